"""T2I-CompBench's files: names of images, and the results as the official scripts leave them.

    <out>/samples/<prompt>_<NNNNNN>.png       image n of prompt i is number 10 i + n
    <out>/<folder>/vqa_result.json            [{"question_id": int, "answer": ...}]
    <out>/<folder>/<average file>             one line with the mean
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unigrpo.evaluation.geneval_folder import write_atomically
from unigrpo.evaluation.t2i_compbench import ATTRIBUTES, FIRST_SEED, IMAGES_PER_PROMPT, mean


class Place(NamedTuple):
    """Where a scorer's results go: folder, file of the average, its text."""

    folder: str
    file: str
    text: str


PLACES = {
    "blip": Place("annotation_blip", "blip_vqa_score.txt", "BLIP-VQA score:{mean}"),
    "spatial": Place("labels/annotation_obj_detection_2d", "avg_score.txt", "score avg:{mean}"),
    "3d_spatial": Place("labels/annotation_obj_detection_3d", "avg_result.txt", "avg score is {mean}"),
    "numeracy": Place("annotation_num", "score.txt", "total:{total} num:{number} avg:{mean}"),
    "clip": Place("annotation_clip", "score_avg.txt", "score avg:{mean}"),
    "complex": Place("annotation_3_in_1", "vqa_score.txt", "score avg:{mean}"),
}
# The scorer whose file holds the category's score.
SCORERS = {**dict.fromkeys(ATTRIBUTES, "blip"), "spatial": "spatial", "3d_spatial": "3d_spatial", "numeracy": "numeracy",
           "non_spatial": "clip", "complex": "complex"}


def file_name(prompt: str, number: int) -> str:
    """The official name of an image: number is 10 i + n for image n of prompt i."""
    return f"{prompt}_{number:06d}.png"


def split_name(name: str) -> tuple[str, int] | None:
    """An image's prompt, officially the text before the first "_", and its number; None if the name is of another form."""
    match = re.fullmatch(r"([^_]*)_(?:.*_)?(\d{6})\.png", name)
    return (match[1], int(match[2])) if match else None


def question_id(name: str) -> int:
    """The number in an image's name. Raises ValueError if it has none."""
    parts = split_name(name)
    if parts is None:
        raise ValueError(f"an image must be named <prompt>_<NNNNNN>.png, got {name!r}")
    return parts[1]


def seed_of(number: int, first: int = FIRST_SEED) -> int:
    """The seed that image `number` is drawn with: the same for image n of every prompt."""
    return first + number % IMAGES_PER_PROMPT


def mapping(names: Sequence[str]) -> list[dict[str, Any]]:
    """The content of the 2D scorer's mapping.json."""
    return [{"image": name, "question_id": question_id(name)} for name in names]


def average_text(scorer: str, scores: Sequence[float]) -> str:
    """The line of the average file."""
    return PLACES[scorer].text.format(total=sum(scores), number=len(scores), mean=mean(scores))


def write_results(out: Path, scorer: str, names: Sequence[str], answers: Sequence[str | float]) -> None:
    """Write a scorer's files.

    Args:
        out: the folder that holds samples/. names: the images' file names, by number.
        answers: one per image; BLIP-VQA's are texts with 4 decimals. Its ids and CLIP's are ranks, those of the others the
            images' numbers, which is the same for a complete set.
    """
    place = PLACES[scorer]
    folder = out / place.folder
    ids = range(len(names)) if scorer in ("blip", "clip", "complex") else [question_id(name) for name in names]
    results = [{"question_id": number, "answer": answer} for number, answer in zip(ids, answers, strict=True)]
    write_atomically(folder / "vqa_result.json", (json.dumps(results) + "\n").encode())
    write_atomically(folder / place.file, average_text(scorer, [float(answer) for answer in answers]).encode())
    if scorer == "spatial":
        write_atomically(folder / "mapping.json", (json.dumps(mapping(names)) + "\n").encode())
