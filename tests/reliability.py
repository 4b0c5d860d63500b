"""What the project survives, measured: `python tests/reliability.py --write docs/reliability.md` fills in the page's table.

Stages run at scale smoke as processes of their own, forked from this one so that a run costs its work and not its imports.
Every disturbed run goes on to its end and is compared with the undisturbed one, byte by byte; so are the metrics in MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from bad_servers import bad_server

from unigrpo import checkpoint, tracking
from unigrpo.checkpoint import load_training_state
from unigrpo.digests import sha256_path
from unigrpo.experiment import make_request, render
from unigrpo.preemption import PREEMPTED
from unigrpo.rewards import get_reward
from unigrpo.rewards.server import RewardServer
from unigrpo.rollout import BagelPolicy
from unigrpo.sealed import seal_problems
from unigrpo.stages import run_stage
from unigrpo.stages.loading import load_policy

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("train", "smoke-unigrpo-0")
STAGES = (("curate", "smoke"), ("base", "smoke"), ("sft", "smoke"), TRAIN, ("evaluate", "smoke-base"),
          ("evaluate", "smoke-sft"), ("evaluate", "smoke-unigrpo-0"), ("report", "smoke-main"))
MARKS = ("<!-- table: begin (python tests/reliability.py --write docs/reliability.md) -->", "<!-- table: end -->")
Job = tuple[str, str]


@dataclass
class Row:
    """A line of the table. `bad`: what did not end as it should, in words."""

    what: str
    times: int
    outcome: str
    bad: list[str] = field(default_factory=list)


def make_project(folder: Path) -> Path:
    """A project root of params alone, listing the main job of scale smoke, with a few more steps of training."""
    shutil.copytree(ROOT / "params", folder / "params")
    scale = yaml.safe_load((folder / "params/scales/smoke.yaml").read_text())
    scale["train"]["num_steps"] = 6
    (folder / "params/scales/smoke.yaml").write_text(yaml.safe_dump(scale))
    (folder / "params/experiment.yaml").write_text(render(folder, make_request(folder, ["smoke"], runs=["unigrpo"], seeds=[0])))
    return folder


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


def metrics(root: Path) -> set[tuple[Any, ...]]:
    """(run, metric, step, value) of everything in MLflow but seconds and memory."""
    if not (root / "mlflow.db").is_file():
        return set()
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as connection:
        return set(connection.execute("select runs.name, metrics.key, step, value from metrics join runs on "
                                      "runs.run_uuid = metrics.run_uuid where metrics.key not like 'system/%'"))


@dataclass
class Undisturbed:
    """The project before each stage, what its artifacts are after it, its metrics, and its seconds."""

    folder: Path
    before: dict[Job, Path] = field(default_factory=dict)
    digest: dict[Job, str] = field(default_factory=dict)
    metrics: dict[Job, set[tuple[Any, ...]]] = field(default_factory=dict)
    seconds: dict[Job, float] = field(default_factory=dict)

    def copy(self, job: Job, name: str) -> Path:
        """A fresh copy of the project as it was before a stage."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.before[job], target)
        return target

    def problems(self, job: Job, root: Path) -> list[str]:
        """What of a run's end differs from the undisturbed one's."""
        out = [] if sha256_path(root / "artifacts") == self.digest[job] else ["other bytes"]
        lost = self.metrics[job] - metrics(root)
        return out + ([f"{len(lost)} metrics lost, such as {sorted(map(str, lost))[0]}"] if lost else [])


def undisturbed(folder: Path) -> Undisturbed:
    """Run every stage once."""
    out, root = Undisturbed(folder), make_project(folder / "whole")
    for job in STAGES:
        out.before[job] = folder / f"before-{'-'.join(job)}"
        shutil.copytree(root, out.before[job])
        began = time.monotonic()
        if status := run(root, job):
            raise RuntimeError(f"{job} ended with {status}:\n{(root / 'log').read_text()}")
        out.seconds[job] = time.monotonic() - began
        out.digest[job], out.metrics[job] = sha256_path(root / "artifacts"), metrics(root)
    return out


def end_of(whole: Undisturbed, job: Job, root: Path) -> list[str]:
    """Run a disturbed stage again, undisturbed, and compare."""
    if status := run(root, job):
        return [f"{job}: resumed, and ended with {status}: {(root / 'log').read_text()[-300:]}"]
    return [f"{job}: {problem}" for problem in whole.problems(job, root)]


def kills(whole: Undisturbed, count: int, rng: random.Random) -> Row:
    """kill -9 at a random moment of each stage in turn."""
    bad, killed, resumed = [], 0, 0
    while killed < count:
        job = STAGES[killed % len(STAGES)]
        root = whole.copy(job, "killed")
        pid = start(root, job)
        time.sleep(rng.random() * whole.seconds[job])
        os.kill(pid, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            continue  # it was quicker this time
        killed += 1
        bad += end_of(whole, job, root)
        resumed += "going on from" in (root / "log").read_text()
    return Row("`kill -9` at a random moment, all eight stages in turn", count,
               f"ended with the bytes of the undisturbed run ({resumed} had a resume folder to go on from)", bad)


def terminations(whole: Undisturbed, count: int, rng: random.Random) -> Row:
    """SIGTERM at a random moment of training, base and sft."""
    bad, done = [], 0
    while done < count:
        job = (TRAIN, STAGES[1], STAGES[2])[done % 3]
        root = whole.copy(job, "terminated")
        pid = start(root, job)
        time.sleep((0.1 + 0.7 * rng.random()) * whole.seconds[job])
        os.kill(pid, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status in (0, -signal.SIGTERM):
            continue  # it had done its last step, or had not begun
        done += 1
        bad += [] if status == PREEMPTED else [f"{job}: status {status}"]
        bad += end_of(whole, job, root)
    return Row("SIGTERM at a random moment of train, base, sft", count, "left with status 75 after its step, same bytes", bad)


def at_call(module: Any, name: str, number: int, act: Callable[..., Any]) -> None:
    """Do something in place of the n-th call of a function, in this process."""
    original, calls = getattr(module, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return act(original, *args, **kwargs) if len(calls) == number else original(*args, **kwargs)

    setattr(module, name, wrapped)


def no_space(original: Any, tensors: Any, path: Path, **kwargs: Any) -> None:
    path.write_bytes(b"half of it")
    raise OSError(28, "No space left on device", str(path))


def full_disks(whole: Undisturbed, calls: Sequence[int]) -> Row:
    """The n-th file of tensors finds the disk full."""
    bad = []
    for call in calls:
        root = whole.copy(TRAIN, "full")
        status = run(root, TRAIN, lambda call=call: at_call(checkpoint, "save_file", call, no_space))
        bad += [] if status == 2 and "the disk is full" in (root / "log").read_text() else [f"file {call}: status {status}"]
        bad += end_of(whole, TRAIN, root)
    return Row("full disk while saving", len(calls), "one sentence, status 2, the states before whole, same bytes", bad)


def reward_server(port: int, dies_at: int) -> tuple[int, int]:
    """A reward server in a process of its own that exits at its n-th call; (pid, port)."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            original, calls = get_reward("shapes_graded"), []

            def reward(*args: Any) -> Any:
                calls.append(1)
                if len(calls) == dies_at:
                    os._exit(1)
                return original(*args)

            server = RewardServer(("127.0.0.1", port), {"shapes_graded": reward})
            os.write(write, f"{server.server_address[1]}\n".encode())
            server.serve_forever()
        os._exit(1)
    found = int(os.read(read, 32))
    os.close(read)
    os.close(write)
    return pid, found


def dead_rewards(whole: Undisturbed, calls: Sequence[int]) -> Row:
    """The server that scores dies at its n-th request; it is started again, and so is the run."""
    bad = []
    for call in calls:
        root = whole.copy(TRAIN, "rewards")
        pid, port = reward_server(0, call)
        runs = root / "params/runs.yaml"
        runs.write_text(yaml.safe_dump({"unigrpo": {"reward": {"options": {"shapes_graded": {"server": {
            "url": f"http://127.0.0.1:{port}", "backoff": 0.1}}}}}}))
        status = run(root, TRAIN)
        os.waitpid(pid, 0)
        said = "are missing" in (root / "log").read_text()
        bad += [] if status == 2 and said else [f"request {call}: status {status}, {(root / 'log').read_text()[-200:]}"]
        pid, _ = reward_server(port, 0)
        bad += end_of(whole, TRAIN, root)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return Row("a reward server that dies in the middle of a run", len(calls),
               "the run stops with status 2 and goes on when the server is back: same bytes", bad)


def bad_losses(whole: Undisturbed, calls: Sequence[int]) -> Row:
    """The n-th replay with gradient gives a velocity that is not finite."""
    def inject(call: int) -> None:
        original, seen = BagelPolicy.replay, []

        def replay(self: BagelPolicy, rollouts: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, rollouts, *args, **kwargs)
            if torch.is_grad_enabled():
                seen.append(1)
                if len(seen) == call:
                    found.velocities[1] = float("nan")
            return found

        BagelPolicy.replay = replay  # type: ignore[method-assign]

    bad = []
    for call in calls:
        root = whole.copy(TRAIN, "losses")
        status, said = run(root, TRAIN, lambda call=call: inject(call)), (root / "log").read_text()
        steps = {row[2] for row in metrics(root) if row[:2] == ("train/smoke-unigrpo-0", "reward/mean")}
        named = re.search(r"step \d+, update \d is skipped, the 1\. .*: not finite is .* of prompts [0-9a-f]{16}", said)
        right = status == 0 and steps == set(range(6)) and named is not None
        bad += [] if right else [f"replay {call}: {status}, {steps}, {said[-200:]}"]
    return Row("a loss that is not finite", len(calls),
               "update skipped and counted; tensor, prompts and step named; all steps done", bad)


def bad_trackers(whole: Undisturbed, ways: Sequence[str]) -> Row:
    """An MLflow server that fails during the whole training; the next stage sends what it did not take."""
    bad, costs = [], []
    for way in ways:
        root = whole.copy(TRAIN, "tracker")
        with bad_server(way) as url:
            def inject(url: str = url) -> None:
                os.environ["MLFLOW_TRACKING_URI"] = url
                tracking.WAIT, tracking.SEND_EVERY = 2.0, 0.0

            began = time.monotonic()
            status = run(root, TRAIN, inject)
            costs.append(time.monotonic() - began - whole.seconds[TRAIN])
        bad += [] if status == 0 else [f"{way}: status {status}"]
        after = STAGES[6]
        bad += [f"{way}: {problem}" for problem in ([] if run(root, after) == 0 else ["next stage failed"])]
        bad += [f"{way}: metrics lost" for _ in [1] if whole.metrics[TRAIN] - metrics(root)]
        trained = "artifacts/smoke/unigrpo/0/checkpoint"
        same = sha256_path(root / trained) == sha256_path(whole.folder / "whole" / trained)
        bad += [] if same else [f"{way}: other bytes"]
    return Row(f"MLflow {', '.join(ways)} for a whole training", len(ways),
               f"at most {max(costs):.0f} s more, 2 s at the end allowed; the next stage sent every metric", bad)


def damage(folder: Path, rng: random.Random) -> str:
    """Change one bit of a random byte of a folder, each byte as likely as another; which file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    at = rng.randrange(sum(path.stat().st_size for path in files))
    for path in files:
        size = path.stat().st_size
        if at < size:
            content = bytearray(path.read_bytes())
            content[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(content))
            return path.name
        at -= size
    raise AssertionError


def damaged_states(whole: Undisturbed, count: int, rng: random.Random) -> Row:
    """One bit of a training state."""
    root = whole.copy(TRAIN, "state")
    status = run(root, TRAIN, lambda: at_call(checkpoint, "save_file", 12, no_space))
    assert status == 2, status
    resume = next(path for path in (root / ".unigrpo/resume").iterdir() if (path / "state.old").is_dir())
    newest, older = (int(checkpoint.read_json(resume / name / "state.json")["step"]) for name in ("state", "state.old"))
    bad, harmless = [], 0
    for i in range(count):
        copy = whole.folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(resume, copy)
        name = damage(copy / "state", rng)
        whole_still = not seal_problems(copy / "state")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            found = load_training_state(copy)
        if whole_still:  # the bit is of the manifest's white space or of a hexadecimal digit's case: every file is as written
            harmless += 1
            bad += [] if found is not None and found[0]["step"] == newest else [f"{i}: {name}"]
        else:
            refused = "is damaged and not used" in said.getvalue() and found is not None and found[0]["step"] == older
            bad += [] if refused else [f"{i}: {name} was not refused: {said.getvalue()}"]
    return Row("one bit of a random byte of a training state", count,
               f"{count - harmless} refused by name and the state before used, {harmless} harmless (every file has its sha256)",
               bad)


def damaged_models(whole: Undisturbed, count: int, rng: random.Random) -> Row:
    """One bit of a model checkpoint."""
    from small import small_config

    bad, harmless, config = [], 0, small_config()
    for i in range(count):
        copy = whole.folder / "model"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole.folder / "whole/artifacts/smoke/sft/checkpoint", copy)
        name = damage(copy, rng)
        whole_still = not seal_problems(copy)
        harmless += whole_still
        try:
            load_policy(copy, config)
            refused = ""
        except ValueError as error:
            refused = str(error)
        bad += [] if bool(refused) != whole_still and (whole_still or str(copy) in refused) else [f"{i}: {name}: {refused!r}"]
    return Row("one bit of a random byte of a model checkpoint", count,
               f"{count - harmless} refused by name, {harmless} harmless (every file has its sha256)", bad)


def fuzzed(folder: Path, count: int) -> list[Row]:
    """Malformed inputs to everything that reads."""
    from test_fuzz import TARGETS

    rows = []
    for name, target in TARGETS.items():
        (folder / name.replace(" ", "-")).mkdir()
        found = target(folder / name.replace(" ", "-"), count)
        rows.append(Row(f"malformed {name}", found.inputs, f"{found.refused} refused in words, {found.accepted} accepted, "
                        f"{found.lines} lines reached, slowest {found.slowest:.1f} s", found.failures))
    return rows


def measure(folder: Path, *, seed: int = 0, number: int = 30, faults: int = 3, bytes_: int = 50, inputs: int = 1500,
            say: Callable[[str], None] = print) -> list[Row]:
    """Every row of the table."""
    importlib.import_module("mlflow")
    for stage in dict.fromkeys(stage for stage, _ in STAGES):
        importlib.import_module(f"unigrpo.stages.{stage}")
    torch.set_num_threads(1)
    whole, rng, rows = undisturbed(folder), random.Random(seed), list[Row]()
    for work in (lambda: kills(whole, number, rng), lambda: terminations(whole, 2 * faults, rng),
                 lambda: full_disks(whole, (2, 6, 12, 1)[:faults + 1]), lambda: dead_rewards(whole, (2, 4, 7, 9)[:faults + 1]),
                 lambda: bad_losses(whole, (4, 6, 10)[:faults]),
                 lambda: bad_trackers(whole, ("refuses", "hangs", "drips", "answers 500", "hangs up")[:faults + 2]),
                 lambda: damaged_states(whole, bytes_, rng), lambda: damaged_models(whole, bytes_, rng)):
        rows.append(work())
        say(f"{rows[-1].what}: {rows[-1].times}, {rows[-1].outcome}; not as it should: {rows[-1].bad[:3] or 'none'}")
    for row in fuzzed(folder, inputs):
        rows.append(row)
        say(f"{row.what}: {row.times}, {row.outcome}; not as it should: {row.bad[:3] or 'none'}")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what happens | times | how it ends | not so |", "| --- | ---: | --- | ---: |"]
    lines += [f"| {row.what} | {row.times:,} | {row.outcome} | {len(row.bad)} |" for row in rows]
    inputs = sum(row.times for row in rows if row.what.startswith("malformed"))
    return "\n".join([*lines, "", f"{inputs:,} malformed inputs in all. Lost steps: 0. Lost metrics: 0." if not any(
        row.bad for row in rows) else "Some rows did not end as they should."])


def main() -> int:
    """Measure, print, and write the table into a page where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--inputs", type=int, default=1500, help="malformed inputs a target")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="unigrpo-reliability-"))
    try:
        rows = measure(folder, seed=args.seed, number=args.kills, inputs=args.inputs, say=lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    if args.write is not None:
        text = args.write.read_text(encoding="utf-8")
        start_, end_ = (text.index(mark) for mark in MARKS)
        args.write.write_text(text[:start_] + MARKS[0] + "\n\n" + table(rows) + "\n\n" + text[end_:], encoding="utf-8")
    return 1 if any(row.bad for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
