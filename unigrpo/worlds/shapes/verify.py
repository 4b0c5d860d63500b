"""Verdicts on pictures of the shapes world: exactly what was asked for, and how close it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.detect import Components, detect_arrays
from unigrpo.worlds.shapes.scene import CELL_CENTERS, CELLS, COLORS, RELATIONS, SHAPES
from unigrpo.worlds.shapes.specification import Specification, specification

POSITION_THRESHOLD = 0.1  # GenEval: an offset counts from a tenth of the two boxes' sizes on
_AXIS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])  # the direction of each of RELATIONS, in x and y
_REACH = 24.0  # px, the distance from the wanted cell at which nothing is left of the cell's credit


@dataclass(frozen=True)
class _Wanted:
    """One specification as arrays; shapes are distinct, so that a shape names its clause."""

    fixed: np.ndarray  # (4, 6) objects per shape and colour
    free: np.ndarray  # (4,) objects per shape whose colour is free
    cell: np.ndarray  # (4,) index into CELLS or -1
    relation: np.ndarray  # (3,) relation, subject shape, target shape; or -1


@lru_cache(maxsize=65536)
def _wanted(spec: Specification) -> _Wanted:
    """The arrays of a specification.

    Raises: ValueError for what this verifier does not decide: a shape in two clauses, a relation or cell of several objects.
    """
    if len({clause.shape for clause in spec.clauses}) < len(spec.clauses):
        raise ValueError(f"each clause must have a shape of its own, got {spec}")
    related = spec.relation[1:] if spec.relation else ()
    if any(clause.count > 1 and (clause.cell is not None or i in related) for i, clause in enumerate(spec.clauses)):
        raise ValueError(f"relations and cells need a count of 1, got {spec}")
    fixed, free = np.zeros((len(SHAPES), len(COLORS)), np.int64), np.zeros(len(SHAPES), np.int64)
    cell, relation = np.full(len(SHAPES), -1), np.full(3, -1)
    for clause in spec.clauses:
        row = SHAPES.index(clause.shape)
        if clause.color is None:
            free[row] = clause.count
        else:
            fixed[row, COLORS.index(clause.color)] = clause.count
        if clause.cell is not None:
            cell[row] = CELLS.index(clause.cell)
    if spec.relation is not None:
        name, subject, target = spec.relation
        relation = np.array([RELATIONS.index(name), *(SHAPES.index(spec.clauses[i].shape) for i in (subject, target))])
    return _Wanted(fixed, free, cell, relation)


def _matched(counts: np.ndarray, fixed: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well the found objects match the wanted ones.

    Args:
        counts: (N, 5, 7) objects found per shape and colour, the last of each being unknown.
        fixed, free: (N, 4, 6), (N, 4) objects wanted.
    Returns: (N,) float64 F1 of the match, an object with the right shape or the right colour alone counting one half;
        (N,) bool, True where it is perfect (F1 is 1 exactly there).
    """
    known = counts[:, :-1, :-1]
    hit = np.minimum(known, fixed)  # (N, 4, 6)
    free_hit = np.minimum(free, (known - hit).sum(2))  # (N, 4)
    missing = (fixed - hit).sum(2) + free - free_hit
    extra = counts[:, :-1].sum(2) - hit.sum(2) - free_hit
    shape_only = np.minimum(missing, extra)
    # What is left has a shape that nobody asked for, or one that is missing; its colour may still be a wanted one.
    wanted_colors = ((fixed - hit) * (missing > extra)[:, :, None]).sum(1)  # (N, 6)
    left_colors = ((known - hit) * (extra > missing)[:, :, None]).sum(1) + counts[:, -1, :-1]
    color_only = np.minimum(np.minimum(wanted_colors, left_colors).sum(1), (missing - shape_only).sum(1))
    full = hit.sum((1, 2)) + free_hit.sum(1)
    total_wanted, total_found = fixed.sum((1, 2)) + free.sum(1), counts.sum((1, 2))
    f1 = (2.0 * full + shape_only.sum(1) + color_only) / np.maximum(total_wanted + total_found, 1)
    return np.minimum(f1, 1.0), (full == total_wanted) & (full == total_found)


def judge(found: Components, records: Sequence[PromptRecord]) -> dict[str, np.ndarray]:
    """`verify` for images whose detections are known already."""
    if found.size != len(records):
        raise ValueError(f"as many records as images are needed, got {len(records)} for {found.size}")
    cache: dict[str, _Wanted] = {}
    wanted = [cache.get(r.id) or cache.setdefault(r.id, _wanted(specification(r))) for r in records]  # siblings share one
    fixed, free = np.stack([w.fixed for w in wanted]), np.stack([w.free for w in wanted])
    cell, relation = np.stack([w.cell for w in wanted]), np.stack([w.relation for w in wanted])
    counts = np.zeros((found.size, len(SHAPES) + 1, len(COLORS) + 1), np.int64)
    np.add.at(counts, (found.image, found.shape, found.color), 1)  # -1 is the last row or column: unknown
    f1, right = _matched(counts, fixed, free)

    number = np.zeros((found.size, len(SHAPES) + 1))
    number[:] = counts.sum(2)
    boxes = np.zeros((found.size, len(SHAPES) + 1, 4))  # the mean box of each shape
    np.add.at(boxes, (found.image, found.shape), found.box)
    boxes /= np.maximum(number, 1.0)[..., None]
    center, extent = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]  # (N, 5, 2) px

    row = np.arange(found.size)
    name, subject, target = relation.T
    offset = center[row, subject] - center[row, target]
    slack = POSITION_THRESHOLD * (extent[row, subject] + extent[row, target])
    revised = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    cosine = (revised * _AXIS[name]).sum(1) / np.maximum(np.sqrt((offset ** 2).sum(1)), 1e-6)
    seen = (number[row, subject] > 0) & (number[row, target] > 0)
    related = (name < 0) | (seen & (cosine > 0.5))
    factor = np.where(related, 1.0, np.where(seen, 0.5 + 0.4 * (cosine + 1.0) / 1.5, 0.5))

    centers = np.array(CELL_CENTERS)
    place = np.stack([centers[cell % 3], centers[cell // 3]], axis=-1)  # (N, 4, 2)
    away = center[:, :-1] - place
    nearest = np.abs(center[:, :-1, :, None] - centers).argmin(3)  # (N, 4, 2) column and row
    placed = (cell < 0) | ((number[:, :-1] > 0) & (nearest[..., 0] == cell % 3) & (nearest[..., 1] == cell // 3))
    near = np.where(number[:, :-1] > 0, np.maximum(1.0 - np.sqrt((away ** 2).sum(2)) / _REACH, 0.0), 0.0)
    factor = factor * np.where(placed, 1.0, 0.5 + 0.4 * near).prod(1)
    exact = right & related & placed.all(1)
    return {"exact": exact, "graded": np.where(exact, 1.0, np.minimum(f1 * factor, 0.99)).astype(np.float32)}


def verify(images: np.ndarray, records: Sequence[PromptRecord]) -> dict[str, np.ndarray]:
    """Whether pictures show what their prompts ask for.

    graded = F1(objects found, objects wanted) * relation term * cell terms

    F1 gives one half for the right shape or the right colour alone; extra objects, unknown ones included, lower it; a missed
    relation or cell leaves between 0.5 and 0.9 of it, more when it is nearly met. graded is 1 exactly where exact is True.

    Args:
        images: (N, 32, 32, 3) float in [0, 1].
        records: N prompts of this world; siblings may share one record.
    Returns: "exact" (N,) bool: the objects wanted and nothing else, in the right colours and cells, the relation by GenEval's
        rule on the boxes. "graded" (N,) float32 in [0, 1].
    Raises: ValueError for records of another world, or shapes that differ.
    """
    return judge(detect_arrays(images), records)
