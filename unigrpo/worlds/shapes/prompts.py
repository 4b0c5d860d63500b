"""Prompts of the shapes world: GenEval's six categories, plain or with one attribute left to be inferred; and captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unigrpo.prompts.records import record_id
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.reasoning import ATTRIBUTES, KINDS, MIXTURES, NUMBERS, ORDINALS, SIDES, WORLD, Inference, infer
from unigrpo.worlds.shapes.scene import CELLS, COLORS, PLURALS, RELATIONS, SHAPES, Scene, relation_holds
from unigrpo.worlds.shapes.specification import (
    Clause,
    Specification,
    category,
    draw,
    include_clauses,
    specification,
    with_attribute,
)
from unigrpo.worlds.shapes.thinking import OPENERS as PLAN_OPENERS
from unigrpo.worlds.shapes.thinking import article, plan_text

TAGS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OPENERS: tuple[str, ...] = ("", "a photo of ", "a picture of ", "draw ", "show ")
CATEGORIES_OF: dict[str, tuple[str, ...]] = {  # where an attribute can be left out
    "count": ("counting",), "position": ("position",), "color": ("colors", "color_attr", "position", "counting"),
    "class": ("single_object", "two_object", "colors", "color_attr", "position", "counting")}


def noun_phrase(clause: Clause, inference: Inference | None = None) -> str:
    """The words for one clause, one attribute possibly said in a roundabout way."""
    attribute = inference.attribute if inference else None
    many = clause.count > 1 or attribute == "count"
    color = f"{clause.color} " if clause.color and attribute != "color" else ""
    shape = "shape" if attribute == "class" else clause.shape
    thing = color + (PLURALS[shape] if many else shape)
    if inference is None or attribute == "position":
        text = f"{NUMBERS[clause.count]} {thing}" if many else article(thing)
    elif attribute == "count":
        text = f"{inference.phrase} {thing}" if inference.kind == "arithmetic" else f"as many {thing} as {inference.phrase}"
    else:
        text = f"{f'{NUMBERS[clause.count]} {thing}' if many else article(thing)} {inference.phrase}"
    if clause.cell:
        text += f" in the {clause.cell}"
    return text


def prompt_text(spec: Specification, index: int = -1, inference: Inference | None = None) -> str:
    """The prompt of a specification; `inference` belongs to clause `index`."""
    phrases = [noun_phrase(clause, inference if i == index else None) for i, clause in enumerate(spec.clauses)]
    if spec.relation is None:
        return phrases[0] if len(phrases) == 1 else f"{' , '.join(phrases[:-1])} and {phrases[-1]}"
    relation, subject, target = spec.relation
    if inference is not None and inference.attribute == "position":
        relation = inference.phrase
    comma = " ," if inference is not None and index == subject and inference.attribute != "position" else ""
    rest = [phrase for i, phrase in enumerate(phrases) if i not in (subject, target)]
    return " , and ".join([f"{phrases[subject]}{comma} {relation} {phrases[target]}", *rest])


def sample_specification(tag: str, rng: np.random.Generator, *, size: int, cell_share: float) -> Specification:
    """A random specification of a GenEval category.

    Args:
        tag: one of TAGS.
        rng: draws it.
        size: number of objects to aim at; a category that cannot have as many (few) takes its most (fewest).
        cell_share: probability that one object's place is given (single_object, colors, two_object, color_attr).
    """
    def color(share: float = 1.0) -> str | None:
        return COLORS[int(rng.integers(len(COLORS)))] if rng.random() < share else None

    shapes = [SHAPES[int(i)] for i in rng.permutation(len(SHAPES))]
    if tag == "counting":
        count = min(max(size, 2), 4)
        splits: list[tuple[int, ...]] = [(count,)] * 2
        if count > 2:
            splits += [(n, count - n) for n in range(1, count)]
        chosen = splits[int(rng.integers(len(splits)))]
        return Specification(tuple(Clause(s, n, color(0.5)) for s, n in zip(shapes, chosen, strict=False)))
    if tag == "position":
        relation = (RELATIONS[int(rng.integers(len(RELATIONS)))], 0, 1)
        return Specification(tuple(Clause(s, 1, color(0.6)) for s in shapes[: min(max(size, 2), 3)]), relation)
    if tag in ("single_object", "colors"):
        clauses = [Clause(shapes[0], 1, color() if tag == "colors" else None)]
    elif tag == "two_object":
        clauses = [Clause(shapes[0], 1, color(0.4)), Clause(shapes[1])]
    else:
        clauses = [Clause(s, 1, color()) for s in shapes[: min(max(size, 2), 4)]]
    if len(clauses) < 3 and rng.random() < cell_share:
        place = int(rng.integers(len(clauses)))
        cell = CELLS[int(rng.integers(len(CELLS)))]
        clauses[place] = Clause(clauses[place].shape, 1, clauses[place].color, cell)
    return Specification(tuple(clauses))


def is_heldout(inference: Inference, spec: Specification, index: int, share: float) -> bool:
    """Whether this phrase beside this shape (or, for an inferred shape, this colour) is reserved for evaluation.

    A function of the pair alone, the same in every run: about `share` of all pairs.
    """
    partner = (spec.clauses[index].color or "any") if inference.attribute == "class" else spec.clauses[index].shape
    key = "|".join(("heldout", inference.kind, inference.phrase, partner))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") < share * 2.0**64


def make_record(spec: Specification, prompt: str, index: int = -1, inference: Inference | None = None,
                heldout: bool = False) -> PromptRecord:
    """The record of a prompt: GenEval's clauses; counting excludes one more of each of its classes."""
    inferred = {index: inference.annotation()} if inference is not None else None
    include = include_clauses(spec, inferred)
    counted = category(spec) == "counting" or (inference is not None and inference.attribute == "count")
    tag = "counting" if counted else category(spec)
    exclude = tuple({"class": c["class"], "count": c["count"] + 1} for c in include) if counted else ()
    return PromptRecord(id=record_id(tag, prompt, include, exclude), tag=tag, prompt=prompt, include=include, exclude=exclude,
                        source="shapes/heldout" if heldout else "shapes", needs_reasoning=inference is not None,
                        reasoning=inference.kind if inference is not None else None)


def _weighted(tags: Sequence[str], weights: Mapping[str, float], rng: np.random.Generator) -> str:
    """One of the categories, by weight."""
    p = np.array([weights[tag] for tag in tags])
    return tags[int(rng.choice(len(tags), p=p / p.sum()))]


def _reasoning_spec(kind: str, tag_weights: Mapping[str, float], rng: np.random.Generator, *, size: int, cell_share: float,
                    difficulty: int) -> tuple[Specification, int, Inference] | None:
    """One try at a specification and an attribute of it that this kind can say."""
    attribute = ATTRIBUTES[kind][int(rng.integers(len(ATTRIBUTES[kind])))]
    tags = [tag for tag in CATEGORIES_OF[attribute] if tag_weights.get(tag, 0.0) > 0]
    if not tags:
        return None
    spec = sample_specification(_weighted(tags, tag_weights, rng), rng, size=size, cell_share=cell_share)
    index = int(rng.integers(len(spec.clauses)))
    if attribute == "count":  # a lone object can be the answer too: three minus two circles
        index = int(np.argmax([clause.count for clause in spec.clauses]))
        if size == 1:
            spec = Specification((Clause(spec.clauses[index].shape, 1, spec.clauses[index].color),))
            index = 0
    elif attribute == "position":
        index = 0  # the subject
    elif attribute == "color":
        if spec.clauses[index].color is None or kind == "mixture":
            choices = tuple(MIXTURES) if kind == "mixture" else COLORS
            spec = with_attribute(spec, index, "color", choices[int(rng.integers(len(choices)))])
    clause = spec.clauses[index]
    value = {"count": clause.count, "color": clause.color, "class": clause.shape,
             "position": spec.relation[0] if spec.relation else None}[attribute]
    inference = infer(kind, attribute, value, rng, difficulty=difficulty, plural=clause.count > 1,
                      room=4 - spec.size + clause.count)
    return None if inference is None else (spec, index, inference)


def sample_record(rng: np.random.Generator, *, reasoning_kinds: Sequence[str] = KINDS, reasoning_share: float = 0.65,
                  reasoning_difficulty: int = 1, tag_weights: Mapping[str, float] | None = None,
                  object_shares: Sequence[float] = (0.38, 0.42, 0.17, 0.03), cell_share: float = 0.3,
                  heldout_share: float = 0.15) -> PromptRecord:
    """One random prompt.

    Args:
        rng: draws it.
        reasoning_kinds: which of KINDS are on; drawn evenly.
        reasoning_share: probability that the prompt leaves one attribute to be inferred.
        reasoning_difficulty: 1 or 2, see `reasoning.infer`.
        tag_weights: relative weights of TAGS, None means equal; an inferred attribute restricts the choice.
        object_shares: weights of aiming at one, two, three, four objects; a category has its own least and most.
        cell_share: probability that a place is given, where the category allows it.
        heldout_share: share of (phrase, partner) pairs reserved for evaluation; their records have source "shapes/heldout".
    Raises: ValueError for an unknown kind or category.
    """
    unknown = [kind for kind in reasoning_kinds if kind not in KINDS] + [tag for tag in tag_weights or () if tag not in TAGS]
    if unknown:
        raise ValueError(f"reasoning kinds must be among {KINDS} and categories among {TAGS}, got {unknown}")
    weights = dict.fromkeys(TAGS, 1.0) if tag_weights is None else dict(tag_weights)
    sizes = np.array(object_shares, dtype=np.float64)
    opener = OPENERS[int(rng.integers(len(OPENERS)))]
    reasons = bool(reasoning_kinds) and rng.random() < reasoning_share
    kind = reasoning_kinds[int(rng.integers(len(reasoning_kinds)))] if reasons else None
    while True:
        size = 1 + int(rng.choice(len(sizes), p=sizes / sizes.sum()))
        if kind is not None:
            found = _reasoning_spec(kind, weights, rng, size=size, cell_share=cell_share, difficulty=reasoning_difficulty)
            if found is None:
                continue
            spec, index, inference = found
            return make_record(spec, opener + prompt_text(spec, index, inference), index, inference,
                               heldout=is_heldout(inference, spec, index, heldout_share))
        tags = [tag for tag in TAGS if weights.get(tag, 0.0) > 0]
        spec = sample_specification(_weighted(tags, weights, rng), rng, size=size, cell_share=cell_share)
        return make_record(spec, opener + prompt_text(spec))


def sample_scene(record: PromptRecord, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies the record exactly."""
    return draw(specification(record), rng)


def _caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Specification]:
    """One caption of a scene and what it specifies: everything said, or groups counted, or two objects related."""
    style = int(rng.integers(3))
    groups: dict[tuple[str, str], int] = {}
    for item in scene:
        groups[item.color, item.shape] = groups.get((item.color, item.shape), 0) + 1
    clauses = tuple(Clause(shape, count, color) for (color, shape), count in groups.items())
    if style == 0:  # with places
        full = Specification(tuple(Clause(item.shape, 1, item.color, item.cell) for item in scene))
        return " and ".join(noun_phrase(clause) for clause in full.clauses), full
    holds = [name for name in RELATIONS if len(scene) == 2 and relation_holds(name, scene[0].cell, scene[1].cell)]
    if style == 1 and len(clauses) == 2 and holds:
        related = Specification(clauses, (holds[int(rng.integers(len(holds)))], 0, 1))
        return prompt_text(related), related
    return prompt_text(Specification(clauses)), Specification(clauses)


def caption_text(scene: Scene, rng: np.random.Generator, reserved: Callable[[str], bool] | None = None) -> str:
    """A literal caption of a scene in the words of plain prompts, for pretraining.

    Args:
        scene: what is to be described.
        rng: draws the phrasing.
        reserved: which specifications (`Specification.key`) must not be told, those of evaluation prompts, say: such a scene
            gets another caption, or at last an explicit plan.
    """
    opener = OPENERS[int(rng.integers(len(OPENERS)))]
    for _ in range(8):
        text, spec = _caption(scene, rng)
        if reserved is None or not reserved(spec.key()):
            return opener + text
    return plan_text(scene, rng)


def vocabulary() -> list[str]:
    """Every word that prompts, captions, plans and the system prompt use, sorted; fewer than 200."""
    texts = [*SHAPES, *PLURALS.values(), "shape", *COLORS, *CELLS, *RELATIONS, *NUMBERS, *ORDINALS, *OPENERS, *PLAN_OPENERS,
             *(phrase for phrases in (*SIDES.values(), *WORLD.values()) for phrase in phrases),
             "a an the , : . and or in at to of with as many like that is are but not neither nor then",
             "plus minus times half larger smaller color list mix make opposite side",
             "you are a painter first plan the picture in words then draw it"]
    return sorted({word for text in texts for word in text.split()})
