"""`unigrpo score geneval` from folder to files, with tiny random models and with the shapes world's verifier."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geneval_sets import RECORDS, clause, write_set
from scorer_models import save_clip, save_mask2former

from unigrpo.cli import main
from unigrpo.commands.score_geneval import parse_options
from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.cache import ScoreCache
from unigrpo.evaluation.backends.clip import ClipColors
from unigrpo.evaluation.backends.coco import CLASSES
from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector
from unigrpo.evaluation.geneval import OFFICIAL, Options, verdict
from unigrpo.evaluation.geneval_folder import check_files, parse_metadata, read_image_set, write_metadata, write_sample
from unigrpo.evaluation.geneval_scoring import color_requests, find_objects, result_rows, score_images, score_name
from unigrpo.evaluation.images import read_image
from unigrpo.worlds.shapes.render import render
from unigrpo.worlds.shapes.scene import Object


class Models:
    """Checkpoints, their canaries, and the arguments that name them."""

    def __init__(self, root: Path) -> None:
        self.detector, self.color = save_mask2former(root / "detector"), save_clip(root / "clip")
        self.arguments = ["--detector", str(self.detector), "--color", str(self.color), "--input-size", "64"]
        self.canary = root / "canary.json"
        assert main(["score", "canary", "--record", str(self.canary), *self.arguments]) == 0

    def score(self, folder: Path, *more: str) -> int:
        return main(["score", "geneval", str(folder), *self.arguments, "--canary", str(self.canary),
                     "--option", "threshold=0.1", "--option", "counting_threshold=0.1",
                     "--metadata", str(folder.with_suffix(".jsonl")), *more])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures the detector was shown, call by call, without the canaries."""
    counts: list[int] = []
    sound = Mask2FormerDetector.__call__

    def counted(self: Mask2FormerDetector, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        counts.append(len(images))
        return sound(self, images)

    monkeypatch.setattr(Mask2FormerDetector, "__call__", counted)
    return counts


def outputs(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    place, = [path.parent for path in folder.glob("*/results.jsonl")]
    summary = json.loads((place / "summary.json").read_text())
    assert summary["name"] == place.name
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()], summary


def test_a_set_from_end_to_end(models: Models, folder: Path, seen: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert models.score(folder, "--batch", "5", "--soft") == 0
    rows, summary = outputs(folder)
    assert (seen, len(rows)) == ([5, 5, 5, 5, 5, 5, 2], 32)
    # The same, picture by picture, from the parts that have tests of their own.
    detector, colors = Mask2FormerDetector.load(models.detector, shorter=64), ClipColors.load(models.color)
    options = Options(threshold=0.1, counting_threshold=0.1)
    for number, row in enumerate(rows):
        path = folder / f"{number // 4:05d}" / "samples" / f"{number % 4:04d}.png"
        record = parse_metadata(RECORDS[number // 4], "here", CLASSES)
        objects, = find_objects([read_image(path)], [record], detector, colors, options)
        assert (row["filename"], row["tag"], json.loads(row["metadata"])) == (str(path), record.tag, RECORDS[number // 4])
        details = json.loads(row["details"])
        assert {label: [item[:4] for item in items] for label, items in details.items()} == {
            label: [list(item.box) for item in items] for label, items in objects.items()}
        assert [item[4] for items in details.values() for item in items] == pytest.approx(
            [item.score for items in objects.values() for item in items], abs=1e-6)
    assert 0 < sum(row["correct"] for row in rows) < 32, "a set that is all right or all wrong shows nothing"
    assert any("found 0 red; and 1" in row["reason"] for row in rows), "colours were asked"
    said = capsys.readouterr().out
    means = [task["correct"] / task["total"] for task in summary["tasks"].values()]
    assert f"Overall score (avg. over tasks): {np.mean(means):.5f}" in said
    assert summary["name"].startswith("geneval_mask2former_hf_64px_clip_other_other_options_prompts_")
    assert f"{summary['name']} = {np.mean(means):.5f}" in said
    assert (summary["images"], summary["prompts"], summary["partial"]) == (32, 8, False)
    assert summary["options"]["threshold"] == 0.1
    assert (summary["detector"], summary["colors"]) == (detector.identity, colors.identity)
    soft = [json.loads(line) for line in (folder / summary["name"] / "soft.jsonl").read_text().splitlines()]
    assert summary["soft"]["tasks"]["counting"] == pytest.approx(np.mean([line["soft"] for line in soft[8:12]]))


def test_a_second_run_shows_the_models_nothing(models: Models, folder: Path, seen: list[int]) -> None:
    assert models.score(folder) == 0
    first, cache = outputs(folder)[0], (folder / "scores.cache.jsonl").read_bytes()
    assert sum(seen) == 32
    assert models.score(folder, "--batch", "3") == 0
    assert (sum(seen), outputs(folder)[0]) == (32, first)
    assert (folder / "scores.cache.jsonl").read_bytes() == cache
    write_sample(folder, 0, 0, np.zeros((48, 48, 3), dtype=np.uint8))
    assert models.score(folder) == 0
    assert sum(seen) == 33, "one image changed"
    assert outputs(folder)[0] != first
    moved = folder.rename(folder.with_name("moved"))
    shutil.copy(folder.with_suffix(".jsonl"), moved.with_suffix(".jsonl"))
    assert models.score(moved) == 0
    assert sum(seen) == 33, "what an image is called does not matter"


def test_an_interrupted_run_goes_on(models: Models, folder: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Mask2FormerDetector.__call__

    def dies(self: Mask2FormerDetector, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        if sum(seen) >= 12:
            raise KeyboardInterrupt
        return counted(self, images)

    monkeypatch.setattr(Mask2FormerDetector, "__call__", dies)
    assert models.score(folder, "--batch", "4") == 130
    assert not list(folder.glob("*/results.jsonl"))
    monkeypatch.setattr(Mask2FormerDetector, "__call__", counted)
    assert models.score(folder, "--batch", "4") == 0
    assert seen == [4] * 8, "twelve before, twenty after"
    assert len(outputs(folder)[0]) == 32


def test_equal_images_are_scored_once(models: Models, tmp_path: Path, seen: list[int]) -> None:
    folder = write_set(tmp_path / "set", RECORDS[:1])
    for number in range(4):
        write_sample(folder, 0, number, np.full((48, 48, 3), 90, dtype=np.uint8))
    assert models.score(folder) == 0
    assert (seen, len(outputs(folder)[0])) == ([1], 4)


def test_other_options_and_colours_are_other_scores(models: Models, folder: Path, tmp_path: Path, seen: list[int]) -> None:
    assert models.score(folder) == 0
    assert models.score(folder, "--option", "max_objects=1") == 0
    assert sum(seen) == 64
    other = save_clip(tmp_path / "other", seed=5)
    arguments = [*models.arguments[:2], "--color", str(other), *models.arguments[4:]]
    assert main(["score", "canary", "--record", str(tmp_path / "canary.json"), *arguments]) == 0
    assert models.score(folder, "--color", str(other), "--canary", str(tmp_path / "canary.json")) == 0
    assert sum(seen) == 64 + 16, "half of the prompts ask for a colour"


def test_a_partial_set_is_marked_everywhere(models: Models, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "00002" / "samples" / "0003.png").unlink()
    assert models.score(folder) == 2
    assert "no complete set: 1 missing, first 00002/samples/0003.png" in capsys.readouterr().err
    assert models.score(folder, "--allow-partial") == 0
    rows, summary = outputs(folder)
    assert (len(rows), summary["partial"], summary["missing"]) == (31, True, 1)
    assert summary["name"].endswith("_partial")
    assert "PARTIAL: 1 missing" in capsys.readouterr().out


def test_broken_inputs_stop_before_any_model_runs(models: Models, folder: Path, seen: list[int],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "00001" / "samples" / "0002.png"
    good = path.read_bytes()
    for data, words in ((good[:80], "is truncated"), (b"", "is empty (0 bytes)"), (b"GIF", "is no image")):
        path.write_bytes(data)
        assert models.score(folder) == 2
        assert f"unigrpo score: {path} {words}" in capsys.readouterr().err
    path.write_bytes(good)
    for more, words in ((("--option", "treshold=0.2"), "--option must be one of threshold"), (("--batch", "0"), "--batch"),
                        (("--position-bug",), "add --soft"), (("--color", str(models.detector)), "a CLIP was wanted"),
                        (("--canary", str(folder / "none.json")), "record"), (("--samples", "3"), "sample 3, where")):
        assert models.score(folder, *more) == 2
        assert words in capsys.readouterr().err, more
    assert not seen
    assert not list(folder.glob("*.jsonl"))


def test_prompts_of_colour_need_a_colour_model(models: Models, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "geneval", str(folder), "--detector", str(models.detector), "--allow-partial"]) == 2
    assert "give the colour model with --color" in capsys.readouterr().err


def test_models_that_changed_since_the_record_score_nothing(models: Models, folder: Path, seen: list[int], tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    other = save_mask2former(tmp_path / "other", seed=1)
    assert models.score(folder, "--detector", str(other)) == 2
    assert "no record of the detector" in capsys.readouterr().err
    record = json.loads(models.canary.read_text())
    entry = next(entry for entry in record["scorers"].values() if entry["kind"] == "detector")
    entry["readings"]["darkness"][0] += 0.5
    (tmp_path / "canary.json").write_text(json.dumps(record))
    assert models.score(folder, "--canary", str(tmp_path / "canary.json")) == 2
    assert "the detector mask2former_hf_64px is not itself on cpu: of 'darkness'" in capsys.readouterr().err
    assert not seen


def test_the_shapes_verifier_scores_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = (Object("red", "circle", "left"), Object("blue", "square", "right"))
    records = [
        ({"tag": "two_object", "include": [clause("circle"), clause("square")]}, True),
        ({"tag": "two_object", "include": [clause("circle"), clause("cross")]}, False),
        ({"tag": "counting", "include": [clause("circle")], "exclude": [clause("circle", 2)]}, True),
        ({"tag": "color_attr", "include": [clause("circle", color="red"), clause("square", color="blue")]}, True),
        ({"tag": "color_attr", "include": [clause("circle", color="blue"), clause("square", color="red")]}, False),
        ({"tag": "position", "include": [clause("square"), clause("circle", position=["left of", 0])]}, True),
        ({"tag": "position", "include": [clause("square"), clause("circle", position=["right of", 0])]}, False),
    ]
    prompts = [{**record, "prompt": f"prompt {index}"} for index, (record, _) in enumerate(records)]
    folder, rng = tmp_path / "set", np.random.default_rng(0)
    for index, prompt in enumerate(prompts):
        write_metadata(folder, index, prompt)
        for number in range(4):
            write_sample(folder, index, number, np.rint(render([drawn], rng)[0] * 255).astype(np.uint8))
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    assert main(["score", "geneval", str(folder), "--detector", "shapes", "--metadata", str(source), "--soft"]) == 0
    rows, summary = outputs(folder)
    assert [row["correct"] for row in rows] == [right for _, right in records for _ in range(4)]
    assert summary["name"] == f"geneval_shapes_prompts_{summary['prompt_set']['sha256'][:8]}"
    assert summary["overall"] == pytest.approx((0.5 + 1 + 0.5 + 0.5) / 4)
    assert summary["soft"]["tasks"]["position"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["strict"]["tasks"]["color_attr"] == 0.5
    assert "counting         = 100.00% (4 / 4)" in capsys.readouterr().out
    assert rows[16]["reason"].splitlines() == ["expected blue circle>=1, found 0 blue; and 1 red",
                                               "expected red square>=1, found 0 red; and 1 blue"]


class Toy:
    """A detector that finds what it is told."""

    name = identity = "toy"
    labels = ("cup", "fork")

    def __init__(self, found: list[Detected]) -> None:
        self.found = found

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        return [self.found for _ in images]


class Asked:
    """A colour classifier that remembers what it was asked."""

    name = identity = "asked"

    def __init__(self) -> None:
        self.questions: list[tuple[str, list[float]]] = []

    def __call__(self, image: np.ndarray, detections: Sequence[Detected], label: str) -> list[str]:
        self.questions.append((label, [item.score for item in detections]))
        return ["red"] * len(detections)


def test_colours_are_asked_of_the_best_objects_only_and_where_there_are_enough() -> None:
    found = [Detected("cup", (0, 0, 4, 4), score) for score in (0.5, 0.9, 0.7)] + [Detected("fork", (0, 0, 4, 4), 0.8)]
    wanted = {"tag": "colors", "prompt": "p", "include": [clause("cup", 2, color="red"), clause("fork", 2, color="red")]}
    record, asked = parse_metadata(wanted, "here", CLASSES), Asked()
    assert color_requests(record) == {"cup": [2], "fork": [2]}
    objects, = find_objects([np.zeros((4, 4, 3), np.uint8)], [record], Toy(found), asked)
    assert asked.questions == [("cup", [0.9, 0.7])], "one fork is too few already"
    assert [item.color for item in objects["cup"]] == ["red", "red", None]
    with pytest.raises(ValueError, match="give a colour model with --color"):
        find_objects([np.zeros((4, 4, 3), np.uint8)], [record], Toy(found), None)


def test_a_clause_that_is_met_has_its_colours_where_another_of_the_class_is_not() -> None:
    """Officially each clause asks on its own: one cup of two is red, and the clause that wants two does not hide it."""
    wanted = {"tag": "colors", "prompt": "p", "include": [clause("cup", 1, color="red"), clause("cup", 2, color="red")]}
    record, asked = parse_metadata(wanted, "here", CLASSES), Asked()
    objects, = find_objects([np.zeros((4, 4, 3), np.uint8)], [record], Toy([Detected("cup", (0, 0, 4, 4), 0.9)]), asked)
    assert (color_requests(record), asked.questions) == ({"cup": [1, 2]}, [("cup", [0.9])])
    assert verdict(record, objects).reason == "expected cup>=2, found 1"


@pytest.mark.parametrize("broken", [Detected("cup", (0, 0, 4, 4), float("nan")), Detected("cup", (0, 0, float("inf"), 4), 0.9)])
def test_a_detector_that_gives_no_numbers_is_not_a_zero(broken: Detected) -> None:
    record = parse_metadata(RECORDS[0], "here", CLASSES)
    with pytest.raises(ValueError, match=r"the detector toy gave .* not finite"):
        find_objects([np.zeros((4, 4, 3), np.uint8)], [record], Toy([broken]), None)


def test_file_names_may_be_told_from_a_folder_on(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", RECORDS[:1])
    images = check_files(read_image_set(folder, CLASSES, metadata=folder.with_suffix(".jsonl")))
    scored = score_images(images, Toy([Detected("cup", (1, 2, 3, 4), 0.75)]), None, ScoreCache(tmp_path / "cache.jsonl"))
    row = result_rows(scored, relative_to=folder)[2]
    assert row["filename"] == "00000/samples/0002.png"
    assert (row["correct"], row["reason"], row["details"]) == (True, "", '{"cup": [[1, 2, 3, 4, 0.75]]}')


def test_an_image_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", RECORDS[:1])
    images = check_files(read_image_set(folder, CLASSES, metadata=folder.with_suffix(".jsonl")))
    write_sample(folder, 0, 2, np.zeros((48, 48, 3), np.uint8))
    with pytest.raises(ValueError, match=r"0002\.png changed while"):
        score_images(images, Toy([]), None, ScoreCache(tmp_path / "cache.jsonl"))


def test_the_official_set_by_the_official_detector_would_need_no_suffix() -> None:
    images = argparse.Namespace(suffix="")
    official = argparse.Namespace(name="clip_vit_l_14")
    assert score_name(Toy([]), official, images) == "geneval_toy"  # type: ignore[arg-type]
    other = parse_options(["max_overlap=0.5"])
    assert score_name(Toy([]), official, images, other) == "geneval_toy_other_options"  # type: ignore[arg-type]
    assert parse_options([]) == OFFICIAL
    assert parse_options(["max_objects=3"]) == Options(max_objects=3)
    with pytest.raises(ValueError, match="must be a number"):
        parse_options(["threshold=high"])
    with pytest.raises(ValueError, match="must be finite, got 'nan'"):
        parse_options(["threshold=nan"])
