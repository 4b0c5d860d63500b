"""Image files as the scorers read them: 8-bit RGB or a clear error, never a black picture in place of a broken one."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64 * 1024 * 1024  # 8192 x 8192; a larger one is a mistake or a decompression bomb
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
PNG_END = b"IEND\xaeB`\x82"  # the last chunk; without it a PNG was cut off, even where all pixels can be decoded


def digest(path: Path) -> str:
    """sha256 of the file's bytes, 64 hex digits: what a cached score is keyed by."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def decode_image(data: bytes, path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file's bytes as (H, W, 3) uint8 RGB; transparency is dropped, EXIF orientation applied, as officially.

    Args:
        data: the file's bytes. path: where they are from, for the errors.
        max_pixels: a larger image is refused before it is decoded.
    Raises: ValueError naming the file and what is wrong with it: empty, no image, cut off, too large, not 8 bits a channel.
    """
    size = check_image(data, path, max_pixels=max_pixels)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: a {size[0]} x {size[1]} image that cannot be decoded ({error}); "
                         "make it again") from error
    return array


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB. Raises ValueError as `decode_image` does."""
    return decode_image(read_bytes(path), Path(path), max_pixels=max_pixels)


def read_checked(path: Path, sha256: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image whose file was checked before and had this sha256, so that no score is kept for other bytes than were scored.

    Raises: ValueError as `decode_image` does, and if the file is another one by now.
    """
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} changed while it was being scored; start again when nothing writes to the folder")
    return decode_image(data, path, max_pixels=max_pixels)


def check_image(data: bytes, path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Check a file's header and end without decoding its pixels.

    Returns: width and height in pixels, as stored.
    Raises: ValueError naming the file and what is wrong with it.
    """
    if not data:
        raise ValueError(f"{path} is empty (0 bytes): wanted an image; make it again")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height, mode, kind = image.width, image.height, image.mode, image.format
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image: its {len(data)} bytes begin with {data[:8]!r}; wanted a PNG") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: wanted at most {max_pixels} pixels ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; make it again") from error
    if width * height > max_pixels:
        raise ValueError(f"{path} is too large: wanted at most {max_pixels} pixels, got {width} x {height}")
    if mode not in EIGHT_BIT:
        raise ValueError(f"{path} must have 8 bits a channel, got mode {mode}; save it as 8-bit RGB")
    if kind == "PNG" and PNG_END not in data[-1024:]:
        raise ValueError(f"{path} is truncated: a PNG of {len(data)} bytes without its end; make it again")
    return width, height


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises ValueError if it is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); wanted an image file") from error
