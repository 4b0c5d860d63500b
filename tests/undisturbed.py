"""The stages of scale smoke in a project of params alone, run once undisturbed: what disturbed runs are compared with.

Stages run as processes of their own, forked from this one so that a run costs its work and not its imports.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unigrpo.digests import sha256_path
from unigrpo.experiment import make_request, render
from unigrpo.stages import parse_name, run_stage

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("train", "smoke-unigrpo-0")
STAGES = (("curate", "smoke"), ("base", "smoke"), ("sft", "smoke"), TRAIN, ("evaluate", "smoke-base"),
          ("evaluate", "smoke-sft"), ("evaluate", "smoke-unigrpo-0"), ("report", "smoke-main"))
STEPS = 6  # of training
Job = tuple[str, str]
Metric = tuple[Any, ...]


@dataclass
class Row:
    """A line of the table.

    Attributes: bad: what did not end as it should, in words. lost_steps, lost_metrics: of the undisturbed runs', what the
        disturbed ones lack, counted; None where a row disturbs no run.
    """

    what: str
    times: int
    outcome: str = ""
    bad: list[str] = field(default_factory=list)
    lost_steps: int | None = None
    lost_metrics: int | None = None

    def check(self, right: bool, otherwise: str) -> None:
        """Note what is not as it should be."""
        if not right:
            self.bad.append(otherwise)

    def lose(self, steps: int, metrics: int) -> None:
        """Count what is lost, which is not as it should be."""
        self.lost_steps, self.lost_metrics = (self.lost_steps or 0) + steps, (self.lost_metrics or 0) + metrics
        self.check(not steps and not metrics, f"{steps} steps and {metrics} metrics lost")


def make_project(folder: Path) -> Path:
    """A project root of params alone, listing the main job of scale smoke, with a few more steps of training."""
    shutil.copytree(ROOT / "params", folder / "params")
    change_params(folder, "scales/smoke.yaml", train={"num_steps": STEPS})
    (folder / "params/experiment.yaml").write_text(render(folder, make_request(folder, ["smoke"], runs=["unigrpo"], seeds=[0])))
    return folder


def change_params(root: Path, name: str, **sections: Any) -> None:
    """Change keys of a file of a project's params, section by section."""
    path = root / "params" / name
    values = yaml.safe_load(path.read_text()) or {}
    for section, change in sections.items():
        values[section] = {**(values.get(section) or {}), **change}
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def start(root: Path, job: Job, inject: Callable[[], Any] | None = None) -> int:
    """Fork a process that runs a stage; its id. Its output goes to <root>/log; a mistake ends with 2, as the command's."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(root / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if inject is not None:
            inject()
        run_stage(*job, root)
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    except ValueError as error:
        print(error, file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(root: Path, job: Job, inject: Callable[[], Any] | None = None) -> int:
    """Run a stage to its end. Returns its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start(root, job, inject), 0)[1])


def said(root: Path) -> str:
    """Everything that runs in a project have said."""
    return (root / "log").read_text(encoding="utf-8", errors="replace") if (root / "log").is_file() else ""


def metrics(root: Path) -> set[Metric]:
    """(run, metric, step, value) of everything in MLflow but seconds and memory."""
    if not (root / "mlflow.db").is_file():
        return set()
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as connection:
        return set(connection.execute("select runs.name, metrics.key, step, value from metrics join runs on "
                                      "runs.run_uuid = metrics.run_uuid where metrics.key not like 'system/%'"))


def steps(root: Path, job: Job) -> set[int]:
    """The steps in a stage's curves; none for a stage without."""
    path = root / parse_name(*job, root).output / "curves.csv"
    if job[0] not in ("base", "sft", "train") or not path.is_file():
        return set()
    with path.open(newline="") as rows:
        return {int(row["step"]) for row in csv.DictReader(rows)}


def at_call(module: Any, name: str, number: int, act: Callable[..., Any]) -> None:
    """Do something in place of the n-th call of a function, in this process."""
    original, calls = getattr(module, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return act(original, *args, **kwargs) if len(calls) == number else original(*args, **kwargs)

    setattr(module, name, wrapped)


@dataclass
class Undisturbed:
    """The project before each stage; what its artifacts, its metrics and its curves' steps are after it; its seconds."""

    folder: Path
    before: dict[Job, Path] = field(default_factory=dict)
    digest: dict[Job, str] = field(default_factory=dict)
    metrics: dict[Job, set[Metric]] = field(default_factory=dict)
    steps: dict[Job, set[int]] = field(default_factory=dict)
    seconds: dict[Job, float] = field(default_factory=dict)

    def copy(self, job: Job, name: str) -> Path:
        """A fresh copy of the project as it was before a stage."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.before[job], target)
        return target

    def observe(self, root: Path, job: Job, runner: Callable[[Path, Job], int] = run) -> None:
        """Run a stage undisturbed, and keep what it leaves. Raises RuntimeError where it does not end well."""
        self.before[job] = self.folder / f"before-{'-'.join(job)}"
        shutil.copytree(root, self.before[job])
        began = time.monotonic()
        if status := runner(root, job):
            raise RuntimeError(f"{job} ended with {status}:\n{said(root)}")
        self.seconds[job] = time.monotonic() - began
        self.digest[job], self.metrics[job], self.steps[job] = sha256_path(root / "artifacts"), metrics(root), steps(root, job)

    def was_quicker(self, job: Job, began: float) -> None:
        """A stage ended before it was disturbed: moments are drawn from no more seconds than that from now on."""
        self.seconds[job] = min(self.seconds[job], time.monotonic() - began)

    def compare(self, row: Row, job: Job, root: Path) -> None:
        """What of a run's end differs from the undisturbed one's, noted and counted in a row."""
        row.check(sha256_path(root / "artifacts") == self.digest[job], f"{job}: other bytes")
        row.lose(len(self.steps[job] - steps(root, job)), len(self.metrics[job] - metrics(root)))

    def finish(self, row: Row, job: Job, root: Path, runner: Callable[[Path, Job], int] = run) -> None:
        """Run a disturbed stage again, undisturbed, and compare."""
        status = runner(root, job)
        row.check(status == 0, f"{job}: resumed, and ended with {status}: {said(root)[-300:]}")
        if status == 0:
            self.compare(row, job, root)


def undisturbed(folder: Path) -> Undisturbed:
    """Run every stage once."""
    out, root = Undisturbed(folder), make_project(folder / "whole")
    for job in STAGES:
        out.observe(root, job)
    return out
