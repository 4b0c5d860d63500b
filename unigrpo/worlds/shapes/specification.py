"""What a prompt asks for, freed from its words: clauses of distinct shapes, at most one relation.

Two prompts with the same specification are paraphrases; the splits are disjoint in specifications (prompts/curate.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from typing import Any

import numpy as np

from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.scene import CELLS, COLORS, OPPOSITES, RELATIONS, SHAPES, Object, Scene, relation_holds


@dataclass(frozen=True)
class Clause:
    """`count` objects of one shape; colour None means any, cell None means anywhere (a given cell goes with count 1)."""

    shape: str
    count: int = 1
    color: str | None = None
    cell: str | None = None


@dataclass(frozen=True)
class Specification:
    """All objects of the picture, no more and no fewer.

    Args:
        clauses: shapes are distinct, as GenEval's rules need (they look at a class's first `count` boxes).
        relation: (relation, subject clause, target clause) or None.
    """

    clauses: tuple[Clause, ...]
    relation: tuple[str, int, int] | None = None

    @property
    def size(self) -> int:
        """Number of objects."""
        return sum(clause.count for clause in self.clauses)

    def key(self) -> str:
        """Canonical text: the order of clauses and the side from which a relation is told do not matter."""
        clauses = sorted([c.shape, c.count, c.color or "", c.cell or ""] for c in self.clauses)
        relation: list[str] = []
        if self.relation is not None:
            name, subject, target = self.relation
            if name in ("right of", "below"):
                name, subject, target = OPPOSITES[name], target, subject
            relation = [name, self.clauses[subject].shape, self.clauses[target].shape]
        return json.dumps([clauses, relation], separators=(",", ":"))


def include_clauses(spec: Specification, inferred: dict[int, dict[str, Any]] | None = None) -> tuple[dict[str, Any], ...]:
    """GenEval's include list: with a relation the target is clause 0 and the subject clause 1.

    Args:
        spec: what is asked for.
        inferred: for a clause of `spec`, what the prompt only implies (see reasoning.py); kept under the key "inferred",
            which no verdict reads.
    """
    order = list(range(len(spec.clauses)))
    if spec.relation is not None:
        first = [spec.relation[2], spec.relation[1]]
        order = first + [i for i in order if i not in first]
    include = []
    for place, index in enumerate(order):
        clause = spec.clauses[index]
        entry: dict[str, Any] = {"class": clause.shape, "count": clause.count}
        if clause.color is not None:
            entry["color"] = clause.color
        if clause.cell is not None:
            entry["cell"] = clause.cell
        if spec.relation is not None and place == 1:
            entry["position"] = [spec.relation[0], 0]
        if inferred and index in inferred:
            entry["inferred"] = inferred[index]
        include.append(entry)
    return tuple(include)


def read_include(include: Iterable[dict[str, Any]]) -> Specification:
    """The specification of include clauses, whatever their classes are called; the last position clause counts."""
    clauses, relation = [], None
    for index, entry in enumerate(include):
        clauses.append(Clause(entry["class"], int(entry["count"]), entry.get("color"), entry.get("cell")))
        if "position" in entry:
            relation = (entry["position"][0], index, int(entry["position"][1]))
    return Specification(tuple(clauses), relation)


def specification(record: PromptRecord) -> Specification:
    """The specification of a record of this world.

    Raises: ValueError if a clause names an unknown shape, colour, cell or relation.
    """
    spec = read_include(record.include)
    named = [("class", c.shape, SHAPES) for c in spec.clauses] + [("color", c.color, COLORS) for c in spec.clauses]
    named += [("cell", c.cell, CELLS) for c in spec.clauses]
    if spec.relation is not None:
        named.append(("position", spec.relation[0], RELATIONS))
    for name, value, choices in named:
        if value is not None and value not in choices:
            raise ValueError(f"prompt {record.id} ({record.prompt!r}): {name} must be one of {choices}, got {value!r}")
    return spec


def draw(spec: Specification, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies the specification: free colours and cells are drawn independently, objects follow the
    prompt's order.

    The two objects of a relation are placed so that no jitter can turn it (`relation_holds(strict=True)`).
    """
    taken = {clause.cell for clause in spec.clauses if clause.cell is not None}
    free = [cell for cell in CELLS if cell not in taken]
    places: dict[int, list[str]] = {i: [c.cell] for i, c in enumerate(spec.clauses) if c.cell is not None}
    if spec.relation is not None:
        name, subject, target = spec.relation
        pairs = [(a, b) for a, b in permutations(free, 2) if relation_holds(name, a, b, strict=True)]
        a, b = pairs[int(rng.integers(len(pairs)))]
        places[subject], places[target] = [a], [b]
        free = [cell for cell in free if cell not in (a, b)]
    free = [free[int(i)] for i in rng.permutation(len(free))]
    objects = []
    spoken = list(range(len(spec.clauses)))  # the prompt's order: a relation names its subject before its target
    if spec.relation is not None:
        spoken = [*spec.relation[1:], *(i for i in spoken if i not in spec.relation[1:])]
    for index in spoken:
        clause, cells = spec.clauses[index], places.get(index, [])
        while len(cells) < clause.count:
            cells = [*cells, free.pop()]
        for cell in cells:
            objects.append(Object(clause.color or COLORS[int(rng.integers(len(COLORS)))], clause.shape, cell))
    return tuple(objects)


def satisfies(scene: Scene, spec: Specification) -> bool:
    """Exactly the objects asked for, no others, in the right colours and cells, and the relation holds."""
    if len(scene) != spec.size:
        return False
    for clause in spec.clauses:
        found = [item for item in scene if item.shape == clause.shape]
        if len(found) != clause.count or any(item.color != clause.color for item in found if clause.color is not None):
            return False
        if clause.cell is not None and all(item.cell != clause.cell for item in found):
            return False
    if spec.relation is None:
        return True
    name, subject, target = spec.relation
    pairs = product([item.cell for item in scene if item.shape == spec.clauses[subject].shape],
                    [item.cell for item in scene if item.shape == spec.clauses[target].shape])
    return all(relation_holds(name, a, b) for a, b in pairs)


def category(spec: Specification) -> str:
    """GenEval's category of a specification."""
    if spec.relation is not None:
        return "position"
    if any(clause.count > 1 for clause in spec.clauses):
        return "counting"
    colored = sum(clause.color is not None for clause in spec.clauses)
    if len(spec.clauses) == 1:
        return "colors" if colored else "single_object"
    return "color_attr" if colored == len(spec.clauses) else "two_object"


def all_specifications() -> Iterator[Specification]:
    """Every distinct specification that the generator can reach (see prompts.sample_specification), each once."""
    maybe_colors, maybe_cells = (None, *COLORS), (None, *CELLS)
    for shape, color, cell in product(SHAPES, maybe_colors, maybe_cells):
        yield Specification((Clause(shape, 1, color, cell),))
    for size in (1, 2):  # counting
        for shapes, counts in product(combinations(SHAPES, size), product((1, 2, 3, 4), repeat=size)):
            if max(counts) > 1 and sum(counts) <= 4:
                for colors in product(maybe_colors, repeat=size):
                    yield Specification(tuple(map(Clause, shapes, counts, colors)))
    for shapes in combinations(SHAPES, 2):  # two objects: at most one has a cell
        for colors, cells in product(product(maybe_colors, repeat=2), product(maybe_cells, repeat=2)):
            if None in cells:
                yield Specification(tuple(Clause(s, 1, c, k) for s, c, k in zip(shapes, colors, cells, strict=True)))
    for size in (3, 4):
        for shapes, colors in product(combinations(SHAPES, size), product(COLORS, repeat=size)):
            yield Specification(tuple(Clause(s, 1, c) for s, c in zip(shapes, colors, strict=True)))
    for size in (2, 3):  # relations between two objects, perhaps beside a third
        for shapes, colors in product(combinations(SHAPES, size), product(maybe_colors, repeat=size)):
            clauses = tuple(Clause(s, 1, c) for s, c in zip(shapes, colors, strict=True))
            for (subject, target), name in product(permutations(range(size), 2), ("left of", "above")):
                yield Specification(clauses, (name, subject, target))


def with_attribute(spec: Specification, index: int, attribute: str, value: Any) -> Specification:
    """The specification with one attribute replaced: "count", "color", "class" of a clause, or "position" of the relation."""
    if attribute == "position":
        assert spec.relation is not None
        return replace(spec, relation=(value, *spec.relation[1:]))
    field = {"count": "count", "color": "color", "class": "shape"}[attribute]
    clauses = list(spec.clauses)
    clauses[index] = replace(clauses[index], **{field: value})
    return replace(spec, clauses=tuple(clauses))
