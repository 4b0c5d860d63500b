"""T2I-CompBench's rules against the official scripts' stored inputs and outputs, in every golden folder of that format."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import golden_files

from unigrpo.evaluation import t2i_outputs as outputs
from unigrpo.evaluation.backends.clip import ClipSimilarity
from unigrpo.evaluation.t2i_compbench import (
    attribute_score,
    mean,
    prompt_key,
    questions,
    similarity_text,
    three_in_one,
)
from unigrpo.evaluation.t2i_numeracy import duplicate, numeracy_score, read_plurals, wanted_objects
from unigrpo.evaluation.t2i_spatial import (
    find_3d,
    position_2d,
    position_3d,
    query_2d,
    query_3d,
    query_complex,
    spatial_2d,
    spatial_3d,
)

PLURALS = Path(__file__).parents[2] / "shared" / "benchmarks" / "t2i_compbench" / "new_objects.txt"
TOLERANCE = 1e-6


class Labelled(NamedTuple):
    """A detection as the golden files have it."""

    label: str
    box: tuple[float, ...]
    score: float


class GivenEmbeddings(ClipSimilarity):
    """The scorer's CLIP, its networks replaced by one answer."""

    def __init__(self, image: list[float], text: list[float]) -> None:
        self.given = np.asarray([image], dtype=np.float32), np.asarray([text], dtype=np.float32)

    def image_embeddings(self, images: Sequence[np.ndarray]) -> np.ndarray:
        assert len(images) == 1
        return self.given[0]

    def text_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        assert len(texts) == 1
        return self.given[1]


@cache
def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test named test_<list> gets the lists of that name; where a file lacks it, the test is not collected for the file."""
    name = metafunc.function.__name__.removeprefix("test_")
    found = [(path.parent.name, load(path)) for path in golden_files(metafunc.config, "t2i_compbench.json")]
    if name in LISTS:
        found = [(folder, data[name]) for folder, data in found if name in data]
    if name == "numeracy_parse_val" and not PLURALS.is_file():  # the official table lies next to the prompts
        found = []
    metafunc.parametrize("golden", [data for _, data in found], ids=[folder for folder, _ in found])


LISTS = ("determine_position_2d", "determine_position_3d", "spatial_2d", "spatial_2d_complex", "spatial_3d", "numeracy",
         "numeracy_duplicate_test", "numeracy_parse_val", "blip_vqa", "clip_score", "three_in_one")


def test_every_list_has_a_test(golden: dict[str, Any]) -> None:
    lists = {name for name, value in golden.items() if name not in ("schema", "source", "conventions")}
    assert lists
    assert lists <= set(LISTS), lists - set(LISTS)
    assert all(f"test_{name}" in globals() for name in LISTS)


def test_determine_position_2d(golden: list[dict[str, Any]]) -> None:
    for case in golden:
        score = position_2d(case["locality"], case["box1"], case["box2"])
        assert score == pytest.approx(case["expected"], abs=TOLERANCE), case


def test_determine_position_3d(golden: list[dict[str, Any]]) -> None:
    for case in golden:
        depth = np.asarray(case["depth"], dtype=np.float32)
        score = position_3d(case["locality"], case["box1"], case["box2"], depth)
        assert score == pytest.approx(case["expected"], abs=TOLERANCE), case


def check_2d(golden: dict[str, Any], query: Any) -> None:
    scores = []
    for case in golden["cases"]:
        expected = case["expected"]
        asked = query(case["prompt"], tokens_of(case))
        assert tuple(asked) == (expected["locality"], expected["obj1"], expected["obj2"]), case
        result = spatial_2d(asked, detections_of(case))
        assert result.score == pytest.approx(expected["answer"], abs=TOLERANCE), case
        assert outputs.question_id(case["file_name"]) == expected["question_id"]
        scores.append(result.score)
    check_text(outputs.average_text("spatial", scores), golden["expected_avg_score_txt"])


def test_spatial_2d(golden: dict[str, Any]) -> None:
    check_2d(golden, query_2d)
    if keys := golden.get("expected_mapping_keys"):
        assert all(sorted(item) == keys for item in outputs.mapping([case["file_name"] for case in golden["cases"]]))


def test_spatial_2d_complex(golden: dict[str, Any]) -> None:
    check_2d(golden, query_complex)


def test_spatial_3d(golden: dict[str, Any]) -> None:
    scores = []
    for case in golden["cases"]:
        expected = case["expected"]
        query, found = query_3d(case["prompt"], tokens_of(case)), detections_of(case)
        assert tuple(query) == (expected["locality"], expected["obj1"], expected["obj2"]), case["prompt"]
        assert find_3d(query, found) == (expected["obj1_pos"], expected["obj2_pos"]), case["prompt"]
        result = spatial_3d(query, found, np.asarray(case["depth"], dtype=np.float32))
        assert result.score == pytest.approx(expected["answer"], abs=TOLERANCE), case["prompt"]
        scores.append(result.score)
    check_text(outputs.average_text("3d_spatial", scores), golden["expected_avg_result_txt"])


def test_numeracy_duplicate_test(golden: list[dict[str, Any]]) -> None:
    for case in golden:
        assert duplicate(case["box1"], case["box2"]) == bool(case["expected"]), case


def test_numeracy_parse_val(golden: dict[str, Any]) -> None:
    plurals = read_plurals(PLURALS)
    for case in golden["cases"]:
        assert wanted_objects(case["prompt"], plurals) == list(zip(case["objects"], case["counts"], strict=True)), case


def test_numeracy(golden: dict[str, Any]) -> None:
    scores = []
    for case in golden["cases"]:
        expected = case["expected"]
        wanted = list(zip(expected["objects"], expected["counts"], strict=True))
        score = numeracy_score(wanted, detections_of(case))
        assert score == pytest.approx(expected["answer"], abs=TOLERANCE), case
        scores.append(score)
    check_text(outputs.average_text("numeracy", scores), golden["expected_score_txt"])


def test_blip_vqa(golden: list[dict[str, Any]]) -> None:
    for part in golden:
        scores = []
        for image in part["images"]:
            asked = questions(image["noun_chunks"], part["np_num"])
            assert asked == [text for text in image["expected"]["questions"] if text], image
            score = attribute_score([float(p) for p in image["probs"][:len(asked)]])
            assert score == image["expected"]["answer"], image
            scores.append(float(score))
        check_text(outputs.average_text("blip", scores), part["expected_score_txt"])


def test_clip_score(golden: list[dict[str, Any]]) -> None:
    for part in golden:
        scores = []
        for image in part["images"]:
            expected = image["expected"]
            text = similarity_text(image["prompt"], tokens_of(image) if part["complex"] else None)
            assert text == expected["text_sent_to_clip"]
            model = GivenEmbeddings(image["image_embedding"], expected["text_embedding"])
            scores.append(float(model([np.zeros((8, 8, 3), dtype=np.uint8)], [text])[0]))
            assert scores[-1] == pytest.approx(expected["answer"], abs=1e-5)
        check_text(outputs.average_text("clip", scores), part["expected_score_txt"], tolerance=1e-5)


def test_three_in_one(golden: dict[str, Any]) -> None:
    parts = zip(golden["attribute"], golden["spatial"], golden["action"], golden["expected"], strict=True)
    spatial_prompts, action_prompts = ({prompt_key(line) for line in golden[f"complex_val_{part}"]}
                                       for part in ("spatial", "action"))
    scores = []
    for index, (attribute, spatial, similarity, expected) in enumerate(parts):
        prompt = golden["complex_val"][index // golden["images_per_prompt"]]
        scores.append(three_in_one(prompt, attribute=float(attribute), spatial=spatial, similarity=similarity,
                                   spatial_prompts=spatial_prompts, action_prompts=action_prompts))
        assert scores[-1] == pytest.approx(expected, abs=TOLERANCE), prompt
    assert mean(scores) == pytest.approx(float(golden["expected_score_txt"].split(":")[-1]), abs=TOLERANCE)
    check_text(outputs.average_text("complex", scores), golden["expected_score_txt"])


def tokens_of(case: dict[str, Any]) -> list[tuple[str, str]]:
    return [(text, pos) for text, pos in case["tokens"]]


def detections_of(case: dict[str, Any]) -> list[Labelled]:
    return [Labelled(item["label"], tuple(item["box"]), item["score"]) for item in case["detections"]]


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def check_text(text: str, expected: str, tolerance: float = TOLERANCE) -> None:
    """The same words, and numbers that agree."""
    assert NUMBER.sub("#", text) == NUMBER.sub("#", expected)
    numbers, wanted = ([float(number) for number in NUMBER.findall(words)] for words in (text, expected))
    # A total over n images may differ by n roundings.
    assert numbers == pytest.approx(wanted, abs=tolerance * 60)
    assert numbers[-1] == pytest.approx(wanted[-1], abs=tolerance)
