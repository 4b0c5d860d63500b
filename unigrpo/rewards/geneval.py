"""GenEval's rules as rewards: soft and strict as Flow-GRPO trains them, and the benchmark's own verdict.

The name carries the detector (`geneval_soft_mask2former_hf`): scores by another detector than the official one are not
comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from unigrpo.evaluation.geneval import OFFICIAL, Options, flow_grpo_reward, keep
from unigrpo.rewards.gate import gate
from unigrpo.rewards.pictures import Picture, score_pictures
from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.types import PromptRecord, Reward

if TYPE_CHECKING:
    from unigrpo.evaluation.backends import ColorClassifier, Detected, Detector

Rule = Literal["soft", "strict", "verdict"]


def geneval_reward(detector: Detector, colors: ColorClassifier | None = None, *, rule: Rule = "soft",
                   options: Options = OFFICIAL, official_position_bug: bool = False, clamp: bool = False) -> RewardFunction:
    """A reward `geneval_<rule>_<detector>` in (-inf, 1], and the other two numbers of the same detections logged.

    Args:
        detector: finds the objects; its labels must include every class that prompts name.
        colors: labels the kept objects of classes whose colour is asked for; None where the detector gives colours.
        rule: soft: exact counts with partial credit, Flow-GRPO's training reward. strict: 1 if all of that is right.
            verdict: the benchmark's own all-or-nothing rule, where extra objects are free. See `flow_grpo_reward`.
        options: thresholds, which belong to the detector.
        official_position_bug, clamp: see `flow_grpo_reward`; `clamp` keeps the soft reward in [0, 1].
    Returns: further records `<name>/<other rule>`.
    Raises: ValueError for an unknown rule; when called, for a prompt with a class that the detector does not know, which
        would otherwise score 0 for ever.
    Source: Flow-GRPO arXiv:2505.05470; GenEval arXiv:2310.11513.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(get_args(Rule))}")
    name = f"geneval_{rule}_{detector.name}"
    known = frozenset(detector.labels)

    def reward(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        check_classes(prompts, known, detector.name)

        def score(pictures: list[Picture], rows: list[int]) -> dict[str, list[float]]:
            found = detector(pictures) if pictures else []
            numbers = [flow_grpo_reward(prompts[row], kept_objects(picture, items, prompts[row], colors, options), options,
                                        official_position_bug=official_position_bug, clamp=clamp)
                       for picture, items, row in zip(pictures, found, rows, strict=True)]
            values = {"soft": [number.score for number in numbers], "strict": [number.strict for number in numbers],
                      "verdict": [number.correct for number in numbers]}
            return {name: values[rule], **{f"{name}/{other}": values[other] for other in get_args(Rule) if other != rule}}

        return score_pictures(images, score)

    return reward


def kept_objects(picture: Picture, detections: Sequence[Detected], record: PromptRecord, colors: ColorClassifier | None,
                 options: Options) -> dict[str, list[Detected]]:
    """The objects that count, coloured where the prompt asks for the colour of their class."""
    kept = keep(detections, record.tag, options)
    wanted = {clause["class"] for clause in record.include if "color" in clause}
    if colors is not None:
        for label in sorted(wanted & set(kept)):
            found = kept[label]
            kept[label] = [replace(item, color=color) for item, color in zip(found, colors(picture, found, label), strict=True)]
    return kept


def check_classes(prompts: Sequence[PromptRecord], known: frozenset[str], detector: str) -> None:
    """Raise ValueError naming a prompt whose class the detector cannot find."""
    for record in prompts:
        for clause in (*record.include, *record.exclude):
            if clause["class"] not in known:
                raise ValueError(f"prompt {record.id} ({record.prompt!r}) wants the class {clause['class']!r}, which the "
                                 f"detector {detector} does not know: it would score 0 for ever; leave the prompt out, or take "
                                 "another detector")


def soft_mask2former(detector: str, clip: str, canaries: str | None, *, device: str = "cpu", batch: int = 8,
                     shorter: int | None = None, official_position_bug: bool = False, clamp: bool = False) -> RewardFunction:
    """The soft rule by Mask2Former and CLIP in Hugging Face format.

    Args:
        detector: folder or hub name; facebook/mask2former-swin-small-coco-instance is the closest to the official one.
        clip: of the colours; officially openai/clip-vit-large-patch14.
        canaries: their record, or null to trust the models unseen; see `gate`.
        device: cpu or cuda. batch: images at once.
        shorter: pixels that the shorter side is resized to, 800 by default. Another number shows in the reward's name, which
            is how it is chosen by name: geneval_soft_mask2former_hf_400px.
        official_position_bug, clamp: see `flow_grpo_reward`.
    """
    return geneval_reward(*mask2former(detector, clip, canaries, device, batch, shorter), rule="soft", clamp=clamp,
                          official_position_bug=official_position_bug)


def strict_mask2former(detector: str, clip: str, canaries: str | None, *, device: str = "cpu", batch: int = 8,
                       shorter: int | None = None) -> RewardFunction:
    """The strict rule by Mask2Former and CLIP. Arguments as in `soft_mask2former`."""
    return geneval_reward(*mask2former(detector, clip, canaries, device, batch, shorter), rule="strict")


def mask2former(detector: str, clip: str, canaries: str | None, device: str, batch: int,
                shorter: int | None) -> tuple[Detector, ColorClassifier]:
    """The detector, which leaves out what no rule counts, and the colour classifier, past the gate."""
    from unigrpo.evaluation.backends.clip import ClipColors
    from unigrpo.evaluation.backends.mask2former import SHORTER, Mask2FormerDetector
    from unigrpo.evaluation.backends.weights import quiet_transformers

    quiet_transformers()
    found = Mask2FormerDetector.load(detector, device=device, batch=batch, shorter=shorter or SHORTER,
                                     min_score=min(OFFICIAL.threshold, OFFICIAL.counting_threshold))
    colors = ClipColors.load(clip, device=device)
    gate({"detector": found, "colors": colors}, device, canaries)
    return found, colors


def soft_shapes(*, official_position_bug: bool = False, clamp: bool = False) -> RewardFunction:
    """The soft rule by the shapes world's own detector. Arguments as in `flow_grpo_reward`."""
    from unigrpo.evaluation.backends.shapes import ShapesDetector

    return geneval_reward(ShapesDetector(), rule="soft", official_position_bug=official_position_bug, clamp=clamp)


def strict_shapes() -> RewardFunction:
    """The strict rule by the shapes world's own detector."""
    from unigrpo.evaluation.backends.shapes import ShapesDetector

    return geneval_reward(ShapesDetector(), rule="strict")
