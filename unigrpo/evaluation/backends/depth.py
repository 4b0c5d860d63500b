"""Relative depth by DPT (MiDaS) of transformers, as T2I-CompBench's 3D score reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from unigrpo.evaluation.backends.weights import (
    check_complete,
    check_device,
    exact_float32,
    model_folder,
    weights_sha256,
)

DEFAULT = "Intel/dpt-hybrid-midas"
SIZE = 480    # px of either side; the aspect is not kept
LEVELS = 255  # officially depth maps pass through 8-bit images
HALF = (0.5, 0.5, 0.5)  # mean and deviation of MiDaS's hybrid, RGB in [0, 1]


class DptDepth:
    """Depth by a DPT: a `DepthEstimator`.

    Args:
        model: transformers' DPTForDepthEstimation. digest: sha256 of the weights.
        mean, std: of the pictures it was trained on, RGB in [0, 1].
        size: px of either side; the benchmark's 480, another one shows in the name.
        batch: pictures that go through the model together.
    Raises: ValueError if patches do not divide the size.
    """

    def __init__(self, model: Any, digest: str, *, device: str = "cpu", size: int = SIZE, batch: int = 8,
                 mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> None:
        patch = int(model.config.patch_size)
        if size % (2 * patch) or size < 2 * patch:
            raise ValueError(f"DPT's input size must be a multiple of twice its patches of {patch} px, got {size}")
        self.model, self.device, self.size, self.batch = model.to(check_device(device)).eval(), device, size, batch
        if model.config.is_hybrid:
            # The positions are interpolated to any size; only a check knows the one that the model was trained at.
            self.model.dpt.embeddings.image_size = (size, size)
        self.mean, self.std = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
        self.name = "dpt_hf" if size == SIZE else f"dpt_hf_{size}px"
        self.identity = f"{self.name} {digest} mean {list(mean)} std {list(std)}"

    @classmethod
    def load(cls, name: str | Path = DEFAULT, *, device: str = "cpu", size: int = SIZE, batch: int = 8) -> DptDepth:
        """From a folder or a name on the hub, with mean and std of its preprocessor_config.json.

        Raises: ValueError for what is no DPT.
        """
        from transformers import DPTForDepthEstimation

        folder = model_folder(name)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if settings.get("model_type") != "dpt":
            raise ValueError(f"a DPT was wanted, and {folder} holds a model of the type {settings.get('model_type')!r}")
        loaded: Any = DPTForDepthEstimation.from_pretrained(folder, use_safetensors=True, dtype=torch.float32,
                                                            output_loading_info=True)
        model, info = loaded
        check_complete(model, info, folder)
        file = folder / "preprocessor_config.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return cls(model, weights_sha256(folder), device=device, size=size, batch=batch,
                   mean=known.get("image_mean") or HALF, std=known.get("image_std") or HALF)

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Depth, larger is nearer, from 0 to 1 within each image, in 256 levels.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.
        Returns: (H, W) float32 each; all 0 where an image has one depth everywhere.
        Raises: ValueError if a depth is not finite.
        """
        results: list[np.ndarray] = []
        for start in range(0, len(images), self.batch):
            rows = images[start:start + self.batch]
            depths = self._depths(rows)
            if not bool(torch.isfinite(depths).all()):
                raise ValueError(f"DPT's depths must be finite, and they are not: it is broken on {self.device}")
            results += [_levels(depth, image.shape[:2]) for depth, image in zip(depths, rows, strict=True)]
        return results

    @torch.inference_mode()
    def _depths(self, images: Sequence[np.ndarray]) -> Tensor:
        """(B, size, size) inverse depths of any scale."""
        pictures = [Image.fromarray(np.ascontiguousarray(image)).resize((self.size, self.size), Image.Resampling.BICUBIC)
                    for image in images]
        pixels = np.stack([(np.asarray(picture, dtype=np.float32) / 255 - self.mean) / self.std for picture in pictures])
        with exact_float32():
            return self.model(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(self.device)).predicted_depth


def _levels(depth: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """One image's depth at its own size, from 0 to 1, in 8 bits."""
    full = interpolate(depth[None, None].float(), size=shape, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
    low, high = full.min(), full.max()
    if not high > low:
        return np.zeros(shape, dtype=np.float32)
    return (np.round((full - low) / (high - low) * LEVELS) / LEVELS).astype(np.float32)
