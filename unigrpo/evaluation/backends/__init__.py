"""What the benchmarks' rules ask of a model: five interfaces on numpy arrays, one module for each kind of model.

Images are (H, W, 3) uint8 RGB of any size; batches are lists. A `name` carries into the score's name, so that a number made
with another model than the official one says so. Backends also have an `identity`, the name with the sha256 of the weights
and the options that move a number: caches and canaries are keyed by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Detected:
    """One detected object; fits `geneval.Detection`.

    Args:
        label: a name of the detector's `labels`.
        box: x1, y1, x2, y2 in pixels of the image that was given; the right and bottom edge exclusive.
        score: confidence in [0, 1].
        color: where a detector tells colours itself; None where a ColorClassifier does.
        mask: (H, W) bool at the image's resolution, where the detector segments.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


class Detector(Protocol):
    """Finds objects of known classes."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        """Per image its detections by falling score."""


class ColorClassifier(Protocol):
    """Names the colours of detected objects."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    def __call__(self, image: np.ndarray, detections: Sequence[Detected], label: str) -> list[str]:
        """Per detection one of `geneval.COLORS`; `label` is the objects' class, which prompts may name."""


class Similarity(Protocol):
    """Compares images with texts."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """(B,) float32 cosine of each image with its text."""


class YesProbability(Protocol):
    """Answers yes-or-no questions about images."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    def __call__(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> np.ndarray:
        """(B,) in [0, 1], the probability of yes against no; one question per image."""


class DepthEstimator(Protocol):
    """Estimates relative depth."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Per image (H, W) float32 in [0, 1], larger = nearer, min-max normalised per image."""
