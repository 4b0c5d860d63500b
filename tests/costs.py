"""What checkpoints and keyed draws cost a training, as ratios within one measurement.

Checkpoints: pairs of runs, with and without, by turns. Draws: a run's seconds to those without the making of generators.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from undisturbed import ROOT, change_params, make_project, run, said, start

from unigrpo import tracking
from unigrpo.config import load_config
from unigrpo.experiment import make_request, render

SCALES = {"smoke": 12, "tiny": 3}  # steps of training


@dataclass
class Cost:
    """A ratio of seconds: medians over runs, or over pairs of them."""

    what: str
    cpu: float
    wall: float
    runs: int


@dataclass
class Clock:
    """CPU and wall seconds that calls of functions take."""

    cpu: float = 0.0
    wall: float = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose seconds are added up here."""
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            out = function(*args, **kwargs)
            self.cpu, self.wall = self.cpu + time.process_time() - cpu, self.wall + time.perf_counter() - wall
            return out

        return wrapped


def seconds_of(root: Path, job: tuple[str, str], checkpoint_every: int) -> tuple[Clock, Clock]:
    """What a training's loop takes from its beginning, and what the making of generators takes of it. No tracker is told."""
    shutil.rmtree(root / ".unigrpo", ignore_errors=True)
    change_params(root, f"scales/{job[1].partition('-')[0]}.yaml", train={"checkpoint_every": checkpoint_every})

    def inject() -> None:
        os.environ["MLFLOW_TRACKING_URI"] = tracking.JOURNAL
        stage, loop, draws = importlib.import_module("unigrpo.stages.train"), Clock(), Clock()
        stage.generator = draws.around(stage.generator)  # type: ignore[attr-defined]
        train = loop.around(stage.train)

        def kept(*args: Any, **kwargs: Any) -> None:
            train(*args, **kwargs)
            (root / "seconds.json").write_text(json.dumps([asdict(loop), asdict(draws)]))

        stage.train = kept  # type: ignore[attr-defined]

    if status := run(root, job, inject):
        raise RuntimeError(f"{job} ended with {status}: {said(root)[-500:]}")
    loop, draws = (Clock(**values) for values in json.loads((root / "seconds.json").read_text()))
    return loop, draws


def ratio(what: str, with_: Sequence[Clock], without: Sequence[Clock]) -> Cost:
    """Medians of the ratios, pair by pair."""
    pairs = list(zip(with_, without, strict=True))
    return Cost(what, statistics.median(one.cpu / other.cpu for one, other in pairs),
                statistics.median(one.wall / other.wall for one, other in pairs), len(pairs))


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
    found, began = list[Cost](), time.monotonic()
    for scale, steps in SCALES.items():
        root, job = prepared(folder / scale, scale), ("train", f"{scale}-unigrpo-0")
        every, last, draws = list[Clock](), list[Clock](), list[Clock]()
        for i in range(pairs if scale == "smoke" else max(1, pairs // 2)):
            for save in ((1, steps) if i % 2 else (steps, 1)):  # by turns which is first
                loop, keyed = seconds_of(root, job, save)
                (every if save == 1 else last).append(loop)
                if save != 1:
                    draws.append(keyed)
        found.append(ratio(f"`{scale}`: a training state after every step, instead of one after {steps} steps", every, last))
        found.append(ratio(f"`{scale}`: a generator for every draw, keyed by what it is for, instead of one that is there",
                           last, [Clock(loop.cpu - keyed.cpu, loop.wall - keyed.wall)
                                  for loop, keyed in zip(last, draws, strict=True)]))
        for cost in found[-2:]:
            say(f"[costs, {time.monotonic() - began:.0f} s] {cost}")
    return found
