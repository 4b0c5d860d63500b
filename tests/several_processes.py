"""A training of two processes of which one is killed, hangs, or is asked to leave: rows of the table of reliability.py.

Processes are started as a flow starts them (run_together of flows/common.py, under torch.distributed.run's agent).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from pipeline_copy import copy_environment
from undisturbed import ROOT, TRAIN, Job, Row, Undisturbed, change_params, said

from unigrpo.preemption import PREEMPTED

PATIENCE = 15.0  # seconds that a process waits for the other here; 30 minutes by default
LEAVE = 10       # seconds that the agent gives a process which does not leave
SLACK = 30.0     # seconds that a slow machine may add
LAUNCH = (f"import sys; sys.path.insert(0, 'flows'); import common, surroundings; surroundings.SHUTDOWN = {LEAVE}; "
          "common.run_together(sys.argv[1], sys.argv[2], {}, 2)")
HUNG = re.compile(r"train smoke-unigrpo-0: step \d+, [a-z ]+: process [01] of 2 waited \d+ s for the others, and one of them "
                  r"hangs \(compute\.patience_minutes=0\.25 says how long to wait\); the same command goes on after step \d+")


def launch(root: Path, job: Job) -> subprocess.Popen[bytes]:
    """Start a stage in two processes of the project."""
    environment = copy_environment(PYTHONPATH=str(ROOT), UNIGRPO_SCALE="smoke", UNIGRPO_ROOT=str(root), METAFLOW_USER="test",
                                   OMP_NUM_THREADS="1")
    with (root / "log").open("a") as log:
        return subprocess.Popen([sys.executable, "-c", LAUNCH, *job], cwd=root, env=environment, stdin=subprocess.DEVNULL,
                                stdout=log, stderr=log)


def run_two(root: Path, job: Job) -> int:
    """Run a stage in two processes to its end. Returns its status."""
    return launch(root, job).wait(600)


def two_undisturbed(whole: Undisturbed) -> Undisturbed:
    """The training by two processes, undisturbed."""
    (whole.folder / "several").mkdir()
    out = Undisturbed(whole.folder / "several")
    root = out.folder / "whole"
    shutil.copytree(whole.before[TRAIN], root)
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__", ".metaflow"))
    change_params(root, "scales/smoke.yaml", train={"processes": 2}, compute={"patience_minutes": PATIENCE / 60})
    out.observe(root, TRAIN, run_two)
    return out


def process_of(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of a rank. Raises psutil.NoSuchProcess where it has ended, or the launcher has."""
    while launcher.poll() is None:
        for process in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if "unigrpo.stages.run" in process.cmdline() and process.environ().get("RANK") == str(rank):
                    return process
            except psutil.Error:
                continue
        time.sleep(0.02)
    raise psutil.NoSuchProcess(launcher.pid)


def wait_for_a_state(launcher: subprocess.Popen[bytes], root: Path) -> None:
    """Until a training state is saved."""
    while launcher.poll() is None and not list((root / ".unigrpo/resume").glob("*/state/state.json")):
        time.sleep(0.02)


def end_of(launcher: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The launcher's status; None where it did not end in time, and is killed."""
    try:
        return launcher.wait(seconds)
    except subprocess.TimeoutExpired:
        launcher.kill()  # its processes end with it
        launcher.wait()
        return None


def one_killed(two: Undisturbed, count: int, rng: random.Random) -> Row:
    """kill -9 of either process in turn, at a random moment of the whole run."""
    row, slowest, resumed = Row("`kill -9` of one of two processes that train, either in turn, at a random moment", 0), 0.0, 0
    while row.times < count:
        root = two.copy(TRAIN, "killed")
        begun, launcher = time.monotonic(), launch(root, TRAIN)
        try:
            victim = process_of(launcher, row.times % 2)
            time.sleep(rng.random() * 0.8 * two.seconds[TRAIN])
            victim.kill()
        except psutil.NoSuchProcess:
            end_of(launcher, SLACK)
            two.was_quicker(TRAIN, begun)
            continue
        began = time.monotonic()
        status = end_of(launcher, PATIENCE + LEAVE + SLACK)
        if status == 0:
            continue
        slowest = max(slowest, time.monotonic() - began)
        row.times += 1
        row.check(status == 1 and "was killed by signal 9" in said(root), f"status {status}: {said(root)[-300:]}")
        two.finish(row, TRAIN, root, run_two)
        resumed += "going on from" in said(root)
    row.outcome = (f"all ended within {slowest:.0f} s, which process and by what signal is said; the same command ended with "
                   f"the undisturbed run's bytes ({resumed} had a resume folder)")
    return row


def one_hangs(two: Undisturbed, count: int, rng: random.Random) -> Row:
    """SIGSTOP to either process in turn, in the middle of training."""
    row, slowest = Row("one of two processes that train hangs (SIGSTOP, either in turn)", 0), 0.0
    while row.times < count:
        root = two.copy(TRAIN, "hung")
        launcher = launch(root, TRAIN)
        wait_for_a_state(launcher, root)
        try:
            time.sleep(rng.random())
            process_of(launcher, row.times % 2).suspend()
        except psutil.NoSuchProcess:
            end_of(launcher, SLACK)
            continue
        began = time.monotonic()
        status = end_of(launcher, PATIENCE + LEAVE + SLACK)
        if status == 0:
            continue
        slowest = max(slowest, time.monotonic() - began)
        row.times += 1
        row.check(status == 1 and HUNG.search(said(root)) is not None, f"status {status}: {said(root)[-600:]}")
        row.check("Traceback" not in said(root), f"a traceback: {said(root)[-600:]}")
        two.finish(row, TRAIN, root, run_two)
    row.outcome = (f"the other stops after its patience ({PATIENCE:.0f} s here) and names stage, step and what it waited for; "
                   f"all ended within {slowest:.0f} s; the same command ended with the undisturbed run's bytes")
    return row


def two_leave(two: Undisturbed, count: int, rng: random.Random) -> Row:
    """SIGTERM to the launcher at a random moment of training."""
    row = Row("SIGTERM to the launcher of two processes that train", 0)
    while row.times < count:
        root = two.copy(TRAIN, "left")
        launcher = launch(root, TRAIN)
        wait_for_a_state(launcher, root)
        time.sleep(0.5 * rng.random())
        if launcher.poll() is not None:
            continue
        launcher.send_signal(signal.SIGTERM)
        status = end_of(launcher, SLACK)
        if status == 0:
            continue
        row.times += 1
        row.check(status == PREEMPTED, f"status {status}: {said(root)[-300:]}")
        two.finish(row, TRAIN, root, run_two)
    row.outcome = "both stopped after the same step, saved, status 75; same bytes"
    return row


def several(whole: Undisturbed, count: int, rng: random.Random) -> list[Any]:
    """The work of every row, to be called in turn."""
    found: list[Undisturbed] = []

    def two() -> Undisturbed:
        if not found:
            found.append(two_undisturbed(whole))
        return found[0]

    return [lambda: one_killed(two(), count, rng), lambda: one_hangs(two(), count, rng), lambda: two_leave(two(), count, rng)]


assert os.name == "posix", "signals are the subject here"
