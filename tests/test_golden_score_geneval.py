"""GenEval's own 553 prompts through the whole scorer, where their file is there: a kill, the official size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from geneval_sets import write_set
from scorer_models import picture, save_clip, save_mask2former

from unigrpo.cli import main
from unigrpo.evaluation.backends.coco import CLASSES, read_class_names
from unigrpo.evaluation.geneval_folder import (
    parse_metadata,
    read_image_set,
    read_metadata_file,
    write_metadata,
    write_sample,
)

BENCHMARK = Path(__file__).parents[2] / "shared" / "benchmarks" / "geneval"
PER_TAG = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    path = BENCHMARK / "evaluation_metadata.jsonl"
    metafunc.parametrize("metadata", [path] if path.is_file() else [], ids=str)  # without it there is nothing to collect


def test_every_official_prompt_is_understood(metadata: Path, tmp_path: Path) -> None:
    records, digest = read_metadata_file(metadata)
    assert digest == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert dict(Counter(parse_metadata(record, "here", CLASSES).tag for record in records)) == PER_TAG
    assert read_class_names(BENCHMARK / "object_names.txt") == CLASSES


def test_the_official_set_is_known_without_its_file(metadata: Path, tmp_path: Path) -> None:
    records, _ = read_metadata_file(metadata)
    for index, record in enumerate(records):
        write_metadata(tmp_path / "set", index, record)
        for number in range(4):
            (tmp_path / "set" / f"{index:05d}" / "samples" / f"{number:04d}.png").touch()
    images = read_image_set(tmp_path / "set", CLASSES)
    assert (images.prompt_set, images.suffix, len(images.samples), images.prompts) == ("official", "", 2212, 553)
    assert images == read_image_set(tmp_path / "set", CLASSES, metadata=metadata)
    write_metadata(tmp_path / "set", 7, {**records[7], "prompt": "another"})
    with pytest.raises(ValueError, match="are not GenEval's 553"):
        read_image_set(tmp_path / "set", CLASSES)
    with pytest.raises(ValueError, match="is not line 8 of"):
        read_image_set(tmp_path / "set", CLASSES, metadata=metadata)


def models(root: Path, *more: str) -> list[str]:
    arguments = ["--detector", str(save_mask2former(root / "detector")), "--color", str(save_clip(root / "clip")), *more]
    assert main(["score", "canary", "--record", str(root / "canary.json"), *arguments]) == 0
    return [*arguments, "--canary", str(root / "canary.json")]


@pytest.mark.slow
def test_the_whole_benchmark_survives_a_kill(metadata: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", read_metadata_file(metadata)[0], size=64)
    command = [sys.executable, "-m", "unigrpo", "score", "geneval", str(folder), *models(tmp_path, "--input-size", "64"),
               "--soft", "--batch", "16"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    cache = folder / "scores.cache.jsonl"
    with (tmp_path / "first.log").open("w") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        while running.poll() is None and not (cache.exists() and cache.read_bytes().count(b"\n") >= 800):
            time.sleep(0.2)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    before = cache.read_bytes()
    assert 800 <= before.count(b"\n") < 2212
    assert not list(folder.glob("*/results.jsonl")), "no result before the end"

    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr
    after = cache.read_bytes()
    assert after.startswith(before), "what was scored stays"
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert (len(keys), len(set(keys))) == (2212, 2212), "no image twice"

    name = "geneval_mask2former_hf_64px_clip_other"
    rows = [json.loads(line) for line in (folder / name / "results.jsonl").read_text().splitlines()]
    summary = json.loads((folder / name / "summary.json").read_text())
    assert (summary["name"], summary["partial"], summary["prompt_set"]["name"]) == (name, False, "official")
    assert {tag: task["total"] // 4 for tag, task in summary["tasks"].items()} == PER_TAG
    correct = {tag: [row["correct"] for row in rows if row["tag"] == tag] for tag in PER_TAG}
    assert summary["overall"] == pytest.approx(np.mean([np.mean(values) for values in correct.values()]))
    assert f"Overall score (avg. over tasks): {summary['overall']:.5f}" in finished.stdout
    assert "Total images: 2212" in finished.stdout
    assert "Total prompts: 553" in finished.stdout
    assert sum(bool(json.loads(row["details"])) for row in rows) > 1000, "detections were made"

    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (again.returncode, again.stdout, cache.read_bytes()) == (0, finished.stdout, after)


@pytest.mark.slow
def test_twenty_images_at_the_official_size(metadata: Path, tmp_path: Path) -> None:
    records = read_metadata_file(metadata)[0]
    folder = tmp_path / "set"
    for index in (0, 100, 200, 300, 500):
        write_metadata(folder, index, records[index])
        for number in range(4):
            write_sample(folder, index, number, picture(4 * index + number, 512, 512))
    assert main(["score", "geneval", str(folder), *models(tmp_path), "--metadata", str(metadata), "--allow-partial"]) == 0
    place = folder / "geneval_mask2former_hf_clip_other_partial"
    rows = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert json.loads((place / "summary.json").read_text())["missing"] == 548, "as prompts, whose images are missing too"
    edges = [edge for row in rows for items in json.loads(row["details"]).values() for item in items for edge in item[:4]]
    assert max(edges) == 512, "boxes are in the image's own pixels"
