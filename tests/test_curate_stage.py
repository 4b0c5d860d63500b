"""The curate stage's doors to the outside: files in place of a split, protected files, and the benchmarks it keeps out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small import ROOT

from unigrpo.config import load_config
from unigrpo.prompts.firewall import shipped_firewall
from unigrpo.prompts.geneval_grammar import training_prompts
from unigrpo.prompts.records import read_records, write_records
from unigrpo.stages.curate import run


def project(folder: Path, curate: dict, sft: dict | None = None) -> Path:
    """Params of scale smoke with changes of curate and sft."""
    shutil.copytree(ROOT / "params", folder / "params", dirs_exist_ok=True)
    path = folder / "params" / "scales" / "smoke.yaml"
    content = yaml.safe_load(path.read_text())
    content["curate"] |= curate
    content["sft"] |= sft or {}
    path.write_text(yaml.safe_dump(content))
    return folder


def entry(root: Path, name: str) -> dict[str, str]:
    return {"path": name, "sha256": hashlib.sha256((root / name).read_bytes()).hexdigest()}


def test_prompts_that_train_are_compared_with_every_benchmark(tmp_path: Path) -> None:
    metrics = run("smoke", root=project(tmp_path, {}))
    assert metrics["curate/benchmark_checked"] == 64 + 32 + 16
    assert metrics["curate/benchmark_prompts"] > 8000  # of the shipped digests
    part = run("smoke", root=project(tmp_path, {"allow": ["t2i_compbench_*"]}))
    assert part["curate/benchmark_prompts"] < 1000


def test_a_file_takes_the_place_of_a_split(tmp_path: Path) -> None:
    firewall = shipped_firewall()
    records, _ = training_prompts(40, seed=3, refused=lambda record: firewall.overlap(record) is not None)
    write_records(tmp_path / "train.jsonl", records)
    root = project(tmp_path, {"files": {"train": entry(tmp_path, "train.jsonl")}})
    metrics = run("smoke", root=root)
    found = read_records(root / "artifacts/smoke/prompts/train.jsonl")
    assert [(r.id, r.prompt) for r in found] == [(r.id, r.prompt) for r in records[:32]]
    assert {r.split for r in found} == {"train"}
    assert metrics["curate/train_prompts"] == 32
    assert json.loads((root / "artifacts/smoke/prompts/leakage.json").read_text())["leaks"] == 0


@pytest.mark.parametrize(("curate", "message"), [
    ({"files": {"train": {"path": "few.txt", "sha256": None}}}, r"curate.files.train must hold the 32 distinct prompts of "
                                                                r"curate.train, got 2"),
    ({"files": {"train": {"path": "none.txt", "sha256": "0" * 64}}}, "curate.files.train names none.txt, and there is no such"),
    ({"protected": [{"path": "few.txt", "sha256": "0" * 64}]}, "curate.protected wants few.txt with sha256 0000"),
    ({"files": {"sft": {"path": "few.txt", "sha256": None}}}, "curate.files.sft"),
    ({"protected": [{"path": "few.txt", "sha256": "abc"}]}, "curate.protected.0.sha256"),
    ({"allow": ["genevall"]}, "allowed lists must be among geneval"),
])
def test_bad_files_are_refused(tmp_path: Path, curate: dict, message: str) -> None:
    (tmp_path / "few.txt").write_text("a griffin\na phoenix\n")
    for file in [*curate.get("files", {}).values(), *curate.get("protected", ())]:
        if file["sha256"] is None:
            file["sha256"] = entry(tmp_path, file["path"])["sha256"]
    root = project(tmp_path, curate)
    with pytest.raises(ValueError, match=message):
        run("smoke", root=root)
    assert not list((root / "artifacts/smoke/prompts").glob("*.jsonl")) if (root / "artifacts").exists() else True


def test_an_overlap_with_a_protected_file_lists_the_pairs(tmp_path: Path) -> None:
    """The first training prompt of the scale, in other words, in a file of the user's own benchmark."""
    run("smoke", root=project(tmp_path, {}))
    victim = next(r for r in read_records(tmp_path / "artifacts/smoke/prompts/train.jsonl")
                  if not r.needs_reasoning and len(r.include) == 1 and "cell" not in r.include[0])
    (tmp_path / "mine.txt").write_text(f"a griffin\n{victim.prompt.upper()}!\n")
    shutil.rmtree(tmp_path / "artifacts")
    root = project(tmp_path, {"protected": [entry(tmp_path, "mine.txt")]})
    with pytest.raises(ValueError, match="training prompts must not be in a benchmark") as error:
        run("smoke", root=root)
    assert repr(victim.prompt) in str(error.value)
    assert "mine.txt, line 2" in str(error.value)
    assert not list((root / "artifacts/smoke/prompts").glob("*.jsonl"))


def test_examples_of_the_warmup_are_compared_too(tmp_path: Path) -> None:
    (tmp_path / "protected.txt").write_text("two green griffins\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    example = {"prompt": "A photo of two green griffins.", "thinking": "", "image": "a.png"}
    (tmp_path / "warm.jsonl").write_text(json.dumps(example) + "\n")
    root = project(tmp_path, {"protected": [entry(tmp_path, "protected.txt")]}, {"data": "warm.jsonl"})
    assert load_config("smoke", root=root).sft.data == "warm.jsonl"
    with pytest.raises(ValueError, match="two green griffins"):
        run("smoke", root=root)
