"""Images to GenEval's verdicts: detections in batches, colours where a prompt asks for them, every result kept at once.

    files --digest--> cache? --no: read, detect, keep, colours--> cache --> verdict, soft reward --> results, summary
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unigrpo.evaluation.backends import ColorClassifier, Detected, Detector
from unigrpo.evaluation.backends.cache import ScoreCache, score_key
from unigrpo.evaluation.geneval import (
    OFFICIAL,
    FlowGRPOReward,
    Options,
    Summary,
    Verdict,
    flow_grpo_reward,
    keep,
    summarize,
    verdict,
)
from unigrpo.evaluation.geneval_folder import ImageSet, Sample, write_atomically, write_results
from unigrpo.evaluation.images import MAX_PIXELS, read_checked
from unigrpo.types import PromptRecord

OFFICIAL_COLORS = "clip_vit_l_14"  # the official colour model's architecture goes without saying
Objects = dict[str, list[Detected]]


@dataclass(frozen=True)
class Scored:
    """One image's outcome."""

    sample: Sample
    objects: Objects
    verdict: Verdict
    reward: FlowGRPOReward


def color_requests(record: PromptRecord) -> dict[str, list[int]]:
    """Class -> how many of its best objects each clause wants to know the colour of, rising."""
    wanted: dict[str, list[int]] = {}
    for clause in record.include:
        if "color" in clause:
            wanted[clause["class"]] = sorted({clause["count"], *wanted.get(clause["class"], [])})
    return wanted


def find_objects(images: Sequence[np.ndarray], records: Sequence[PromptRecord], detector: Detector,
                 colors: ColorClassifier | None, options: Options = OFFICIAL) -> list[Objects]:
    """What counts in each image for its prompt: the kept detections, coloured where the prompt asks.

    The colour model sees the best `count` objects of a class and only where there are as many, as officially.

    Args:
        images: (H, W, 3) uint8 RGB.
        colors: may be None where the detector tells colours itself.
    Returns: per image class -> detections by falling score, classes in the detector's order.
    Raises: ValueError for a score or box that is not finite, and for a colour that nobody tells.
    """
    results = []
    for image, record, found in zip(images, records, detector(images), strict=True):
        for item in found:
            if not (math.isfinite(item.score) and all(math.isfinite(edge) for edge in item.box)):
                raise ValueError(f"the detector {detector.name} gave {item}, which is not finite: it is broken on this device")
        objects = keep(found, record.tag, options)
        for label, counts in color_requests(record).items():
            if met := [count for count in counts if count <= len(objects.get(label, ()))]:
                objects[label] = _colored(image, objects[label], label, met[-1], detector, colors)
        results.append({label: objects[label] for label in detector.labels if label in objects})
    return results


def score_images(images: ImageSet, detector: Detector, colors: ColorClassifier | None, cache: ScoreCache, *,
                 options: Options = OFFICIAL, batch: int = 8, max_pixels: int = MAX_PIXELS,
                 position_bug: bool = False, progress: Callable[[int], None] | None = None) -> list[Scored]:
    """Score every image of a set, each at most once in the cache's life.

    Args:
        images: checked, so that its samples have digests. batch: images at a time; results are kept after each batch.
        position_bug: see `flow_grpo_reward`.
        progress: told how many images have their result.
    Raises: ValueError as `find_objects`; and if a file is not the one that was checked.
    """
    keys = image_keys(images, detector, colors, options)
    waiting: dict[str, Sample] = {key: sample for key, sample in zip(keys, images.samples, strict=True) if key not in cache}
    counts, todo = Counter(keys), list(waiting.items())
    done = sum(counts[key] for key in counts if key in cache)
    for start in range(0, len(todo), batch):
        chunk = todo[start:start + batch]
        pictures = [read_checked(sample.path, sample.digest, max_pixels=max_pixels) for _, sample in chunk]
        found = find_objects(pictures, [sample.record for _, sample in chunk], detector, colors, options)
        for (key, _), objects in zip(chunk, found, strict=True):
            cache.put(key, {label: [[*item.box, item.score, item.color] for item in items] for label, items in objects.items()})
            done += counts[key]
        if progress is not None:
            progress(done)
    return [_judge(sample, cache.get(key), options, position_bug) for key, sample in zip(keys, images.samples, strict=True)]


def image_keys(images: ImageSet, detector: Detector, colors: ColorClassifier | None, options: Options = OFFICIAL) -> list[str]:
    """The key of each image in the cache."""
    return [_key(sample, detector, colors, options) for sample in images.samples]


def result_rows(scored: Sequence[Scored], relative_to: Path | None = None) -> list[dict[str, Any]]:
    """The lines of results.jsonl, with the official keys.

    Args:
        relative_to: file names are told from this folder on; as they were read by default, as officially.
    """
    def shown(path: Path) -> str:
        return os.fspath(path) if relative_to is None else path.relative_to(relative_to).as_posix()

    return [{"filename": shown(item.sample.path), "tag": item.sample.record.tag, "prompt": item.sample.record.prompt,
             "correct": item.verdict.correct, "reason": item.verdict.reason, "metadata": json.dumps(item.sample.metadata),
             "details": json.dumps({label: [[*found.box, found.score] for found in items]
                                    for label, items in item.objects.items()})} for item in scored]


def summarize_scored(scored: Sequence[Scored]) -> Summary:
    """GenEval's aggregate."""
    return summarize((item.sample.record.tag, json.dumps(item.sample.metadata), item.verdict.correct) for item in scored)


def score_name(detector: Detector, colors: ColorClassifier | None, images: ImageSet, options: Options = OFFICIAL) -> str:
    """What the number may be called: `geneval_<detector>`, and whatever else differs from the official protocol."""
    other = f"_{colors.name}" if colors is not None and colors.name != OFFICIAL_COLORS else ""
    return f"geneval_{detector.name}{other}{'_other_options' if options != OFFICIAL else ''}{images.suffix}"


def summary_record(scored: Sequence[Scored], images: ImageSet, detector: Detector, colors: ColorClassifier | None,
                   options: Options, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as JSON: the score under its honest name, and all that decided it."""
    summary = summarize_scored(scored)
    return {"name": score_name(detector, colors, images, options), "overall": summary.overall,
            "tasks": {tag: {"correct": score.correct, "total": score.total, "mean": score.mean}
                      for tag, score in summary.tasks.items()},
            "images": summary.images, "prompts": summary.prompts, "correct_images": summary.correct_images,
            "correct_prompts": summary.correct_prompts, "partial": bool(images.missing), "missing": len(images.missing),
            "samples_per_prompt": images.samples_per_prompt,
            "prompt_set": {"name": images.prompt_set, "sha256": images.sha256},
            "detector": detector.identity, "colors": None if colors is None else colors.identity,
            "options": vars(options), **extra}


def write_scores(output: Path, scored: Sequence[Scored], record: Mapping[str, Any], *, soft: bool = False,
                 relative_to: Path | None = None) -> None:
    """Write results.jsonl, summary.json and, where asked for, soft.jsonl, each whole or not at all.

    Args:
        record: of `summary_record`. soft: a line per image with Flow-GRPO's rewards. relative_to: see `result_rows`.
    """
    rows = result_rows(scored, relative_to)
    if soft:
        lines = [json.dumps({"filename": row["filename"], "tag": row["tag"], "prompt": row["prompt"], "soft": item.reward.score,
                             "strict": item.reward.strict}) for row, item in zip(rows, scored, strict=True)]
        write_atomically(output / "soft.jsonl", "".join(f"{line}\n" for line in lines).encode())
    write_results(output / "results.jsonl", rows)
    write_atomically(output / "summary.json", (json.dumps(record, indent=1) + "\n").encode())


def soft_means(scored: Sequence[Scored]) -> dict[str, Any]:
    """Flow-GRPO's soft and strict reward: the mean over each tag's images, and over the tags."""
    tags = list(dict.fromkeys(item.sample.record.tag for item in scored))
    means = {name: {tag: float(np.mean([getattr(item.reward, name) for item in scored if item.sample.record.tag == tag]))
                    for tag in tags} for name in ("score", "strict")}
    return {("soft" if name == "score" else name): {"overall": float(np.mean(list(values.values()))), "tasks": values}
            for name, values in means.items()}


def _key(sample: Sample, detector: Detector, colors: ColorClassifier | None, options: Options) -> str:
    """Everything that decides an image's objects; the prompt only through its threshold and the colours it asks for."""
    requests = color_requests(sample.record)
    asked = [sorted(requests.items()), None if colors is None else colors.identity] if requests else None
    return score_key(sample.digest, json.dumps(["geneval objects 1", detector.identity, options.score_threshold(
        sample.record.tag), options.max_objects, options.max_overlap, asked]))


def _colored(image: np.ndarray, found: list[Detected], label: str, count: int, detector: Detector,
             colors: ColorClassifier | None) -> list[Detected]:
    """The best `count` with their colour, the others as they are."""
    best = found[:count]
    names: Sequence[str | None] = [item.color for item in best] if colors is None else colors(image, best, label)
    if None in names:
        raise ValueError(f"a prompt asks for a colour and the detector {detector.name} tells none: give a colour model with "
                         "--color")
    return [Detected(item.label, item.box, item.score, color) for item, color in zip(best, names, strict=True)] + found[count:]


def _judge(sample: Sample, value: Any, options: Options, position_bug: bool) -> Scored:
    """A cached image's verdict and reward."""
    objects = {label: [Detected(label, (x1, y1, x2, y2), score, color) for x1, y1, x2, y2, score, color in items]
               for label, items in value.items()}
    return Scored(sample, objects, verdict(sample.record, objects, options),
                  flow_grpo_reward(sample.record, objects, options, official_position_bug=position_bug))
