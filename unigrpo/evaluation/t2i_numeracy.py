"""T2I-CompBench++'s numeracy rules: how many of what a prompt wants, and how an image's detections compare.

    score = sum over the n objects of the prompt of (1/2 if it is present + 1/2 if its number is exact) / n
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from unigrpo.evaluation.t2i_compbench import PEOPLE, Box, Found, person_or
from unigrpo.evaluation.t2i_labels import known, means

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
# "telivision" is spelt so in the official table, so that "television" is looked up by its own name.
RENAMES = {**dict.fromkeys(PEOPLE, "person"), "ship": "boat", "goldfish": "fish", "painting": "picture", "telivision": "tv"}
SAME_OBJECT = 0.9        # two boxes of a label are one object above this share

Wanted = Sequence[tuple[str, int]]


def read_plurals(path: Path) -> dict[str, str]:
    """singular -> plural of the official table, lines "knife - knives".

    Raises: ValueError naming a line that is no pair.
    """
    plurals: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            singular, separator, plural = (part.strip() for part in line.partition(" - "))
            if not (singular and separator and plural):
                raise ValueError(f"{path}:{number} must read \"singular - plural\", got {line!r}; take new_objects.txt of "
                                 "T2I-CompBench")
            plurals[singular] = plural
    return plurals


def wanted_objects(prompt: str, plurals: Mapping[str, str]) -> list[tuple[str, int]]:
    """(object, count) as the prompt names them: a, an or one with a singular, two to eight with a plural of the table.

    Args:
        plurals: singular -> plural. The noun follows its number at once, as two words or one.
    """
    singulars = {plural: singular for singular, plural in plurals.items()}
    words = re.findall(r"\w+|[^\w\s]", prompt)
    wanted = []
    for place, word in enumerate(words):
        count = NUMBERS.get(word)
        if count is None:
            continue
        for length in (2, 1):
            noun = " ".join(words[place + 1:place + 1 + length])
            if count == 1 and noun in plurals:
                wanted.append((noun, 1))
                break
            if count > 1 and noun in singulars:
                wanted.append((singulars[noun], count))
                break
    return wanted


def duplicate(box_a: Box, box_b: Box) -> bool:
    """Whether two boxes of one label are the same object: more than 0.9 of either lies inside the other.

    (An IoU above 0.9, the official third condition, implies that.)

    Args:
        box_a, box_b: x1, y1, x2, y2 in pixels; a side is x2 - x1 + 1.
    """
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0.0) * max(y2 - y1 + 1, 0.0)

    shared = area(max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3]))
    return shared > SAME_OBJECT * min(area(*box_a), area(*box_b))


def distinct(detections: Sequence[Found]) -> list[str]:
    """Labels of the detections that are no duplicate of an earlier one of their label, in order."""
    kept: list[Found] = []
    for item in detections:
        if not any(other.label == item.label and duplicate(item.box, other.box) for other in kept):
            kept.append(item)
    return [item.label for item in kept]


def numeracy_score(wanted: Wanted, detections: Sequence[Found], *, official: bool = True) -> float:
    """The score of one image, in [0, 1].

    Args:
        wanted: of `wanted_objects`; without any the score is 0.
        detections: by falling score, all above `t2i_spatial.MIN_SCORE`.
        official: renames by table; a name that no label equals takes over every label that contains it, for the later objects
            too ("pen" takes penguins); boys and girls are compared with the same persons. False goes by names and synonyms
            (`t2i_labels`), and compares "three boys and two girls" with five persons.
    """
    labels = distinct(detections)
    if not official:
        return _by_names(wanted, labels)
    score, weight = 0.0, 1 / len(wanted) if wanted else 0.0
    for name, count in wanted:
        name = RENAMES.get(name, name)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        if name in labels:
            score += weight / 2
            if labels.count(name) == count:
                score += weight / 2
    return score


def ceiling(wanted: Wanted, labels: Collection[str], *, official: bool = True) -> float:
    """The best score that any image can earn from a detector with these labels, as if objects did not disturb one another."""
    if not wanted:
        return 0.0
    nouns = [RENAMES.get(name, name) if official else name for name, _ in wanted]
    return sum(known(noun, labels, contained=True, official=official) for noun in nouns) / len(nouns)


def _by_names(wanted: Wanted, labels: Sequence[str]) -> float:
    """The rule that was meant: persons, whom detectors cannot tell apart, are counted together."""
    totals: dict[str, int] = {}
    for name, count in wanted:
        totals[person_or(name)] = totals.get(person_or(name), 0) + count
    counts = {name: sum(means(name, label) for label in labels) for name in totals}
    return sum((counts[person_or(name)] > 0) / 2 + (counts[person_or(name)] == totals[person_or(name)]) / 2
               for name, _ in wanted) / len(wanted) if wanted else 0.0
