"""The shapes world's exact verifier as a detector that tells colours too: GenEval's whole path without any model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unigrpo.digests import PACKAGE, sha256_path
from unigrpo.evaluation.backends import Detected
from unigrpo.worlds.shapes.detect import detect
from unigrpo.worlds.shapes.scene import IMAGE_SIZE, SHAPES


class ShapesDetector:
    """Finds the shapes of rendered scenes; `identity` is the digest of the world's modules."""

    name = "shapes"
    labels = SHAPES

    def __init__(self) -> None:
        self.identity = f"{self.name} {sha256_path(PACKAGE / 'worlds' / 'shapes')}"

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        """Per image its shapes by falling score; what the verifier calls unknown is none.

        Raises: ValueError for pictures that are not 32 x 32.
        """
        wrong = [image.shape for image in images if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3)]
        if wrong:
            raise ValueError(f"the shapes detector reads pictures of {IMAGE_SIZE} x {IMAGE_SIZE} px, got {wrong[0]}; "
                             "for others give a detector's folder")
        if not images:
            return []
        return [sorted((Detected(item.label, item.box, item.score, item.color) for item in found if item.label in SHAPES),
                       key=lambda item: -item.score) for found in detect(np.stack(images).astype(np.float32) / 255)]
