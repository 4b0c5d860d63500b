"""Running the experiments side by side: an arm trains, then is evaluated, so that what is finished is finished whole.

DVC decides what is stale and keeps the lock; every arm is one `dvc --wait-for-lock repro -s STAGE ...` (without waiting for
the lock 5 of 12 parallel ones failed). Started again it goes on with what is not there yet. An arm that fails stops no other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from unigrpo.config import Config, load_config
from unigrpo.courier import ADDRESS, shared_courier
from unigrpo.progress import duration
from unigrpo.resume import STATE
from unigrpo.stages import read_experiment

DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
FAILURE = "failed.json"
# What an evaluation is beside a training of its scale's full length, in time, for the estimate of what is left. Measured at
# scale tiny: 7 minutes of one core a training, 88, 24 and 20 seconds an evaluation.
EVALUATION = {"all": 0.2, "guidance": 0.06, "headline": 0.05}
TAIL = 5  # lines of a failed stage's output that are shown
NAMED = re.compile(r"^(?:Running stage|ERROR: failed to reproduce) '([^']+)'", re.MULTILINE)  # DVC's words


@dataclass(frozen=True)
class Arm:
    """Stages of one checkpoint, in order, and how much work they are: 1 is a training of the scale's full length."""

    name: str
    stages: tuple[str, ...]
    work: float


@dataclass
class Running:
    """An arm under way, and its process."""

    arm: Arm
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float = field(default_factory=time.monotonic)


def list_arms(root: Path, scale: str) -> list[Arm]:
    """The arms of a scale in the order of params/experiment.yaml: trainings with their evaluations, then what is left.

    Raises: ValueError where none is listed.
    """
    experiment = read_experiment(root)
    evaluations = {name: EVALUATION.get(item.get("cells"), EVALUATION["all"])
                   for name, item in experiment["evaluations"].items() if item["scale"] == scale}
    full = training_rollouts(load_config(scale, root=root))
    found = []
    for name, item in experiment["trainings"].items():
        if item["scale"] != scale:
            continue
        config = load_config(scale, run=item["run"], seed=item["seed"], root=root)
        stages = (f"train@{name}", f"evaluate@{name}") if name in evaluations else (f"train@{name}",)
        found.append(Arm(name, stages, training_rollouts(config) / full + evaluations.pop(name, 0.0)))
    found += [Arm(name, (f"evaluate@{name}",), work) for name, work in evaluations.items()]
    if not found:
        raise ValueError(f"params/experiment.yaml lists no training of scale {scale}; write some with "
                         f"`unigrpo experiment write --scale {scale}`")
    return found


def training_rollouts(config: Config) -> int:
    """All that a training samples."""
    return config.train.num_steps * config.rollout.prompts_per_step * config.rollout.group_size


def digest_code(root: Path) -> None:
    """Bring the stage `code` up to date, on which DVC's judgement rests. Raises ValueError with DVC's words where it fails."""
    done = subprocess.run([*DVC, "repro", "code"], cwd=root, env=stage_environment(), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"dvc repro code failed: {done.stderr.strip()}")


def stage_environment() -> dict[str, str]:
    """This environment, in which `python` of dvc.yaml is this one, also where none was activated."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def stale(root: Path, arms: Sequence[Arm]) -> set[str]:
    """The stages that are not up to date, as DVC sees it. Raises ValueError with DVC's words where it cannot say."""
    # Of everything, since DVC walks the whole graph for each stage that is named: minutes for seventy of them.
    done = subprocess.run([*DVC, "status", "--json"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"dvc status failed: {done.stderr.strip() or done.stdout.strip()}")
    return set(json.loads(done.stdout[done.stdout.index("{"):])) & {stage for arm in arms for stage in arm.stages}


def command_of(arm: Arm) -> list[str]:
    """What runs the stages of an arm, in their order, up to the first that fails."""
    return [*DVC, "repro", "-s", *arm.stages]


def last_stage(arm: Arm, log: Path) -> str:
    """The stage of an arm that DVC named last, as it started or refused it; its first where it named none."""
    named = NAMED.findall(log.read_text(encoding="utf-8", errors="replace"))
    return str(named[-1]) if named else arm.stages[0]


def run_arms(root: Path, arms: Sequence[Arm], slots: int, *, say: Callable[[str], None] = print,
             command: Callable[[Arm], Sequence[str]] = command_of, pause: float = 0.2, show: bool = False,
             courier: str | None = None) -> dict[str, str]:
    """Run arms, at most `slots` at a time, in their order; says a line whenever one has ended.

    Args:
        command: what runs an arm. pause: seconds between looks at the processes. show: let the stages speak for
            themselves, in place of a log and a line when an arm has ended. courier: address of one that they share.
    Returns: name of a failed arm -> the stage that failed, its first with `show`, where no log tells. Outputs are in
        .unigrpo/experiments/<name>.log.
    """
    logs = root / STATE / "experiments"
    logs.mkdir(parents=True, exist_ok=True)
    todo, start, ended, spent = list(arms), time.monotonic(), 0.0, 0.0
    running: list[Running] = []
    failed: dict[str, str] = {}
    environment = stage_environment() | ({ADDRESS: courier} if courier else {})

    try:
        while todo or running:
            while todo and len(running) < slots:
                arm = todo.pop(0)
                log = (logs / f"{arm.name}.log").open("wb")
                process = subprocess.Popen(command(arm), cwd=root, env=environment, stdin=subprocess.DEVNULL,
                                           stdout=None if show else log, stderr=None if show else subprocess.STDOUT)
                running.append(Running(arm, process, log))
                if not show:
                    say(f"{arm.name}: started")
            time.sleep(pause)
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                arm, spent = item.arm, spent + time.monotonic() - item.started
                item.log.close()
                if item.process.returncode:
                    failed[arm.name] = last_stage(arm, Path(item.log.name))
                ended += arm.work
                left = sum(other.work for other in todo) + sum(other.arm.work for other in running)
                count = len(arms) - len(todo) - len(running)
                eta = spent / ended * left / min(slots, max(1, len(todo) + len(running)))
                if show:
                    continue
                outcome = f"FAILED in {failed[arm.name]}" if arm.name in failed else "done"
                say(f"{arm.name}: {outcome}; {count} of {len(arms)} arms in {duration(time.monotonic() - start)}, "
                    f"{len(failed)} failed, about {duration(eta)} left")
    finally:  # an interrupted experiment leaves no stage behind: a stage ends with its dvc
        for item in running:
            item.process.terminate()
        for item in running:
            item.process.wait()
            item.log.close()
    return failed


def explain(root: Path, failed: Mapping[str, str]) -> str:
    """The failed arms and the last lines of what they said."""
    lines = []
    for name, stage in failed.items():
        log = root / STATE / "experiments" / f"{name}.log"
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-TAIL:]
        lines += [f"{stage} failed ({log.relative_to(root)}):", *(f"  {line}" for line in said)]
    return "\n".join(lines)


def note_failures(root: Path, scale: str, failed: Mapping[str, str]) -> None:
    """Leave failed.json in the folder of each failed training, for its row in the report of all experiments."""
    trainings = read_experiment(root)["trainings"]
    for name, stage in failed.items():
        if name not in trainings:
            continue
        folder = root / "artifacts" / scale / str(trainings[name]["run"]) / str(trainings[name]["seed"])
        folder.mkdir(parents=True, exist_ok=True)
        last = explain(root, {name: stage}).splitlines()[-1].strip()
        (folder / FAILURE).write_text(json.dumps({"error": f"{stage}: {last}"}) + "\n", encoding="utf-8")


def run_experiments(root: Path, scale: str, jobs: int | None, only: Sequence[str] | None = None, *, show: bool = False) -> int:
    """Bring every arm of a scale up to date. Returns how many failed.

    Args:
        jobs: arms at a time; at most, and by default, compute.slots. only: names of arms; all by default. show: see `run_arms`;
            DVC is then not asked beforehand what is stale, which takes as long as a few stages that are not.
    Raises: ValueError for a name that is no arm.
    """
    limit = load_config(scale, root=root).compute.slots
    slots = limit if jobs is None else max(1, min(jobs, limit))
    if jobs is not None and jobs > limit:
        print(f"{slots} arms at a time and not {jobs}: compute.slots in params says so", flush=True)
    arms = list_arms(root, scale)
    if unknown := sorted(set(only or ()) - {arm.name for arm in arms}):
        raise ValueError(f"an arm must be one of {[arm.name for arm in arms]}, got {unknown}")
    arms = [arm for arm in arms if not only or arm.name in only]
    digest_code(root)
    if show:
        with shared_courier(root) as courier:
            return len(run_arms(root, arms, slots, show=True, courier=courier))
    old = stale(root, arms)
    todo = [arm for arm in arms if old & set(arm.stages)]
    print(f"{len(arms)} arms, {len(arms) - len(todo)} of them up to date; {slots} at a time", flush=True)
    with shared_courier(root) as courier:
        failed = run_arms(root, todo, slots, say=lambda line: print(line, flush=True), courier=courier)
    note_failures(root, scale, failed)
    if failed:
        print(explain(root, failed), file=sys.stderr, flush=True)
    return len(failed)
