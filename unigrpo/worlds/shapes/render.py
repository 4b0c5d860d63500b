"""Scenes to pictures: anti-aliased solid shapes on a plain background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unigrpo.worlds.shapes.scene import BACKGROUND, CELL_CENTERS, CELLS, IMAGE_SIZE, PALETTE, SHAPES, Scene

JITTER = 0.5  # px, uniform in each direction; with 8.4 px shapes on an 11 px grid neighbours stay 1.6 px apart
SIZE_VARIATION = 0.03  # relative, uniform
RADIUS = 4.2  # px, half the extent of circle, triangle and cross; the square is smaller, so that areas are alike
SQUARE_RADIUS = 3.8  # px
CROSS_ARM = 1.45  # px, half the width of an arm


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Share of each pixel that a shape covers, from the signed distance to its outline.

    alpha = clip(1/2 - distance, 0, 1), exact for edges along the axes, within 0.05 on others and 0.2 in corners

    Args:
        shape: (M, 1, 1) int, index into SHAPES.
        x, y: (M, H, W) px, the pixels' centres seen from the shape's centre; y grows downwards.
        scale: (M, 1, 1) relative size, 1 is nominal.
    Returns: (M, H, W) in [0, 1].
    """
    out = np.empty(np.broadcast_shapes(x.shape, y.shape, shape.shape))
    for index, name in enumerate(SHAPES):
        rows = (shape == index)[:, 0, 0]
        u, v, r = x[rows], y[rows], RADIUS * scale[rows]
        if name == "circle":
            distance = np.hypot(u, v) - r
        elif name == "square":
            distance = np.maximum(np.abs(u), np.abs(v)) - SQUARE_RADIUS * scale[rows]
        elif name == "triangle":  # apex up; the sloping sides go from (0, -r) to (+-r, r)
            distance = np.maximum(v - r, (2 * np.abs(u) - v - r) / np.sqrt(5.0))
        else:
            arm = CROSS_ARM * scale[rows]
            distance = np.minimum(np.maximum(np.abs(u) - r, np.abs(v) - arm), np.maximum(np.abs(u) - arm, np.abs(v) - r))
        out[rows] = np.clip(0.5 - distance, 0.0, 1.0)
    return out


def render(scenes: Sequence[Scene], rng: np.random.Generator, *, jitter: float = JITTER,
           size_variation: float = SIZE_VARIATION) -> np.ndarray:
    """Draw each scene once.

    Args:
        scenes: N scenes.
        rng: draws the jitter, scene by scene and object by object, so that a scene's picture does not depend on later ones.
        jitter: px, objects move by at most this much in x and in y.
        size_variation: relative, objects grow or shrink by at most this much.
    Returns: (N, 32, 32, 3) float32 in [0, 1].
    """
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3))
    images[:] = BACKGROUND
    counts = [len(scene) for scene in scenes]
    objects = [item for scene in scenes for item in scene]
    if not objects:
        return images.astype(np.float32)
    noise = rng.uniform(-1.0, 1.0, size=(len(objects), 3))  # row-major: one object's three numbers are consecutive
    cells = np.array([CELLS.index(item.cell) for item in objects])
    centers = np.array(CELL_CENTERS)
    x = (centers[cells % 3] + jitter * noise[:, 0])[:, None, None]
    y = (centers[cells // 3] + jitter * noise[:, 1])[:, None, None]
    scale = (1.0 + size_variation * noise[:, 2])[:, None, None]
    shape = np.array([SHAPES.index(item.shape) for item in objects])[:, None, None]
    grid = np.arange(IMAGE_SIZE) + 0.5
    full = (len(objects), IMAGE_SIZE, IMAGE_SIZE)
    u, v = np.broadcast_to(grid[None, None, :] - x, full), np.broadcast_to(grid[None, :, None] - y, full)
    alpha = coverage(shape, u, v, scale)
    colors = np.array([PALETTE[item.color] for item in objects])
    owner = np.repeat(np.arange(len(scenes)), counts)
    slot = np.concatenate([np.arange(count) for count in counts])
    for k in range(max(counts)):  # the k-th object of every scene at once
        rows = slot == k
        a = alpha[rows][..., None]
        images[owner[rows]] = images[owner[rows]] * (1.0 - a) + a * colors[rows][:, None, None, :]
    return images.astype(np.float32)
