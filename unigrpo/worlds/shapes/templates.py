"""What the verifier compares a component with: each shape at sub-pixel places and sizes, and how it changes between them."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

from unigrpo.worlds.shapes.render import RADIUS, coverage
from unigrpo.worlds.shapes.scene import SHAPES

HALF = 6  # px; windows are 13x13
LEVELS = 128.0  # alpha is rounded to 1/128
OFFSETS = (-0.6, -0.3, 0.0, 0.3, 0.6)  # px
SCALES = (0.92, 1.0, 1.08)
MAX_CHANGE = (0.35, 0.35, 0.06, 1.5)  # forgiven: x, y (px), relative size, blur (1 is a standard deviation of 0.5 px)
MIN_BLUR = -0.3
_UNIT = 2.0 ** 20  # the fit's integers


def _draw(x: float = 0.0, y: float = 0.0, size: float = 0.0, stretch: float = 0.0, slant: float = 0.0) -> np.ndarray:
    """(4 * K, 13, 13) all templates, each changed alike; stretch and slant in px at the outline."""
    grid = np.arange(-HALF, HALF + 1, dtype=np.float64)
    combos = [(s, scale, dx, dy) for s in range(len(SHAPES)) for scale in SCALES for dx in OFFSETS for dy in OFFSETS]
    s, scale, dx, dy = (np.array(column)[:, None, None] for column in zip(*combos, strict=True))
    shape_y = np.where(s == SHAPES.index("triangle"), 1.4 * scale, 0.0)  # the centroid lies a sixth of its height lower
    full = (len(combos), len(grid), len(grid))
    u = np.broadcast_to(grid[None, None, :] - dx - x, full)
    v = np.broadcast_to(grid[None, :, None] - dy - y, full)
    u, v = (u * (1 - stretch / RADIUS) + v * slant / RADIUS, v * (1 + stretch / RADIUS) + u * slant / RADIUS)
    return LEVELS * coverage(s, u, v + shape_y, scale + size)


@cache
def templates() -> tuple[np.ndarray, np.ndarray]:
    """(4 * K, 169) integer templates, K per shape (sizes x offsets), centred on their centroids; (4 * K,) their energies."""
    flat = np.rint(_draw()).reshape(-1, (2 * HALF + 1) ** 2)
    return flat.astype(np.float32), (flat ** 2).sum(1)


@cache
def nominal_mass() -> np.ndarray:
    """(4,) sum of each shape's template of size 1."""
    grouped = templates()[0].reshape(len(SHAPES), len(SCALES), -1, (2 * HALF + 1) ** 2)
    return grouped[:, SCALES.index(1.0)].sum(2).mean(1).astype(np.float64)


@cache
def _changes() -> tuple[np.ndarray, np.ndarray]:
    """How templates change, to first order.

    Returns: (4 * K, 4, 169) derivatives by x, y (px), relative size and blur; (4 * K, 7, 169) integers, the pseudo-inverse
        of the template, these four, stretch and slant (px at the outline), times 2^20.
    """
    steps = (("x", 0.15), ("y", 0.15), ("size", 0.04), ("stretch", 0.15), ("slant", 0.15))
    changes = [(_draw(**{name: h}) - _draw(**{name: -h})) / (2 * h) for name, h in steps]
    nominal = _draw()
    changes.insert(3, ndimage.gaussian_filter(nominal, (0, 0.5, 0.5), mode="constant") - nominal)
    basis = np.stack([nominal, *changes], axis=1).reshape(len(nominal), 7, -1)
    return basis[:, 1:5], np.rint(np.linalg.pinv(basis).transpose(0, 2, 1) * _UNIT)


def refine(alpha: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest templates, moved, resized and blurred by the little that fits the windows better.

    What a clean drawing differs by from the templates' grid is fitted, so that what remains is noise or a defect; how far
    the outline is drawn out along or across the axes is measured and not fitted, because that is how two shapes look that
    lie almost on top of each other.

    Args:
        alpha: (M, 169) integers, LEVELS is full colour.
        best: (M,) int, the nearest template.
    Returns: (M, 169) float32 integer templates; (M,) float64 px, how far the outline is drawn out, stretch and slant
        together; (M,) float64 relative size.
    """
    derivatives, inverse = _changes()
    fit = np.einsum("mkp,mp->mk", inverse[best], alpha.astype(np.float64)) / _UNIT  # integers below 2^53: exact
    fit = fit[:, 1:] / np.maximum(fit[:, :1], 0.1)
    low = (-MAX_CHANGE[0], -MAX_CHANGE[1], -MAX_CHANGE[2], MIN_BLUR)
    step = np.clip(fit[:, :4], low, MAX_CHANGE)
    refined = templates()[0][best].astype(np.float64)
    for k in range(4):  # term by term, in one order
        refined = refined + step[:, k, None] * derivatives[best, k]
    scale = np.array(SCALES)[best // len(OFFSETS) ** 2 % len(SCALES)]
    return np.rint(refined).astype(np.float32), np.sqrt(fit[:, 4] ** 2 + fit[:, 5] ** 2), scale + step[:, 2]
