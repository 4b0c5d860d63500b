"""Eight kinds of inference: phrases from which a count, a colour, a shape or a relation follows but is not said."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from unigrpo.worlds.shapes.scene import COLORS, OPPOSITES, PLURALS, SHAPES

KINDS: tuple[str, ...] = ("arithmetic", "sides", "world_color", "negation", "opposite", "comparison", "ordinal", "mixture")
ATTRIBUTES: dict[str, tuple[str, ...]] = {  # what each kind can leave to be inferred
    "arithmetic": ("count",), "sides": ("class",), "world_color": ("color",), "negation": ("color", "class"),
    "opposite": ("position",), "comparison": ("count",), "ordinal": ("color", "class"), "mixture": ("color",)}
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six")
ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth")
SIDES: dict[str, tuple[str, ...]] = {  # the first phrase belongs to difficulty 1, the others come with 2
    "circle": ("no corners", "no straight sides"), "square": ("four sides", "four corners"),
    "triangle": ("three sides", "three corners"), "cross": ("twelve sides", "twelve corners")}
WORLD: dict[str, tuple[str, ...]] = {  # the first two belong to difficulty 1
    "red": ("blood", "a strawberry", "a fire truck", "a tomato"), "green": ("grass", "a frog", "a cucumber", "a leaf"),
    "blue": ("the sky", "the ocean", "a whale", "a sapphire"), "yellow": ("a banana", "the sun", "a lemon", "butter"),
    "purple": ("a grape", "an eggplant", "lavender", "a plum"), "orange": ("a carrot", "a pumpkin", "a basketball", "a tiger")}
MIXTURES: dict[str, tuple[str, str]] = {"green": ("blue", "yellow"), "orange": ("red", "yellow"), "purple": ("red", "blue")}


@dataclass(frozen=True)
class Inference:
    """One attribute said in a roundabout way.

    Args:
        kind: one of KINDS.
        attribute: "count", "color", "class" or "position".
        phrase: the words; for a class and a count above one, in the plural.
        concept: what has to be known or worked out, e.g. "grass", "three minus two".
        misread: the value that somebody takes who always gets this concept wrong.
    """

    kind: str
    attribute: str
    phrase: str
    concept: str
    misread: Any

    def annotation(self) -> dict[str, Any]:
        """What a record's clause keeps."""
        return {"attribute": self.attribute, "concept": self.concept, "misread": self.misread}


def _hashed(concept: str, choices: list[Any]) -> Any:
    """A choice that depends on the concept only: the same in every run."""
    return choices[int.from_bytes(hashlib.sha256(concept.encode()).digest()[:4], "little") % len(choices)]


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _listed(words: list[str], last: str) -> str:
    return f"{' , '.join(words[:-1])} {last} {words[-1]}"


def _count(kind: str, value: int, room: int, rng: np.random.Generator, difficulty: int) -> Inference | None:
    """Arithmetic or comparison; `room` is the largest count that still fits the picture."""
    top = 6 if difficulty > 1 else 4
    if kind == "arithmetic":
        options = [(f"{NUMBERS[a]} plus {NUMBERS[value - a]}", value) for a in range(1, value)]
        options += [(f"{NUMBERS[a]} minus {NUMBERS[a - value]}", value) for a in range(value + 1, top + 1)]
        if difficulty > 1 and 2 * value <= top:
            options.append((f"half of {NUMBERS[2 * value]}", value))
        if difficulty > 1 and value % 2 == 0:
            options.append((f"two times {NUMBERS[value // 2]}", value))
        concept = _pick(rng, options)[0]
        wrong = _hashed(concept, [n for n in (1, 2, 3, 4) if n != value and abs(n - value) <= 2])
        phrase = concept
    else:
        other = _pick(rng, [n for n in range(1, top + 1) if n != value])
        words = [NUMBERS[value], NUMBERS[other]]
        if rng.random() < 0.5:
            words.reverse()
        concept = phrase = f"the {'larger' if value > other else 'smaller'} of {words[0]} and {words[1]}"
        wrong = other
    if wrong > room:  # the usual mistake does not fit beside the other objects
        wrong = value - 1 if value > 1 else value + 1
    return Inference(kind, "count", phrase, concept, wrong) if 1 <= wrong <= room else None


def _choice(kind: str, attribute: str, value: str, plural: bool, rng: np.random.Generator, difficulty: int) -> Inference:
    """Negation or ordinal, of colours or shapes: the answer is in the words, but not the only one there."""
    pool = [word for word in (COLORS if attribute == "color" else SHAPES) if word != value]
    size = (2 if difficulty == 1 else int(rng.integers(2, 4))) + (kind == "ordinal")
    others = [pool[int(i)] for i in rng.permutation(len(pool))[: size - 1]]
    place = int(rng.integers(size))
    words = [*others[:place], value, *others[place:]]
    if kind == "ordinal":
        concept = ORDINALS[place]
        listed = _listed(words, "and")
        noun = "color" if attribute == "color" else "shape"
        phrase = f"{'in' if attribute == 'color' else 'like'} the {concept} {noun} of the list {listed}"
        return Inference(kind, attribute, phrase, concept, words[0] if place else words[1])
    if attribute == "class":
        words, others = ([PLURALS[w] if plural else f"a {w}" for w in group] for group in (words, others))
    denied = f"not {others[0]}" if size == 2 else f"neither {others[0]} nor {others[1]}"
    phrase = f"that {'are' if plural else 'is'} {_listed(words, 'or')} but {denied}"
    return Inference(kind, attribute, phrase, "not" if size == 2 else "neither", next(w for w in pool if w in " ".join(others)))


def infer(kind: str, attribute: str, value: Any, rng: np.random.Generator, *, difficulty: int = 1, plural: bool = False,
          room: int = 4) -> Inference | None:
    """A phrase from which `value` follows.

    Args:
        kind, attribute: a pair of ATTRIBUTES.
        value: the right answer: a count, a colour, a shape, a relation.
        rng: draws the phrase.
        difficulty: 1 has few concepts and small numbers; 2 has all words, numbers to six, lists of up to four.
        plural: whether the noun phrase is in the plural.
        room: for counts, the largest that fits the picture.
    Returns: None if the kind cannot say this value (a primary colour is no mixture).
    """
    if attribute not in ATTRIBUTES[kind]:
        raise ValueError(f"reasoning kind {kind!r} infers {ATTRIBUTES[kind]}, got {attribute!r}")
    if attribute == "count":
        return _count(kind, value, room, rng, difficulty)
    if kind in ("negation", "ordinal"):
        return _choice(kind, attribute, value, plural, rng, difficulty)
    if kind == "opposite":
        words = _pick(rng, ("at the opposite of", "at the side opposite to"))
        return Inference(kind, attribute, f"{words} {OPPOSITES[value]}", f"opposite of {OPPOSITES[value]}", OPPOSITES[value])
    if kind == "sides":
        concept = _pick(rng, SIDES[value][: 1 if difficulty == 1 else None])
        return Inference(kind, attribute, f"with {concept}", concept, _hashed(concept, [s for s in SHAPES if s != value]))
    if kind == "world_color":
        concept = _pick(rng, WORLD[value][: 2 if difficulty == 1 else None])
        wrong = _hashed(concept, [c for c in COLORS if c != value])
        return Inference(kind, attribute, f"in the color of {concept}", concept, wrong)
    if value not in MIXTURES:
        return None
    first, second = MIXTURES[value] if rng.random() < 0.5 else MIXTURES[value][::-1]
    concept = " and ".join(MIXTURES[value])
    phrase = _pick(rng, (f"in the mix of {first} and {second}", f"in the color that {first} and {second} make"))
    wrong = _hashed(concept, [c for c in COLORS if c not in (value, first, second)])
    return Inference(kind, attribute, phrase, concept, wrong)
