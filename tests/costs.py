"""What checkpoints and keyed draws cost a training, as ratios: pairs of runs, with and without, by turns in one measurement.

Training's loop alone counts, in a process of its own a run. CPU seconds depend little on what else the machine does; wall
seconds also hold the disk's answer, and are shown beside them.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from undisturbed import ROOT, change_params, make_project, run, said, start

from unigrpo import tracking
from unigrpo.config import load_config
from unigrpo.experiment import make_request, render
from unigrpo.seeding import generator

SCALES = {"smoke": 12, "tiny": 3}  # steps of training


@dataclass
class Cost:
    """A ratio of seconds: medians over pairs of runs."""

    what: str
    cpu: float
    wall: float
    pairs: int


def timed(function: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """The function, whose CPU and wall seconds go into a file."""
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time(), time.perf_counter()
        out = function(*args, **kwargs)
        path.write_text(json.dumps([time.process_time() - began[0], time.perf_counter() - began[1]]))
        return out

    return wrapped


def one_generator() -> Callable[..., Any]:
    """Stands for `seeding.generator` where draws need no key: the same generator every time."""
    only = generator(0, "only")
    return lambda *key: only


def loop_seconds(root: Path, job: tuple[str, str], train: Mapping[str, Any], *, keyed: bool = True) -> tuple[float, float]:
    """(CPU, wall) seconds of a training's loop, from its beginning; nothing is sent to a tracker."""
    shutil.rmtree(root / ".unigrpo", ignore_errors=True)
    scale = job[1].partition("-")[0]
    change_params(root, f"scales/{scale}.yaml", train=dict(train))

    def inject() -> None:
        os.environ["MLFLOW_TRACKING_URI"] = tracking.JOURNAL
        stage = importlib.import_module("unigrpo.stages.train")
        stage.train = timed(stage.train, root / "seconds.json")  # type: ignore[attr-defined]
        if not keyed:
            stage.generator = one_generator()  # type: ignore[attr-defined]

    if status := run(root, job, inject):
        raise RuntimeError(f"{job} ended with {status}: {said(root)[-500:]}")
    cpu, wall = json.loads((root / "seconds.json").read_text())
    return cpu, wall


def ratio(what: str, pairs: int, with_: Callable[[], tuple[float, float]], without: Callable[[], tuple[float, float]]) -> Cost:
    """Medians of the ratios of pairs, whose order changes from one to the next."""
    found = []
    for i in range(pairs):
        first, second = (with_(), without()) if i % 2 else (without(), with_())[::-1]
        found.append((first[0] / second[0], first[1] / second[1]))
    cpu, wall = (statistics.median(values) for values in zip(*found, strict=True))
    return Cost(what, cpu, wall, pairs)


def prepared(folder: Path, scale: str) -> Path:
    """A project of a scale in which a training can start: its prompts, and a model of its size with random weights."""
    root = make_project(folder)
    (root / "params/experiment.yaml").write_text(render(root, make_request(root, [scale], runs=["unigrpo"], seeds=[0])))
    assert run(root, ("curate", scale)) == 0, said(root)

    def weights() -> None:
        from unigrpo.stages.base import fresh_policy
        from unigrpo.stages.loading import save_policy

        config = load_config(scale, root=root)
        save_policy(root / f"artifacts/{scale}/sft/checkpoint", fresh_policy(config))
        os._exit(0)

    os.waitpid(start(root, ("curate", scale), weights), 0)
    change_params(root, f"scales/{scale}.yaml", train={
        "num_steps": SCALES[scale], "gallery_every": 1000, "probe_every": 1000, "probe_prompts": 2,
        "max_mismatch": yaml.safe_load((ROOT / "params/base.yaml").read_text())["train"]["max_mismatch"]})
    return root


def costs(folder: Path, pairs: int, say: Callable[[str], None] = print) -> list[Cost]:
    """Every ratio, said as it comes."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    found, began = [], time.monotonic()
    for scale, steps in SCALES.items():
        root, job = prepared(folder / scale, scale), ("train", f"{scale}-unigrpo-0")
        every = steps + 1  # the last step is always saved
        count = pairs if scale == "smoke" else max(1, pairs // 3)
        found.append(ratio(
            f"`{scale}`: a training state after every step, instead of one at the end of {steps}", count,
            lambda root=root, job=job: loop_seconds(root, job, {"checkpoint_every": 1}),
            lambda root=root, job=job, every=every: loop_seconds(root, job, {"checkpoint_every": every})))
        say(f"[costs, {time.monotonic() - began:.0f} s] {found[-1]}")
        found.append(ratio(
            f"`{scale}`: a generator for every draw, keyed by what it is for, instead of one for all", count,
            lambda root=root, job=job, every=every: loop_seconds(root, job, {"checkpoint_every": every}),
            lambda root=root, job=job, every=every: loop_seconds(root, job, {"checkpoint_every": every}, keyed=False)))
        say(f"[costs, {time.monotonic() - began:.0f} s] {found[-1]}")
    return found
