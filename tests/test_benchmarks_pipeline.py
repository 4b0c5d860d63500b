"""GenEval and T2I-CompBench through `dvc repro` at scale smoke, with made checkpoints of every model they ask."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from benchmark_sets import PROMPTS, RECORDS, geneval, t2i_compbench, write_models, write_sets
from pipeline_copy import copy_environment, make_copy, run_in
from test_pipeline import RAN, edit, processes_of

from unigrpo.digests import sha256_path

EVALUATIONS = {"evaluate@smoke-base", "evaluate@smoke-sft", "evaluate@smoke-unigrpo-0"}
CELLS = ("cfg_off-thinking_on", "cfg_on-thinking_on")


def write_experiment(folder: Path, *runs: str) -> None:
    run_in(folder, "python", "-m", "unigrpo", "experiment", "write", "--scale", "smoke", "--run", *runs, "--seed", "0")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which the main job ran on both benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarks") / "copy"
    make_copy(folder)
    write_sets(folder)
    write_models(folder)
    edit(folder / "params" / "scales" / "smoke.yaml", lambda content: content["evaluate"].update(
        benchmarks=["geneval", "t2i_compbench"], batch=4, geneval=geneval(), t2i_compbench=t2i_compbench()))
    write_experiment(folder, "unigrpo")
    done = run_in(folder, "dvc", "repro", "report@smoke-main")
    assert set(RAN.findall(done.stdout)) >= EVALUATIONS | {"report@smoke-main"}, done.stdout
    return folder


@pytest.mark.slow
def test_every_evaluation_leaves_official_folders_and_the_report_their_rows(project: Path) -> None:
    folder = project / "artifacts" / "smoke"
    for checkpoint in ("base", "sft", "unigrpo/0"):
        metrics = json.loads((folder / checkpoint / "metrics.json").read_text())
        for cell in CELLS:
            place = folder / checkpoint / "benchmarks"
            assert len(list((place / "geneval" / cell).glob("*/samples/*.png"))) == 2 * len(RECORDS)
            (summary,) = (place / "geneval" / cell).glob("geneval_*/summary.json")
            content = json.loads(summary.read_text())
            assert not content["partial"]
            assert metrics[f"bench/geneval/{cell}/overall"] == pytest.approx(content["overall"], rel=1e-5)
            for category, prompts in PROMPTS.items():
                assert len(list((place / "t2i_compbench" / cell / category / "samples").glob("*.png"))) == 10 * len(prompts)
                (record,) = (place / "t2i_compbench" / cell).glob(f"t2i_compbench_{category}_*/unigrpo_score.json")
                content = json.loads(record.read_text())
                assert content["complete"]
                assert metrics[f"bench/t2i_compbench/{cell}/{category}"] == pytest.approx(content["score"], rel=1e-4, abs=1e-9)
        assert set(metrics) >= {"bench/geneval/overall", "bench/geneval/colors", *(
            f"bench/t2i_compbench/{category}" for category in PROMPTS)}
    report = json.loads((folder / "report" / "report.json").read_text())
    entry = report["differences"]["unigrpo-sft"]["bench/geneval/overall"]
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert report["headline"]["metric"] == "bench/geneval/overall"
    assert report["scores"]["bench/geneval/overall"].startswith("geneval_mask2former_hf_64px_clip_other_prompts_")
    page = (folder / "report" / "report.html").read_text()
    for words in ("GenEval and T2I-CompBench", "t2i_compbench_complex_blip_hf_32px_", "_own_prompts, guidance on, thinking on",
                  "On 6 prompts with 2 images each"):
        assert words in page, words
    assert "exact accuracy" not in page
    assert "GenEval&#x27;s rules" not in page
    shown = run_in(project, "python", "-m", "unigrpo", "report", "--scale", "smoke").stdout
    assert "geneval_mask2former_hf_64px" in shown
    assert not re.findall(str(project), "".join(path.read_text() for path in folder.rglob("*.json*")))


@pytest.mark.slow
def test_a_second_repro_runs_nothing_and_an_edited_scorer_reruns_what_uses_it_alone(project: Path) -> None:
    """The digests of params/experiment.yaml are params of their stages: of an evaluation's scorers, of a training's rewards."""
    stages = ["report@smoke-main", *EVALUATIONS, "train@smoke-unigrpo-0", "base@smoke", "sft@smoke", "curate@smoke"]
    assert RAN.findall(run_in(project, "dvc", "repro", "report@smoke-main").stdout) == []

    def stale() -> set[str]:
        return set(json.loads(run_in(project, "dvc", "status", "--json", *stages).stdout))

    scorer, experiment = project / "unigrpo" / "evaluation" / "t2i_labels.py", project / "params" / "experiment.yaml"
    kept = scorer.read_text(), experiment.read_text()
    try:
        scorer.write_text(kept[0] + "# another rule\n")
        write_experiment(project, "unigrpo")
        assert stale() == EVALUATIONS
        experiment.write_text(kept[1])
        edit(experiment, lambda content: content["trainings"]["smoke-unigrpo-0"].update(scorers="0123456789abcdef"))
        assert stale() == {"train@smoke-unigrpo-0"}
    finally:
        scorer.write_text(kept[0])
        experiment.write_text(kept[1])


@pytest.mark.slow
def test_killed_while_it_draws_it_goes_on_with_the_same_bytes(project: Path, tmp_path: Path) -> None:
    """kill -9 of the step after some chunks: what they drew is in the output as it was, the same inode and time."""
    folder = tmp_path / "killed"
    shutil.copytree(project, folder, symlinks=True)
    output = folder / "artifacts" / "smoke" / "base"
    whole = {name: sha256_path(output / name) for name in ("benchmarks", "benchmarks.csv", "metrics.json")}
    command = ["dvc", "repro", "--force", "--single-item", "evaluate@smoke-base"]
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(command, cwd=folder, env=copy_environment(PYTHONPATH=str(folder)),
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        resume = folder / ".unigrpo" / "resume"
        deadline = time.monotonic() + 180
        while len(list(resume.glob("*/benchmarks/t2i_compbench/cfg_on-*/*/samples/*.png"))) < 40:
            assert started.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.01)
        victims = processes_of(folder, "evaluate_flow.py", " step ", "evaluate")
        assert victims, "no process of the step"
        victims[0].send_signal(signal.SIGKILL)
        started.wait(60)
    (drawn,) = resume.glob("*/benchmarks")
    # A prompt of T2I-CompBench is a chunk (10 images, batch 4). Its second cell is drawn last, so it tells which are finished.
    stamps = {}
    for category, prompts in PROMPTS.items():
        for index, prompt in enumerate(prompts):
            files = [drawn / "t2i_compbench" / cell / category / "samples" / f"{prompt}_{10 * index + n:06d}.png"
                     for cell in CELLS for n in range(10)]
            if all(file.is_file() for file in files):
                stamps |= {file.relative_to(drawn): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
    total = 2 * 10 * sum(map(len, PROMPTS.values()))
    assert 40 <= len(stamps) < total
    done = run_in(folder, *command)
    assert "going on from" in done.stdout
    for file, stamp in stamps.items():
        there = (output / "benchmarks" / file).stat()
        assert (there.st_ino, there.st_mtime_ns) == stamp, f"{file} was drawn again"
    assert {name: sha256_path(output / name) for name in whole} == whole
