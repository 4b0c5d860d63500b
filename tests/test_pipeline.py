"""The whole graph at scale smoke, end to end, in a copy of this checkout: DVC, Metaflow, MLflow and every stage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from moto_cloud import cloud
from pipeline_copy import copy_environment, make_copy, run_in
from rehearsal import kill_after_a_checkpoint, lock_of, start, without_results

from unigrpo.digests import sha256_path
from unigrpo.stages import report

RAN = re.compile(r"^Running stage '([^']+)'", re.MULTILINE)


def edit(path: Path, change) -> None:
    """Change a yaml file of the copy in place."""
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy in which the main job ran, and one training more."""
    folder = tmp_path_factory.mktemp("pipeline") / "copy"
    make_copy(folder)
    edit(folder / "params" / "runs.yaml", lambda runs: runs.update(other={"optim": {"understanding_lr": 2.0e-4}}))
    run_in(folder, "python", "-m", "unigrpo", "experiment", "write", "--scale", "smoke", "--run", "unigrpo", "other",
           "--seed", "0")
    done = run_in(folder, "dvc", "repro", "report@smoke-main", "train@smoke-other-0")
    assert set(RAN.findall(done.stdout)) >= {"train@smoke-other-0", "report@smoke-main"}, done.stdout
    return folder


def test_every_stage_leaves_its_outputs(project):
    folder = project / "artifacts" / "smoke"
    for checkpoint in ("base", "sft", "unigrpo/0"):
        for name in ("checkpoint/model.safetensors", "training.json", "curves.csv", "metrics.json", "outcomes.csv",
                     "verdicts.parquet", "samples/samples.json"):
            assert (folder / checkpoint / name).is_file(), f"{checkpoint}/{name}"
        metrics = json.loads((folder / checkpoint / "metrics.json").read_text())
        assert 0 <= metrics["bench/shapes/exact"] <= 1
        assert list(metrics) == sorted(metrics)
    report = json.loads((folder / "report" / "report.json").read_text())
    assert {"base", "sft", "unigrpo"} <= set(report["arms"])
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert not (project / ".unigrpo" / "resume").exists() or not [
        path for path in (project / ".unigrpo" / "resume").iterdir() if path.is_dir()]


def test_a_second_repro_runs_nothing(project):
    before = (project / "dvc.lock").read_bytes()
    done = run_in(project, "dvc", "repro", "report@smoke-main", "train@smoke-other-0")
    assert RAN.findall(done.stdout) == []
    assert (project / "dvc.lock").read_bytes() == before


@pytest.mark.parametrize(("file", "change", "stale"), [
    ("runs.yaml", lambda c: c["other"]["optim"].update(understanding_lr=3.0e-4), {"train@smoke-other-0"}),
    ("scales/smoke.yaml", lambda c: c["sft"].update(steps=5), {
        "curate@smoke", "sft@smoke", "report@smoke-main"}),
    ("scales/smoke.yaml", lambda c: c["evaluate"].update(gallery=5), {
        "evaluate@smoke-base", "evaluate@smoke-sft", "evaluate@smoke-unigrpo-0", "report@smoke-main"}),
    ("scales/smoke.yaml", lambda c: c["report"].update(gallery=5), {"report@smoke-main"}),
    ("base.yaml", lambda c: c["compute"]["resources"].update(memory_mb=1), set()),
])
def test_a_changed_key_makes_only_its_stages_stale(project, file, change, stale):
    """Stale by their own params; what depends on them follows only if their outputs change."""
    path = project / "params" / file
    kept = path.read_text()
    ran = ["report@smoke-main", "train@smoke-other-0", "evaluate@smoke-base", "evaluate@smoke-sft", "evaluate@smoke-unigrpo-0",
           "train@smoke-unigrpo-0", "curate@smoke", "base@smoke", "sft@smoke"]
    try:
        edit(path, change)
        assert set(json.loads(run_in(project, "dvc", "status", "--json", *ran).stdout)) == stale
    finally:
        path.write_text(kept)


def test_outputs_name_no_place_and_no_host(project):
    """Nothing in an output says where or when it was made."""
    for path in (project / "artifacts").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(project).encode() not in content, path
            if len(host := os.uname().nodename) > 6:  # a shorter name occurs in any picture
                assert host.encode() not in content, path


def test_mlflow_and_cards_tell_what_happened(project):
    with sqlite3.connect(project / "mlflow.db") as connection:
        runs = connection.execute("select name, status, run_uuid from runs").fetchall()
        tags = connection.execute("select run_uuid, key, value from tags").fetchall()
    by_name = {name: uuid for name, _, uuid in runs}
    assert {status for _, status, _ in runs} == {"FINISHED"}
    assert {"curate/smoke", "base/smoke", "sft/smoke", "train/smoke-unigrpo-0", "evaluate/smoke-sft",
            "report/smoke-main"} <= set(by_name)
    found = {key: value for uuid, key, value in tags if uuid == by_name["train/smoke-unigrpo-0"]}
    assert found["dvc.stage"] == "train@smoke-unigrpo-0"
    assert re.fullmatch("[0-9a-f]{40}", found["git.commit"])
    assert found["git.dirty"] == "true"  # the fixture has changed params since the commit
    assert found["metaflow.pathspec"].startswith("TrainFlow/")
    assert re.fullmatch("[0-9a-f]{64}", found["inputs.sha256"])
    assert list((project / "mlartifacts" / "smoke" / by_name["train/smoke-unigrpo-0"]).rglob("gallery.json"))
    cards = {path.relative_to(project / ".metaflow").parts[1] for path in (project / ".metaflow").rglob("*.html")} | {
        flow for flow in ("TrainFlow", "EvaluateFlow") if list((project / ".metaflow").rglob(f"*{flow}*/**/*.html"))}
    assert {"TrainFlow", "EvaluateFlow"} <= cards


def test_a_mistake_in_params_stops_before_anything_runs(project):
    path = project / "params" / "scales" / "smoke.yaml"
    kept = path.read_text()
    try:
        edit(path, lambda c: c["optim"].update(generation_rl=1.0))
        done = run_in(project, "dvc", "repro", "train@smoke-unigrpo-0", check=False)
        assert done.returncode != 0
        assert "optim.generation_rl is not a key" in done.stdout
        assert "smoke.yaml" in done.stdout
        assert "Traceback" not in done.stdout
    finally:
        path.write_text(kept)
        run_in(project, "dvc", "checkout", "--force", "train@smoke-unigrpo-0", check=False)


def test_the_whole_graph_as_one_flow_leaves_the_same_lock(project, tmp_path):
    """Through Metaflow, its datastore on moto's S3, and an empty folder a stage; the training is killed once on its way."""
    folder = without_results(project, tmp_path / "copy")
    run_in(folder, "python", "-m", "unigrpo", "experiment", "write", "--scale", "smoke", "--run", "unigrpo", "--seed", "0")
    with cloud() as env:
        running = start(folder, env, "python", "flows/launch.py", "experiment", "smoke")
        kill_after_a_checkpoint(running, folder, env, "train", "smoke-unigrpo-0")
        output, _ = running.communicate(timeout=600)
        assert running.returncode == 0, output
        assert "train smoke-unigrpo-0: an earlier attempt's progress came from the datastore" in output
        assert "train smoke-unigrpo-0: going on from" in output
        run = re.search(r"transfer.py fetch smoke (ExperimentFlow/\d+)", output)[1]
        fetched = start(folder, env, "python", "flows/transfer.py", "fetch", "smoke", run)
        assert fetched.wait(120) == 0, fetched.communicate()[0]
    run_in(folder, "dvc", "commit", "--force")
    here, there = lock_of(project), lock_of(folder)
    alone = "experiments@smoke"  # the report of this one training, which the project's own lists beside another
    assert set(there) == {alone, "code", "curate@smoke", "base@smoke", "sft@smoke", "train@smoke-unigrpo-0",
                          "evaluate@smoke-base", "evaluate@smoke-sft", "evaluate@smoke-unigrpo-0", "report@smoke-main"}
    assert {**there, alone: None} == {name: None if name == alone else here[name] for name in there}
    made = folder / "artifacts" / "smoke" / "experiments"
    digest = sha256_path(made)
    shutil.rmtree(made)
    report.run("smoke", which="experiments", root=folder)
    assert sha256_path(made) == digest


@pytest.mark.slow
def test_through_a_datastore_the_lock_is_the_same(project, tmp_path):
    """The main job once more as on a cluster, and its training dies after its first checkpoint."""
    folder = without_results(project, tmp_path / "copy")
    with cloud() as env:
        running = start(folder, env, "dvc", "repro", "report@smoke-main")
        kill_after_a_checkpoint(running, folder, env, "train", "smoke-unigrpo-0")
        output, _ = running.communicate(timeout=600)
    assert running.returncode == 0, output
    assert "train smoke-unigrpo-0: an earlier attempt's progress came from the datastore" in output
    assert "train smoke-unigrpo-0: going on from" in output
    here, there = lock_of(project), lock_of(folder)
    assert len(there) == 9
    assert there == {name: here[name] for name in there}
    assert not list((tmp_path / "rehearsals").glob("unigrpo-*"))
    with sqlite3.connect(folder / "mlflow.db") as connection:  # records came back, and the killed run is one run
        runs = dict(connection.execute("select name, status from runs").fetchall())
        specs = [value for (value,) in connection.execute("select value from tags where key = 'metaflow.pathspec'").fetchall()]
        commits = {value for (value,) in connection.execute("select value from tags where key = 'git.commit'").fetchall()}
    assert set(runs.values()) == {"FINISHED"}
    assert len(runs) == len(specs) == 8
    assert len(commits) == 1
    assert re.fullmatch("[0-9a-f]{40}", commits.pop())


def processes_of(folder: Path, *words: str) -> list[psutil.Process]:
    """Living processes whose command line names this copy's flows and all the words."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            inside = str(folder) in line or Path(process.cwd()) == folder
            if inside and process.status() != psutil.STATUS_ZOMBIE and all(word in line for word in words):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow
def test_killed_in_three_ways_it_ends_with_the_same_bytes(project, tmp_path):
    """kill -9 of dvc, of the launcher and of the step, each during training; then the run goes on to the same result."""
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    for folder in (reference, killed):
        shutil.copytree(project, folder, symlinks=True)
        edit(folder / "params" / "scales" / "smoke.yaml", lambda c: c["train"].update(num_steps=60, gallery_every=20))
    target = "train@smoke-unigrpo-0"
    run_in(reference, "dvc", "repro", target)
    for words in (("dvc", "repro"), ("launch.py", "train"), ("train_flow.py", " step ", "train")):
        log = (killed / "log").open("a")
        started = subprocess.Popen(["dvc", "repro", target], cwd=killed, env=copy_environment(PYTHONPATH=str(killed)),
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        resume = killed / ".unigrpo" / "resume"
        known = {path: path.stat().st_mtime for path in resume.glob("*/state/state.json")}
        deadline = time.monotonic() + 120
        while not [path for path in resume.glob("*/state/state.json") if path.stat().st_mtime > known.get(path, 0)]:
            assert started.poll() is None, (killed / "log").read_text()
            assert time.monotonic() < deadline, (killed / "log").read_text()
            time.sleep(0.05)
        victims = processes_of(killed, *words)
        assert victims, f"no process {words}"
        victims[0].send_signal(signal.SIGKILL)
        started.wait(60)
        deadline = time.monotonic() + 15
        while left := processes_of(killed, "flows"):
            assert time.monotonic() < deadline, [process.cmdline() for process in left]
            time.sleep(0.1)
    done = run_in(killed, "dvc", "repro", target)
    assert "going on from" in done.stdout
    output = "artifacts/smoke/unigrpo/0"
    for name in ("checkpoint", "gallery", "curves.csv", "training.json"):
        assert sha256_path(killed / output / name) == sha256_path(reference / output / name), name
    assert (killed / "dvc.lock").read_bytes() == (reference / "dvc.lock").read_bytes()
    with sqlite3.connect(killed / "mlflow.db") as connection:
        assert connection.execute("select count(*) from runs where status = 'RUNNING'").fetchone() == (0,)
