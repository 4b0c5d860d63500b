"""T2I-CompBench's 2D and 3D spatial rules: two objects of the prompt, a relation, boxes (and depth) -> score.

    score = s1 / 4 + s2 / 4 + position / 2,   s the detection scores;   s / 4 if one of the objects is found

In 2D what stays below 0.5 scores 0, so that a single object never scores. Boxes and the 150 pixels of "near" live in the
official detector's input, whose shorter side is 479: `input_size` gives it, and boxes of other detectors are scaled to it.
What `official=False` changes is said at each function.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from unigrpo.evaluation.t2i_compbench import Box, Found, Tokens, person_or
from unigrpo.evaluation.t2i_labels import known, means

RELATIONS_2D = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
                "on top of")
RELATIONS_3D = ("in front of", "behind", "hidden")
BESIDE = ("next to", "on side of", "near")
# Words of a relation as consecutive tokens, in the order in which they are looked for.
SPANS = (("on", "top", "of"), ("on", "bottom", "of"), ("on", "the", "left"), ("on", "the", "right"), ("on", "side", "of"),
         ("next", "to"), ("near",))
SIDES = {"on the right of": (0, -1), "on the left of": (0, 1), "on the bottom of": (1, -1), "on the top of": (1, 1)}
NEAR_PIXELS = 150
SHORTER_SIDE, LONGER_SIDE = 479, 480
MIN_SCORE = 0.5          # official detections have a score above this


class Query(NamedTuple):
    """What a spatial prompt asks for; None where the parse offers no such word."""

    relation: str | None
    first: str | None
    second: str | None


class Spatial(NamedTuple):
    """An image's score, and the detections it rests on (indices, None where an object was not found)."""

    score: float
    first: int | None
    second: int | None


def input_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of an image -> of the official detector's input: shorter side 479, longer at most 480, rounded."""
    scale = min(SHORTER_SIDE / min(height, width), LONGER_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def iou(box_a: Box, box_b: Box) -> float:
    """Intersection over union of x1, y1, x2, y2; 0 where both are empty (the official code divides by zero there)."""
    shared = (max(min(box_a[2], box_b[2]) - max(box_a[0], box_b[0]), 0.0)
              * max(min(box_a[3], box_b[3]) - max(box_a[1], box_b[1]), 0.0))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (box_a, box_b)) - shared
    return shared / union if union else 0.0


def query_2d(prompt: str, tokens: Tokens) -> Query:
    """Relation and objects of a prompt of the category `spatial`: the first and the last NOUN, persons by that name.

    Args:
        tokens: (text, part of speech) of the prompt.
    """
    return _between_nouns(_first_contained(RELATIONS_2D, prompt), tokens)


def query_3d(prompt: str, tokens: Tokens) -> Query:
    """Relation and objects of a prompt of the category `3d_spatial`, by the same rule."""
    return _between_nouns(_first_contained(RELATIONS_3D, prompt), tokens)


def query_complex(prompt: str, tokens: Tokens) -> Query:
    """Relation and objects of a prompt of the category `complex`, whose sentences have more than two nouns.

    At each relation's words: the nearest NOUN or PROPN before them, and the first NOUN after, else the first PROPN that some
    other token follows. Exactly two objects must come together, else there are none.
    """
    words = [text for text, _ in tokens]
    objects: list[str] = []
    for length in (3, 2, 1):
        for start in range(len(tokens) - length + 1):
            if tuple(words[start:start + length]) in SPANS:
                objects += _nouns_around(tokens, start, start + length)
    relation = _first_contained(RELATIONS_2D, prompt)
    if len(objects) != 2:
        return Query(relation, None, None)
    return Query(relation, person_or(objects[0]), person_or(objects[1]))


def position_2d(relation: str | None, box_a: Box, box_b: Box, *, official: bool = True) -> float:
    """How well A stands to B as the relation says, in [0, 1].

        o = center_B - center_A;   next to, on side of, near:  1 if |o_x| < 150 or |o_y| < 150, else 150 / max(|o_x|, |o_y|)
        left, right, top, bottom:  0 unless o points the right way and mainly along that axis, then min(1, 0.1 / IoU)

    Args:
        box_a, box_b: x1, y1, x2, y2 in pixels of `input_size`.
        official: "on top of" scores 0, as any relation without a rule does; False takes it for "on the top of".
    """
    offset = [(box_b[axis] + box_b[axis + 2]) / 2 - (box_a[axis] + box_a[axis + 2]) / 2 for axis in (0, 1)]
    if relation in BESIDE:
        if min(abs(offset[0]), abs(offset[1])) < NEAR_PIXELS:
            return 1.0
        return NEAR_PIXELS / max(abs(offset[0]), abs(offset[1]))
    if relation == "on top of" and not official:
        relation = "on the top of"
    if relation not in SIDES:
        return 0.0
    axis, sign = SIDES[relation]
    if offset[axis] * sign <= 0 or abs(offset[axis]) <= abs(offset[1 - axis]):
        return 0.0
    overlap = iou(box_a, box_b)
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def position_3d(relation: str | None, box_a: Box, box_b: Box, depth: npt.NDArray[np.float32], *,
                official: bool = True) -> float:
    """How well A stands before or behind B, in [0, 1]: 0 in the wrong order of mean depths, then by overlap.

        IoU > 1/2: 1;   0 < IoU < 1/2: 2 IoU;   IoU = 0: 0 (the paper's authors confirm: what does not overlap scores 0)

    Args:
        box_a, box_b: in pixels of the depth map, whose fractions are cut off.
        depth: (H, W) in [0, 1], larger is nearer.
        official: rows and columns are confused when the boxes' depths are read, and an IoU of exactly 1/2 scores 0; False
            reads the boxes' own pixels, and scores 1 there. A box without pixels has no depth, and scores 0 either way.
    """
    depth_a, depth_b = (_mean_depth(box, depth.T if official else depth) for box in (box_a, box_b))
    wanted = depth_a > depth_b if relation == "in front of" else depth_a < depth_b
    if relation not in RELATIONS_3D or not wanted:               # comparisons with NaN are false
        return 0.0
    overlap = iou(box_a, box_b)
    if overlap > 0.5 or (overlap == 0.5 and not official):
        return 1.0
    return overlap / 0.5 if overlap < 0.5 else 0.0


def spatial_2d(query: Query, detections: Sequence[Found], *, official: bool = True) -> Spatial:
    """The 2D score of one image. `query` is that of `query_2d` or `query_complex`.

    Args:
        detections: by falling score, all above MIN_SCORE, in pixels of `input_size`.
        official: the first detection whose label equals the noun, even if it serves as both objects ("a boy next to a
            girl"); False goes by names and synonyms (`t2i_labels`), and needs two detections for two objects.
    """
    first, second = _pick(query, [_matches_2d(name, detections, official) for name in query[1:]], official)
    found = [detections[index] for index in (first, second) if index is not None]
    score = sum(0.25 * item.score for item in found)
    if len(found) == 2:
        score += 0.5 * position_2d(query.relation, found[0].box, found[1].box, official=official)
    return Spatial(score if score >= 0.5 else 0.0, first, second)


def find_3d(query: Query, detections: Sequence[Found], *, official: bool = True) -> tuple[int | None, int | None]:
    """Indices of the two objects' detections in 3D, None where an object is not found.

    Args:
        official: a label that contains the noun; in one pass that ends when both objects have been seen, so that until then a
            later, lower scoring detection replaces an earlier one. False: as `spatial_2d`.
    """
    if not official or query.first is None or query.second is None:
        return _pick(query, [_matches_2d(name, detections, official) for name in query[1:]], official)
    first = second = None
    for index, item in enumerate(detections):
        if query.first in item.label:
            first = index
        if query.second in item.label:
            second = index
        if first is not None and second is not None:
            break
    return first, second


def spatial_3d(query: Query, detections: Sequence[Found], depth: npt.NDArray[np.float32] | None, *,
               official: bool = True) -> Spatial:
    """The 3D score of one image; no score is cut to 0 here.

    Args:
        detections: by falling score, all above MIN_SCORE, in pixels of the depth map.
        depth: (H, W) in [0, 1], larger is nearer; may be None where `find_3d` does not find both objects.
    Raises: ValueError if the depth is missing and needed.
    """
    first, second = find_3d(query, detections, official=official)
    found = [detections[index] for index in (first, second) if index is not None]
    score = sum(0.25 * item.score for item in found)
    if len(found) == 2:
        if depth is None:
            raise ValueError("both objects were found, so their order needs the image's depth, got None")
        score += 0.5 * position_3d(query.relation, found[0].box, found[1].box, depth, official=official)
    return Spatial(score, first, second)


def ceiling(query: Query, labels: Collection[str], *, depth: bool = False, official: bool = True) -> float:
    """The best score that an image can earn from a detector with these labels, whose scores come close to 1.

    Args:
        labels: all that the detector has. depth: by the 3D rule, where a single object earns a quarter.
    """
    nouns = [name for name in query[1:] if name is not None]
    found = sum(known(name, labels, contained=depth, official=official) for name in nouns)
    if depth:
        return 0.25 * found + (0.5 if found == 2 and query.relation is not None else 0.0)
    # Without a position's half what is left stays below 0.5, as no detection is quite sure.
    placed = query.relation in (*BESIDE, *SIDES) or (query.relation == "on top of" and not official)
    return 1.0 if found == 2 and placed else 0.0


def _between_nouns(relation: str | None, tokens: Tokens) -> Query:
    """The first and the last NOUN."""
    nouns = [person_or(text) for text, pos in tokens if pos == "NOUN"]
    return Query(relation, nouns[0], nouns[-1]) if nouns else Query(relation, None, None)


def _first_contained(relations: Sequence[str], prompt: str) -> str | None:
    return next((relation for relation in relations if relation in prompt), None)


def _nouns_around(tokens: Tokens, start: int, stop: int) -> list[str]:
    """At most one object before and one behind the tokens start..stop."""
    before = [text for text, pos in tokens[:start] if pos in ("NOUN", "PROPN")][-1:]
    behind = [text for text, pos in tokens[stop:] if pos == "NOUN"][:1]
    if not behind:
        rest = tokens[stop:]
        behind = [here[0] for here, following in itertools.pairwise(rest)
                  if here[1] == "PROPN" and following[1] != "PROPN"][:1]
    return before + behind


def _matches_2d(name: str | None, detections: Sequence[Found], official: bool) -> list[int]:
    """Indices of the detections that a noun means."""
    if name is None:
        return []
    return [index for index, item in enumerate(detections)
            if (item.label == name if official else means(name, item.label))]


def _pick(query: Query, matches: list[list[int]], official: bool) -> tuple[int | None, int | None]:
    """The first detection of each object; officially it may be the same one."""
    first, second = matches
    if not official and second and first:
        second = [index for index in second if index != first[0]]
    return (first[0] if first else None), (second[0] if second else None)


def _mean_depth(box: Box, depth: npt.NDArray[np.float32]) -> float:
    """Mean over a box's pixels; NaN if it has none."""
    x1, y1, x2, y2 = (int(value) for value in box)
    values = depth[y1:y2, x1:x2]
    return float(values.mean()) if values.size else math.nan
