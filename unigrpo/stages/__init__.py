"""One function per stage: paths in, paths and metrics out. This module turns a stage's name into that function's arguments.

    unigrpo.stages.<stage>.run(scale, *, [run, seed | checkpoint | which], root, provenance) -> {metric: value}

| stage                  | name                                  | example             |
|------------------------|---------------------------------------|---------------------|
| curate, base, sft      | <scale>                               | tiny                |
| train                  | a key of `trainings`                  | tiny-unigrpo-0      |
| evaluate               | a key of `evaluations`                | tiny-sft            |
| report                 | <scale>-main or <scale>-experiments   | tiny-main           |

`trainings` and `evaluations` are the dicts of params/experiment.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("curate", "base", "sft", "train", "evaluate", "report")
SHARED = ("base", "sft", "train", "evaluate")  # stages that compute.processes share
REPORTS = ("main", "experiments")
CELLS = ("all", "guidance", "headline")  # of the grid in which a checkpoint is evaluated, the most first
EXPERIMENT = Path("params/experiment.yaml")
SETS = Path("params/sets.yaml")
MAIN_RUN = "unigrpo/0"  # the checkpoint that the main report is about, beside base and sft


@dataclass(frozen=True)
class Job:
    """A stage's name, taken apart.

    Args:
        stage: one of STAGES. name: its item in dvc.yaml. scale: a file of params/scales/.
        run, seed: of the RL run, for train. checkpoint: the folder below artifacts/<scale>/, for evaluate.
        cells: in which it is evaluated, one of CELLS. report: main or experiments.
        inputs: what the stage reads, relative to the project's root.
    """

    stage: str
    name: str
    scale: str
    run: str | None = None
    seed: int | None = None
    checkpoint: str | None = None
    cells: str | None = None
    report: str | None = None
    inputs: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The folder the stage writes into, relative to the project's root."""
        return f"artifacts/{self.scale}/" + {
            "curate": "prompts", "base": "base", "sft": "sft", "train": f"{self.run}/{self.seed}",
            "evaluate": self.checkpoint or "", "report": {"experiments": "experiments"}.get(self.report or "", "report"),
        }[self.stage]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the stage function takes beside root and provenance."""
        optional = {"run": self.run, "seed": self.seed, "checkpoint": self.checkpoint, "cells": self.cells,
                    "which": self.report}
        return {"scale": self.scale} | {key: value for key, value in optional.items() if value is not None}


def read_experiment(root: Path = Path(".")) -> dict[str, Any]:
    """params/experiment.yaml: scales, trainings, evaluations, reports. Raises ValueError naming what is wrong."""
    import yaml

    path = root / EXPERIMENT
    if not path.is_file():
        raise ValueError(f"{path} is missing; `unigrpo experiment write` writes it")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    wanted = {"scales", "trainings", "evaluations", "reports"}
    if not isinstance(content, dict) or set(content) != wanted:
        raise ValueError(f"{path} must hold {sorted(wanted)}, got "
                         f"{sorted(content) if isinstance(content, dict) else type(content).__name__}; "
                         "`unigrpo experiment write` writes it")
    return content


def entry(items: Mapping[str, Any], what: str, name: str) -> dict[str, Any]:
    """One entry of a dict of params/experiment.yaml. Raises ValueError listing the choices."""
    if name not in items:
        raise ValueError(f"{what} must be one of {sorted(items)}, the {what}s of {EXPERIMENT}, got {name!r}")
    return dict(items[name])


def report_inputs(scale: str, checkpoints: list[str]) -> tuple[str, ...]:
    """What a report reads: the prompts, and of every checkpoint its numbers and its gallery."""
    files = [f"artifacts/{scale}/curate.json", f"artifacts/{scale}/prompts"]
    for checkpoint in checkpoints:
        folder = f"artifacts/{scale}/{checkpoint}"
        files += [f"{folder}/{file}" for file in ("training.json", "curves.csv", "metrics.json", "outcomes.csv",
                                                   "understanding.csv", "benchmarks.csv", "samples")]
    return tuple(files)


def parse_name(stage: str, name: str, root: Path = Path(".")) -> Job:
    """The job that `name` means in `stage`.

    Raises: ValueError listing the choices, for an unknown stage, scale, training, evaluation or report.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {list(STAGES)}, got {stage!r}")
    scale = name
    if stage in ("train", "evaluate", "report"):
        experiment = read_experiment(root)
    if stage == "train":
        item = entry(experiment["trainings"], "training", name)
        scale = str(item["scale"])
        job = Job(stage, name, scale, run=str(item["run"]), seed=int(item["seed"]),
                  inputs=(f"artifacts/{scale}/prompts", f"artifacts/{scale}/sft/checkpoint"))
    elif stage == "evaluate":
        item = entry(experiment["evaluations"], "evaluation", name)
        scale, checkpoint = str(item["scale"]), str(item["checkpoint"])
        cells = str(item.get("cells", CELLS[0]))
        if cells not in CELLS:
            raise ValueError(f"evaluations.{name}.cells must be one of {list(CELLS)}, got {cells!r}; change it in "
                             f"{SETS} and run `unigrpo experiment write`")
        job = Job(stage, name, scale, checkpoint=checkpoint, cells=cells,
                  inputs=(f"artifacts/{scale}/prompts", f"artifacts/{scale}/{checkpoint}/checkpoint"))
    elif stage == "report":
        scale, _, which = name.rpartition("-")
        if which not in REPORTS:
            raise ValueError(f"report must be named <scale>-{REPORTS[0]} or <scale>-{REPORTS[1]}, got {name!r}")
        checkpoints = ["base", "sft", MAIN_RUN] if which == "main" else [
            str(item["checkpoint"]) for item in experiment["evaluations"].values() if item["scale"] == scale]
        job = Job(stage, name, scale, report=which, inputs=report_inputs(scale, checkpoints))
    else:
        prompts = f"artifacts/{scale}/prompts"
        job = Job(stage, name, scale, inputs={"curate": (), "base": (),
                                              "sft": (prompts, f"artifacts/{scale}/base/checkpoint")}[stage])
    scales = sorted(path.stem for path in (root / "params" / "scales").glob("*.yaml"))
    if scale not in scales:
        raise ValueError(f"scale must be one of {scales}, the files of params/scales/, got {scale!r}")
    return job


def run_stage(stage: str, name: str, root: Path = Path("."), provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Call the stage function that `name` means. Returns its metrics."""
    job = parse_name(stage, name, root)
    return quick_import(f"unigrpo.stages.{stage}").run(**job.arguments, root=root, provenance=dict(provenance or {}))


def quick_import(module: str) -> Any:
    """Import a stage's module without the garbage collector, which would look a hundred times through what is there to stay.

    What was imported is left out of its later rounds too.
    """
    import gc
    import sys
    from importlib import import_module

    if module in sys.modules:
        return sys.modules[module]
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
