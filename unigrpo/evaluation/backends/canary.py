"""Known pictures with recorded scores: a scorer that does not repeat them on this device is stopped before it scores anything.

The pictures are drawn here, the same on every machine: coloured shapes with their captions, two objects that a detector
may know, and pictures of nothing. A record holds what each scorer, known by its weights and options, said of them on a device
that was trusted. What is compared are numbers that move smoothly with a model's outputs, not verdicts, which may flip.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from unigrpo.digests import sha256_json
from unigrpo.evaluation.backends import ColorClassifier, Detected, Detector
from unigrpo.evaluation.geneval import COLORS
from unigrpo.evaluation.geneval_folder import write_atomically

SIZE = 128  # px, square
PAINTS = {"red": (214, 32, 32), "green": (32, 150, 48), "blue": (32, 64, 210), "yellow": (250, 220, 32),
          "white": (250, 250, 250), "black": (16, 16, 16)}
GROUND = (200, 200, 200)
# Largest difference from the record, by kind: of probabilities and scores in [0, 1], of a cosine, of 100 times a cosine.
TOLERANCES = {"detector": 1e-2, "colors": 0.2, "similarity": 2e-3, "yes": 1e-2, "depth": 1e-2}
Readings = dict[str, list[float]]


@cache
def canary_images() -> Mapping[str, np.ndarray]:
    """Picture -> (128, 128, 3) uint8 RGB, by caption; the last three show nothing."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    def paint(*layers: tuple[np.ndarray, tuple[int, int, int]]) -> np.ndarray:
        image = np.full((SIZE, SIZE, 3), GROUND, dtype=np.uint8)
        for shape, color in layers:
            image[shape] = color
        return image

    def disc(cx: float, cy: float, radius: float) -> np.ndarray:
        return (x - cx) ** 2 + (y - cy) ** 2 < radius ** 2

    def square(cx: float, cy: float, half: float) -> np.ndarray:
        return np.maximum(abs(x - cx), abs(y - cy)) < half

    triangle = (y < 104) & (y - 24 > 1.8 * abs(x - 64))
    octagon = (np.maximum(abs(x - 64), abs(y - 48)) < 36) & (abs(x - 64) + abs(y - 48) < 50)
    post, bar = (abs(x - 64) < 3) & (y > 48), (abs(x - 64) < 26) & (abs(y - 48) < 6)
    hands = ((abs(x - 64) < 2) & (y > 30) & (y < 64)) | ((abs(y - 64) < 2) & (x > 64) & (x < 86))
    noise = np.cumsum(np.arange(SIZE * SIZE * 3, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(4093)) // np.uint64(7)
    return {
        "a red circle": paint((disc(64, 64, 36), PAINTS["red"])),
        "a blue square": paint((square(64, 64, 32), PAINTS["blue"])),
        "a green triangle": paint((triangle, PAINTS["green"])),
        "a yellow circle left of a black square": paint((disc(36, 64, 22), PAINTS["yellow"]),
                                                        (square(92, 64, 20), PAINTS["black"])),
        "a stop sign": paint((post, PAINTS["black"]), (octagon, PAINTS["red"]), (bar, PAINTS["white"])),
        "a clock": paint((disc(64, 64, 44), PAINTS["black"]), (disc(64, 64, 40), PAINTS["white"]), (hands, PAINTS["black"])),
        "a plain grey wall": paint(),
        "darkness": paint((x > 0, PAINTS["black"])),
        "noise": (noise % np.uint64(256)).astype(np.uint8).reshape(SIZE, SIZE, 3),
    }


def read_scorer(kind: str, scorer: Any) -> Readings:
    """What a scorer says of every picture, as numbers.

    Args:
        kind: detector (per class the best score, then the mean box weighted by score), colors (logits, or one-hot names),
            similarity (with the picture's caption and with the next one's), yes (the same as questions), depth (4 x 4 means).
    Raises: ValueError for another kind, and for readings that are not finite or the same for every picture.
    """
    readers: dict[str, Callable[[Any], Readings]] = {
        "detector": _read_detector, "colors": _read_colors, "similarity": _read_pairs,
        "yes": lambda scorer: _read_pairs(scorer, "is there {}?"), "depth": _read_depth}
    if kind not in readers:
        raise ValueError(f"canaries know the kinds {', '.join(readers)}, got {kind!r}")
    readings = readers[kind](scorer)
    bad = [caption for caption, values in readings.items() if not np.isfinite(values).all()]
    if bad:
        raise ValueError(f"says NaN or infinity of {bad[0]!r}")
    rows = list(readings.values())
    if all(len(row) == len(rows[0]) and np.allclose(row, rows[0], rtol=0, atol=1e-6) for row in rows):
        raise ValueError(f"says the same of every picture: {_shown(rows[0])}")
    return readings


def record(path: Path, scorers: Mapping[str, Any], device: str) -> list[str]:
    """Write what scorers say on this device, which must be a trusted one; other scorers' entries stay.

    Args:
        path: JSON file, made if it is not there. scorers: kind -> scorer. device: its name, for the record.
    Returns: lines for a person to judge: does each scorer tell pictures apart as it should?
    Raises: ValueError naming scorer and device for readings that no working scorer gives.
    """
    entries = _load(path) if path.exists() else {}
    lines = []
    for kind, scorer in scorers.items():
        readings = _readings_or_stop(kind, scorer, device)
        entries[scorer.identity] = {"kind": kind, "device": device, "pictures": _pictures_digest(),
                                    "readings": {caption: [round(value, 7) for value in row]
                                                 for caption, row in readings.items()}}
        lines += _sense(kind, scorer, readings)
    data = json.dumps({"about": "scores of unigrpo's canary pictures; written by unigrpo score canary --record",
                       "scorers": entries}, indent=1, sort_keys=True) + "\n"
    write_atomically(path, data.encode())
    return lines


def check(path: Path, scorers: Mapping[str, Any], device: str) -> dict[str, float]:
    """Compare scorers with their records.

    Returns: kind -> the largest difference found.
    Raises: ValueError naming scorer, device, picture and numbers if a scorer has no record, says something that no working one
        says, or differs from its record by more than its kind's tolerance.
    """
    if not path.is_file():
        raise ValueError(f"the canaries' record {path} is missing: no scorer is trusted unseen. Write it on a device that you "
                         f"trust with `unigrpo score canary --record {path}` and the same models, and look at what it prints")
    entries = _load(path)
    worst: dict[str, float] = {}
    for kind, scorer in scorers.items():
        entry = entries.get(scorer.identity)
        if entry is None:
            raise ValueError(f"{path} has no record of the {kind} {scorer.identity!r}: other weights or options than were "
                             f"recorded. Record it with `unigrpo score canary --record {path}` if they are meant")
        if entry.get("pictures") != _pictures_digest():
            raise ValueError(f"{path} holds other canary pictures' scores for the {kind} {scorer.name} (it was written by "
                             "another version): record it again")
        readings = _readings_or_stop(kind, scorer, device)
        worst[kind] = 0.0
        for caption, row in readings.items():
            wanted = entry["readings"].get(caption, [])
            if len(wanted) != len(row):
                raise ValueError(f"{path} has {len(wanted)} numbers for {caption!r} of the {kind} {scorer.name}, and it gives "
                                 f"{len(row)}: record it again")
            gaps = np.abs(np.subtract(row, wanted))
            place = int(gaps.argmax())
            if gaps[place] > TOLERANCES[kind]:
                raise ValueError(f"the {kind} {scorer.name} is not itself on {device}: of {caption!r} it says {row[place]:.6g} "
                                 f"where {wanted[place]:.6g} was recorded on {entry['device']}, allowed {TOLERANCES[kind]:g}. "
                                 "Scores made here would be wrong; nothing was scored")
            worst[kind] = max(worst[kind], float(gaps[place]))
    return worst


def device_name(device: str) -> str:
    """cpu, or the GPU's name."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def _readings_or_stop(kind: str, scorer: Any, device: str) -> Readings:
    """Readings; any failure names scorer and device."""
    try:
        return read_scorer(kind, scorer)
    except ValueError as error:
        raise ValueError(f"the {kind} {scorer.name} is broken on {device}: it {error}. Nothing was scored") from error


def _read_detector(scorer: Detector) -> Readings:
    """Per picture the best score of each class, then the score-weighted mean box in shares of the side."""
    detect = getattr(scorer, "detect", scorer)  # where there is one, below the bound that the detector is used with
    readings: Readings = {}
    for (caption, image), found in zip(canary_images().items(), detect(list(canary_images().values())), strict=True):
        best = dict.fromkeys(scorer.labels, 0.0)
        for item in found:
            best[item.label] = float(np.maximum(best[item.label], item.score))  # maximum keeps NaN
        weight = sum(item.score for item in found)
        box = sum(item.score * np.array(item.box) for item in found) / weight / len(image) if weight else np.zeros(4)
        readings[caption] = [*best.values(), *(float(edge) for edge in box)]
    return readings


def _read_colors(scorer: ColorClassifier) -> Readings:
    """Of each whole picture the colours' logits where the scorer gives them, else which colour it names."""
    readings: Readings = {}
    for caption, image in canary_images().items():
        whole = [Detected("frisbee", (0.0, 0.0, SIZE, SIZE), 1.0, mask=np.ones(image.shape[:2], dtype=bool))]
        if hasattr(scorer, "logits"):
            readings[caption] = [float(value) for value in scorer.logits(image, whole, "frisbee")[0]]
        else:
            named = scorer(image, whole, "frisbee")[0]
            readings[caption] = [float(color == named) for color in COLORS]
    return readings


def _read_pairs(scorer: Any, template: str = "{}") -> Readings:
    """Each picture with its own caption, then with the next picture's."""
    captions, images = list(canary_images()), list(canary_images().values())
    own = scorer(images, [template.format(caption) for caption in captions])
    other = scorer(images, [template.format(caption) for caption in captions[1:] + captions[:1]])
    return {caption: [float(a), float(b)] for caption, a, b in zip(captions, own, other, strict=True)}


def _read_depth(scorer: Any) -> Readings:
    """The mean depth in each of 4 x 4 tiles."""
    return {caption: [float(value) for value in depth.reshape(4, SIZE // 4, 4, SIZE // 4).mean(axis=(1, 3)).flat]
            for caption, depth in zip(canary_images(), scorer(list(canary_images().values())), strict=True)}


def _sense(kind: str, scorer: Any, readings: Readings) -> list[str]:
    """What a person should see before trusting a record: known-good pictures against known-bad ones."""
    captions = list(readings)
    if kind in ("similarity", "yes"):
        right = [caption for caption, (own, other) in readings.items() if own > other]
        return [f"{kind} {scorer.name}: prefers the picture's own caption for {len(right)} of {len(captions)} pictures"]
    if kind == "colors":
        drawn = {caption: next(word for word in caption.split() if word in COLORS) for caption in captions[:3]}
        right = [caption for caption, color in drawn.items() if COLORS[int(np.argmax(readings[caption]))] == color]
        return [f"colors {scorer.name}: names the colour of {len(right)} of {len(drawn)} plain shapes"]
    if kind == "detector":
        known = {caption: caption.removeprefix("a ") for caption in captions if caption.removeprefix("a ") in scorer.labels}
        shown = [f"{label} {readings[caption][scorer.labels.index(label)]:.2f} (on the grey wall "
                 f"{readings['a plain grey wall'][scorer.labels.index(label)]:.2f})" for caption, label in known.items()]
        return [f"detector {scorer.name}: {', '.join(shown) or 'knows none of the drawn objects'}"]
    return [f"{kind} {scorer.name}: recorded"]


def _load(path: Path) -> dict[str, Any]:
    """The entries of a record by scorer identity."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["scorers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the canaries' record {path} cannot be read ({error}); write it again with "
                         f"`unigrpo score canary --record {path}`") from error


@cache
def _pictures_digest() -> str:
    """16 hex digits of the pictures and their captions."""
    return sha256_json([[caption, image.tobytes().hex()] for caption, image in canary_images().items()])[:16]


def _shown(values: list[float]) -> str:
    """The first numbers of a row."""
    return ", ".join(f"{value:.4g}" for value in values[:3]) + (", ..." if len(values) > 3 else "")
