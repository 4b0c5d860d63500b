"""Thinking of the shapes world: an explicit plan in words, colour, shape and cell of every object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.scene import CELLS, COLORS, MAX_OBJECTS, OPPOSITES, RELATIONS, SHAPES, Object, Scene
from unigrpo.worlds.shapes.specification import draw, satisfies, specification, with_attribute

OPENERS: tuple[str, ...] = ("i will draw", "the picture shows", "plan :", "draw", "first")
_COLOR, _SHAPE = (f"({'|'.join(words)})" for words in (COLORS, SHAPES))
_CELL = f"({'|'.join(sorted(CELLS, key=len, reverse=True))})"  # longest first: "top left" before "top"
_OBJECT = rf"(?:(?:an? )?{_COLOR} {_SHAPE} (?:(?:at|in) (?:the )?)?{_CELL}|{_CELL} :? ?(?:an? )?{_COLOR} {_SHAPE})"
_SEPARATOR = r" (?:, and|, then|,|and|then) "
_PLAN = re.compile(rf"(?:(?:{'|'.join(OPENERS)}) )?{_OBJECT}(?:{_SEPARATOR}{_OBJECT})*(?: \.)?")
_OBJECT_RE, _SEPARATOR_RE = re.compile(_OBJECT), re.compile(_SEPARATOR)


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plan_text(scene: Scene, rng: np.random.Generator) -> str:
    """One of five phrasings of a scene, its objects in the scene's order; at most 36 words for four objects.

    All of them name the cell last: what belongs to what is learned sooner from one order than from two.

    The inverse of `parse_plan`: parse_plan(plan_text(scene, rng)) == scene.
    """
    style = int(rng.integers(len(OPENERS)))
    parts = []
    for item in scene:
        thing = f"{item.color} {item.shape}"
        if style == 0:
            parts.append(f"{article(thing)} at the {item.cell}")
        elif style == 1:
            parts.append(f"{article(thing)} in the {item.cell}")
        elif style == 2:
            parts.append(f"{thing} {item.cell}")
        else:
            parts.append(f"{article(thing)} {'at ' if style == 4 else ''}{item.cell}")
    separator = {1: " and ", 4: " , then "}.get(style, " , ")
    return f"{OPENERS[style]} {separator.join(parts)} ."


def parse_plan(text: str) -> Scene | None:
    """The scene that a plan describes, in any mixture of the phrasings.

    Returns: None if the text is malformed: an unknown word, a missing attribute, a cell named twice, more than four objects.
    """
    text = " ".join(text.split())
    if not _PLAN.fullmatch(text):
        return None
    for opener in OPENERS:
        if text.startswith(opener + " "):
            text = text[len(opener) + 1:]
            break
    scene = []
    for part in _SEPARATOR_RE.split(text.removesuffix(" .")):
        match = _OBJECT_RE.fullmatch(part)
        if match is None:
            return None
        color, shape, cell, cell2, color2, shape2 = match.groups()
        scene.append(Object(color or color2, shape or shape2, cell or cell2))
    if len(scene) > MAX_OBJECTS or len({item.cell for item in scene}) < len(scene):
        return None
    return tuple(scene)


def plan_satisfies(scene: Scene | None, record: PromptRecord) -> bool:
    """Whether a plan is a right answer to a prompt: the right objects and no others, relation and cells included."""
    return scene is not None and satisfies(scene, specification(record))


def wrong_plan(record: PromptRecord, rng: np.random.Generator, *, systematic: bool) -> Scene:
    """A plan with one wrong inference, everything else right.

    Args:
        record: a reasoning prompt.
        rng: draws the scene, and the wrong value unless systematic.
        systematic: True takes the value that this concept always takes when it is misunderstood (grass is always purple,
            say, and "not" is always overlooked): greedy decoding learns it too. False draws any wrong value.
    Raises: ValueError if the prompt has nothing to infer.
    """
    index = next((i for i, clause in enumerate(record.include) if "inferred" in clause), None)
    if index is None:
        raise ValueError(f"a wrong plan needs something to infer, got the plain prompt {record.prompt!r} ({record.id})")
    spec, clause = specification(record), record.include[index]
    attribute, value = clause["inferred"]["attribute"], clause["inferred"]["misread"]
    if not systematic:
        right = clause["position"][0] if attribute == "position" else clause[attribute]
        room = MAX_OBJECTS - spec.size + clause["count"]
        choices: dict[str, Sequence[Any]] = {"count": range(1, room + 1), "color": COLORS, "class": SHAPES,
                                             "position": tuple(OPPOSITES[name] for name in RELATIONS if name == right)}
        wrong = [choice for choice in choices[attribute] if choice != right]
        value = wrong[int(rng.integers(len(wrong)))]
    return draw(with_attribute(spec, index, attribute, value), rng)


def sft_thinking(record: PromptRecord, rng: np.random.Generator, error_share: float,
                 systematic_share: float) -> tuple[str, bool]:
    """The thinking of a warm-up example, right or, for some of the reasoning prompts, wrong.

    Args:
        record: any prompt of this world.
        rng: draws everything.
        error_share: probability that a reasoning prompt gets a wrong plan; plain prompts never do.
        systematic_share: probability that a wrong plan is the concept's systematic one, the rest being random ones.
    Returns: (plan text, whether the plan is right).
    """
    wrong, systematic = rng.random(2) < (error_share, systematic_share)
    if record.needs_reasoning and wrong:
        return plan_text(wrong_plan(record, rng, systematic=bool(systematic)), rng), False
    return plan_text(draw(specification(record), rng), rng), True
