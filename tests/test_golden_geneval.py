"""GenEval's rules against the official scripts' stored inputs and outputs, in every golden folder of that format."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import golden_files

from unigrpo.evaluation.geneval import (
    COLORS,
    Options,
    compute_iou,
    flow_grpo_reward,
    keep,
    relative_position,
    summarize,
    verdict,
)
from unigrpo.evaluation.geneval_color import (
    BACKGROUND,
    color_logits,
    color_names,
    color_prompts,
    color_weights,
    crop_object,
)
from unigrpo.types import PromptRecord


class Labelled(NamedTuple):
    """A detection whose colour is already labelled."""

    label: str
    box: tuple[float, ...]
    score: float
    color: str | None


@cache
def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


LISTS = {"test_verdicts": "cases", "test_flow_grpo_rewards": "cases", "test_aggregate": "aggregate",
         "test_relative_position": "relative_position", "test_compute_iou": "compute_iou", "test_crops": "crops",
         "test_color_head": "color_head"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = LISTS.get(metafunc.function.__name__)  # a folder that lacks the list has nothing to collect
    paths = [path for path in golden_files(metafunc.config, "geneval.json") if wanted is None or load(path).get(wanted)]
    metafunc.parametrize("golden", [load(path) for path in paths], ids=[str(path.parent.name) for path in paths])


def record_of(metadata: dict[str, Any]) -> PromptRecord:
    return PromptRecord(id="", tag=metadata["tag"], prompt=metadata["prompt"], include=tuple(metadata["include"]),
                        exclude=tuple(metadata.get("exclude", ())))


def detections_of(classes: dict[str, list[dict[str, Any]]]) -> list[Labelled]:
    return [Labelled(label, tuple(item["box"]), item["score"], item["color"])
            for label, items in classes.items() for item in items]


def test_verdicts(golden: dict[str, Any]) -> None:
    for case in golden["cases"]:
        options, record, expected = Options(**case["options"]), record_of(case["metadata"]), case["expected"]
        objects = keep(detections_of(case["detections"]), record.tag, options)
        kept = {label: [[*item.box, item.score] for item in items] for label, items in objects.items()}
        assert kept == expected["kept"], case["id"]
        result = verdict(record, objects, options)
        assert result.correct is expected["correct"], case["id"]
        assert result.reason in expected.get("reason_variants", [expected["reason"]]), case["id"]


def test_flow_grpo_rewards(golden: dict[str, Any]) -> None:
    for case in (case for case in golden["cases"] if case.get("flow_grpo")):
        record, expected = record_of(case["metadata"]), case["flow_grpo"]
        objects = keep(detections_of(case["detections"]), record.tag)
        reward = flow_grpo_reward(record, objects, official_position_bug=True)
        assert reward.score == pytest.approx(expected["score"], abs=1e-7), case["id"]
        assert (reward.strict, reward.correct) == (expected["strict"], expected["correct"]), case["id"]
        fixed = flow_grpo_reward(record, objects)
        assert fixed.score <= reward.score, case["id"]
        assert (fixed.strict, fixed.correct) == (reward.strict, reward.correct), case["id"]


def test_aggregate(golden: dict[str, Any]) -> None:
    aggregate = golden["aggregate"]
    verdicts = []
    for image in aggregate["images"]:
        record = record_of(image["metadata"])
        result = verdict(record, keep(detections_of(image["detections"]), record.tag))
        assert result.correct is image["expected"]["correct"]
        assert result.reason in image["expected"].get("reason_variants", [image["expected"]["reason"]])
        verdicts.append((record.tag, json.dumps(image["metadata"]), result.correct))
    summary, expected = summarize(verdicts), aggregate["expected_summary"]
    # The official order of the tasks is that of os.listdir, and no part of the contract.
    assert sorted(summary.lines()) == sorted(expected["stdout_lines"])
    assert [line for line in summary.lines() if "(" not in line] == [
        line for line in expected["stdout_lines"] if "(" not in line]
    assert summary.overall == pytest.approx(expected["overall"], abs=5e-6)
    assert (summary.images, summary.prompts) == (expected["total_images"], expected["total_prompts"])
    assert {tag: (score.correct, score.total) for tag, score in summary.tasks.items()} == {
        tag: (task["correct"], task["total"]) for tag, task in expected["tasks"].items()}


def test_relative_position(golden: dict[str, Any]) -> None:
    for case in golden["relative_position"]:
        relations = relative_position(case["box_a"], case["box_b"], case["position_threshold"])
        assert sorted(relations) == case["expected"], case


def test_compute_iou(golden: dict[str, Any]) -> None:
    for case in golden["compute_iou"]:
        assert compute_iou(case["box_a"], case["box_b"]) == pytest.approx(case["expected"], abs=1e-7), case


def test_crops(golden: dict[str, Any]) -> None:
    for case in golden["crops"]:
        settings = {"background": case["options"].get("bgcolor", BACKGROUND), "crop": case["options"].get("crop", "1") != "0"}
        assert set(case["options"]) <= {"bgcolor", "crop"}, case["options"]
        mask = None if case["mask"] is None else np.array(case["mask"], dtype=bool)
        image = np.array(case["image"], dtype=np.uint8)
        assert crop_object(image, case["box"], mask, **settings).tolist() == case["expected"], case["box"]


def test_color_head(golden: dict[str, Any]) -> None:
    for case in golden["color_head"]:
        assert color_prompts(case["class"]) == [case["prompts"][color] for color in COLORS]
        texts = [[case["text_embeddings"][text] for text in row] for row in color_prompts(case["class"])]
        logits = color_logits(color_weights(np.array(texts)), np.array(case["image_embeddings"]))
        np.testing.assert_allclose(logits, case["expected_logits"], atol=1e-3)
        assert color_names(logits) == case["expected_colors"]


def test_every_list_of_the_file_is_tested(golden: dict[str, Any]) -> None:
    assert {key for key, value in golden.items() if isinstance(value, list) or key == "aggregate"} <= set(LISTS.values())
    assert set(LISTS) == {name for name in globals() if name.startswith("test_")} - {"test_every_list_of_the_file_is_tested"}
