"""What the project survives, measured: `python tests/reliability.py --write docs/reliability.md` fills in the page's table.

Every disturbed run goes on to its end and is compared with the undisturbed one, byte by byte; so are the metrics in MLflow, and
the steps of its curves. undisturbed.py holds the runs, several_processes.py and costs.py their own rows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from bad_servers import bad_server
from costs import Cost, costs
from several_processes import several
from undisturbed import STAGES, TRAIN, Row, Undisturbed, at_call, metrics, run, said, start, undisturbed

from unigrpo import checkpoint, tracking
from unigrpo.checkpoint import load_training_state
from unigrpo.digests import sha256_path
from unigrpo.preemption import PREEMPTED
from unigrpo.progress import duration
from unigrpo.rewards import get_reward
from unigrpo.rewards.server import RewardServer
from unigrpo.rollout import BagelPolicy
from unigrpo.sealed import seal_problems
from unigrpo.stages.loading import load_policy

MARKS = ("<!-- table: begin (python tests/reliability.py --write docs/reliability.md) -->", "<!-- table: end -->")
STEPWISE = ("base", "sft", "train")


def kills(whole: Undisturbed, count: int, rng: random.Random) -> Row:
    """kill -9 at a random moment of each stage in turn."""
    row, resumed = Row("`kill -9` at a random moment, all eight stages in turn", 0), 0
    while row.times < count:
        job = STAGES[row.times % len(STAGES)]
        root = whole.copy(job, "killed")
        began, pid = time.monotonic(), start(root, job)
        time.sleep(rng.random() * whole.seconds[job])
        os.kill(pid, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            whole.was_quicker(job, began)
            continue
        row.times += 1
        whole.finish(row, job, root)
        resumed += "going on from" in said(root)
    row.outcome = f"ended with the bytes of the undisturbed run ({resumed} had a resume folder to go on from)"
    return row


def saved_step(root: Path) -> int:
    """The step of a project's newest training state; 0 where there is none."""
    found = [int(checkpoint.read_json(path)["step"]) for path in (root / ".unigrpo/resume").glob("*/state/state.json")]
    return max(found, default=0)


def terminations(whole: Undisturbed, count: int, rng: random.Random) -> Row:
    """SIGTERM at a random moment of training, base, sft and an evaluation."""
    row, jobs = Row("SIGTERM at a random moment of train, base, sft, evaluate", 0), (TRAIN, STAGES[1], STAGES[2], STAGES[5])
    while row.times < count:
        job = jobs[row.times % len(jobs)]
        root = whole.copy(job, "terminated")
        before = metrics(root)
        began, pid = time.monotonic(), start(root, job)
        time.sleep((0.1 + 0.7 * rng.random()) * whole.seconds[job])
        os.kill(pid, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status in (0, -signal.SIGTERM):  # it had done its last step, or had not begun
            if status == 0:
                whole.was_quicker(job, began)
            continue
        row.times += 1
        row.check(status == PREEMPTED, f"{job}: status {status}")
        if job[0] in STEPWISE:  # what it has told of is what it has saved
            told = {int(step) for _, key, step, _ in metrics(root) - before if not key.startswith("cost/")}
            row.lose(len({step for step in told if step >= saved_step(root)}), 0)
        whole.finish(row, job, root)
    row.outcome = "status 75; stages that train saved the step they were in and lost none; same bytes"
    return row


def no_space(original: Any, tensors: Any, path: Path, **kwargs: Any) -> None:
    path.write_bytes(b"half of it")
    raise OSError(28, "No space left on device", str(path))


def full_disks(whole: Undisturbed, calls: Sequence[int]) -> Row:
    """The n-th file of tensors finds the disk full."""
    row = Row("full disk while saving", len(calls), "one sentence, status 2, the states before whole, same bytes")
    for call in calls:
        root = whole.copy(TRAIN, "full")
        status = run(root, TRAIN, lambda call=call: at_call(checkpoint, "save_file", call, no_space))
        row.check(status == 2 and "the disk is full" in said(root), f"file {call}: status {status}")
        whole.finish(row, TRAIN, root)
    return row


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
    row = Row("a reward server that dies in the middle of a run", len(calls),
              "the run stops with status 2 and goes on when the server is back: same bytes")
    for call in calls:
        root = whole.copy(TRAIN, "rewards")
        pid, port = reward_server(0, call)
        runs = root / "params/runs.yaml"
        runs.write_text(yaml.safe_dump({"unigrpo": {"reward": {"options": {"shapes_graded": {"server": {
            "url": f"http://127.0.0.1:{port}", "backoff": 0.1}}}}}}))
        status = run(root, TRAIN)
        os.waitpid(pid, 0)
        row.check(status == 2 and "are missing" in said(root), f"request {call}: status {status}, {said(root)[-200:]}")
        pid, _ = reward_server(port, 0)
        whole.finish(row, TRAIN, root)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return row


def lacking(values: int) -> Callable[..., Any]:
    """A reward's answer in which so many values are missing, NaN or infinite by turns."""
    def answer(original: Any, *args: Any, **kwargs: Any) -> Any:
        records = original(*args, **kwargs)
        for record in records:
            record.value[:values] = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(values) % 3]
        return records

    return answer


def missing_rewards(whole: Undisturbed, calls: Sequence[int]) -> list[Row]:
    """The n-th scoring lacks one of 16 rewards, which reward.max_missing = 0.1 allows; then seven, which it does not."""
    train = importlib.import_module("unigrpo.stages.train")
    few = Row("one reward of 16 is not finite (reward.max_missing is 10%)", len(calls),
              "counted as missing, its rollout trains nothing, all steps done, every weight finite")
    for call in calls:
        root = whole.copy(TRAIN, "missing")
        status = run(root, TRAIN, lambda call=call: at_call(train, "rewards_of", call, lacking(1)))
        counted = [row for row in metrics(root) if row[:2] == ("train/smoke-unigrpo-0", "reward/missing") and row[3] > 0]
        few.check(status == 0 and [row[2:] for row in counted] == [(call - 1, 1 / 16)],
                  f"scoring {call}: {status}, {counted}, {said(root)[-300:]}")
        few.lose(*lost_whatever_the_values(whole, root))
        few.check(finite_weights(root), f"scoring {call}: weights that are not finite")
    many = Row("7 rewards of 16 are not finite", len(calls),
               "the run stops with status 2 before it updates with them, and goes on when they are back: same bytes")
    for call in calls:
        root = whole.copy(TRAIN, "missing")
        status = run(root, TRAIN, lambda call=call: at_call(train, "rewards_of", call, lacking(7)))
        many.check(status == 2 and "44% of the rewards of step" in said(root), f"scoring {call}: {status}, {said(root)[-300:]}")
        whole.finish(many, TRAIN, root)
    return [few, many]


def lost_whatever_the_values(whole: Undisturbed, root: Path, skipped: int | None = None) -> tuple[int, int]:
    """(steps, metrics) of the undisturbed training that a disturbed one has not told, whose numbers are others.

    Args:
        skipped: the step whose update was skipped: what is measured of an update has no value there.
    """
    def told(rows: set[tuple[Any, ...]], *parts: int) -> set[tuple[Any, ...]]:
        return {tuple(row[i] for i in parts) for row in rows if row[0] == "train/smoke-unigrpo-0"}

    wanted, found = whole.metrics[TRAIN], metrics(root)
    names = {name for (name,) in told(wanted, 1)}
    of_updates = {name for name in names if name.startswith("update_") or f"update_1/{name}" in names}
    missing = told(wanted, 1, 2) - told(found, 1, 2)
    return len(told(wanted, 2) - told(found, 2)), sum(step != skipped or name not in of_updates for name, step in missing)


def finite_weights(root: Path) -> bool:
    """Whether a trained checkpoint's weights are all finite."""
    from safetensors.torch import load_file

    path = root / "artifacts/smoke/unigrpo/0/checkpoint/model.safetensors"
    return all(bool(value.isfinite().all()) for value in load_file(path).values())


def poison(calls: Callable[[int], bool]) -> None:
    """In this process, replays with gradient whose number `calls` takes give a velocity that is not finite."""
    original, seen = BagelPolicy.replay, []

    def replay(self: BagelPolicy, rollouts: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, rollouts, *args, **kwargs)
        if torch.is_grad_enabled():
            seen.append(1)
            if calls(len(seen)):
                found.velocities[1] = float("nan")
        return found

    BagelPolicy.replay = replay  # type: ignore[method-assign]


def bad_losses(whole: Undisturbed, calls: Sequence[int]) -> list[Row]:
    """The n-th replay with gradient gives a velocity that is not finite; then all from the n-th on."""
    once = Row("a loss that is not finite", len(calls),
               "update skipped and counted; tensor, prompts and step named; all steps done, every weight finite")
    named = re.compile(r"step (\d+), update \d is skipped, the 1\. .*: not finite is .* of prompts [0-9a-f]{16}")
    for call in calls:
        root = whole.copy(TRAIN, "losses")
        status = run(root, TRAIN, lambda call=call: poison(lambda n: n == call))
        skipped = named.search(said(root))
        once.check(status == 0 and skipped is not None, f"replay {call}: {status}, {said(root)[-200:]}")
        once.lose(*lost_whatever_the_values(whole, root, int(skipped[1]) if skipped else None))
        once.check(finite_weights(root), f"replay {call}: weights that are not finite")
    ever = Row("losses that stay not finite (train.max_skipped is 3)", len(calls),
               "status 2 at the fourth skipped update, tensor, prompts and step named; the weights saved before it are finite")
    for call in calls:
        root = whole.copy(TRAIN, "losses")
        status = run(root, TRAIN, lambda call=call: poison(lambda n: n >= call))
        right = re.search(r"4 updates had a loss or gradients that are not finite, the last at step \d+, update \d: "
                          r".* of prompts", said(root))
        folder = next(path for path in (root / ".unigrpo/resume").iterdir() if path.is_dir())
        state = load_training_state(folder)
        whole_state = state is not None and all(bool(value.isfinite().all()) for value in state[1]["model"].values())
        ever.check(status == 2 and right is not None and whole_state, f"replay {call} on: {status}, {said(root)[-300:]}")
    return [once, ever]


def bad_trackers(whole: Undisturbed, kind: str, ways: Sequence[str]) -> Row:
    """An MLflow server that fails during the whole training; the next stage sends what it did not take."""
    row, slower = Row(f"MLflow {kind} for a whole training ({', '.join(dict.fromkeys(ways))})", len(ways)), list[float]()
    for way in ways:
        root = whole.copy(TRAIN, "tracker")
        with bad_server(way) as url:
            def inject(url: str = url) -> None:
                os.environ["MLFLOW_TRACKING_URI"] = url
                tracking.WAIT, tracking.SEND_EVERY = 2.0, 0.0

            began = time.monotonic()
            status = run(root, TRAIN, inject)
            slower.append(time.monotonic() - began - whole.seconds[TRAIN])
        row.check(status == 0, f"{way}: status {status}")
        trained = "artifacts/smoke/unigrpo/0/checkpoint"
        row.check(sha256_path(root / trained) == sha256_path(whole.folder / "whole" / trained), f"{way}: other bytes")
        row.check(run(root, STAGES[6]) == 0, f"{way}: the next stage failed")
        row.lose(0, len(whole.metrics[TRAIN] - metrics(root)))
    row.outcome = f"at most {max(0.0, *slower):.0f} s more, 2 s at the end allowed; the next stage sent every metric"
    return row


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
    row, harmless = Row("one bit of a random byte of a training state", count), 0
    for i in range(count):
        copy = whole.folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(resume, copy)
        name = damage(copy / "state", rng)
        whole_still = not seal_problems(copy / "state")
        words = io.StringIO()
        with contextlib.redirect_stderr(words):
            found = load_training_state(copy)
        if whole_still:  # the bit is of the manifest's white space or of a hexadecimal digit's case: every file is as written
            harmless += 1
            row.check(found is not None and found[0]["step"] == newest, f"{i}: {name}")
        else:
            refused = "is damaged and not used" in words.getvalue() and found is not None and found[0]["step"] == older
            row.check(refused, f"{i}: {name} was not refused: {words.getvalue()}")
    row.outcome = (f"{count - harmless} refused by name and the state before used, {harmless} harmless (every file has its "
                   "sha256)")
    return row


def damaged_models(whole: Undisturbed, count: int, rng: random.Random) -> Row:
    """One bit of a model checkpoint."""
    from small import small_config

    row, harmless, config = Row("one bit of a random byte of a model checkpoint", count), 0, small_config()
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
        row.check(bool(refused) != whole_still and (whole_still or str(copy) in refused), f"{i}: {name}: {refused!r}")
    row.outcome = f"{count - harmless} refused by name, {harmless} harmless (every file has its sha256)"
    return row


def fuzzed(folder: Path, name: str, count: int) -> Row:
    """Malformed inputs to one of what reads."""
    from test_fuzz import TARGETS

    place = folder / name.replace(" ", "-")
    place.mkdir()
    found = TARGETS[name](place, count)
    return Row(f"malformed {name}", found.inputs, f"{found.refused} refused in words, {found.accepted} accepted, "
               f"{found.lines} lines reached, slowest {found.slowest:.1f} s", found.failures)


def measure(folder: Path, *, seed: int = 0, number: int = 30, faults: int = 3, bytes_: int = 50, inputs: int = 1500,
            say: Callable[[str], None] = print) -> list[Row]:
    """Every row of the table; each is said as it comes, with the minutes since the beginning."""
    from test_fuzz import TARGETS

    began, rows = time.monotonic(), list[Row]()
    importlib.import_module("mlflow")
    for stage in dict.fromkeys(stage for stage, _ in STAGES):
        importlib.import_module(f"unigrpo.stages.{stage}")
    torch.set_num_threads(1)
    whole, rng = undisturbed(folder), random.Random(seed)
    say(f"[{duration(time.monotonic() - began)}] all eight stages ran undisturbed: {sum(whole.seconds.values()):.0f} s")
    work: list[Callable[[], Row | list[Row]]] = [
        lambda: kills(whole, number, rng), *several(whole, faults, rng), lambda: terminations(whole, 4 * faults, rng),
        lambda: full_disks(whole, (2, 6, 12, 1)[:faults + 1]), lambda: dead_rewards(whole, (2, 4, 7, 9)[:faults + 1]),
        lambda: missing_rewards(whole, (2, 4, 6)[:faults]), lambda: bad_losses(whole, (4, 6, 10)[:faults]),
        lambda: bad_trackers(whole, "down", (("refuses", "hangs up") * 2)[:faults + 1]),
        lambda: bad_trackers(whole, "slow", (("hangs", "drips") * 2)[:faults + 1]),
        lambda: bad_trackers(whole, "wrong", (("answers 500", "answers rubbish") * 2)[:faults + 1]),
        lambda: damaged_states(whole, bytes_, rng), lambda: damaged_models(whole, bytes_, rng),
        *[lambda name=name: fuzzed(folder, name, inputs) for name in TARGETS]]
    for item in work:
        found = item()
        for row in found if isinstance(found, list) else [found]:
            rows.append(row)
            say(f"[{duration(time.monotonic() - began)}] {row.what}: {row.times}, {row.outcome}; lost steps {row.lost_steps}, "
                f"lost metrics {row.lost_metrics}; not as it should: {row.bad[:3] or 'none'}")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and their sums in words."""
    def shown(value: int | None) -> str:
        return "–" if value is None else str(value)

    lines = ["| what happens | times | how it ends | lost steps | lost metrics | not so |",
             "| --- | ---: | --- | ---: | ---: | ---: |"]
    lines += [f"| {row.what} | {row.times:,} | {row.outcome} | {shown(row.lost_steps)} | {shown(row.lost_metrics)} | "
              f"{len(row.bad)} |" for row in rows]
    disturbed = [row for row in rows if row.lost_steps is not None]
    lost = [sum((row.lost_steps if part else row.lost_metrics) or 0 for row in rows) for part in (1, 0)]
    inputs = sum(row.times for row in rows if row.what.startswith("malformed"))
    return "\n".join([*lines, "", f"{sum(row.times for row in disturbed)} runs disturbed: lost steps {lost[0]}, lost metrics "
                      f"{lost[1]}. {inputs:,} malformed inputs in all. Ended otherwise than the table says: "
                      f"{sum(len(row.bad) for row in rows)}."])


def cost_table(found: Sequence[Cost]) -> str:
    """The ratios as Markdown."""
    lines = ["| what it costs | CPU seconds, with : without | wall seconds, with : without | runs |",
             "| --- | ---: | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {cost.what} | {cost.cpu:.3f} | {cost.wall:.3f} | {cost.runs} |" for cost in found)])


def main() -> int:
    """Measure, print, and write the table into a page where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--faults", type=int, default=3, help="of a kind")
    parser.add_argument("--inputs", type=int, default=1500, help="malformed inputs a target")
    parser.add_argument("--pairs", type=int, default=5, help="of runs of which a ratio is the median")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="unigrpo-reliability-"))
    try:
        def say(line: str) -> None:
            print(line, flush=True)

        ratios = costs(folder / "costs", args.pairs, say)
        rows = measure(folder, seed=args.seed, number=args.kills, faults=args.faults, inputs=args.inputs, say=say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = f"{table(rows)}\n\n{cost_table(ratios)}"
    print(text)
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        start_, end_ = (page.index(mark) for mark in MARKS)
        args.write.write_text(page[:start_] + MARKS[0] + "\n\n" + text + "\n\n" + page[end_:], encoding="utf-8")
    return 1 if any(row.bad for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
