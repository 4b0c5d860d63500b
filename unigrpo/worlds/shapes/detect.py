"""The exact verifier's eyes: pixels to detections, for a whole batch at once.

    8-bit pixels -> colour over background -> connected components -> 13x13 windows -> nearest template and nearest colour,
    the template moved, resized and blurred to fit (templates.py) -> what is left over: noise, or a defect?

A component that is not clearly one of the shapes in one of the colours is reported as "unknown" instead of being overlooked,
because reinforcement learning finds whatever a verifier lets through. Sums run over integers held in floats, which makes
them exact in any order: an image's detections do not depend on the batch it is in, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from unigrpo.worlds.shapes.scene import BACKGROUND, COLORS, IMAGE_SIZE, PALETTE, SHAPES
from unigrpo.worlds.shapes.templates import HALF, LEVELS, nominal_mass, refine, templates

UNKNOWN = "unknown"
SOLID = 0.5  # share of a palette colour from which a pixel belongs to a component
MIN_AREA = 4  # px; smaller specks are left to the search for faint things
MAX_SHAPE_RESIDUAL = 0.10  # share of a window's energy that the nearest template leaves unexplained, in one colour
MAX_RESIDUAL = 0.14  # the same over the three channels: two-coloured or blotchy components exceed it
MAX_OUTLINE = 0.15  # mean of 3x3 px off the refined template, in shares of full colour: something sticks out or is missing
MAX_STRETCH = 0.35  # px by which the outline is drawn out; the shares of both limits add up to at most one
MAX_SIZE = 1.09  # relative; the renderer stays within 1.03, and two shapes that overlap are larger
MAX_TINT = 0.11  # RGB, the same mean in other colours than the shape's own: a sliver of another colour
MAX_TINT_RMS = 0.045  # RGB, root mean square of that over the shape
MIN_STRENGTH = 0.85  # share of the palette colour; a shape at 0.8 is faint
MIN_MASS = 0.76  # relative to a shape of nominal size: a triangle without its base is a triangle again
MIN_MARGIN = 0.02  # by which the next shape must be worse
MAX_COLOR_DISTANCE = 0.20  # RGB distance to the palette; palette colours are at least 0.39 apart
MIN_COLOR_MARGIN = 0.10  # by which the next colour must be further
FAINT = 0.12  # RGB distance of a 5x5 mean from the background that counts as something drawn

_BASE = np.rint(np.array(BACKGROUND) * 255).astype(np.float32)
_AXES = (np.rint(np.array([PALETTE[name] for name in COLORS]) * 255) - _BASE).astype(np.float32)  # (6, 3) integers
_NORMS = np.sqrt((_AXES.astype(np.float64) ** 2).sum(1))  # (6,)


@dataclass(frozen=True)
class Detection:
    """One thing found in an image, as GenEval's rules take it.

    Args:
        label: one of SHAPES, or "unknown".
        color: one of COLORS, or "unknown".
        box: (x0, y0, x1, y1) px, right and bottom exclusive.
        score: 1 is a perfect match; known shapes are above 0.9, so that GenEval's thresholds keep them; 0 for "unknown".
    """

    label: str
    color: str
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class Components:
    """The detections of a batch as arrays, ordered by image.

    Args:
        image: (M,) int, which image of the batch.
        shape, color: (M,) int, index into SHAPES and COLORS, -1 for unknown.
        box: (M, 4) float64 px, exclusive right and bottom.
        score: (M,) float64.
        residual: (M,) float64, what the nearest template leaves unexplained; 1 for faint things.
        size: number of images N.
    """

    image: np.ndarray
    shape: np.ndarray
    color: np.ndarray
    box: np.ndarray
    score: np.ndarray
    residual: np.ndarray
    size: int


_LAST: list[tuple[np.ndarray, Components]] = []  # at most one: images, and what is in them; `forget` empties it


def _dilate(labels: np.ndarray) -> np.ndarray:
    """(N, H, W) largest label among the 3x3 neighbours."""
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
    rows = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return np.maximum(np.maximum(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:])


def _label(deviation: np.ndarray) -> tuple[np.ndarray, int]:
    """Components of solid pixels, 4-connected, never across images, specks removed: (N, H, W) int32 from 1, and how many."""
    flat = deviation.reshape(-1, 3)
    near = np.flatnonzero(np.abs(flat).max(1) > 0.25 * 255)
    along = (flat[near] @ _AXES.T).astype(np.float64) / _NORMS  # (n, 6): integers below 2^24, exact
    best = along.argmax(1)
    solid = np.zeros(len(flat), dtype=bool)
    solid[near] = along[np.arange(len(near)), best] > SOLID * _NORMS[best]
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(solid.reshape(deviation.shape[:3]), structure)
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= MIN_AREA
    keep[0] = False
    renumber = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return renumber[labels], int(keep.sum())


def _faint(deviation: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Things too faint or too small to be components: (images, boxes) with the strongest one of each image that has any."""
    left = np.where((covered == 0)[..., None], deviation, 0.0)
    padded = np.pad(left, ((0, 0), (2, 2), (2, 2), (0, 0)))
    rows, total = np.zeros_like(padded[:, 4:]), np.zeros_like(left)  # total: (N, H, W, 3) sums over 25 px
    for i in range(5):
        rows += padded[:, i : i + IMAGE_SIZE]
    for i in range(5):
        total += rows[:, :, i : i + IMAGE_SIZE]
    strength = np.einsum("nhwc,nhwc->nhw", total, total).reshape(len(total), -1)
    place = strength.argmax(1)
    images = np.flatnonzero(strength[np.arange(len(total)), place] > (25 * 255 * FAINT) ** 2)
    y, x = place[images] // IMAGE_SIZE, place[images] % IMAGE_SIZE
    return images, np.stack([x - 2, y - 2, x + 3, y + 3], axis=1).clip(0, IMAGE_SIZE).astype(np.float64)


def _defects(residual: np.ndarray, template: np.ndarray, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What 3x3 means of the residual show: off the outline, in another colour, and the latter's root mean square.

    Args:
        residual: (M, 169, 3) integers.
        template: (M, 169).
        axis: (M,) index of the palette colour; what lies along it is outline, what lies across it is tint.
    """
    side = 2 * HALF + 1
    square = residual.reshape(len(residual), side, side, 3)
    rows = square[:, :-2] + square[:, 1:-1] + square[:, 2:]
    sums = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]).astype(np.float64)
    own = _AXES[axis].astype(np.float64)[:, None, None]
    along = sums[..., 0] * own[..., 0] + sums[..., 1] * own[..., 1] + sums[..., 2] * own[..., 2]
    along /= _NORMS[axis][:, None, None]
    across = np.rint(np.maximum(sums[..., 0] ** 2 + sums[..., 1] ** 2 + sums[..., 2] ** 2 - along ** 2, 0.0))  # sums exactly
    solid = template.reshape(len(template), side, side)[:, 1:-1, 1:-1] > 0.9 * LEVELS
    mean = (across * solid).sum((1, 2)) / np.maximum(solid.sum((1, 2)), 1)
    flat = (len(residual), (side - 2) ** 2)
    unit = 9.0 * 255.0
    within = template.reshape(len(template), side, side)[:, 1:-1, 1:-1] > 0.5 * LEVELS
    outline = np.where(within, np.abs(along), np.maximum(along, 0.0))  # a bright halo around a shape is no defect
    return (outline.reshape(flat).max(1) / unit, np.sqrt(across.reshape(flat).max(1)) / unit, np.sqrt(mean) / unit)


def detect_arrays(images: np.ndarray) -> Components:
    """All objects of a batch. What was found last is remembered: several rewards, or a verdict's parts, look at one batch.

    Args:
        images: (N, 32, 32, 3) float in [0, 1]; values outside are clipped, as they are when an image is saved.
    Raises: ValueError if the shape differs or a value is not finite.
    """
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"images must be (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {images.shape}")
    if not np.isfinite(images).all():
        raise ValueError(f"images must be finite, got {int((~np.isfinite(images)).sum())} values that are not")
    for seen, found in _LAST:
        if seen.dtype == images.dtype and np.array_equal(seen, images):
            return found
    found = _find(images)
    _LAST[:] = [(images.copy(), found)]
    return found


def forget() -> None:
    """Remember no batch: what is timed must look at it."""
    _LAST.clear()


def _find(images: np.ndarray) -> Components:
    """`detect_arrays` of images that are checked."""
    deviation = np.rint(np.clip(images, 0.0, 1.0).astype(np.float32) * np.float32(255)) - _BASE  # (N, H, W, 3) integers
    labels, count = _label(deviation)
    covered = _dilate(labels)
    faint_images, faint_boxes = _faint(deviation, covered)

    image, y, x = np.nonzero(labels)
    own = labels[image, y, x] - 1
    area = np.bincount(own, minlength=count)
    center_y = np.floor(np.bincount(own, y, count) / area + 0.5).astype(np.int64)
    center_x = np.floor(np.bincount(own, x, count) / area + 0.5).astype(np.int64)
    owner = np.zeros(count, dtype=np.int64)
    owner[own] = image
    box = np.tile([IMAGE_SIZE, IMAGE_SIZE, 0, 0], (count, 1))
    for side, extreme, value in ((0, np.minimum, x), (1, np.minimum, y), (2, np.maximum, x + 1), (3, np.maximum, y + 1)):
        extreme.at(box[:, side], own, value)

    # A component's window: its own pixels and the empty ones that do not lie next to another component.
    span = np.arange(2 * HALF + 1)
    at = (owner[:, None, None], center_y[:, None, None] + span[:, None], center_x[:, None, None] + span)
    pad = ((0, 0), (HALF, HALF), (HALF, HALF))
    mine = np.arange(1, count + 1)[:, None, None]
    window_labels, window_covered = np.pad(labels, pad)[at], np.pad(covered, pad)[at]
    inside = window_labels == mine
    allowed = inside | ((window_labels == 0) & ((window_covered == mine) | (window_covered == 0)))
    window = (np.pad(deviation, (*pad, (0, 0)))[at] * allowed[..., None]).reshape(count, len(span) ** 2, 3)  # (M, 169, 3)

    # The nearest template, in the palette direction nearest to the component's own colour.
    total = np.einsum("mpc,mp->mc", window, inside.reshape(count, len(span) ** 2).astype(np.float32)).astype(np.float64)
    axis = (total @ _AXES.T.astype(np.float64) / _NORMS).argmax(1)
    along = np.einsum("mpc,mc->mp", window, _AXES[axis]).astype(np.float64) / (_NORMS[axis] ** 2)[:, None]
    alpha = np.rint(LEVELS * along.clip(-0.5, 1.5)).astype(np.float32)
    flat, energy = templates()
    energy_window = np.maximum(np.einsum("mp,mp->m", alpha, alpha).astype(np.float64), 1.0)
    product = np.maximum((alpha @ flat.T).astype(np.float64), 0.0)  # (M, 4 K)
    residuals = 1.0 - product ** 2 / (energy_window[:, None] * energy)
    per_shape = residuals.reshape(count, len(SHAPES), len(flat) // len(SHAPES)).min(2)
    ranked = np.sort(per_shape, axis=1)
    shape = per_shape.argmin(1)
    template, stretch, size = refine(alpha, residuals.argmin(1))

    # Its colour by least squares, and what template and colour together leave unexplained.
    weight = np.maximum(np.einsum("mp,mp->m", template, template), 1.0).astype(np.float64)
    color_sum = np.einsum("mpc,mp->mc", window, template).astype(np.float64)
    fitted = color_sum * (LEVELS / weight)[:, None]  # (M, 3), 255 * (colour - background)
    distance = np.sqrt(((fitted[:, None] - _AXES) ** 2).sum(2)) / 255.0
    nearest = np.sort(distance, axis=1)
    color = distance.argmin(1)
    strength = (fitted * _AXES[color]).sum(1) / _NORMS[color] ** 2
    energy_total = np.maximum(np.einsum("mpc,mpc->m", window.astype(np.float64), window), 1.0)
    unexplained = 1.0 - (color_sum ** 2).sum(1) / (weight * energy_total)
    outline, tint, tint_rms = _defects(window - np.rint(fitted[:, None] * (template / LEVELS)[..., None]), template, axis)
    mass = alpha.astype(np.float64).sum(1) / nominal_mass()[shape]
    outside = 1.0 - inside.reshape(count, len(span) ** 2).sum(1) / area  # of a component larger than its window
    whole = ((outline / MAX_OUTLINE + stretch / MAX_STRETCH < 1) & (tint < MAX_TINT) & (tint_rms < MAX_TINT_RMS)
             & (strength > MIN_STRENGTH) & (size < MAX_SIZE) & (mass > MIN_MASS) & (outside == 0))
    shape_ok = ((ranked[:, 0] < MAX_SHAPE_RESIDUAL) & (ranked[:, 1] - ranked[:, 0] > MIN_MARGIN)
                & (unexplained < MAX_RESIDUAL) & whole)
    color_ok = (nearest[:, 0] < MAX_COLOR_DISTANCE) & (nearest[:, 1] - nearest[:, 0] > MIN_COLOR_MARGIN)

    return _ordered(
        image=np.concatenate([owner, faint_images]),
        shape=np.concatenate([np.where(shape_ok, shape, -1), np.full(len(faint_images), -1)]),
        color=np.concatenate([np.where(color_ok, color, -1), np.full(len(faint_images), -1)]),
        box=np.concatenate([box.astype(np.float64), faint_boxes]),
        score=np.concatenate([np.where(shape_ok, 1.0 - 0.5 * ranked[:, 0], 0.0), np.zeros(len(faint_images))]),
        residual=np.concatenate([np.maximum(ranked[:, 0], outside), np.ones(len(faint_images))]), size=len(images))


def _ordered(*, image: np.ndarray, size: int, **columns: np.ndarray) -> Components:
    """Components sorted by image, in raster order within one, faint ones last."""
    order = np.argsort(image, kind="stable")
    return Components(image=image[order], size=size, **{name: column[order] for name, column in columns.items()})


def detect(images: np.ndarray) -> list[list[Detection]]:
    """The detections of each image, see `detect_arrays`."""
    found: list[list[Detection]] = [[] for _ in range(len(images))]
    parts = detect_arrays(images)
    for image, shape, color, box, score in zip(parts.image.tolist(), parts.shape.tolist(), parts.color.tolist(),
                                               parts.box.tolist(), parts.score.tolist(), strict=True):
        x0, y0, x1, y1 = box
        found[image].append(Detection(SHAPES[shape] if shape >= 0 else UNKNOWN, COLORS[color] if color >= 0 else UNKNOWN,
                                      (x0, y0, x1, y1), score))
    return found
