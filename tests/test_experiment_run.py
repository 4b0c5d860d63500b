"""Sets of runs become trainings and evaluations, and these run side by side: a limit of slots, failures by name, cells."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from small import ROOT, small_config, small_policy, small_prompts

from unigrpo.arms import Arm, explain, last_stage, list_arms, note_failures, run_arms
from unigrpo.evaluate import GRID, GRIDS, grid_images
from unigrpo.evaluation.controls import read_understanding, thinking_effects
from unigrpo.evaluation.outcomes import read_outcomes
from unigrpo.experiment import RunSet, expand, make_request, read_sets, render, written_request
from unigrpo.prompts.records import write_records
from unigrpo.report.reading import absence
from unigrpo.stages import CELLS, parse_name
from unigrpo.stages.evaluate import run as evaluate
from unigrpo.stages.loading import save_policy

# ----------------------------------------------------------------------------------------------------------------- sets

def test_every_arm_is_in_a_set_and_claims_come_first():
    sets = yaml.safe_load((ROOT / "params" / "sets.yaml").read_text())
    runs = yaml.safe_load((ROOT / "params" / "runs.yaml").read_text())
    listed = {run for part in sets.values() for run in part["runs"]}
    assert listed <= set(runs)
    assert all(runs[run]["times"]["train.num_steps"] == 0.25 for run in set(runs) - listed)  # cut points, no arms
    kinds = [name.split("_")[0] for name in sets]
    assert kinds == sorted(kinds, key=["paper", "claim", "sweep"].index)
    request = make_request(ROOT, ["tiny"])
    assert [arm[1] for arm in request.arms()][:15] == [0, 1, 2] + [0] * 4 + [1] * 4 + [2] * 4   # a set's arms a seed at a time
    for (run, seed), cells in request.arms().items():
        sweep = run in {name for label, part in sets.items() if label.startswith("sweep") for name in part["runs"]}
        wanted = {"unigrpo": "all", "cfg_rollout": "guidance", "no_regularizer": "guidance"}  # compared in other cells too
        assert cells == wanted.get(run, "headline")
        assert not sweep or (seed == 10 and runs[run]["times"]["train.num_steps"] == 0.25)


@pytest.mark.parametrize("arguments", [{}, {"sets": ["sweep_choices", "claim_2"]},
                                       {"runs": ["unigrpo", "short"], "seeds": [4]}])
def test_the_header_leads_back_to_the_request(arguments):
    request = make_request(ROOT, ["smoke", "tiny"], **arguments)
    assert written_request(ROOT, render(ROOT, request)) == request
    content = expand(ROOT, request)
    assert set(content["trainings"]) == {f"{scale}-{run}-{seed}" for scale in ("smoke", "tiny") for run, seed in request.arms()}


def test_impossible_requests_are_refused(tmp_path):
    for arguments, wanted in (({"sets": ["claim_9"]}, "set must be one of"), ({"runs": ["none"]}, "run must be one of"),
                              ({"runs": ["short"], "seeds": [-1]}, "from 0"), ({"sets": ["claim_1"], "seeds": [0]}, "either")):
        with pytest.raises(ValueError, match=wanted):
            make_request(ROOT, ["tiny"], **arguments)
    request = make_request(ROOT, ["tiny"], sets=["claim_1"])
    more = type(request)(request.scales, (*request.sets, RunSet(("text_only",), (0, 1), "guidance")), "").arms()
    assert [more["text_only", seed] for seed in (0, 1, 2)] == ["guidance", "guidance", "headline"]
    assert list(more) == list(request.arms())
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "sets.yaml").write_text("a: {runs: [unigrpo], seeds: [0], cells: some}\n")
    with pytest.raises(ValueError, match=r"one of \['all', 'guidance', 'headline'\]"):
        read_sets(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- cells

@pytest.fixture
def project(tmp_path):
    """Params, prompts and a checkpoint at scale smoke."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    folder = tmp_path / "artifacts" / "smoke"
    write_records(folder / "prompts" / "eval.jsonl", small_prompts(24))
    save_policy(folder / "sft" / "checkpoint", small_policy(small_config()))
    return tmp_path


def test_the_headline_cell_alone(project, monkeypatch, capsys):
    """The same images as in the whole grid; the other cells are lacking, and what needs them is skipped and said."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    folder = project / "artifacts" / "smoke" / "sft"
    whole = evaluate("smoke", checkpoint="sft", root=project)
    both = read_outcomes(folder / "outcomes.csv")
    capsys.readouterr()
    found = evaluate("smoke", checkpoint="sft", cells="headline", root=project)
    assert "cells headline, so no controls" in capsys.readouterr().err
    assert set(found) < set(whole)
    assert not [name for name in set(whole) - set(found) if "/cfg_" not in name and not name.startswith("understanding/")]
    outcomes = read_outcomes(folder / "outcomes.csv")
    assert set(zip(outcomes["cfg"], outcomes["thinking"], strict=True)) == {("off", "on")}
    columns = ["prompt_id", "images"]
    same = both[(both["cfg"] == "off") & (both["thinking"] == "on")].reset_index(drop=True)
    assert outcomes[columns].equals(same[columns])
    assert found["bench/shapes/graded"] == pytest.approx(whole["bench/shapes/graded"], rel=1e-3)
    assert {name for name in found if name.startswith("sentinel/")} == {name for name in whole if name.startswith("sentinel/")}
    assert read_understanding(folder / "understanding.csv", empty=True).empty
    assert thinking_effects(outcomes, lambda first, second: {}) == {}
    assert {sample["cell"] for sample in json.loads((folder / "samples" / "samples.json").read_text())} == {"on"}


def test_the_cells_without_and_with_guidance(project, monkeypatch, capsys):
    """What they share with the whole grid is the same; it has no controls."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    folder = project / "artifacts" / "smoke" / "sft"
    whole = evaluate("smoke", checkpoint="sft", root=project)
    both = read_outcomes(folder / "outcomes.csv")
    found = evaluate("smoke", checkpoint="sft", cells="guidance", root=project)
    assert "cells guidance, so no controls and no understanding" in capsys.readouterr().err
    assert {name: value for name, value in whole.items() if name in found} == found
    assert any("/cfg_on" in name for name in found)
    outcomes = read_outcomes(folder / "outcomes.csv")
    assert outcomes.equals(both[both["thinking"] == "on"].reset_index(drop=True))
    assert thinking_effects(outcomes, lambda first, second: {}) == {}


def test_cells_of_an_evaluation(project):
    assert tuple(GRIDS) == CELLS
    config = small_config()
    assert grid_images(config, GRIDS["headline"]) == config.evaluate.prompts * config.evaluate.images_per_prompt
    assert GRID[0] == GRIDS["guidance"][0] == GRIDS["headline"][0]
    assert set(GRIDS["headline"]) < set(GRIDS["guidance"]) < set(GRIDS["all"])
    path = project / "params" / "experiment.yaml"
    content = yaml.safe_load(path.read_text())
    assert parse_name("evaluate", "tiny-short-10", project).arguments["cells"] == "headline"
    del content["evaluations"]["tiny-short-10"]["cells"]
    content["evaluations"]["tiny-sft"]["cells"] = "some"
    path.write_text(yaml.safe_dump(content))
    assert parse_name("evaluate", "tiny-short-10", project).arguments["cells"] == "all"
    with pytest.raises(ValueError, match=r"tiny-sft.cells must be one of \['all', 'guidance', 'headline'\]"):
        parse_name("evaluate", "tiny-sft", project)


def test_dvc_tracks_the_cells_of_an_evaluation_alone():
    params = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["evaluate"]["do"]["params"]
    keys = next(item["params/experiment.yaml"] for item in params if "params/experiment.yaml" in item)
    assert keys == ["evaluations.${key}.cells", "evaluations.${key}.scorers"]
    evaluations = yaml.safe_load((ROOT / "params" / "experiment.yaml").read_text())["evaluations"]
    assert all("cells" in item for item in evaluations.values())


# -------------------------------------------------------------------------------------------------------------- running

def test_arms_of_a_scale():
    arms = list_arms(ROOT, "tiny")
    assert arms[0].stages == ("train@tiny-unigrpo-0", "evaluate@tiny-unigrpo-0")
    assert [arm.name for arm in arms[-2:]] == ["tiny-base", "tiny-sft"]
    work = {arm.name: arm.work for arm in arms}
    assert [work[f"tiny-{name}"] for name in ("unigrpo-0", "cfg_rollout-0", "text_only-0", "short-10", "sft")] == pytest.approx(
        [1.2, 1.06, 1.05, 0.3, 0.2])
    with pytest.raises(ValueError, match="lists no training of scale small"):
        list_arms(ROOT, "small")


def test_arms_run_in_pairs_and_a_failure_stops_no_other(tmp_path):
    """At most two at a time, an arm's stages in a row; the failed one is named with what it said."""
    arms = [Arm(f"a{i}", (f"train@a{i}", f"evaluate@a{i}"), 1.0) for i in range(5)]
    script = textwrap.dedent("""
        import sys, time
        for stage in sys.argv[1:]:
            print(f"Running stage '{stage}':", flush=True)
            for sign in "+-":
                with open("events", "a") as log:
                    log.write(f"{sign}{stage}\\n")
                time.sleep(0.15 * (sign == "+"))
            print("no room for", stage)
            if stage in ("train@a1", "evaluate@a3"):
                sys.exit(1)
    """)
    said = []
    failed = run_arms(tmp_path, arms, 2, say=said.append, command=lambda arm: [sys.executable, "-c", script, *arm.stages],
                      pause=0.01)
    assert failed == {"a1": "train@a1", "a3": "evaluate@a3"}
    events = (tmp_path / "events").read_text().split()
    assert "+evaluate@a1" not in events
    assert sum(event[0] == "+" for event in events) == 9
    at_once = [sum(1 if event[0] == "+" else -1 for event in events[:i + 1]) for i in range(len(events))]
    assert max(at_once) == 2
    for arm in ("a0", "a2", "a3", "a4"):
        assert events.index(f"-train@{arm}") < events.index(f"+evaluate@{arm}")
    assert events.index("+evaluate@a0") < events.index("+train@a3")             # finished arms are complete early
    assert any(line.startswith("a1: FAILED in train@a1; ") for line in said)
    assert "5 of 5 arms" in said[-1]
    assert said[-1].endswith("2 failed, about 0:00 left")
    assert "no room for train@a1" in explain(tmp_path, failed)


@pytest.mark.parametrize(("said", "stage"), [
    ("", "train@a"),
    ("Running stage 'train@a':\n> python\nERROR: failed to reproduce 'train@a': failed to run", "train@a"),
    ("Running stage 'train@a':\n\nRunning stage 'evaluate@a':\n> python", "evaluate@a"),
    ("Stage 'train@a' didn't change, skipping\nERROR: failed to reproduce 'evaluate@a': missing data 'source'", "evaluate@a"),
])
def test_the_stage_that_failed_is_the_one_dvc_named_last(tmp_path, said, stage):
    (tmp_path / "log").write_text(said)
    assert last_stage(Arm("a", ("train@a", "evaluate@a"), 1.0), tmp_path / "log") == stage


def test_a_runner_that_is_asked_to_end_ends_its_arms(tmp_path):
    script = textwrap.dedent("""
        import sys
        from argparse import Namespace
        from pathlib import Path
        from unigrpo import arms, cli
        sleep = "import os, pathlib, time; pathlib.Path(str(os.getpid())).touch(); time.sleep(60)"
        arms.run_experiments = lambda root, *given, **named: len(arms.run_arms(
            Path.cwd(), [arms.Arm(name, (name,), 1.0) for name in "ab"], 2, command=lambda arm: [sys.executable, "-c", sleep]))
        cli.project_root = Path.cwd
        cli.arms_command(Namespace(scale="smoke", jobs=None, only=None, show=False))
    """)
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(arms := [int(path.name) for path in tmp_path.glob("[0-9]*")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    runner.terminate()
    assert runner.wait(60) == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{arm}").exists() for arm in arms)


def test_an_interrupted_experiment_leaves_nothing_running(tmp_path):
    script = "import time, pathlib; time.sleep(30); pathlib.Path('late').touch()"
    arms = [Arm(name, (name,), 1.0) for name in ("a", "b")]

    def stop(line):
        if line.startswith("b"):
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_arms(tmp_path, arms, 2, say=stop, command=lambda arm: [sys.executable, "-c", script], pause=0.01)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "late").exists()


def test_a_failed_arm_leaves_its_last_words(tmp_path):
    """They are its row in the report of all experiments; what has results needs none."""
    (tmp_path / "params").mkdir()
    shutil.copy(ROOT / "params" / "experiment.yaml", tmp_path / "params")
    logs = tmp_path / ".unigrpo" / "experiments"
    logs.mkdir(parents=True)
    (logs / "tiny-text_only-1.log").write_text("first\nloss is not finite\n")
    note_failures(tmp_path, "tiny", {"tiny-text_only-1": "train@tiny-text_only-1", "tiny-sft": "evaluate@tiny-sft"})
    folder = tmp_path / "artifacts" / "tiny" / "text_only" / "1"
    assert absence(folder) == "failed: train@tiny-text_only-1: loss is not finite"
    assert absence(folder.parent / "2") == "not run"
    (folder / "training.json").write_text("{}")
    (folder / "outcomes.csv").write_text("")
    assert absence(folder) is None
