"""What nobody rewards: statistics of images and thinkings that a healthy run leaves about where they were.

    images   -> edge density, brightness, colour and hue entropy, background drift, diversity within a group
    thinking -> length, repetition, distinct texts in a group

A probe draws the same S samples of the same P prompts every time. Each statistic is an estimate: its value, and the noise
that other draws of the same policy for the same prompts would move it by. Images are described batch by batch, so that a
benchmark of large ones never has to lie in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

EDGE = 0.1              # difference of neighbouring pixels in any channel from which there is an edge
CHROMA = 0.1            # largest minus smallest channel from which a pixel has a hue
HUES = 12               # bins of the colour circle, shared linearly with the neighbour, so that no colour sits on a border
LEVELS = 4              # per channel, of the colours that an image's own entropy counts
RING = 32               # the border is one part of so many of the side, at least a pixel
THUMBNAIL = 16          # pixels a side, of what the siblings of a group are compared on
PIXELS = 2 ** 20        # described at a time, which bounds memory

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic of one probe.

    Args:
        value: its mean over the probe.
        noise: standard error by other draws for the same prompts, 0 where it is not known.
        spread: standard deviation of single values: the scale on which a change is large or small.
    """

    value: float
    noise: float
    spread: float


def estimate(values: npt.ArrayLike, *, value: float | None = None) -> Estimate:
    """Mean, noise and spread of (P, S) values, or of (P,) where a prompt has one.

        noise^2 = mean over prompts of the variance among a prompt's S values / (P S)

    Prompts are the same at every probe, so what differs between them is no noise; with one value a prompt the variance among
    prompts stands in, which is larger. Prompts with a value that is not finite (a missing reward) are left out.

    Args:
        value: reported instead of the mean, where the values are only its jackknife parts.
    Raises: ValueError if nothing is finite.
    """
    rows = np.asarray(values, np.float64)
    rows = rows.reshape(len(rows), -1)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if rows.size == 0:
        raise ValueError("a statistic needs at least one prompt whose values are all finite, got none")
    within = rows.var(axis=1, ddof=1).mean() if rows.shape[1] > 1 else rows.var(ddof=1) if len(rows) > 1 else 0.0
    return Estimate(float(rows.mean()) if value is None else value, math.sqrt(within / rows.size), float(rows.std()))


def over_steps(curves: Sequence[Mapping[str, float]], name: str) -> Estimate | None:
    """A logged metric's mean over training steps, None where no row has it. Steps see other prompts, which is its noise.

    A step whose update was skipped has values that are not finite: it is left out.
    """
    values = [float(row[name]) for row in curves if name in row and np.isfinite(row[name])]
    return estimate(values) if values else None


# ------------------------------------------------------------------------------------------------------------- images

@dataclass(frozen=True)
class ImageSigns:
    """What is kept of N images: everything the guards need, a few KB an image.

    Args:
        edges, brightness, colors: (N,) share of pixels on an edge; mean luminance; nats of the image's own colours.
        hues: (N, HUES) pixels of each hue, weighted with their chroma.
        border: (N, 3) median colour of the border, which is the background of most pictures.
        thumbnails: (N, THUMBNAIL, THUMBNAIL, 3).
    """

    edges: Floats
    brightness: Floats
    colors: Floats
    hues: Floats
    border: Floats
    thumbnails: npt.NDArray[np.float32]


def describe_images(images: npt.NDArray[np.float32]) -> ImageSigns:
    """The signs of (N, H, W, 3) float32 images in [0, 1]. Raises ValueError for another shape or values that are not finite."""
    if images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        raise ValueError(f"images must be (N, H, W, 3) with N at least 1, got {images.shape}")
    if not np.isfinite(images).all():
        raise ValueError(f"images must be finite, got {int((~np.isfinite(images)).sum())} values that are not")
    together = max(1, PIXELS // (images.shape[1] * images.shape[2]))
    return join_signs(_describe(images[at:at + together]) for at in range(0, len(images), together))


def join_signs(parts: Iterable[ImageSigns]) -> ImageSigns:
    """The signs of several batches, in their order."""
    found = list(parts)
    return ImageSigns(*(np.concatenate([getattr(part, item.name) for part in found]) for item in fields(ImageSigns)))


def _describe(images: npt.NDArray[np.float32]) -> ImageSigns:
    """The signs of one batch."""
    count, height, width, _ = images.shape
    edge = np.zeros((count, height, width), dtype=bool)
    edge[:, :, 1:] = np.abs(np.diff(images, axis=2)).max(axis=3) > EDGE
    edge[:, 1:] |= np.abs(np.diff(images, axis=1)).max(axis=3) > EDGE
    ring = max(1, min(height, width) // RING)
    border = np.ones((height, width), dtype=bool)
    border[ring:-ring, ring:-ring] = False
    codes = np.minimum((images * LEVELS).astype(np.int64), LEVELS - 1).clip(0) @ np.array([LEVELS ** 2, LEVELS, 1])
    thumbnails = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2),
                                                         THUMBNAIL)
    return ImageSigns(edges=edge.mean(axis=(1, 2)).astype(np.float64),
                      brightness=(images.mean(axis=(1, 2), dtype=np.float64) @ np.array([0.299, 0.587, 0.114])),
                      colors=entropy(_histogram(codes.reshape(count, -1), None, LEVELS ** 3)), hues=_hues(images),
                      border=np.median(images[:, border], axis=1).astype(np.float64),
                      thumbnails=thumbnails.permute(0, 2, 3, 1).numpy())


def _hues(images: npt.NDArray[np.float32]) -> Floats:
    """(N, HUES) chroma of the pixels that have a hue, shared between the two nearest bins."""
    flat = images.reshape(len(images), -1, 3).astype(np.float64)
    red, green, blue = np.moveaxis(flat, 2, 0)
    high = flat.max(axis=2)
    chroma = high - flat.min(axis=2)
    safe = np.maximum(chroma, 1e-6)
    angle = np.where(high == red, (green - blue) / safe, np.where(high == green, (blue - red) / safe + 2,
                                                                   (red - green) / safe + 4)) % 6      # the circle is 6 long
    place = angle * (HUES / 6)
    lower = np.floor(place).astype(np.int64)
    share, weight = place - lower, np.where(chroma > CHROMA, chroma, 0.0)
    return _histogram(lower % HUES, weight * (1 - share), HUES) + _histogram((lower + 1) % HUES, weight * share, HUES)


def _histogram(codes: npt.NDArray[np.int64], weights: Floats | None, bins: int) -> Floats:
    """(N, bins) summed weights (or counts) of (N, M) codes."""
    rows = codes + bins * np.arange(len(codes))[:, None]
    flat = None if weights is None else weights.ravel()
    return np.bincount(rows.ravel(), flat, minlength=bins * len(codes)).reshape(len(codes), bins).astype(np.float64)


def entropy(counts: Floats) -> Floats:
    """Nats of histograms (..., bins); 0 for an empty one."""
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-12)
    return -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=-1)


def border_color(signs: ImageSigns) -> list[float]:
    """The mean border colour (3 numbers): what `background_drift` of later probes is measured against."""
    return [float(value) for value in signs.border.mean(axis=0)]


def image_guards(signs: ImageSigns, *, samples: int, background: Sequence[float]) -> dict[str, Estimate]:
    """The images' statistics.

        edge_density      share of pixels on an edge
        brightness        mean luminance
        color_entropy     nats of an image's own colours, LEVELS a channel
        hue_entropy       nats of the hues of all images together: low where every picture has the same favourite colour
        background_drift  RGB distance of the border's colour from `background`, the start's
        group_diversity   root mean square difference between a prompt's images, in RGB (needs samples > 1)

    Args:
        signs: of P * samples images, a prompt's side by side.
    Raises: ValueError if the images are no multiple of `samples`.
    """
    count = len(signs.edges)
    if samples < 1 or count % samples:
        raise ValueError(f"{count} images are not {samples} of each prompt")
    total = signs.hues.sum(axis=0)
    pooled = float(entropy(total))
    parts = count * pooled - (count - 1) * entropy(total - signs.hues)            # jackknife: what each image adds
    away = np.sqrt(((signs.border - np.asarray(background)) ** 2).sum(axis=1))
    found = {"edge_density": estimate(signs.edges.reshape(-1, samples)),
             "brightness": estimate(signs.brightness.reshape(-1, samples)),
             "color_entropy": estimate(signs.colors.reshape(-1, samples)),
             "hue_entropy": estimate(parts.reshape(-1, samples), value=pooled),
             "background_drift": estimate(away.reshape(-1, samples))}
    if samples > 1:
        groups = signs.thumbnails.reshape(-1, samples, THUMBNAIL ** 2 * 3).astype(np.float64)
        found["group_diversity"] = estimate(np.sqrt(2 * groups.var(axis=1, ddof=1).mean(axis=1)))
    return found


# ----------------------------------------------------------------------------------------------------------- thinking

def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-grams of words that stood in it before; 0 for a text shorter than two of them."""
    words = text.split()
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def thinking_guards(texts: Sequence[str], *, samples: int) -> dict[str, Estimate]:
    """The thinkings' statistics.

        thinking_length      words
        thinking_repetition  share of repeated 3-grams of words
        distinct_texts       of a prompt's texts: 0 if all are the same, 1 if none is (needs samples > 1)

    Args:
        texts: P * samples, a prompt's side by side.
    Raises: ValueError if the texts are no multiple of `samples`.
    """
    if samples < 1 or len(texts) % samples or not texts:
        raise ValueError(f"{len(texts)} texts are not {samples} of each prompt")
    found = {"thinking_length": estimate(np.reshape([len(text.split()) for text in texts], (-1, samples))),
             "thinking_repetition": estimate(np.reshape([repetition(text) for text in texts], (-1, samples)))}
    if samples > 1:
        groups = [texts[at:at + samples] for at in range(0, len(texts), samples)]
        found["distinct_texts"] = estimate([(len(set(group)) - 1) / (samples - 1) for group in groups])
    return found
