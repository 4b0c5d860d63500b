"""GenEval's colour question as pure functions: what is shown to CLIP, what it is asked, and how its answer is read.

    object --crop_object--> picture --CLIP--> image embedding --+
    class  --color_prompts--> 10 x 3 texts --CLIP--> embeddings --color_weights--> color_logits --> one of COLORS

The rules are those of `evaluation/evaluate_images.py` in djghosh13/geneval at af4902f (MIT) with clip-benchmark's zero-shot
classifier, proven equal on golden cases.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from unigrpo.evaluation.geneval import COLORS, Box

BACKGROUND = "#999"  # the option `bgcolor`: what covers everything but the object; "original" keeps the picture
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
LOGIT_SCALE = 100.0


def color_prompts(label: str) -> list[list[str]]:
    """The texts of a class: (10 colours) x (3 templates), articles as they are ("a photo of a orange couch")."""
    return [[template.format(color=color, label=label) for template in TEMPLATES] for color in COLORS]


def crop_object(image: np.ndarray, box: Box, mask: np.ndarray | None, *, background: str = BACKGROUND,
                crop: bool = True) -> np.ndarray:
    """One object as the colour model sees it: on a plain background, cut to its box.

    Args:
        image: (H, W, 3) uint8 RGB.
        box: x1, y1, x2, y2 in pixels; corners are rounded half to even, as Pillow does. What lies outside the image is black.
        mask: (H, W) bool or 0 / 1, the object's pixels; None leaves the picture around it.
        background: a colour in Pillow's notation, or "original" for none (the official option `bgcolor`).
        crop: False keeps the whole picture (the official option `crop=0`).
    Returns: (h, w, 3) uint8 RGB.
    Raises: ValueError if mask and image differ in size, or if nothing is left of the box.
    """
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    if mask is not None and background != "original":
        if mask.shape != image.shape[:2]:
            raise ValueError(f"an object's mask must have its image's height and width, {image.shape[:2]}, got {mask.shape}")
        shown = Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255)
        picture = Image.composite(picture, Image.new("RGB", picture.size, color=background), shown)
    if crop:
        left, top, right, bottom = (round(float(value)) for value in box)
        if right <= left or bottom <= top:
            raise ValueError(f"an object's box must hold at least one pixel after rounding, got {tuple(box)}")
        picture = picture.crop((left, top, right, bottom))
    return np.asarray(picture)


def color_weights(embeddings: np.ndarray) -> np.ndarray:
    """Text embeddings of one class to one unit vector per colour.

        w_c = u(mean over templates of u(e_ct)),   u(x) = x / |x|

    Args:
        embeddings: (10, 3, D) of `color_prompts`, any length.
    Returns: (10, D) float32.
    """
    return _unit(_unit(np.asarray(embeddings, dtype=np.float32)).mean(axis=1))


def color_logits(weights: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """100 times the cosine of each picture with each colour.

    Args:
        weights: (10, D) of `color_weights`. embeddings: (N, D) of the pictures, any length.
    Returns: (N, 10) float32.
    """
    return LOGIT_SCALE * _unit(np.asarray(embeddings, dtype=np.float32)) @ weights.T


def color_names(logits: np.ndarray) -> list[str]:
    """The likeliest colour of each row.

    Raises: ValueError if a logit is not finite, as the argmax over NaN names some colour too.
    """
    if not np.isfinite(logits).all():
        raise ValueError(f"colour logits must be finite, and {int((~np.isfinite(logits)).sum())} of {logits.size} are not: "
                         "the colour model is broken on this device")
    return [COLORS[index] for index in np.argmax(logits, axis=-1)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one along the last axis."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
