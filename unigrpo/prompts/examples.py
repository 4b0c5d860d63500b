"""Supervised examples from a folder: a JSONL of prompt, thinking and image.

    {"prompt": "a cat on a mat", "thinking": "One cat, lying on a flat mat.", "image": "images/0001.png"}

`image` is relative to the JSONL's folder; `thinking` may be left out or empty, then the sample draws without thinking.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

KEYS = {"prompt", "thinking", "image"}


@dataclass(frozen=True)
class ImageExample:
    """One row: what is asked, how it is thought about ("" for not at all), and the picture's file."""

    prompt: str
    thinking: str
    image: Path


def read_examples(path: Path) -> list[ImageExample]:
    """All rows of a JSONL.

    Raises: ValueError naming the file, and row, key and reason of every bad row (the first ten of them).
    """
    if not path.is_file():
        raise ValueError(f"sft.data must be a JSONL of prompt, thinking and image, and {path} is missing")
    examples, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"row {number} is not JSON: {error}")
            continue
        if (problem := bad_row(row, path.parent)) is not None:
            problems.append(f"row {number}: {problem}")
            continue
        examples.append(ImageExample(row["prompt"], row.get("thinking") or "", path.parent / row["image"]))
    if problems:
        raise ValueError(f"{path} has {len(problems)} bad rows:\n- " + "\n- ".join(problems[:10]))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def bad_row(row: object, folder: Path) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"wanted an object with prompt, thinking and image, got {type(row).__name__}"
    if unknown := sorted(row.keys() - KEYS):
        return f"unknown keys {unknown}; the keys are {sorted(KEYS)}"
    for key in ("prompt", "image"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            return f"{key} must be a text that is not empty, got {row.get(key)!r}"
    if not isinstance(row.get("thinking") or "", str):
        return f"thinking must be a text, got {row['thinking']!r}"
    if not (folder / row["image"]).is_file():
        return f"image {row['image']} is not in {folder}"
    return None


def load_images(examples: Sequence[ImageExample], size: tuple[int, int]) -> np.ndarray:
    """Pictures as the model draws them: cut to the wanted aspect round the middle, then resized (bicubic).

    Args:
        size: (height, width), pixels.
    Returns: (B, H, W, 3) float32 in [0, 1].
    Raises: ValueError naming a file that is no picture.
    """
    return np.stack([load_image(example.image, size) for example in examples])


def load_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """One picture; see `load_images`."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a picture that Pillow reads: {error}") from error
    height, width = size
    scale = min(picture.height / height, picture.width / width)
    cut = (width * scale, height * scale)
    left, top = (picture.width - cut[0]) / 2, (picture.height - cut[1]) / 2
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + cut[0], top + cut[1]))
    return np.asarray(picture, dtype=np.float32) / 255
