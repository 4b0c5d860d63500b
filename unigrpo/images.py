"""Image inputs: the sizes that BAGEL's encoders take, and pixels as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unigrpo.models.configuration import MoTConfig

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 14 * 14 * 9 * 1024  # BAGEL's bound on the area of an input


@dataclass(frozen=True)
class SizeRule:
    """Sides of an image input, in pixels: longest side at most, shortest at least, both multiples of the stride.

    Source: image transforms of BAGEL (ByteDance-Seed/Bagel): (1024, 512, 16) for the autoencoder, (980, 224, 14) for the
    vision tower. Other models take the same shares of their own position tables.
    """

    longest: int
    shortest: int
    stride: int

    @classmethod
    def autoencoder(cls, config: MoTConfig) -> SizeRule:
        """Of the clean latents of an edit."""
        stride = config.latent_patch_size * config.latent_downsample
        return cls(stride * config.max_latent_size, stride * config.max_latent_size // 2, stride)

    @classmethod
    def vision(cls, config: MoTConfig) -> SizeRule:
        """Of what the vision tower sees. Raises ValueError if the model has none."""
        if config.vision is None:
            raise ValueError("this checkpoint reads no images (its config.json has no vision section); leave out the image, or "
                             "take a checkpoint with a vision tower, such as an imported BAGEL-7B-MoT")
        stride = config.vision["patch_size"]
        return cls(stride * config.vit_max_patches, stride * max(1, config.vit_max_patches * 16 // 70), stride)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) -> the size to resize to, aspect kept but for rounding.

        The bound on the area multiplies each side by the ratio of areas, as the released code does, so it shrinks more than
        it must; the bound on the longest side comes last and always holds.
        """
        scale = max(min(self.longest / max(width, height), 1.0), self.shortest / min(width, height))
        width, height = self._scaled(width, height, scale)
        if width * height > MAX_PIXELS:
            width, height = self._scaled(width, height, MAX_PIXELS / (width * height))
        if max(width, height) > self.longest:
            width, height = self._scaled(width, height, self.longest / max(width, height))
        return width, height

    def resize(self, image: Image) -> Image:
        """Bicubic, antialiased; an image that fits already keeps its pixels."""
        from PIL import Image as pil

        size = self.size(*image.size)
        return image if size == image.size else image.resize(size, pil.Resampling.BICUBIC)

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        """Both sides scaled, rounded to the stride and at least one stride long."""
        first, second = (max(self.stride, round(round(side * scale) / self.stride) * self.stride) for side in (width, height))
        return first, second


def rgb(image: Image) -> Image:
    """Any image as RGB, transparent parts on white."""
    from PIL import Image as pil

    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = pil.new("RGBA", layer.size, (255, 255, 255, 255))
        return pil.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def to_pixels(image: Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1.0


def to_image(pixels: np.ndarray) -> Image:
    """(H, W, 3) in [0, 1] -> image; truncated to 8 bits as BAGEL does."""
    from PIL import Image as pil

    return pil.fromarray((pixels * 255).astype(np.uint8))
