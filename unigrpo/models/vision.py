"""Reading images: the SigLIP NaViT tower and the connector to the decoder, under BAGEL's official keys.

Differences from the SigLIP of transformers, whose layers are used as they are: patches enter through a linear layer (no
fixed image size), the learned position table is indexed by row and column, and no pooling head follows.
Source: SigLIP arXiv 2303.15343, NaViT arXiv 2307.06304, BAGEL arXiv 2505.14683.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from unigrpo.models.embeddings import grid_places, patchify


class VisionEmbeddings(nn.Module):
    """Linear patch embedding and learned positions."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(vision["num_channels"] * vision["patch_size"] ** 2, vision["hidden_size"])
        self.position_embedding = nn.Embedding((vision["image_size"] // vision["patch_size"]) ** 2, vision["hidden_size"])


class VisionEncoder(nn.Module):
    """The layers, named as in the official state dict."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        config = SiglipVisionConfig(**vision | {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0,
                                                "attn_implementation": "sdpa"})
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(vision["num_hidden_layers"]))


class VisionTransformer(nn.Module):
    """Embeddings, layers and the norm behind the last layer that is built."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(vision)
        self.encoder = VisionEncoder(vision)
        self.post_layernorm = nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"])

    def forward(self, patches: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """Patches to features, (B, N, width).

        Args:
            patches: (B, N, patch * patch * channels), padded. places: (B, N) rows of the learned position table.
            mask: (B, 1, 1, N) bool, True on real patches; None without padding.
        """
        x = self.embeddings.patch_embedding(patches) + self.embeddings.position_embedding(places)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        return self.post_layernorm(x)


class VisionTower(nn.Module):
    """SigLIP over images of any sizes: full attention inside an image, none across, one forward for all.

    Args:
        vision: the settings of MoTConfig.vision.
    """

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.patch_size, self.channels = vision["patch_size"], vision["num_channels"]
        self.vision_model = VisionTransformer(vision)

    def forward(self, pixels: Sequence[Tensor], *, side: int) -> tuple[list[Tensor], list[Tensor]]:
        """Features of every patch, and the patches' rows in a position table of `side` x `side`.

        Args:
            pixels: one image or more, (channels, H, W) in [-1, 1]; sides are multiples of the patch size.
        Returns: per image (N, width) features and (N,) int64 places row * side + column.
        Raises: ValueError if an image has other channels, does not divide into patches, or has more of them in a row or
            column than the tables.
        """
        embeddings = self.vision_model.embeddings
        weight, known = embeddings.patch_embedding.weight, embeddings.position_embedding.num_embeddings
        size, places = self.patch_size, []
        for image in pixels:
            if image.ndim != 3 or image.shape[0] != self.channels or image.shape[1] % size or image.shape[2] % size:
                raise ValueError(f"an image input must be ({self.channels}, H, W) with sides that are multiples of "
                                 f"model.vision.patch_size={size}, got {tuple(image.shape)}")
            rows, columns = image.shape[1] // size, image.shape[2] // size
            places.append(grid_places((rows, columns), side, key="model.vit_max_patches", device=weight.device))
            if (rows - 1) * side + columns > known:
                raise ValueError(f"an image input must lie within the learned position table of {known} patches "
                                 f"(model.vision.image_size), got {rows}x{columns}")
        patches = [patchify(image[None].to(weight.device, weight.dtype), size)[0] for image in pixels]
        lengths = torch.tensor([len(p) for p in patches], device=weight.device)
        batch, longest = pad_sequence(patches, batch_first=True), max(len(p) for p in patches)
        mask = None
        if any(len(p) < longest for p in patches):
            mask = (torch.arange(longest, device=weight.device) < lengths[:, None])[:, None, None]
        features = self.vision_model(batch, pad_sequence(places, batch_first=True), mask)
        return [x[:len(p)] for x, p in zip(features, patches, strict=True)], places


class Connector(nn.Module):
    """Two-layer MLP from the tower's width to the decoder's, GELU in its tanh approximation."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
