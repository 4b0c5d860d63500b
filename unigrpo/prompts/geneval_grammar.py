"""GenEval's prompt grammar: the official 553 records, byte for byte, and training prompts that are none of them.

    single_object  a photo of a <class>                         position    a photo of a <class> <relation> a <class>
    two_object     a photo of a <class> and a <class>           colors      a photo of a <color> <class>
    counting       a photo of <two|three|four> <class>s         color_attr  a photo of a <color> <class> and a <color> <class>

The grammar is that of GenEval (arXiv:2310.11513, github.com/djghosh13/geneval, MIT), written anew from its description; plurals
are GenEval's own ("benchs", "scissorses"). A person has no colour, as in GenEval. A training prompt differs from every official
record in its specification, not only in its words; `firewall` checks the words against all benchmarks as well.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from unigrpo.evaluation.geneval import COLORS, RELATIONS, TAGS
from unigrpo.prompts.records import record_id
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord

CLASSES: tuple[str, ...] = (  # COCO's things in COCO's order, three of them renamed by GenEval
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon",
    "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush")
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OFFICIAL_SEED = 43
OFFICIAL_PER_TAG = 100
FLOW_GRPO_MIX: dict[str, float] = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
PATIENCE = 3000  # draws without a new prompt after which a tag counts as exhausted
SOURCE = "geneval-grammar"

Fields = dict[str, Any]  # an official record: tag, include, exclude (counting only), prompt, in this order


def with_article(words: str) -> str:
    """The words after "a", or after "an" where a vowel letter follows."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """GenEval's plural, which knows no other rule: "es" after an s, "s" after anything else."""
    return name + ("es" if name.endswith("s") else "s")


def fields(tag: str, classes: Sequence[str], *, colors: Sequence[str] = (), count: int = 1, relation: str = "") -> Fields:
    """An official record from its parts.

    Args:
        tag: one of TAGS.
        classes: in the order in which the prompt names them.
        colors: one per class for `colors` and `color_attr`.
        count: of `counting`; one more of the class makes an image wrong.
        relation: of `position`, of the first class to the second; the record lists the second first, as the target.
    """
    clauses: list[dict[str, Any]] = [{"class": name, "count": count} for name in classes]
    for clause, color in zip(clauses, colors, strict=False):
        clause["color"] = color
    words = [with_article(f"{color} {name}") for color, name in zip(colors, classes, strict=True)] if colors else [
        with_article(name) for name in classes]
    if tag == "counting":
        words = [f"{NUMBERS[count]} {plural(classes[0])}"]
    if tag == "position":
        clauses = [clauses[1], {**clauses[0], "position": [relation, 0]}]
        words = [f"{words[0]} {relation} {words[1]}"]
    exclude = {"exclude": [{"class": classes[0], "count": count + 1}]} if tag == "counting" else {}
    return {"tag": tag, "include": clauses, **exclude, "prompt": f"a photo of {' and '.join(words)}"}


def draw(tag: str, rng: np.random.Generator, classes: Sequence[str] = CLASSES, max_count: int = 4) -> Fields:
    """One random record of a tag; the calls on `rng`, in number and order, are those that made the official set.

    Args:
        tag: one of TAGS.
        rng: draws it.
        classes: to choose from; at least three, "person" perhaps among them.
        max_count: counting draws from 2 to this; the official set's is 4.
    """
    # Where colour matters person is left out: an index among the others is counted on from person, round the list.
    person = classes.index("person") if "person" in classes else None
    size = len(classes)

    def colorable(index: int) -> str:
        return classes[index] if person is None else classes[(index + 1 + person) % size]

    things = size - (person is not None)
    if tag == "single_object":
        return fields(tag, [classes[int(rng.choice(size))]])
    if tag == "two_object":
        return fields(tag, [classes[int(i)] for i in rng.choice(size, size=2, replace=False)])
    if tag == "counting":
        name = classes[int(rng.choice(size))]
        return fields(tag, [name], count=int(rng.integers(2, max_count, endpoint=True)))
    if tag == "colors":
        name = colorable(int(rng.choice(things)))
        return fields(tag, [name], colors=[COLORS[int(rng.choice(len(COLORS)))]])
    if tag == "position":
        pair = [classes[int(i)] for i in rng.choice(size, size=2, replace=False)]
        return fields(tag, pair, relation=RELATIONS[int(rng.choice(len(RELATIONS)))])
    if tag == "color_attr":
        pair = [colorable(int(i)) for i in rng.choice(things, size=2, replace=False)]
        return fields(tag, pair, colors=[COLORS[int(i)] for i in rng.choice(len(COLORS), size=2, replace=False)])
    raise ValueError(f"a GenEval tag must be one of {TAGS}, got {tag!r}")


@lru_cache(maxsize=1)
def official_lines() -> tuple[str, ...]:
    """The 553 lines of GenEval's evaluation_metadata.jsonl: 580 draws from one stream, the first of equal ones kept."""
    rng = np.random.default_rng(OFFICIAL_SEED)
    records = [fields("single_object", [CLASSES[int(i)]]) for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    records += [draw(tag, rng) for tag in TAGS[1:] for _ in range(OFFICIAL_PER_TAG)]
    return tuple(dict.fromkeys(json.dumps(record) for record in records))


def specification(include: Iterable[Mapping[str, Any]]) -> tuple[Any, ...]:
    """What include clauses ask for: their order, and the side from which a relation is told, do not matter."""
    clauses = list(include)
    things = sorted((c["class"], int(c["count"]), c.get("color", "")) for c in clauses)
    relations = []
    for clause in clauses:
        if "position" in clause:
            name, pair = clause["position"][0], (clause["class"], clauses[clause["position"][1]]["class"])
            mirrored = {"right of": "left of", "below": "above"}.get(name)
            relations.append((mirrored, *reversed(pair)) if mirrored else (name, *pair))
    return (tuple(things), tuple(sorted(relations)))


@lru_cache(maxsize=1)
def official_specifications() -> frozenset[tuple[Any, ...]]:
    """The specifications of the official records."""
    return frozenset(specification(json.loads(line)["include"]) for line in official_lines())


def capacity(tag: str, classes: int, things: int, max_count: int = 4) -> int:
    """Distinct specifications of a tag, official ones included, of so many classes, `things` of which can have a colour."""
    pairs, colors, relations = math.comb(classes, 2), len(COLORS), len(RELATIONS)
    return {"single_object": classes, "two_object": pairs, "counting": (max_count - 1) * classes, "colors": things * colors,
            "position": pairs * relations, "color_attr": math.comb(things, 2) * colors * (colors - 1)}[tag]


def to_record(entry: Fields, *, split: str = "", source: str = SOURCE) -> PromptRecord:
    """An official record as ours."""
    include, exclude = tuple(entry["include"]), tuple(entry.get("exclude", ()))
    return PromptRecord(id=record_id(entry["tag"], entry["prompt"], include, exclude), tag=entry["tag"], prompt=entry["prompt"],
                        include=include, exclude=exclude, split=split, source=source)


def to_fields(record: PromptRecord) -> Fields:
    """Our record as GenEval writes it."""
    entry = asdict(record)
    exclude = {"exclude": list(record.exclude)} if record.exclude else {}
    return {"tag": record.tag, "include": list(entry["include"]), **exclude, "prompt": record.prompt}


def candidates(tag: str, seed: int, classes: Sequence[str], max_count: int = 4) -> Iterator[PromptRecord]:
    """Endless records of a tag: number i is a function of the arguments and i alone."""
    index = 0
    while True:
        yield to_record(draw(tag, generator(seed, SOURCE, tag, index), classes, max_count), split="train")
        index += 1


def quota(number: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers per tag with the right sum: largest remainders, ties in the order of TAGS."""
    total = sum(mix.values())
    shares = {tag: number * mix[tag] / total for tag in TAGS if mix.get(tag, 0) > 0}
    whole = {tag: int(share) for tag, share in shares.items()}
    for tag in sorted(shares, key=lambda name: whole[name] - shares[name])[:number - sum(whole.values())]:
        whole[tag] += 1
    return whole


def training_prompts(number: int, *, seed: int, mix: Mapping[str, float] = FLOW_GRPO_MIX, heldout_classes: Sequence[str] = (),
                     max_count: int = 4, fill: bool = False, refused: Callable[[PromptRecord], bool] | None = None,
                     ) -> tuple[list[PromptRecord], Counter[str]]:
    """Distinct training prompts, none of which specifies what an official record does.

    Args:
        number: of prompts. A tag's are always the first so many of one endless list.
        seed: of the prompts.
        mix: tag -> weight; every tag gets its share of `number`, rounded so that the sum is right.
        heldout_classes: never used, so that they can be tested as unseen.
        max_count: counting asks for 2 to this many; above 4 leaves the official grammar, below 11.
        fill: a tag that runs out leaves its rest to the others, by their weights, instead of raising.
        refused: tells of a record that must not be used: `Firewall` against further benchmarks.
    Returns: the records in a keyed random order; how many draws were dropped, and why (official, repeated, firewall).
    Raises: ValueError for unknown tags or classes, weights that are no shares, or too few specifications.
    """
    unknown = [name for name in heldout_classes if name not in CLASSES] + [tag for tag in mix if tag not in TAGS]
    if unknown:
        raise ValueError(f"held-out classes must be among GenEval's 80 and tags among {TAGS}, got {unknown}")
    if number < 1 or not all(math.isfinite(w) and w >= 0 for w in mix.values()) or sum(mix.values()) <= 0:
        raise ValueError(f"wanted at least 1 prompt and weights of at least 0 with a positive sum, got {number}, {dict(mix)}")
    classes = [name for name in CLASSES if name not in set(heldout_classes)]
    if len(classes) < 3 or not 2 <= max_count < len(NUMBERS):
        raise ValueError(f"wanted at least 3 classes left to draw from and max_count in [2, {len(NUMBERS) - 1}], got "
                         f"{len(classes)} and {max_count}")
    dropped: Counter[str] = Counter(official=0, repeated=0, firewall=0)
    found: dict[str, list[PromptRecord]] = {tag: [] for tag in TAGS if mix.get(tag, 0) > 0}
    tags = {tag: _new_ones(candidates(tag, seed, classes, max_count), refused, dropped) for tag in found}
    weights = {tag: mix[tag] for tag in found}
    while missing := number - sum(map(len, found.values())):
        for tag, wanted in quota(missing, weights).items():
            taken = list(islice(tags[tag], wanted))
            found[tag] += taken
            if len(taken) == wanted:
                continue
            weights.pop(tag)
            if not fill or not weights:
                total = capacity(tag, len(classes), len(classes) - ("person" in classes), max_count)
                raise ValueError(f"the tag {tag} has {len(found[tag])} of its {total} specifications left that are neither "
                                 f"official nor refused, {wanted - len(taken)} too few; lower its weight, ask for fewer "
                                 "prompts or let it leave its rest to the others (fill)")
    records = [record for tag in found for record in found[tag]]
    order = generator(seed, SOURCE, "order").permutation(len(records))
    return [records[int(i)] for i in order], dropped


def _new_ones(source: Iterator[PromptRecord], refused: Callable[[PromptRecord], bool] | None,
              dropped: Counter[str]) -> Iterator[PromptRecord]:
    """The candidates that are new, not official and not refused; ends when PATIENCE of them in a row were not."""
    seen: set[tuple[Any, ...]] = set()
    misses = 0
    while misses <= PATIENCE:
        record = next(source)
        key = specification(record.include)
        reason = "official" if key in official_specifications() else "repeated" if key in seen else (
            "firewall" if refused is not None and refused(record) else None)
        seen.add(key)
        misses = misses + 1 if reason else 0
        if reason is None:
            yield record
        else:
            dropped[reason] += 1
