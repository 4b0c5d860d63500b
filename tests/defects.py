"""Pictures with something wrong on purpose: what the verifier must refuse, as families to draw from.

Each family draws one object with a defect, over the plain background, with the renderer's own coverage. A picture is
accepted when all that is found in it is known, whatever it is taken for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes import COLORS, SHAPES, Object, random_scene
from unigrpo.worlds.shapes.detect import detect_arrays
from unigrpo.worlds.shapes.prompts import make_record
from unigrpo.worlds.shapes.render import SIZE_VARIATION, coverage, render
from unigrpo.worlds.shapes.scene import BACKGROUND, CELLS, PALETTE, Scene
from unigrpo.worlds.shapes.specification import Clause, Specification
from unigrpo.worlds.shapes.verify import verify

GROUND = np.array(BACKGROUND)
COLOR_VALUES = np.array([PALETTE[name] for name in COLORS])
VISIBLE = 10.0  # px of area, a fifth of a shape's
ROUNDING = 0.5 / 255  # a smaller change of a pixel is none


class Lone:
    """Single shapes near the middle: shape and colour indices, centres, coverage."""

    def __init__(self, count: int, rng: np.random.Generator, scale: float | None = None) -> None:
        self.rng, self.count = rng, count
        self.shape, self.color = rng.integers(len(SHAPES), size=count), rng.integers(len(COLORS), size=count)
        self.center = rng.uniform(12, 20, size=(2, count, 1, 1))
        self.scale = (rng.uniform(1 - SIZE_VARIATION, 1 + SIZE_VARIATION, size=(count, 1, 1)) if scale is None
                      else np.full((count, 1, 1), scale))
        grid, full = np.arange(32) + 0.5, (count, 32, 32)
        self.x = np.broadcast_to(grid - self.center[0], full)
        self.y = np.broadcast_to(grid[:, None] - self.center[1], full)
        self.alpha = coverage(self.shape[:, None, None], self.x, self.y, self.scale)

    def uniform(self, low: float, high: float) -> np.ndarray:
        """(N, 1, 1)"""
        return self.rng.uniform(low, high, size=(self.count, 1, 1))

    def other_color(self) -> np.ndarray:
        """(N,) colour indices, never the shape's own."""
        return (self.color + self.rng.integers(1, len(COLORS), size=self.count)) % len(COLORS)

    def paint(self, alpha: np.ndarray | None = None) -> np.ndarray:
        """In their own colours."""
        return paint(self.alpha if alpha is None else alpha, self.color)


def paint(alpha: np.ndarray, color: np.ndarray, ground: np.ndarray = GROUND) -> np.ndarray:
    """Colours over a ground; color is an index (N,) or RGB (N, H, W, 3)."""
    rgb = COLOR_VALUES[color][:, None, None] if color.ndim == 1 else color
    return (ground * (1 - alpha[..., None]) + alpha[..., None] * rgb).astype(np.float32)


def cut(count: int, rng: np.random.Generator, missing: float) -> np.ndarray:
    """A straight cut at any angle takes this share of the area away."""
    lone = Lone(count, rng)
    angle = lone.uniform(0, 2 * np.pi)
    order = np.argsort(-(np.cos(angle) * lone.x + np.sin(angle) * lone.y).reshape(count, -1), axis=1)
    flat = np.take_along_axis(lone.alpha.reshape(count, -1), order, axis=1)
    flat = np.where(flat.cumsum(1) < missing * flat.sum(1, keepdims=True), 0.0, flat)
    left = np.zeros_like(flat)
    np.put_along_axis(left, order, flat, axis=1)
    return lone.paint(left.reshape(lone.alpha.shape))


def faint(count: int, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A blend of this share of the colour with the background."""
    lone = Lone(count, rng)
    return lone.paint(strength * lone.alpha)


def sliver(count: int, rng: np.random.Generator, width: float) -> np.ndarray:
    """A straight band of another colour, this many px wide, at any angle across the shape, within 2 px of its centre.

    At least a sixth of the shape's area has the other colour, so that a band that misses the arms of a cross is none.
    """
    lone = Lone(count, rng)
    angle, place = lone.uniform(0, 2 * np.pi), lone.uniform(-2, 2)
    distance = np.abs(np.cos(angle) * lone.x + np.sin(angle) * lone.y - place) - width / 2
    band = np.clip(0.5 - distance, 0, 1)
    inside = (band * lone.alpha).sum((1, 2)) >= lone.alpha.sum((1, 2)) / 6
    rgb = COLOR_VALUES[lone.color][:, None, None] * (1 - band[..., None]) \
        + band[..., None] * COLOR_VALUES[lone.other_color()][:, None, None]
    return paint(lone.alpha, rgb)[inside]


def merged(count: int, rng: np.random.Generator, low: float, high: float, *, same_color: bool,
           same_shape: bool = False) -> np.ndarray:
    """Two shapes low to high px apart in any direction, painted as one (same colour) or the second over the first.

    Pictures whose two shapes do not touch, or in which one hides the other entirely, are left out.
    """
    lone = Lone(count, rng)
    angle, distance = lone.uniform(0, 2 * np.pi), lone.uniform(low, high)
    shape = lone.shape if same_shape else rng.integers(len(SHAPES), size=count)
    other = coverage(shape[:, None, None], lone.x + distance * np.cos(angle), lone.y + distance * np.sin(angle),
                     lone.uniform(1 - SIZE_VARIATION, 1 + SIZE_VARIATION))
    touching = np.minimum(lone.alpha, other).reshape(count, -1).max(1) > 0.5
    if same_color:
        return lone.paint(np.maximum(lone.alpha, other))[touching & ~_hidden(lone.alpha, other)]
    two = paint(other, lone.other_color(), lone.paint())
    return two[touching & ~_hidden(lone.alpha, other, above=True)]


def nested(count: int, rng: np.random.Generator, *, same_color: bool) -> np.ndarray:
    """A smaller shape (half to nine tenths of the size) within 1 px of another's centre, in front of it.

    In the same colour only what sticks out can be seen, and a shape with its corners filled may be another shape: pictures
    that differ from the nearest clean drawing of any shape by less than VISIBLE in all are left out.
    """
    lone = Lone(count, rng)
    shape, angle, distance = rng.integers(len(SHAPES), size=count), lone.uniform(0, 2 * np.pi), lone.uniform(0, 1)
    other = coverage(shape[:, None, None], lone.x + distance * np.cos(angle), lone.y + distance * np.sin(angle),
                     lone.uniform(0.5, 0.9))
    if same_color:
        union = np.maximum(lone.alpha, other)
        rows = np.flatnonzero((union - lone.alpha).sum((1, 2)) >= VISIBLE - 2)  # the others differ less from their own shape
        return lone.paint(union)[rows[difference(union[rows]) >= VISIBLE]]
    return paint(other, lone.other_color(), lone.paint())


def difference(alpha: np.ndarray) -> np.ndarray:
    """(N,) px of area by which a picture differs from the nearest clean drawing of one shape, in quarter-pixel steps."""
    total, grid = alpha.sum((1, 2)), np.arange(32)
    y = np.rint((alpha.sum(2) * grid).sum(1) / total).astype(int)
    x = np.rint((alpha.sum(1) * grid).sum(1) / total).astype(int)
    span = np.arange(-8, 9)
    windows = np.stack([a[i + span[:, None], j + span] for a, i, j in zip(alpha, y, x, strict=True)]).astype(np.float32)
    best = np.full(len(alpha), np.inf, np.float32)
    steps = np.arange(-1.0, 1.01, 0.25)
    for shape in range(len(SHAPES)):
        shift = 1.4 if SHAPES[shape] == "triangle" else 0.0  # its centroid lies lower than its centre
        dx, dy, scale = (a.reshape(-1, 1, 1) for a in np.meshgrid(steps, steps - shift, (0.97, 0.985, 1.0, 1.015, 1.03)))
        full = (len(dx), len(span), len(span))
        clean = coverage(np.full((len(dx), 1, 1), shape), np.broadcast_to(span - dx, full),
                         np.broadcast_to(span[:, None] - dy, full), scale).astype(np.float32)
        for template in clean:
            best = np.minimum(best, np.abs(windows - template).sum((1, 2)))
    return best


def _hidden(alpha: np.ndarray, other: np.ndarray, *, above: bool = False) -> np.ndarray:
    """Where the union equals one of the two within rounding; above: where the second covers the first."""
    second = (alpha - other).max((1, 2)) <= ROUNDING
    return second if above else second | ((other - alpha).max((1, 2)) <= ROUNDING)


FAMILIES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "a third cut off": lambda n, rng: cut(n, rng, 1 / 3),
    "half cut off": lambda n, rng: cut(n, rng, 1 / 2),
    "two thirds cut off": lambda n, rng: cut(n, rng, 2 / 3),
    "strength 0.8": lambda n, rng: faint(n, rng, 0.8),
    "strength 0.65": lambda n, rng: faint(n, rng, 0.65),
    "strength 0.5": lambda n, rng: faint(n, rng, 0.5),
    "strength 0.2": lambda n, rng: faint(n, rng, 0.2),
    "sliver of 2 px": lambda n, rng: sliver(n, rng, 2.0),
    "sliver of 3 px": lambda n, rng: sliver(n, rng, 3.0),
    "merged, same colour": lambda n, rng: merged(n, rng, 3.0, 7.0, same_color=True),
    "merged, two colours": lambda n, rng: merged(n, rng, 3.0, 7.0, same_color=False),
    "near-coincident, same colour and shape": lambda n, rng: merged(n, rng, 1.5, 3.0, same_color=True, same_shape=True),
    "near-coincident, same colour": lambda n, rng: merged(n, rng, 1.5, 3.0, same_color=True),
    "near-coincident, two colours": lambda n, rng: merged(n, rng, 1.5, 3.0, same_color=False),
    "nested, same colour": lambda n, rng: np.concatenate([nested(2000, rng, same_color=True) for _ in range(2 + n // 500)]),
    "nested, two colours": lambda n, rng: nested(n, rng, same_color=False),
}


LIMITS = {"nested, same colour": 0.02}
"""Families that miss the limit of 0.005, and what they are held to. Of nested shapes of one colour 0.5 % pass from 10 px of
difference on (7 of 1342; 5 of 598 in the test's own draw), 3 % from 8 px, 8 % from 6 px, 19 % from
4 px: a policy's own untidy outlines differ as much."""


def accepted(images: np.ndarray) -> float:
    """Share of images that consist of recognised things only, and of at least one."""
    found = detect_arrays(images)
    bad = np.bincount(found.image, (found.shape < 0) | (found.color < 0), len(images))
    return float(((np.bincount(found.image, minlength=len(images)) > 0) & (bad == 0)).mean())


def wrong_attributes(count: int, rng: np.random.Generator) -> tuple[dict[str, float], float]:
    """Scenes whose prompt fixes everything, each with every single attribute changed once.

    Returns: share accepted per kind of change; share of the unchanged scenes accepted.
    """
    images: dict[str, list[Scene]] = {name: [] for name in ("color", "shape", "cell", "missing", "extra", "none")}
    records: dict[str, list[PromptRecord]] = {name: [] for name in images}
    while len(images["none"]) < count:
        scene = random_scene(rng)
        if len({o.shape for o in scene}) < len(scene):
            continue  # a prompt names a shape once
        record = make_record(Specification(tuple(Clause(o.shape, 1, o.color, o.cell) for o in scene)), "x")
        free = [c for c in CELLS if c not in {o.cell for o in scene}]
        changes: dict[str, list[Scene]] = {"none": [scene], "missing": [], "extra": [], "color": [], "shape": [], "cell": []}
        for i, item in enumerate(scene):
            for name, choices in (("color", COLORS), ("shape", SHAPES), ("cell", free)):
                others = [c for c in choices if c != getattr(item, name)]
                changed = Object(**{**vars(item), name: others[int(rng.integers(len(others)))]})
                changes[name].append((*scene[:i], changed, *scene[i + 1:]))
            if len(scene) > 1:
                changes["missing"].append((*scene[:i], *scene[i + 1:]))
            changes["extra"].append((*scene, Object(item.color, item.shape, free[int(rng.integers(len(free)))])))
        for name, changed_scenes in changes.items():
            images[name] += changed_scenes
            records[name] += [record] * len(changed_scenes)
    shares = {name: float(verify(render(images[name], rng), records[name])["exact"].mean()) for name in images}
    return shares, shares.pop("none")
