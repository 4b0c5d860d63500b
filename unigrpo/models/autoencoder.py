"""The FLUX.1 autoencoder that BAGEL draws with: diffusers' AutoencoderKL, with its latents scaled and shifted.

Official files name the same 244 tensors in the layout of the latent-diffusion code; `to_diffusers` and `to_official`
translate, both ways without a change in a byte. One difference in value remains: diffusers clamps the posterior's
log-variance to [-30, 20], the official code does not, which matters for a sampled posterior beyond that range only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FLUX: dict[str, Any] = {
    "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' names


class Autoencoder(nn.Module):
    """Pixels to latents and back. Frozen: BAGEL never trains it.

    Args:
        config: what differs from FLUX.1's settings (the keys of FLUX). Sides shrink by 2 per entry of
            block_out_channels after the first.
    Raises: ValueError naming unknown keys.
    """

    vae: Any  # diffusers.AutoencoderKL, which is imported on demand only

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from diffusers import AutoencoderKL  # here: scales that draw pixels never pay for it

        unknown = sorted(set(config or {}) - FLUX.keys())
        if unknown:
            raise ValueError(f"an autoencoder's settings are {', '.join(FLUX)}; unknown: {unknown}")
        self.config: dict[str, Any] = FLUX | dict(config or {})
        levels = len(self.config["block_out_channels"])
        self.vae = AutoencoderKL(
            **self.config, in_channels=3, out_channels=3, use_quant_conv=False, use_post_quant_conv=False,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
        self.requires_grad_(False).eval()

    @property
    def downsample(self) -> int:
        """Pixels per side of a latent cell."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def encode(self, pixels: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Latents of images: scaling_factor * (z - shift_factor).

        Args:
            pixels: (B, 3, H, W) in [-1, 1], sides multiples of `downsample`.
            noise: (B, C, h, w) standard normal. Then z = mean + std * noise, the posterior's sample, as BAGEL encodes;
                without, z is the posterior's mean.
        Returns: (B, C, h, w) float32.
        Raises: ValueError if the sides do not divide.
        """
        if pixels.shape[-2] % self.downsample or pixels.shape[-1] % self.downsample:
            raise ValueError(f"an image's sides must be multiples of {self.downsample} pixels for this autoencoder, "
                             f"got {pixels.shape[-2]}x{pixels.shape[-1]}")
        posterior = self.vae.encode(self._like_weights(pixels)).latent_dist
        z = posterior.mean.float()
        if noise is not None:
            z = z + posterior.std.float() * noise.to(z.device)
        return self.config["scaling_factor"] * (z - self.config["shift_factor"])

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) scaled and shifted latents -> (B, 3, H, W) float32, about [-1, 1] and not clamped."""
        z = latents / self.config["scaling_factor"] + self.config["shift_factor"]
        return self.vae.decode(self._like_weights(z)).sample.float()

    def _like_weights(self, x: Tensor) -> Tensor:
        return x.to(self.vae.device, self.vae.dtype)

    def save(self, folder: Path) -> None:
        """Write config.json and the weights as diffusers names them: `AutoencoderKL.from_pretrained` reads the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.vae.save_config(folder)
        save_file({k: v.contiguous() for k, v in self.vae.state_dict().items()}, folder / WEIGHTS_FILE,
                  metadata={"format": "pt"})

    @classmethod
    def from_folder(cls, folder: Path) -> Autoencoder:
        """Read a folder that `save`, or diffusers for an autoencoder of this kind, has written.

        Raises: ValueError naming what is missing or does not fit.
        """
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"an autoencoder folder must hold {name}, and {folder} does not")
        settings = json.loads((folder / CONFIG_FILE).read_text())
        if settings.get("use_quant_conv", True) or settings.get("use_post_quant_conv", True):
            raise ValueError(f"{folder / CONFIG_FILE} must have use_quant_conv and use_post_quant_conv false, as FLUX.1's "
                             "autoencoder has; other kinds are not supported")
        return cls._with_weights({k: v for k, v in settings.items() if k in FLUX}, load_file(folder / WEIGHTS_FILE))

    @classmethod
    def from_official(cls, tensors: Mapping[str, Tensor], **config: Any) -> Autoencoder:
        """Build from the tensors of an official file (ae.safetensors), whose shapes tell the sizes.

        Args:
            config: settings that shapes do not tell, where they differ from FLUX.1's (norm_num_groups, factors).
        Raises: ValueError naming missing, extra and misshapen tensors.
        """
        levels, blocks = _sizes(tensors, r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
        sizes = {"block_out_channels": tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0]
                                             for i in range(levels)),
                 "layers_per_block": blocks, "latent_channels": tensors["decoder.conv_in.weight"].shape[1]}
        return cls._with_weights(sizes | config, to_diffusers(tensors))

    @classmethod
    def _with_weights(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Autoencoder:
        """Built on the meta device, so that memory holds the tensors once."""
        with torch.device("meta"):
            model = cls(config)
        wanted = {name: tuple(value.shape) for name, value in model.vae.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if wanted != found:
            problems = [f"tensor {name} must have shape {wanted.get(name, 'none (extra)')}, got "
                        f"{found.get(name, 'none (missing)')}" for name in sorted(wanted.keys() | found.keys())
                        if wanted.get(name) != found.get(name)]
            raise ValueError("the autoencoder's tensors do not fit its settings:\n- " + "\n- ".join(problems[:10]))
        model.vae.load_state_dict(tensors, assign=True)
        return model.requires_grad_(False)


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under diffusers' names; the attention's 1 x 1 convolutions become matrices, as views.

    Raises: ValueError naming the keys that are not the autoencoder's.
    """
    levels, blocks = _sizes(tensors, r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    out = _renamed(tensors, module_names(levels, blocks))
    return {k: v[:, :, 0, 0] if _is_attention_matrix(k) else v for k, v in out.items()}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_diffusers`, same bytes. Raises: ValueError naming the keys that are not the autoencoder's."""
    levels, blocks = _sizes(tensors, r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    shaped = {k: v[:, :, None, None] if _is_attention_matrix(k) else v for k, v in tensors.items()}
    return _renamed(shaped, {theirs: ours for ours, theirs in module_names(levels, blocks).items()})


def module_names(levels: int, blocks: int) -> dict[str, str]:
    """Official module names and diffusers' for `levels` resolutions with `blocks` residual blocks (the decoder one more).

    The decoder's levels count from the other end: official up.0 is the finest, diffusers' up_blocks.0 the coarsest.
    """
    out = {}

    def block(ours: str, theirs: str) -> None:
        out.update({f"{ours}.{part}": f"{theirs}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")})
        out[f"{ours}.nin_shortcut"] = f"{theirs}.conv_shortcut"

    for side in ("encoder", "decoder"):
        out.update({f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out",
                    f"{side}.norm_out": f"{side}.conv_norm_out"})
        block(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        block(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        for ours, theirs in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            out[f"{side}.mid.attn_1.{ours}"] = f"{side}.mid_block.attentions.0.{theirs}"
    for i in range(levels):
        up = levels - 1 - i
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", f"decoder.up_blocks.{up}.resnets.{j}")
        out[f"encoder.down.{i}.downsample.conv"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        out[f"decoder.up.{i}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return out


def _sizes(names: Mapping[str, Tensor], pattern: str) -> tuple[int, int]:
    """Levels and residual blocks per level, from the numbers in the encoder's names."""
    found = [(int(m[1]), int(m[2])) for name in names if (m := re.fullmatch(pattern, name))]
    if not found:
        raise ValueError(f"these are not an autoencoder's tensors: no name like {pattern!r} among {len(names)}")
    return 1 + max(i for i, _ in found), 1 + max(j for _, j in found)


def _renamed(tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    unknown = [name for name in tensors if name.rpartition(".")[0] not in modules]
    if unknown:
        raise ValueError(f"not tensors of the autoencoder: {', '.join(sorted(unknown)[:10])}")
    return {f"{modules[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in tensors.items()}


def _is_attention_matrix(name: str) -> bool:
    return re.search(r"\.attentions\.0\.to_.*weight$", name) is not None
