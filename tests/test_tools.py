"""DVC, Metaflow and MLflow on one project of twelve arms: started at once, seen in a browser, followed by the doctor, and
as DVC experiments. Slow: a stage is two seconds of work and ten of starting it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
import yaml
from browser import Page, find_browser
from mlflow_pages import SIZE, Pages, served
from pipeline_copy import make_copy, run_in

from unigrpo.digests import sha256_path
from unigrpo.journal import open_client

pytestmark = pytest.mark.slow
KINDS = {"unigrpo": "velocity_mse", "no_regularizer": "none", "latent_kl": "latent_kl",
         **{f"decay_{i}": "velocity_mse" for i in range(9)}}
ARMS = [f"smoke-{run}-0" for run in KINDS]
REGULARIZERS = [f"train/{arm}" for arm in ARMS[:3]]
MADE = ("checkpoint", "gallery", "curves.csv", "training.json", "outcomes.csv", "metrics.json", "verdicts.parquet", "samples")
TROUBLE = re.compile(r"ERROR|Unable to acquire|(?<!Updating )(?<!Generating )lock file|does not answer|Traceback")


def commit(folder: Path, what: str) -> None:
    run_in(folder, "git", "add", "-A")
    run_in(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", what)


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A project of twelve arms whose warm-up is there, and none of whose arms has run. Weights decay, each run's by its own
    amount, because a model that draws nothing right has no other gradient: so every arm ends with its own bytes."""
    folder = make_copy(tmp_path_factory.mktemp("tools") / "ready")
    runs = {run: {"objective": {"image": {"regularizer": kind}}, "optim": {"weight_decay": 0.1 * (i + 1)}}
            for i, (run, kind) in enumerate(KINDS.items())}
    path = folder / "params" / "runs.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | runs, sort_keys=False))
    path = folder / "params" / "base.yaml"
    path.write_text(path.read_text().replace("slots: 2 ", f"slots: {len(ARMS)} "))
    run_in(folder, "python", "-m", "unigrpo", "experiment", "write", "--scale", "smoke", "--run", *runs, "--seed", "0")
    commit(folder, "twelve arms")
    run_in(folder, "dvc", "repro", "sft@smoke")
    for path in (folder / ".unigrpo", folder / "mlartifacts"):
        shutil.rmtree(path)
    (folder / "mlflow.db").unlink()  # the twelve find a cold database
    return folder


@pytest.fixture(scope="module")
def together(ready) -> Path:
    """The project after twelve arms were started at once, each trained and evaluated."""
    folder = ready.parent / "together"
    shutil.copytree(ready, folder, symlinks=True)
    start = time.monotonic()
    done = run_in(folder, "python", "-m", "unigrpo", "experiment", "run", "--scale", "smoke", "--only", *ARMS, check=False)
    print(f"twelve arms at once: {time.monotonic() - start:.0f} s")
    said = done.stdout + "".join((folder / ".unigrpo" / "experiments" / f"{arm}.log").read_text() for arm in ARMS)
    assert done.returncode == 0, said
    assert not TROUBLE.search(said), said
    first = done.stdout.index(": done; ")
    assert all(f"{arm}: started" in done.stdout[:first] for arm in ARMS), "twelve slots take twelve arms at once"
    commit(folder, "results")
    return folder


def stored(folder: Path) -> dict[str, list[tuple]]:
    """{run name: its metrics without those of the machine}, from the store; every run must have ended well."""
    with sqlite3.connect(folder / "mlflow.db") as connection:
        runs = connection.execute("select run_uuid, name, status from runs").fetchall()
        assert {status for _, _, status in runs} == {"FINISHED"}
        assert len({name for _, name, _ in runs}) == len(runs), "a run was told twice"
        return {name: sorted(connection.execute(
            "select key, step, value from metrics where run_uuid = ? and key not like 'system/%'", (uuid,)))
            for uuid, name, _ in runs}


def test_twelve_arms_at_once_are_twelve_arms_one_after_another(ready, together):
    """No lock error, no lost run, the same bytes, the same lock, the same numbers in MLflow."""
    alone = ready.parent / "alone"
    shutil.copytree(ready, alone, symlinks=True)
    start = time.monotonic()
    run_in(alone, "dvc", "repro", "-s", *[f"{stage}@{arm}" for stage in ("train", "evaluate") for arm in ARMS])
    print(f"twelve arms one after another: {time.monotonic() - start:.0f} s")
    for run in KINDS:
        for name in MADE:
            path = f"artifacts/smoke/{run}/0/{name}"
            assert sha256_path(together / path) == sha256_path(alone / path), path
    weights = {sha256_path(together / f"artifacts/smoke/{run}/0/checkpoint") for run in KINDS}
    assert len(weights) == 12, "arms that end with the same weights cannot be told from mixed-up ones"
    assert yaml.safe_load((together / "dvc.lock").read_text()) == yaml.safe_load((alone / "dvc.lock").read_text())
    both = [stored(folder) for folder in (together, alone)]
    assert set(both[0]) == {f"{stage}/{arm}" for stage in ("train", "evaluate") for arm in ARMS}
    assert both[0] == both[1]
    assert all(both[0].values())
    with sqlite3.connect(together / "mlflow.db") as connection:
        roots = connection.execute("select name, artifact_location from experiments where name != 'Default'").fetchall()
        ids = [uuid for (uuid,) in connection.execute("select run_uuid from runs")]
    assert roots == [("smoke", (together / "mlartifacts").as_uri() + "/smoke")]
    assert all(list((together / "mlartifacts" / "smoke" / uuid / "artifacts").iterdir()) for uuid in ids)
    shutil.rmtree(alone)


def test_mlflow_s_pages_in_a_browser(together, tmp_path):
    """Readable names, curves and params of the regulariser arms side by side, a gallery with thinking, tags that lead on."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on PATH; install one, or name it in UNIGRPO_BROWSER")
    with served(together / "mlflow.db") as base, Page(program, *SIZE) as page:
        pages = Pages(page, base, open_client(together), "smoke", tmp_path)
        listing = pages.listing(*REGULARIZERS, "evaluate/smoke-decay_8-0")
        assert "24 matching runs" in listing
        assert "flows/launch.py" in listing or "launch.py train" in listing
        assert all(name in pages.charts(REGULARIZERS, "text/entropy|cost/prompt_tokens") for name in REGULARIZERS)
        compared = pages.compare(REGULARIZERS, "objective.image.regularizer")
        assert all(kind in compared for kind in ("velocity_mse", "none", "latent_kl"))
        params = compared[compared.index("Parameters"):compared.index("Metrics")]
        assert "rollout.num_steps" not in params  # the same in all
        name = REGULARIZERS[0]
        shown = pages.run(name, "doctor run")
        commit, pathspec = re.search(r"commit ([0-9a-f]{12})", shown), re.search(r"TrainFlow/\d+/train/\d+", shown)
        assert "DVC train@smoke-unigrpo-0" in shown
        assert commit is not None
        assert pathspec is not None
        seen = pages.gallery(name)
        entries = json.loads((together / "artifacts/smoke/unigrpo/0/gallery/gallery.json").read_text())
        assert entries[-1]["prompt"] in seen
        assert entries[-1]["thinking"] in seen
        assert f"{len(entries)} pictures drawn" in seen
        samples = pages.gallery(name.replace("train", "evaluate"), "samples.html")
        assert "cell on" in samples
        assert page.errors == []
        away = [url for url in page.requests if not url.startswith((base, "data:", "blob:", "chrome", "about:"))]
        assert away == [], "the pages ask other machines"
    assert run_in(together, "git", "cat-file", "-t", commit[1]).stdout.strip() == "commit"
    for picture in tmp_path.glob("*.png"):
        assert picture.stat().st_size < 200_000
    back = "import sys; from metaflow import Task, namespace; namespace(None); print(Task(sys.argv[1]).data.mlflow_run)"
    answer = run_in(together, "python", "-c", back, pathspec[0], METAFLOW_DATASTORE_SYSROOT_LOCAL=str(together),
                    METAFLOW_DEFAULT_METADATA="local", METAFLOW_USER="x").stdout
    assert pages.runs[name] in answer
    said = run_in(together, "python", "-m", "unigrpo", "doctor", "run", pathspec[0], check=False).stdout
    assert pages.runs[name] in said
    lines = [line for line in said.splitlines() if line[13:21].strip() in ("ok", "differs", "unknown")]
    doubtful = [line for line in lines if line[13:21].strip() != "ok"]
    assert len(lines) > 8, said
    # The fixture has taken the warm-up's run out of MLflow, so nothing is known of it.
    assert [re.sub("[0-9a-f]{12}", "DIGEST", line).split(maxsplit=2) for line in doubtful] == [
        ["checkpoint", "unknown", "from artifacts/smoke/sft/checkpoint DIGEST, made by a run that MLflow does not know"]], said


def test_dvc_experiments_work_offline(together, tmp_path):
    """`dvc exp run -S` here and in a copy, `exp show`, `metrics diff` and `plots show`: nothing lost, nothing fetched."""
    folder = tmp_path / "copy"
    shutil.copytree(together, folder, symlinks=True)
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    change, target = "params/scales/smoke.yaml:train.num_steps", "train@smoke-unigrpo-0"
    wanted = yaml.safe_load((folder / "params" / "scales" / "smoke.yaml").read_text())
    run_in(folder, "dvc", "exp", "run", "-S", f"{change}=4", "-n", "four", target, **offline)
    wanted["train"]["num_steps"] = 4
    assert yaml.safe_load((folder / "params" / "scales" / "smoke.yaml").read_text()) == wanted
    done = run_in(folder, "dvc", "exp", "run", "--temp", "-S", f"{change}=2", "-n", "two", target, **offline)
    assert "didn't change" in done.stdout
    assert not TROUBLE.search(done.stdout), done.stdout
    table = list(csv.DictReader(io.StringIO(run_in(folder, "dvc", "exp", "show", "--csv", **offline).stdout)))
    column = next(name for name in table[0] if name.endswith("train.num_steps") and "smoke" in name)
    assert {row["Experiment"]: row[column] for row in table if row["Experiment"]} == {"four": "4", "two": "2"}
    said = run_in(folder, "dvc", "metrics", "diff", "--json", **offline).stdout
    changes = json.loads(said[said.index("{"):])  # before it DVC warns of evaluations that nobody has asked for
    updates = changes["artifacts/smoke/unigrpo/0/training.json"]["cost/updates"]
    assert (updates["old"], updates["new"]) == (6.0, 8.0)
    run_in(folder, "dvc", "plots", "diff", "four", "two", **offline)
    with sqlite3.connect(folder / "mlflow.db") as connection:
        told = connection.execute("select value from tags where key = 'dvc.exp' and value != 'none'").fetchall()
    assert sorted(told) == [("four",), ("two",)]
    assert "params       differs" in run_in(folder, "python", "-m", "unigrpo", "doctor", "run", "two", check=False).stdout
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on PATH: plots were written but not looked at")
    with Page(program, *SIZE) as page:
        page.open((folder / "dvc_plots" / "index.html").as_uri(), "artifacts/smoke/unigrpo/0/curves.csv", "four", "two")
        assert page.js("document.querySelectorAll('svg polyline').length") >= 2
        assert page.errors == []
        assert [url for url in page.requests if not url.startswith("file:")] == []


def test_plots_are_drawn_without_a_network(together, tmp_path):
    """Every file has its plot; where x is a name, as in outcomes.csv, means in order; another column on choosing it."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on PATH; install one, or name it in UNIGRPO_BROWSER")
    run_in(together, "dvc", "plots", "show", "-o", str(tmp_path / "plots"))
    with Page(program, *SIZE) as page:
        page.open((tmp_path / "plots" / "index.html").as_uri(), "unigrpo/0/outcomes.csv", "of each prompt_id, in order of size")
        page.wait_for("document.querySelectorAll('svg').length >= 3 * 12")  # drawn one after another as the page is read
        first = "document.querySelector('#artifacts_smoke_unigrpo_0_curves_csv')"
        before = page.js(f"{first}.querySelector('polyline').getAttribute('points')")
        page.js(f"(() => {{ const s = {first}.querySelector('select'); s.value = 'text/entropy'; s.onchange(); }})()")
        assert page.js(f"{first}.querySelector('polyline').getAttribute('points')") != before
        assert page.errors == []
