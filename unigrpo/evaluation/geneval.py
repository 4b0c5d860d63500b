"""GenEval's verdict rules as pure functions on detections: no model, no image.

    detections --keep--> objects per class --verdict--> correct, reason --summarize--> task scores, overall

The rules are those of `evaluation/evaluate_images.py` and `summary_scores.py` in djghosh13/geneval at af4902f (MIT; paper
arXiv:2310.11513), proven equal on golden cases. Thresholds and boxes are compared in float32, as the official arrays are.
Detections arrive with their colour label; which classifier gave it is not this module's business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from unigrpo.types import PromptRecord

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Box = Sequence[float]


class Detection(Protocol):
    """What the rules read of a detected object: `box` is x1, y1, x2, y2 in pixels, the right and bottom edge exclusive."""

    @property
    def label(self) -> str: ...
    @property
    def color(self) -> str | None: ...
    @property
    def box(self) -> Box: ...
    @property
    def score(self) -> float: ...


D = TypeVar("D", bound=Detection)


@dataclass(frozen=True)
class Options:
    """The scorer's command-line options with their official defaults; published numbers use these.

    Args:
        threshold: a detection counts if its score is above this (strictly, in float32).
        counting_threshold: the same for prompts of the tag `counting`.
        max_objects: at most so many per class, the best; applied before the suppression of overlaps.
        max_overlap: greedy suppression within a class keeps a box if its IoU with every kept one is below this; 1 turns it off.
        position_threshold: share of the two objects' summed sizes that an offset must exceed to count as a relation.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1

    def score_threshold(self, tag: str) -> float:
        """The score a detection must exceed for a prompt of this tag."""
        return self.counting_threshold if tag == "counting" else self.threshold


OFFICIAL = Options()


def compute_iou(box_a: Box, box_b: Box) -> float:
    """Intersection over union with pixel-inclusive sizes: a side is x2 - x1 + 1 (GenEval's `compute_iou`).

    Args:
        box_a, box_b: x1, y1, x2, y2 in pixels.
    Returns: IoU in [0, 1]; 0 where the union is empty. Touching boxes overlap by the added pixel.
    """
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0.0) * max(y2 - y1 + 1, 0.0)

    shared = area(max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3]))
    union = area(*box_a) + area(*box_b) - shared
    return shared / union if union else 0.0


def relative_position(box_a: Box, box_b: Box, threshold: float = OFFICIAL.position_threshold) -> frozenset[str]:
    """Relations of A to B: none, one, or two (a diagonal).

        o = center_A - center_B,   r_k = sign(o_k) max(|o_k| - threshold (size_A,k + size_B,k), 0),   d = r / |o|
        left of: d_x < -1/2,   right of: d_x > 1/2,   above: d_y < -1/2,   below: d_y > 1/2      (y points down)

    The norm is that of the unshrunk offset, so large objects must be further apart. 30 degrees off an axis still count.

    Args:
        box_a, box_b: x1, y1, x2, y2 in pixels.
        threshold: >= 0, see `Options.position_threshold`.
    Returns: members of RELATIONS.
    Source: GenEval's `relative_position`, in float32 like its boxes.
    """
    boxes = np.asarray([box_a, box_b], dtype=np.float32).reshape(2, 2, 2)         # box, corner, axis
    center_a, center_b = boxes.mean(axis=1)
    size_a, size_b = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = center_a - center_b
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - np.float32(threshold) * (size_a + size_b), 0)
    if (np.abs(shrunk) < 1e-3).all():
        return frozenset()
    dx, dy = shrunk / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(relation for relation, true in holds.items() if true)


def keep(detections: Iterable[D], tag: str, options: Options = OFFICIAL) -> dict[str, list[D]]:
    """The detections that count, per class: threshold, then the cap, then greedy suppression of overlaps.

    Args:
        detections: of one image, in any order. Equal scores keep this order.
        tag: the prompt's tag, which decides the score threshold.
    Returns: class -> detections by falling score; classes without any are absent.
    Source: GenEval's `evaluate_image` (benchmark options `threshold`, `counting_threshold`, `max_objects`, `max_overlap`).
    """
    threshold = np.float32(options.score_threshold(tag))
    by_class: dict[str, list[D]] = defaultdict(list)
    for detection in detections:
        if np.float32(detection.score) > threshold:
            by_class[detection.label].append(detection)
    kept: dict[str, list[D]] = {}
    for label, found in by_class.items():
        kept[label] = []
        for candidate in sorted(found, key=lambda detection: -detection.score)[:options.max_objects]:
            if options.max_overlap == 1 or all(compute_iou(other.box, candidate.box) < options.max_overlap
                                               for other in kept[label]):
                kept[label].append(candidate)
    return kept


class Verdict(NamedTuple):
    """Whether an image shows its prompt, and what is wrong, one message a line ("" if nothing is)."""

    correct: bool
    reason: str


def verdict(record: PromptRecord, objects: Mapping[str, Sequence[Detection]], options: Options = OFFICIAL) -> Verdict:
    """GenEval's verdict on one image.

    Include clauses in order: enough objects of the class; of the best `count`, enough of the colour; and every pair of them
    and the target clause's objects in the relation. A clause that failed offers no target. Extra objects never hurt, except
    by an exclude clause (prompts that count have one). All failures are reported.

    Args:
        record: the clauses.
        objects: `keep`'s result for the record's tag.
    Returns: the verdict with the official messages; two relations in one message are in alphabetical order (officially in
        any order, being a printed set).
    Source: GenEval's `evaluate`.
    """
    problems: list[str] = []
    groups: list[Sequence[Detection] | None] = []                   # the objects of each clause, None where it failed
    for clause in record.include:
        label, count, color = clause["class"], clause["count"], clause.get("color")
        found = objects.get(label, ())[:count]
        problem = None
        if len(found) < count:
            problem = f"expected {label}>={count}, found {len(found)}"
        elif color is not None and (right := sum(item.color == color for item in found)) < count:
            problem = f"expected {color} {label}>={count}, found {right} {color}; and {_color_counts(found)}"
        elif "position" in clause:
            relation, target = clause["position"]
            problem = _misplaced(label, relation, found, groups[target], options.position_threshold)
        if problem is not None:
            problems.append(problem)
        groups.append(found if problem is None else None)
    for clause in record.exclude:
        label, count = clause["class"], clause["count"]
        if (number := len(objects.get(label, ()))) >= count:
            problems.append(f"expected {label}<{count}, found {number}")
    return Verdict(not problems, "\n".join(problems))


class FlowGRPOReward(NamedTuple):
    """Flow-GRPO's three numbers for one image: the training reward (soft), the all-or-nothing one, the official verdict."""

    score: float
    strict: float
    correct: float


def flow_grpo_reward(record: PromptRecord, objects: Mapping[str, Sequence[Detection]], options: Options = OFFICIAL, *,
                                   official_position_bug: bool = False, clamp: bool = False) -> FlowGRPOReward:
    """The reward Flow-GRPO trains on: exact counts, partial credit.

        score = mean over the terms of all include clauses, 0 without any;   terms of one clause, n objects of its class:
            1 - |count - n| / count;   where that is wrong and a colour or position is wanted, a further 0
            colour, if the count is right:                1 - |count - objects of the colour| / count
            position, if count and colour are right:      1 if every pair with the target's objects has the relation, else 0

    `strict` is 1 if all terms are 1. Both ignore exclude clauses: their counts are exact already.

    Args:
        official_position_bug: a wrong position adds a 1 after its 0, as in Flow-GRPO's server, so that a mirrored pair
            earns 3/4 instead of 2/3. Off by default; on to compare with numbers that were trained that way.
        clamp: no count or colour term below 0 (officially sixteen objects for two wanted earn -6).
    Source: Flow-GRPO arXiv:2505.05470; yifan123/reward-server at 92ac29f, `reward_server/gen_eval.py`. The fix is that of
        Tencent-Hunyuan/UniRL's port.
    """
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in record.include:
        label, count = clause["class"], clause["count"]
        found = objects.get(label, ())
        matched = len(found) == count
        terms.append(_closeness(len(found), count, clamp))
        if not matched and ("color" in clause or "position" in clause):
            terms.append(0.0)
        if matched and "color" in clause:
            right = sum(item.color == clause["color"] for item in found)
            matched = right == count
            terms.append(_closeness(right, count, clamp))
        if matched and "position" in clause:
            relation, target = clause["position"]
            group = groups[target]
            matched = _misplaced(label, relation, found, group, options.position_threshold) is None
            terms.append(float(matched))
            if official_position_bug and not matched and group is not None:
                terms.append(1.0)
        groups.append(found if matched else None)
    strict = all(group is not None for group in groups)
    return FlowGRPOReward(score=sum(terms) / len(terms) if terms else 0.0, strict=float(strict),
                          correct=float(verdict(record, objects, options).correct))


class TaskScore(NamedTuple):
    """Correct images and images of one tag."""

    correct: int
    total: int

    @property
    def mean(self) -> float:
        """Share of correct images."""
        return self.correct / self.total


@dataclass(frozen=True)
class Summary:
    """GenEval's aggregate of many verdicts. `tasks` is in the order in which tags first occurred."""

    tasks: dict[str, TaskScore]
    images: int
    prompts: int
    correct_images: int
    correct_prompts: int

    @property
    def overall(self) -> float:
        """The published score: the unweighted mean over the tags present of the share of correct images."""
        return sum(score.mean for score in self.tasks.values()) / len(self.tasks)

    def lines(self) -> list[str]:
        """The lines that the official `summary_scores.py` prints."""
        tasks = [f"{tag:<16} = {score.mean:.2%} ({score.correct} / {score.total})" for tag, score in self.tasks.items()]
        return ["Summary", "=======", f"Total images: {self.images}", f"Total prompts: {self.prompts}",
                f"% correct images: {self.correct_images / self.images:.2%}",
                f"% correct prompts: {self.correct_prompts / self.prompts:.2%}", "",
                "Task breakdown", "==============", *tasks, "",
                f"Overall score (avg. over tasks): {self.overall:.5f}", ""]


def summarize(verdicts: Iterable[tuple[str, str, bool]]) -> Summary:
    """Aggregate verdicts as GenEval does: tasks over images, not prompts; a prompt is correct if any of its images is.

    Args:
        verdicts: (tag, prompt, correct) per image; `prompt` is any text that tells prompts apart.
    Raises: ValueError if there are none.
    Source: GenEval's `summary_scores.py`.
    """
    tasks: dict[str, TaskScore] = {}
    prompts: dict[str, bool] = {}
    for tag, prompt, correct in verdicts:
        score = tasks.get(tag, TaskScore(0, 0))
        tasks[tag] = score._replace(correct=score.correct + bool(correct), total=score.total + 1)
        prompts[prompt] = prompts.get(prompt, False) or bool(correct)
    if not tasks:
        raise ValueError("GenEval's summary needs at least one verdict, got none")
    return Summary(tasks=tasks, images=sum(score.total for score in tasks.values()), prompts=len(prompts),
                   correct_images=sum(score.correct for score in tasks.values()), correct_prompts=sum(prompts.values()))


def _misplaced(label: str, relation: str, found: Sequence[Detection], group: Sequence[Detection] | None,
                             threshold: float) -> str | None:
    """The message for the first pair that lacks the relation, or None."""
    if group is None:
        return f"no target for {label} to be {relation}"
    for item in found:
        for target in group:
            relations = relative_position(item.box, target.box, threshold)
            if relation not in relations:
                return f"expected {label} {relation} target, found {' and '.join(sorted(relations))} target"
    return None


def _color_counts(found: Sequence[Detection]) -> str:
    """How often each colour occurs, in the official order."""
    colors = [item.color for item in found]
    return ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)


def _closeness(number: int, wanted: int, clamp: bool) -> float:
    """1 at the wanted number, falling by 1 / wanted per object too few or too many."""
    closeness = 1 - abs(wanted - number) / wanted
    return max(closeness, 0.0) if clamp else closeness
