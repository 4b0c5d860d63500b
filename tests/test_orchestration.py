"""Names, the graph, imports, the tracker, locks and process lifetimes: everything around the stages."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from unigrpo.closure import closure, imports, stage_files
from unigrpo.digests import RECORDERS, sha256_json, sha256_path
from unigrpo.experiment import expand, render, render_graph, replace_list, written_arguments
from unigrpo.progress import Progress, duration
from unigrpo.resume import hold, resume_folder
from unigrpo.stages import STAGES, parse_name, read_experiment, report_inputs
from unigrpo.tracking import Journal, track

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("world", "curate", "model", "base", "sft", "rollout", "reward", "credit", "objective", "optim", "train", "evaluate",
            "report", "compute")


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """True as soon as the condition holds, False if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def load(path: Path):
    """A script of flows/ as a module."""
    spec = importlib.util.spec_from_file_location(f"flows_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def launch():
    return load(ROOT / "flows" / "launch.py")


@pytest.fixture(scope="module")
def process():
    return load(ROOT / "flows" / "process.py")


# ---------------------------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize(("stage", "name", "arguments", "output"), [
    ("curate", "tiny", {"scale": "tiny"}, "artifacts/tiny/prompts"),
    ("base", "smoke", {"scale": "smoke"}, "artifacts/smoke/base"),
    ("sft", "tiny", {"scale": "tiny"}, "artifacts/tiny/sft"),
    ("train", "tiny-unigrpo-1", {"scale": "tiny", "run": "unigrpo", "seed": 1}, "artifacts/tiny/unigrpo/1"),
    ("evaluate", "tiny-sft", {"scale": "tiny", "checkpoint": "sft"}, "artifacts/tiny/sft"),
    ("evaluate", "tiny-unigrpo-0", {"scale": "tiny", "checkpoint": "unigrpo/0"}, "artifacts/tiny/unigrpo/0"),
    ("report", "tiny-main", {"scale": "tiny", "which": "main"}, "artifacts/tiny/report"),
    ("report", "tiny-experiments", {"scale": "tiny", "which": "experiments"}, "artifacts/tiny/experiments"),
])
def test_a_name_becomes_the_arguments_of_a_stage_function(stage, name, arguments, output):
    job = parse_name(stage, name, ROOT)
    assert (job.arguments, job.output) == (arguments, output)


@pytest.mark.parametrize(("stage", "name", "wanted"), [
    ("traim", "tiny", "curate.*base.*sft"), ("base", "tyni", "smoke.*tiny"), ("train", "tiny-unigrpo-9", "tiny-unigrpo-0"),
    ("evaluate", "tiny-rl", "tiny-base"), ("report", "tiny", "main.*experiments"),
])
def test_an_unknown_name_lists_the_choices(stage, name, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse_name(stage, name, ROOT)


# ------------------------------------------------------------------------------------------------------------ the graph

def test_experiment_yaml_is_what_the_command_writes():
    experiment = read_experiment(ROOT)
    arguments = written_arguments(experiment)
    assert experiment == expand(*arguments)
    assert (ROOT / "params" / "experiment.yaml").read_text() == render(*arguments)
    runs = yaml.safe_load((ROOT / "params" / "runs.yaml").read_text())
    assert set(arguments[1]) <= set(runs)


def test_dvc_yaml_lists_what_the_command_writes():
    _, runs, seeds = written_arguments(read_experiment(ROOT))
    text = (ROOT / "dvc.yaml").read_text()
    assert render_graph(ROOT, text, runs, seeds) == text, "dvc.yaml is behind: run `unigrpo experiment write`, see its header"


def test_writing_refuses_a_graph_without_marks():
    with pytest.raises(ValueError, match="got 0"):
        replace_list("stages: {}\n", "code of train", ["a"])


@pytest.mark.parametrize("stage", ["train", "report"])
def test_dependencies_in_dvc_yaml_are_the_import_closure(stage):
    """An independent look: what Python really loads, in a fresh process, against the listed files."""
    listed = {dep for dep in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["do"]["deps"]
              if dep.startswith("unigrpo/")}
    code = f"import sys, unigrpo.stages.{stage}; print('\\n'.join(m.__file__ for n, m in sys.modules.items() " \
           "if n.split('.')[0] == 'unigrpo' and m.__file__))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout.split()
    files = {Path(file).relative_to(ROOT).as_posix() for file in loaded}
    recorders = {f"{name.replace('.', '/')}{end}" for name in RECORDERS for end in (".py", "/__init__.py")}
    needed = {file for file in files - recorders if (ROOT / file).read_text().strip()}
    assert needed <= listed
    for file in listed - needed:  # imported inside a function, or for the type checker
        assert file in stage_files(ROOT, stage)


def test_a_closure_follows_imports_inside_functions_and_packages(tmp_path):
    for name, text in {"__init__": "", "a": "def f():\n    from unigrpo.p import b\n", "p/__init__": "from .c import x\n",
                       "p/b": "import unigrpo.d\n", "p/c": "x = 1\n", "d": "", "e": "x = 2\n"}.items():
        path = tmp_path / "unigrpo" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert closure(tmp_path, "unigrpo.a") == {"unigrpo", *(f"unigrpo.{m}" for m in ("a", "p", "p.b", "p.c", "d"))}


@pytest.mark.parametrize("stage", STAGES)
def test_params_in_dvc_yaml_are_the_sections_a_stage_reads(stage):
    """Every `config.<section>` in the modules that take the whole config is among the stage's params."""
    params = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["do"]["params"]
    listed = {str(key).split(".")[0] for item in params for keys in item.values() for key in keys}
    own = {f"unigrpo.stages.{stage}"} | ({"unigrpo.rollout", "unigrpo.train", "unigrpo.update", "unigrpo.mismatch"}
                                        if stage == "train" else {"unigrpo.evaluate"} if stage == "evaluate" else set())
    if stage == "report":
        own |= {module for module in closure(ROOT, "unigrpo.stages.report") if module.startswith("unigrpo.report")}
    files = [ROOT / (name.replace(".", "/") + ".py") for name in own]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    read = set(re.findall(rf"\bconfig\.({'|'.join(SECTIONS)})\b", text))
    assert read <= listed


def test_main_report_inputs_are_in_dvc_yaml():
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]["do"]["deps"]
    wanted = report_inputs("${item.scale}", ["base", "sft", "unigrpo/0"])
    assert set(wanted) == {dep for dep in deps if dep.startswith("artifacts/")}


def test_no_out_is_left_out_of_the_cache():
    """`cache: false` under outs switches off the run cache of the whole stage."""
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        assert all(isinstance(out, str) for out in stage["do"]["outs"])


# -------------------------------------------------------------------------------------------------------------- imports

LEVELS = {0: {"types", "config", "schema", "schema_model", "seeding", "digests", "stages"},  # `unigrpo.stages` holds names only
          1: {"tensorfiles", "policy", "advantages", "credit", "objectives", "text", "flow"},
          2: {"models", "rewards", "evaluation", "worlds", "prompts"},
          3: {"train", "sft", "rollout", "contexts", "evaluate", "report", "update", "mismatch", "cost", "checkpoint",
              "adapters", "masters", "roofline", "footprint", "sampling", "images", "interchange"},
          4: {"progress", "resume", "tracking", "stages.*", "plan", "generate"},
          5: {"experiment", "closure", "commands", "cli", "__main__"}}


def level(module: str) -> int:
    """Where a module stands; a new one must be given a place."""
    part = "stages.*" if module.startswith("unigrpo.stages.") else module.split(".")[1]
    return next(number for number, names in LEVELS.items() if part in names)


def all_modules() -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for path in sorted((ROOT / "unigrpo").rglob("*.py"))]


@pytest.mark.parametrize("module", [name for name in all_modules() if name != "unigrpo"])
def test_imports_point_one_way(module):
    for name in imports(ROOT, module) - {"unigrpo", module}:
        assert level(name) <= level(module), f"{module} imports {name}, which stands above it"


def top_level_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_tools_stay_in_their_places():
    """metaflow in flows/, mlflow in tracking.py, and the training loop is handed its policy and its reward."""
    for path in (ROOT / "unigrpo").rglob("*.py"):
        found = top_level_imports(path)
        assert "metaflow" not in found, path
        assert "mlflow" not in found or path.name == "tracking.py", path
        assert "dvc" not in found, path
    for path in (ROOT / "flows").glob("*.py"):
        assert "mlflow" not in top_level_imports(path), path
    reached = {name.split(".")[1] for name in imports(ROOT, "unigrpo.train") if "." in name}
    assert not reached & {"models", "rewards", "rollout", "worlds", "tracking"}


@pytest.mark.parametrize("module", ["advantages", "credit", "objectives", "text", "flow.sde", "flow.schedule", "flow.guidance"])
def test_pure_modules_import_arrays_and_types_only(module):
    path = ROOT / "unigrpo" / (module.replace(".", "/") + ".py")
    assert top_level_imports(path) - set(sys.stdlib_module_names) <= {"torch", "numpy", "unigrpo"}


def test_help_is_quick():
    """The command's --help loads nothing heavy."""
    code = "import sys, unigrpo.cli; unigrpo.cli.parser().format_help(); print([m for m in ('torch', 'mlflow', 'yaml', " \
           "'pydantic', 'numpy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------- launcher

def test_the_environment_of_a_stage_does_not_come_from_the_shell(launch):
    from unigrpo.config import load_config

    config = load_config("smoke", root=ROOT)
    env = launch.environment(config, {"OMP_NUM_THREADS": "64", "PYTHONHASHSEED": "7", "USER": "root", "PATH": "/bin"})
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == str(config.compute.threads)
    assert env["PYTHONHASHSEED"] == "0"
    assert env["MALLOC_MMAP_THRESHOLD_"] == "33554432"
    assert env["METAFLOW_USER"] == "unigrpo"  # Metaflow refuses root
    assert launch.environment(config, {"USER": "ada"})["METAFLOW_USER"] == "ada"


@pytest.mark.parametrize(("backend", "wanted"), [("kubernetes", "this machine only"), ("batch", "this machine only"),
                                                 ("cloud", r"must be one of \['local', 'kubernetes', 'batch'\]")])
def test_a_backend_that_is_not_there_is_refused_in_words(launch, monkeypatch, capsys, backend, wanted):
    monkeypatch.setenv("UNIGRPO_BACKEND", backend)
    assert launch.main(["base", "smoke"]) == 2
    assert re.search(wanted, capsys.readouterr().err)


def test_a_mistake_ends_the_launcher_in_one_line(launch, monkeypatch, capsys):
    monkeypatch.delenv("UNIGRPO_BACKEND", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert launch.main(["train", "tiny-unigrpo-99"]) == 2
    error = capsys.readouterr().err
    assert "tiny-unigrpo-0" in error
    assert "Traceback" not in error


def test_provenance_is_unknown_without_git_and_never_a_guess(launch, monkeypatch, tmp_path):
    from unigrpo.config import load_config

    config = load_config("smoke", root=ROOT)
    monkeypatch.setattr(launch, "ROOT", tmp_path)  # no repository here
    monkeypatch.delenv("DVC_STAGE", raising=False)
    found = launch.provenance(parse_name("base", "smoke", ROOT), config)
    assert (found["git_commit"], found["git_dirty"], found["dvc_stage"]) == ("unknown", "unknown", "unknown")
    assert re.fullmatch("[0-9a-f]{64}", found["params_sha256"])


def test_remote_resources_come_from_params(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    monkeypatch.setenv("METAFLOW_USER", "test")
    monkeypatch.setenv("UNIGRPO_SCALE", "smoke")
    common = load(ROOT / "flows" / "common.py")
    wanted = yaml.safe_load((ROOT / "params" / "base.yaml").read_text())["compute"]["resources"]
    assert common.resources() == {"gpu": wanted["gpu"], "cpu": wanted["cpu"], "memory": wanted["memory_mb"],
                                  "shared_memory": wanted["shared_memory_mb"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_flow_calls_one_stage_function(stage):
    text = (ROOT / "flows" / f"{stage}_flow.py").read_text()
    assert text.count(f'call_stage(self, "{stage}")') == text.count("call_stage(self") == 1
    assert ("@card" in text) == (stage in ("train", "evaluate"))
    assert ("@resources" in text) == (stage in ("base", "sft", "train", "evaluate"))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name


# ------------------------------------------------------------------------------------------------------------ processes

PARENT = """
import subprocess, sys, time
child = subprocess.Popen({command})
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("through_shell", [False, True])
def test_a_child_ends_with_its_killed_parent(process, tmp_path, through_shell):
    """kill -9 of the parent, also with a shell between (dvc starts stages through one, which would stay and wait)."""
    mark = tmp_path / "pid"
    code = f"import sys, os, time; sys.path.insert(0, {str(ROOT / 'flows')!r}); import process; process.die_with_parent(); " \
           f"open({str(mark)!r} + '.part', 'w').write(str(os.getpid())); os.rename({str(mark)!r} + '.part', {str(mark)!r}); " \
           "time.sleep(60)"
    command = [sys.executable, "-c", code]
    if through_shell:
        script = tmp_path / "child.py"
        script.write_text(code)
        command = ["/bin/sh", "-c", f"{sys.executable} {script}; true"]  # "; true" keeps the shell from exec
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(command=command)], stdout=subprocess.DEVNULL)
    try:
        assert wait_for(mark.exists)
        pid = int(mark.read_text())
        assert process.alive(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_for(lambda: not process.alive(pid), 10), "the child outlived its parent"


def test_a_second_starter_waits_and_names_the_holder(tmp_path):
    lock = tmp_path / "locks" / "train-x.lock"
    code = f"import time; from pathlib import Path; from unigrpo.resume import hold\n" \
           f"with hold(Path({str(lock)!r}), 'train x'):\n    print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said: list[str] = []
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(TimeoutError, match=rf"train x \(process {holder.pid}\) still holds"), \
                hold(lock, "train x again", timeout=0.2, say=said.append):
            pass
        assert said == [f"train x again: waiting for train x (process {holder.pid}), which holds train-x.lock"]
    finally:
        holder.kill()
        holder.wait()
    with hold(lock, "after the kill", timeout=5, say=said.append):  # the kernel has released a killed holder's lock
        pass


def test_a_resume_folder_stays_after_a_failure_and_goes_after_success(tmp_path):
    (tmp_path / "in.txt").write_text("1")
    quiet: list[str] = []

    def enter(params, fail=False, stage="train"):
        with resume_folder(tmp_path, stage, "x", params, ["in.txt"], say=quiet.append) as folder:
            seen = (folder / "state").exists()
            (folder / "state").write_text("half way")
            if fail:
                raise KeyboardInterrupt
        return seen

    with pytest.raises(KeyboardInterrupt):
        enter({"lr": 1}, fail=True)
    assert not enter({"lr": 2})   # other params: another folder
    assert not enter({"lr": 1}, stage="sft")
    (tmp_path / "in.txt").write_text("2")
    assert not enter({"lr": 1})   # another input
    (tmp_path / "in.txt").write_text("1")
    assert enter({"lr": 1})       # back at the old values: found again
    assert not enter({"lr": 1})   # and removed by the success before


def test_digests_see_content_and_names_only(tmp_path):
    for folder, name, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    a, b, c, d = (sha256_path(tmp_path / folder) for folder in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="missing"):
        sha256_path(tmp_path / "none")


def test_a_progress_line_tells_rate_and_eta(capsys):
    with Progress("train x", 10, start=4, every=0.0) as progress:
        progress.step(5, reward=0.71234)
    line = capsys.readouterr().err
    assert re.fullmatch(r"train x: 5/10  0:00  [\d.]+ steps/s  ETA \d+:\d\d  reward 0.712\n", line)
    assert [duration(s) for s in (5, 75, 3723)] == ["0:05", "1:15", "1:02:03"]


# -------------------------------------------------------------------------------------------------------------- tracker

CONFIG = {"scale": "smoke", "seed": 3, "optim": {"lr": 0.1}}


def rows(root: Path, query: str) -> list[tuple]:
    with sqlite3.connect(root / "mlflow.db") as connection:
        return connection.execute(query).fetchall()


def test_a_tracker_that_is_down_never_stops_a_stage_and_gets_all_later(tmp_path, monkeypatch, capsys):
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "gallery.json").write_text("[]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    with track("train", "x", CONFIG, {"git_commit": "abc"}, tmp_path) as tracker:
        tracker.log_metrics(0, {"reward/mean": 0.25, "text/entropy": float("nan")})
        tracker.log_metrics(1, {"reward/mean": 0.5})
        tracker.log_artifacts(tmp_path / "gallery")
    said = capsys.readouterr().err
    assert said.count("does not answer") == 1
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with track("evaluate", "y", CONFIG, {}, tmp_path) as tracker:
        tracker.log_metrics(0, {"bench/shapes/exact": 1.0})
    runs = {name: (uuid, status) for uuid, name, status in rows(tmp_path, "select run_uuid, name, status from runs")}
    assert {name: status for name, (_, status) in runs.items()} == {"train/x": "FINISHED", "evaluate/y": "FINISHED"}
    late = runs["train/x"][0]
    metrics = rows(tmp_path, f"select key, step, value from metrics where run_uuid = '{late}' and key not like 'system/%'")
    assert sorted(metrics) == [("reward/mean", 0, 0.25), ("reward/mean", 1, 0.5), ("tracking/not_finite", 0, 1.0)]
    tags = dict(rows(tmp_path, f"select key, value from tags where run_uuid = '{late}'"))
    assert (tags["git.commit"], tags["git.dirty"], tags["seed"]) == ("abc", "unknown", "3")
    assert dict(rows(tmp_path, f"select key, value from params where run_uuid = '{late}'"))["optim.lr"] == "0.1"
    assert list((tmp_path / "mlartifacts" / "smoke" / late).rglob("gallery.json"))
    assert rows(tmp_path, "select name, artifact_location from experiments where name = 'smoke'") == [
        ("smoke", (tmp_path / "mlartifacts").as_uri() + "/smoke")]


def test_a_run_that_the_store_no_longer_has_is_told_anew(tmp_path):
    """Somebody removed mlflow.db while a run of it was unfinished: its records go into a new run, and block no other."""
    (tmp_path / "resume").mkdir()
    with track("train", "x", CONFIG, {}, tmp_path, tmp_path / "resume") as tracker:
        tracker.log_metrics(0, {"reward/mean": 0.25})
    note, = (tmp_path / ".unigrpo" / "tracking").glob("*.sent")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"run_id": "0" * 32}))  # an id that this store never gave
    with track("train", "x", CONFIG, {}, tmp_path, tmp_path / "resume") as tracker:
        tracker.log_metrics(1, {"reward/mean": 0.5})
    assert not tracker.down
    new = json.loads(note.read_text())["run_id"]
    told = rows(tmp_path, f"select step, value from metrics where key = 'reward/mean' and run_uuid = '{new}' order by step")
    assert told == [(0, 0.25), (1, 0.5)]


KILLED = """
import os, sys
from pathlib import Path
from unigrpo.tracking import track
root, die = Path(sys.argv[1]), sys.argv[2] == "die"
with track("train", "x", {"scale": "smoke", "seed": 0}, {}, root, root / "resume") as tracker:
    tracker.log_metrics(0 if die else 1, {"reward/mean": 0.5})
    tracker.send()
    if die:
        os._exit(9)
"""


def test_a_killed_stage_reopens_its_run_and_an_abandoned_one_is_closed(tmp_path):
    (tmp_path / "resume").mkdir()
    run = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run([*run, "die"], cwd=ROOT).returncode == 9
    assert rows(tmp_path, "select status from runs") == [("RUNNING",)]
    subprocess.run([*run, "live"], cwd=ROOT, check=True)
    assert rows(tmp_path, "select status from runs") == [("FINISHED",)]
    assert sorted(rows(tmp_path, "select step from metrics where key = 'reward/mean'")) == [(0,), (1,)]
    (tmp_path / "resume" / "tracking.key").unlink()
    assert subprocess.run([*run, "die"], cwd=ROOT).returncode == 9
    with track("sft", "z", CONFIG, {}, tmp_path):
        pass
    assert sorted(rows(tmp_path, "select name, status from runs")) == [
        ("sft/z", "FINISHED"), ("train/x", "FINISHED"), ("train/x", "KILLED")]


def test_a_record_cut_short_by_a_kill_does_not_spoil_the_next(tmp_path):
    journal = Journal(tmp_path, "k")
    journal.append("metrics", step=0, values={"a": 1.0})
    with journal.path.open("a") as file:
        file.write('{"kind": "metr')
    journal.mend()
    journal.append("metrics", step=1, values={"a": 2.0})
    assert [record["kind"] for record in journal.records()] == ["metrics", "torn", "metrics"]
    assert json.loads(journal.path.read_text().splitlines()[-1])["step"] == 1


def test_four_first_users_of_a_cold_database(tmp_path):
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from unigrpo.tracking import track
        with track("train", sys.argv[2], {"scale": "smoke", "seed": 0}, {}, Path(sys.argv[1])) as tracker:
            tracker.log_metrics(0, {"reward/mean": 1.0})
        sys.exit(tracker.down)
    """)
    users = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"x{i}"], cwd=ROOT) for i in range(4)]
    assert [user.wait() for user in users] == [0, 0, 0, 0]
    assert rows(tmp_path, "select count(*), count(distinct experiment_id) from runs where status = 'FINISHED'") == [(4, 1)]
