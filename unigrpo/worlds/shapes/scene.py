"""What a picture of the shapes world contains: objects on a 3x3 grid, before any pixel is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
PLURALS: dict[str, str] = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses",
                           "shape": "shapes"}
PALETTE: dict[str, tuple[float, float, float]] = {  # RGB in [0, 1]; any two are at least 0.4 apart, see tests
    "red": (0.86, 0.06, 0.12),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.08, 0.28, 0.88),
    "yellow": (0.98, 0.90, 0.08),
    "purple": (0.55, 0.10, 0.62),
    "orange": (1.00, 0.50, 0.04),
}
COLORS: tuple[str, ...] = tuple(PALETTE)
BACKGROUND: tuple[float, float, float] = (0.92, 0.92, 0.92)
IMAGE_SIZE = 32  # pixels, square
CELLS: tuple[str, ...] = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CELL_CENTERS: tuple[float, ...] = (5.0, 16.0, 27.0)  # pixel edges, of the three columns and of the three rows
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
OPPOSITES: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MAX_OBJECTS = 4


@dataclass(frozen=True)
class Object:
    """One solid shape.

    Args:
        color: one of COLORS.
        shape: one of SHAPES.
        cell: one of CELLS; no two objects of a scene share one.
    """

    color: str
    shape: str
    cell: str


Scene = tuple[Object, ...]


def offset(subject: str, target: str) -> tuple[int, int]:
    """(columns, rows) from the target's cell to the subject's; positive is right and down."""
    a, b = CELLS.index(subject), CELLS.index(target)
    return a % 3 - b % 3, a // 3 - b // 3


def relation_holds(relation: str, subject: str, target: str, *, strict: bool = False) -> bool:
    """Whether the subject's cell lies on that side of the target's.

    The offset along the relation's axis must be at least the one across it, which is GenEval's rule (cosine above 0.5) at
    the nominal cell centres. strict=True wants it larger, so that no jitter of the drawing can turn it: what a solution
    is drawn from.
    """
    columns, rows = offset(subject, target)
    along, across = {"left of": (-columns, rows), "right of": (columns, rows),
                     "above": (-rows, columns), "below": (rows, columns)}[relation]
    return along > abs(across) if strict else along >= max(abs(across), 1)


def random_scene(rng: np.random.Generator, max_objects: int = MAX_OBJECTS) -> Scene:
    """A scene for pretraining: one to four objects, more than prompts ask for, sometimes several alike.

    A picture of one object says nothing about which colour, shape and cell belong together; pictures of several do.
    """
    weights = np.array([0.15, 0.40, 0.32, 0.13])[:max_objects]
    count = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
    cells = [CELLS[int(i)] for i in rng.permutation(len(CELLS))[:count]]
    shapes = [SHAPES[int(i)] for i in rng.integers(len(SHAPES), size=count)]
    colors = [COLORS[int(i)] for i in rng.integers(len(COLORS), size=count)]
    if count > 1 and rng.random() < 0.3:  # counting prompts: a group of one shape, half of the time in one colour
        size = int(rng.integers(2, count + 1))
        shapes[:size] = [shapes[0]] * size
        if rng.random() < 0.5:
            colors[:size] = [colors[0]] * size
    return tuple(Object(*item) for item in zip(colors, shapes, cells, strict=True))
