"""What rewards share: images as 8-bit pictures and as PNG, and records with missing values."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from unigrpo.rewards.shapes import Images
from unigrpo.types import Reward

Picture = npt.NDArray[np.uint8]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
Values = Mapping[str, npt.ArrayLike]


def finite_rows(images: Images) -> npt.NDArray[np.bool_]:
    """(B,) True where every value of an image is finite."""
    return np.asarray(np.isfinite(images.reshape(len(images), -1)).all(axis=1))


def to_pictures(images: Images) -> list[Picture]:
    """Finite images (B, H, W, 3) in [0, 1] -> B pictures (H, W, 3) of 8 bits, rounded to nearest.

    Rounded as the shapes world's verifier does, and so that a picture that became floats again (value / 255) is the same
    picture: what a reward server sees is what the reward would have seen here.
    """
    return list(np.rint(np.clip(images, 0, 1).astype(np.float32) * np.float32(255)).astype(np.uint8))


def score_pictures(images: Images, score: Callable[[list[Picture], list[int]], Values]) -> list[Reward]:
    """Records of a scorer of pictures; images that are not finite never reach it and have no reward (NaN).

    Args:
        images: (B, H, W, 3) float32 in [0, 1].
        score: (pictures, their rows in the batch) -> name -> one value per picture, NaN where it has none.
    Returns: one record (B,) per name, at the end of the trajectory.
    Raises: ValueError if the scorer returns another number of values.
    """
    rows = [int(row) for row in np.flatnonzero(finite_rows(images))]
    scored = score(to_pictures(images[rows]), rows)
    return [Reward(name=name, value=spread(values, rows, len(images), name)) for name, values in scored.items()]


def spread(values: npt.ArrayLike, rows: Sequence[int], size: int, name: str) -> torch.Tensor:
    """Values of some rows -> (size,) float32, NaN in the others. Raises ValueError if their numbers differ."""
    given = np.asarray(values, dtype=np.float32)
    if given.shape != (len(rows),):
        raise ValueError(f"reward {name} must give one number per image, ({len(rows)},), got {given.shape}")
    out = np.full(size, np.nan, dtype=np.float32)
    out[list(rows)] = given
    return torch.from_numpy(out)


def encode_png(picture: Picture) -> bytes:
    """A picture as PNG, the same bytes for the same picture."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes, *, max_pixels: int) -> Picture:
    """PNG -> (H, W, 3) uint8; nothing is decoded before its header's size is known to be allowed.

    Raises: ValueError if it is no PNG, is cut off or has more than max_pixels pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR" or len(data) < 24:
        raise ValueError(f"a complete PNG wanted, got {len(data)} bytes that are none")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if width * height > max_pixels:
        raise ValueError(f"an image of at most {max_pixels} pixels wanted, got {width} x {height}")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8).copy()
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"a complete PNG wanted, got {len(data)} bytes that cannot be decoded") from error


def read_picture(path: Path) -> Picture:
    """An image file -> (H, W, 3) uint8. Raises ValueError naming the file if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8).copy()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: a complete image wanted ({type(error).__name__})") from error
