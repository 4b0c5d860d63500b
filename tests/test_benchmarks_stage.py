"""The evaluate stage on GenEval and T2I-CompBench: folders, scores, rows, what a kill costs, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from benchmark_sets import PROMPTS, RECORDS, geneval, shapes_geneval, t2i_compbench, write_models, write_sets
from PIL import Image
from small import ROOT, small_config, small_policy, small_prompts
from vqa_models import save_owlv2

from unigrpo.cli import main
from unigrpo.closure import module_files, stage_digests
from unigrpo.config import load_config
from unigrpo.digests import sha256_path
from unigrpo.evaluate import GRID
from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector
from unigrpo.evaluation.benchmark_table import HEADER, read_table
from unigrpo.evaluation.outcomes import read_outcomes, read_verdicts
from unigrpo.prompts.records import write_records
from unigrpo.stages import benchmarks, evaluate
from unigrpo.stages.loading import save_policy

OUT = Path("artifacts/smoke/base")


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records stay in the journal: nothing here needs a database."""
    monkeypatch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt sets, models with canaries, and a random checkpoint of smoke's shape; tests copy it."""
    root = tmp_path_factory.mktemp("made")
    write_sets(root)
    write_models(root)
    save_policy(root / OUT / "checkpoint", small_policy(small_config()))
    (root / "artifacts" / "smoke" / "prompts").mkdir(parents=True)
    shutil.copytree(ROOT / "params", root / "params")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A project of one's own; checkpoints and data are copies too, being small."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def set_params(root: Path, **values: Any) -> None:
    """The section evaluate of scale smoke."""
    path = root / "params" / "scales" / "smoke.yaml"
    content = yaml.safe_load(path.read_text())
    content["evaluate"] |= {"batch": 6, "num_steps": 2, **values}
    path.write_text(yaml.safe_dump(content))


def run(root: Path) -> dict[str, float]:
    return evaluate.run("smoke", checkpoint="base", root=root)


def test_both_benchmarks_with_models_leave_their_official_folders(root: Path) -> None:
    """Everything that the stage writes, against what the files say: one row a prompt and cell, scores of their own names."""
    set_params(root, benchmarks=["geneval", "t2i_compbench"], geneval=geneval(),
               t2i_compbench=t2i_compbench(limit=1, images_per_prompt=2, allow_partial=True))
    metrics = run(root)
    cells = [root / OUT / "benchmarks" / "geneval" / f"cfg_{cfg}-thinking_on" for cfg in ("off", "on")]
    table = read_table(root / OUT / "benchmarks.csv")
    names = set(table["score"][table["benchmark"] == "geneval"])
    (name,) = names
    assert name.startswith("geneval_mask2former_hf_64px_clip_other_prompts_")
    assert name.endswith("_2_samples")
    for cell in cells:
        assert json.loads((cell / "00003" / "metadata.jsonl").read_text()) == RECORDS[3]
        assert sorted(path.name for path in (cell / "00003" / "samples").iterdir()) == ["0000.png", "0001.png"]
        with Image.open(cell / "00003" / "samples" / "0001.png") as image:
            assert image.size == (32, 32)  # its own size, nothing enlarged
            assert isinstance(image.text["thinking"], str)
        lines = [json.loads(line) for line in (cell / name / "results.jsonl").read_text().splitlines()]
        assert len(lines) == 2 * len(RECORDS)
        assert lines[0]["filename"] == "00000/samples/0000.png"
        summary = json.loads((cell / name / "summary.json").read_text())
        rows = table[(table["benchmark"] == "geneval") & (table["cfg"] == cell.name[4:].split("-")[0])]
        assert len(rows) == len(RECORDS)
        assert rows["score_sum"].sum() == summary["correct_images"]
        assert metrics[f"bench/geneval/{cell.name}/overall"] == pytest.approx(summary["overall"], rel=1e-5)
    assert metrics["bench/geneval/overall"] == metrics["bench/geneval/cfg_off-thinking_on/overall"]
    assert {f"bench/geneval/{record['tag']}" for record in RECORDS} <= set(metrics)
    check_compbench(root, table, metrics)
    assert metrics == json.loads((root / OUT / "metrics.json").read_text())
    assert read_outcomes(root / OUT / "outcomes.csv", empty=True).empty
    assert read_verdicts(root / OUT / "verdicts.parquet").empty
    assert json.loads((root / OUT / "samples" / "samples.json").read_text()) == []
    text = "".join(path.read_text() for path in (root / OUT / "benchmarks").rglob("*.json*"))
    assert str(root) not in text


def check_compbench(root: Path, table: pd.DataFrame, metrics: dict[str, float]) -> None:
    """A part of T2I-CompBench: its files, its scores, and no key that would call them scores of the benchmark."""
    cell = root / OUT / "benchmarks" / "t2i_compbench" / "cfg_off-thinking_on"
    assert sorted(path.name for path in (cell / "color" / "samples").iterdir()) == [
        f"{PROMPTS['color'][0]}_00000{i}.png" for i in range(2)]
    assert not [metric for metric in metrics if metric.startswith("bench/t2i_compbench/")]
    for category in PROMPTS:
        rows = table[(table["category"] == category) & (table["cfg"] == "off")]
        (name,) = set(rows["score"])
        assert name.startswith(f"t2i_compbench_{category}_")
        assert name.endswith("_partial_own_prompts")
        record = json.loads((cell / name / "unigrpo_score.json").read_text())
        assert record["complete"] is False
        assert metrics[f"bench/t2i_compbench_partial/{category}"] == pytest.approx(record["score"], rel=1e-5, abs=1e-9)


def test_shapes_alone_leave_an_empty_folder_and_reach_no_scorer(root: Path) -> None:
    """What scale tiny has; and both kinds of benchmark in one evaluation give the same numbers as each alone."""
    reached = {"unigrpo/stages/benchmarks.py", "unigrpo/evaluation/backends/cache.py", "unigrpo/evaluation/t2i_score.py"}
    assert not reached & set(stage_digests(ROOT, "evaluate"))
    assert reached <= set(module_files(ROOT, evaluate.OTHERS))
    write_records(root / "artifacts" / "smoke" / "prompts" / "eval.jsonl", small_prompts(3))
    set_params(root, prompts=3)
    shapes = run(root)
    assert (root / OUT / "benchmarks.csv").read_text() == HEADER + "\n"
    assert [path.read_text() for path in (root / OUT / "benchmarks").iterdir()] == ["[]\n"]  # index.json
    assert not [metric for metric in shapes if "geneval/" in metric]
    set_params(root, benchmarks=["geneval"], geneval=shapes_geneval())
    other = run(root)
    assert len(list((root / OUT / "benchmarks").rglob("*.png"))) == 12
    set_params(root, benchmarks=["shapes", "geneval"])
    assert run(root) == shapes | other
    assert len(read_outcomes(root / OUT / "outcomes.csv")) == 3 * len(GRID)
    set_params(root, benchmarks=["shapes"], geneval=None)
    assert run(root) == shapes
    assert [path.name for path in (root / OUT / "benchmarks").iterdir()] == ["index.json"]  # nothing of an earlier evaluation


def test_a_cell_drawn_with_the_rest_is_the_cell_drawn_by_draw_grid(root: Path) -> None:
    """Noise and thinking are keyed by (prompt, sample): a set with another prompt in front draws the same images."""
    set_params(root, benchmarks=["geneval"], geneval=shapes_geneval(images_per_prompt=1), batch=1)
    run(root)
    lines = (root / "data" / "shapes.jsonl").read_text().splitlines()
    first = {path.parent.parent.name: sha256_path(path) for path in sorted((root / OUT / "benchmarks").rglob("0000.png"))}
    (root / "data" / "shapes.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    run(root)
    second = {path.parent.parent.name: sha256_path(path) for path in sorted((root / OUT / "benchmarks").rglob("0000.png"))}
    assert [first[f"{i:05d}"] for i in range(3)] == [second[f"{i:05d}"] for i in (2, 1, 0)]


class Killed(Exception):
    """In place of kill -9, which an end-to-end test sends."""


def count_drawn(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[Path]:
    """The images that are written from now on; the one after `stop_after` ends the run."""
    written: list[Path] = []
    write = benchmarks.write_picture

    def counted(path: Path, image: Any, thinking: str) -> None:
        if stop_after is not None and len(written) == stop_after:
            raise Killed
        written.append(path)
        write(path, image, thinking)

    monkeypatch.setattr(benchmarks, "write_picture", counted)
    return written


def test_a_killed_run_draws_and_scores_nothing_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second chunk: the first is kept; stopped in scoring: no image is drawn and none is seen again."""
    set_params(root, benchmarks=["geneval"], geneval=geneval())
    with pytest.MonkeyPatch.context() as patch:
        reference = count_drawn(patch)
        run(root)
    whole = sha256_path(root / OUT / "benchmarks"), (root / OUT / "benchmarks.csv").read_bytes()
    assert len(reference) == len(RECORDS) * 2 * 2
    shutil.rmtree(root / OUT / "benchmarks")
    with pytest.MonkeyPatch.context() as patch:  # chunks of 3 prompts x 2 images x 2 cells
        first = count_drawn(patch, stop_after=15)
        with pytest.raises(Killed):
            run(root)
    assert len(first) == 15
    seen: list[int] = []
    detect = Mask2FormerDetector.__call__

    def limited(self: Mask2FormerDetector, images: Any) -> Any:
        if sum(seen) + len(images) > 16:
            raise Killed
        seen.append(len(images))
        return detect(self, images)

    second = count_drawn(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mask2FormerDetector, "__call__", limited)
        with pytest.raises(Killed):
            run(root)
    assert len(second) == 12  # the second chunk, whole: its neighbours decide its last bits
    assert sum(seen) == 12
    monkeypatch.setattr(Mask2FormerDetector, "__call__",
                        lambda self, images: seen.append(len(images)) or detect(self, images))
    run(root)
    assert len(second) == 12
    assert sum(seen) == 24
    assert (sha256_path(root / OUT / "benchmarks"), (root / OUT / "benchmarks.csv").read_bytes()) == whole


def test_a_cut_image_and_changed_prompts_are_drawn_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_params(root, benchmarks=["geneval"], geneval=shapes_geneval())
    monkeypatch.setattr(benchmarks.Benchmarks, "score", lambda self: (_ for _ in ()).throw(Killed()))
    drawn = count_drawn(monkeypatch)
    for _ in range(2):
        with pytest.raises(Killed):
            run(root)
    assert len(drawn) == 12  # all three prompts are one chunk
    (cut,) = [path for path in drawn if path.match("cfg_on-*/00001/samples/0001.png")]
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(Killed):
        run(root)
    assert len(drawn) == 24
    path = root / "data" / "shapes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(Killed):
        run(root)
    assert len(drawn) == 24 + 8
    assert not list((root / ".unigrpo" / "resume").glob("*/benchmarks/geneval/*/00002"))


# -- what is refused, before anything is drawn ------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "wanted"), [
    ({"benchmarks": ["geneval"]}, r"benchmarks names geneval, whose section is null; set evaluate\.geneval.*smoke\.yaml"),
    ({"benchmarks": ["geneval", "geneval"], "geneval": geneval()}, r"benchmarks must name each once"),
    ({"benchmarks": ["genevil"]}, r"'shapes', 'geneval' or 't2i_compbench', got 'genevil'"),
    ({"cells": [["on", "on"]]}, r'cells must hold the headline cell \["off", "on"\]'),
    ({"cells": [[False, True]]}, r'cells must say "on" and "off" in quotes'),
    ({"benchmarks": ["geneval"], "geneval": geneval(canary=None)}, r"canary must be the file .* got null"),
    ({"benchmarks": ["geneval"], "geneval": geneval(limit=2)}, r"limit=2 draws a part .*allow_partial: true"),
    ({"benchmarks": ["geneval"], "geneval": geneval(detectr="x")}, r"evaluate\.geneval\.detectr is not a key.*smoke\.yaml"),
    ({"benchmarks": ["t2i_compbench"], "t2i_compbench": t2i_compbench(images_per_prompt=4)},
     r"images_per_prompt=4 makes a partial set"),
    ({"benchmarks": ["t2i_compbench"], "t2i_compbench": t2i_compbench(categories=["color", "color"])}, r"each category once"),
    ({"benchmarks": ["t2i_compbench"], "t2i_compbench": t2i_compbench(categories=["colour"])}, r"got 'colour'"),
])
def test_a_mistake_in_params_is_found_as_they_load(tmp_path: Path, values: dict[str, Any], wanted: str) -> None:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    set_params(tmp_path, **values)
    with pytest.raises(ValueError, match=f"(?s){wanted}"):
        load_config("smoke", root=tmp_path)


@pytest.mark.parametrize(("change", "wanted"), [
    (lambda values: values.update(benchmarks=["shapes"]), r"benchmarks: \[shapes\]"),
    (lambda values: values["geneval"].update(detector="shapes"), r"geneval\.detector: shapes")])
def test_the_verifier_of_the_shapes_world_reads_its_own_pictures(tmp_path: Path, change: Any, wanted: str) -> None:
    assert load_config("bagel_7b", root=ROOT).evaluate.benchmarks == ("geneval", "t2i_compbench")
    shutil.copytree(ROOT / "params", tmp_path / "params")
    path = tmp_path / "params" / "scales" / "bagel_7b.yaml"
    content = yaml.safe_load(path.read_text())
    change(content["evaluate"])
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=rf"evaluate\.{wanted} judges pictures of 32 x 32 .* \(1024, 1024\)"):
        load_config("bagel_7b", root=tmp_path)


def refused(root: Path, wanted: str) -> None:
    """The stage stops with these words, and nothing was drawn."""
    with pytest.raises(ValueError, match=f"(?s){wanted}"):
        run(root)
    assert not list((root / ".unigrpo" / "resume").rglob("*.png"))


def test_every_missing_file_is_named_at_once(root: Path) -> None:
    shutil.rmtree(root / "checkpoints" / "detector")
    (root / "data" / "geneval.jsonl").unlink()
    (root / "data" / "t2i" / "new_objects.txt").unlink()
    set_params(root, benchmarks=["geneval", "t2i_compbench"], geneval=geneval(canary="data/none.json"),
               t2i_compbench=t2i_compbench(clip=None))
    refused(root, r"nothing was drawn:\n- evaluate\.geneval\.metadata: there is no file \S+/geneval\.jsonl\n"
            r"- evaluate\.geneval\.canary: there is no file \S+/none\.json\n"
            r"- evaluate\.geneval\.detector: there is no folder \S+/detector with a model.*"
            r"- evaluate\.t2i_compbench\.prompts: there is no file \S+/new_objects\.txt\n"
            r"- evaluate\.t2i_compbench\.clip is null, and non_spatial, complex need it\n"
            r"- evaluate\.t2i_compbench\.detector: there is no folder .*change params/scales/smoke\.yaml")


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"own_prompts": False}, r"evaluate\.geneval: metadata must be GenEval's own set \(sha256 010f2e9a62a68a90\.\.\. .*"
                             r"own_prompts: true"),
    ({"detector": "shapes", "canary": None, "colors": None}, r"record 1: unknown class 'banana'"),
    ({"colors": None}, r"ask for colours: set colors"),
])
def test_prompts_that_cannot_be_scored_are_refused(root: Path, changes: dict[str, Any], wanted: str) -> None:
    set_params(root, benchmarks=["geneval"], geneval=geneval(**changes))
    refused(root, wanted)


def test_other_bad_inputs_are_refused(root: Path) -> None:
    """A class that no detector finds, a prompt twice, words that the model cannot read, a detector that is not itself."""
    path = root / "data" / "geneval.jsonl"
    good = path.read_text()
    set_params(root, benchmarks=["geneval"], geneval=geneval())
    for text, wanted in ((good.replace('"truck", "count": 1', '"lorry", "count": 1', 1), r"record 2: unknown class 'lorry'"),
                         (good + good.splitlines()[0] + "\n", r"holds 'a banana' twice"),
                         (good.replace("a banana", "one cup", 1), r"cup"), ("", "is empty"), ("{", "line 1: wanted one JSON")):
        path.write_text(text)
        refused(root, wanted)
    path.write_text(good)
    record = root / "data" / "canary.json"
    content = json.loads(record.read_text())
    for entry in content["scorers"].values():
        if entry["kind"] == "detector":
            entry["readings"]["a clock"] = [value + 0.5 for value in entry["readings"]["a clock"]]
    record.write_text(json.dumps(content))
    refused(root, r"evaluate\.geneval: the detector mask2former_hf_64px is not itself on cpu: of 'a clock'.*nothing was scored")
    set_params(root, benchmarks=["t2i_compbench"], t2i_compbench=t2i_compbench(own_prompts=False))
    refused(root, r"evaluate\.t2i_compbench: .*color_val\.txt must be T2I-CompBench's own file.*own_prompts: true")


def test_an_owlv2_is_asked_for_the_labels_of_params(root: Path) -> None:
    """The other kind of detector, one category, a part of its prompts; without labels it has nothing to find."""
    save_owlv2(root / "checkpoints" / "owlv2")
    (root / "data" / "labels.txt").write_text("banana\ntruck\n")
    section = t2i_compbench(categories=["numeracy"], detector="checkpoints/owlv2", labels="data/labels.txt",
                            images_per_prompt=1, allow_partial=True)
    assert main(["score", "canary", "--record", str(root / "data" / "canary.json"), "--detector",
                 str(root / "checkpoints" / "owlv2"), "--labels", str(root / "data" / "labels.txt")]) == 0
    set_params(root, benchmarks=["t2i_compbench"], t2i_compbench=section)
    run(root)
    (name,) = set(read_table(root / OUT / "benchmarks.csv")["score"])
    assert name == "t2i_compbench_numeracy_owlv2_hf_2labels_above0.1_partial_own_prompts"
    set_params(root, benchmarks=["t2i_compbench"], t2i_compbench=section | {"labels": None})
    refused(root, r"evaluate\.t2i_compbench: the OWLv2 of detector finds what it is asked for: set labels")


def test_a_full_gpu_names_the_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_params(root, benchmarks=["geneval"], geneval=shapes_geneval())

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(benchmarks, "draw_grid", full)
    with pytest.raises(ValueError, match=r"lower evaluate\.batch in params"):
        run(root)
