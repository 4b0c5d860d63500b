"""What a report is made from: the files of its checkpoints, read and checked."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from unigrpo.config import load_config, read_yaml
from unigrpo.digests import flatten, sha256_inputs
from unigrpo.evaluation.benchmark_table import read_table, table_metrics
from unigrpo.evaluation.controls import read_understanding
from unigrpo.evaluation.outcomes import compute_metrics, read_outcomes
from unigrpo.stages import MAIN_RUN, read_experiment, report_inputs

FOLDERS = {"main": "report", "experiments": "experiments"}      # report -> its folder below artifacts/<scale>/
FAILURE = "failed.json"          # of a run that ended with an error: {"error": its message}


@dataclass(frozen=True)
class Checkpoint:
    """Everything the report reads of one checkpoint.

    Args:
        name: its folder below artifacts/<scale>/: base, sft or <run>/<seed>.
        outcomes: one row a prompt and cell of the shapes world. benchmarks: likewise of others. One of the two may be empty.
        understanding: one row a prompt of the shapes world. metrics: flat, of the evaluation.
        training: flat counts and last values of its training stage.
        curves: one row a logged step, columns `step` and metrics; NaN where a metric was not measured.
        samples: the saved images' records, `image` being a file below `folder`/samples.
    """

    name: str
    folder: Path
    outcomes: pd.DataFrame
    benchmarks: pd.DataFrame
    understanding: pd.DataFrame
    metrics: dict[str, float]
    training: dict[str, float]
    curves: pd.DataFrame
    samples: list[dict[str, Any]]

    @property
    def run(self) -> str:
        """The arm this checkpoint belongs to."""
        return self.name.partition("/")[0]

    @property
    def seed(self) -> str | None:
        """The RL seed, None for base and sft."""
        return self.name.partition("/")[2] or None


@dataclass(frozen=True)
class Inputs:
    """All that a report is made from.

    Args:
        missing: checkpoint -> why there is nothing of it, in a report of all experiments.
        settings: run -> its params with dotted keys, of the runs in params/runs.yaml; in a report of all experiments.
    """

    scale: str
    which: str
    checkpoints: tuple[Checkpoint, ...]
    curate: dict[str, Any]
    statistics: dict[str, Any]
    leakage: dict[str, Any]
    digests: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def arms(self) -> dict[str, list[Checkpoint]]:
        """Run -> its checkpoints, in the order of the report."""
        found: dict[str, list[Checkpoint]] = {}
        for checkpoint in self.checkpoints:
            found.setdefault(checkpoint.run, []).append(checkpoint)
        return found

    def is_point(self, run: str) -> bool:
        """Whether a run is a point of a sweep: it takes fewer steps than unigrpo. One without params is none."""
        main = MAIN_RUN.partition("/")[0]
        if run not in self.settings or main not in self.settings:
            return False
        return bool(self.settings[run]["train.num_steps"] < self.settings[main]["train.num_steps"])


# ------------------------------------------------------------------------------------------------------------ reading

def checkpoint_names(scale: str, which: str, root: Path) -> list[str]:
    """The checkpoints of a report. Raises ValueError for an unknown report, or a scale without evaluations."""
    if which == "main":
        return ["base", "sft", MAIN_RUN]
    if which != "experiments":
        raise ValueError(f"the report must be main or experiments, got {which!r}")
    names = [str(item["checkpoint"]) for item in read_experiment(root)["evaluations"].values() if item["scale"] == scale]
    if not names:
        raise ValueError(f"params/experiment.yaml lists no evaluation of scale {scale}; `unigrpo experiment write` writes it")
    first = {"base": 0, "sft": 1}
    return sorted(names, key=lambda name: (first.get(name, 2), name.partition("/")[0] != MAIN_RUN.partition("/")[0], name))


def read_inputs(scale: str, which: str, root: Path, *, pictures: bool = True) -> Inputs:
    """Read and check every input.

    Args:
        pictures: whether there must be what DVC holds, samples and prompts. Without them there is no page, and of the inputs
            that are not there no digest.
    Raises: ValueError naming the file, and the stage that makes it where it is missing. In a report of all experiments a run
        that is not there is no error: `missing` says why.
    """
    names = checkpoint_names(scale, which, root)
    folder = root / "artifacts" / scale
    missing = {name: why for name in names if (why := absence(folder / name))} if which == "experiments" else {}
    names = [name for name in names if name not in missing]
    checkpoints = tuple(read_checkpoint(folder / name, name, pictures=pictures) for name in names)
    curate, statistics, leakage = (read_json(folder / file, "curate", dict) if pictures else {} for file in
                                   ("curate.json", "prompts/statistics.json", "prompts/leakage.json"))
    files = [file for file in report_inputs(scale, names) if pictures or (root / file).exists()]
    return Inputs(scale, which, checkpoints, curate, statistics, leakage, sha256_inputs(root, files), missing,
                  run_settings(scale, root) if which == "experiments" else {})


def absence(folder: Path) -> str | None:
    """Why there is nothing to report of a run; None if there is. base and sft must be there, whatever happens to runs."""
    if folder.name in ("base", "sft"):
        return None
    trained, evaluated = (folder / "training.json").is_file(), (folder / "outcomes.csv").is_file()
    if trained and evaluated:
        return None
    if (folder / FAILURE).is_file():
        return "failed: " + str(read_json(folder / FAILURE, "train", dict).get("error", "without a message"))
    return "trained, not evaluated" if trained else "not run"


def run_settings(scale: str, root: Path) -> dict[str, dict[str, Any]]:
    """Run -> its params at this scale, dotted keys, without what no run may change. Runs that this scale's numbers refuse, such
    as half of its prompts for two processes, cannot have run and are left out."""
    found = {}
    for run in read_yaml(root / "params" / "runs.yaml"):
        with suppress(ValueError):
            params = load_config(scale, run=run, root=root).model_dump(mode="json")
            found[run] = {key: value for key, value in flatten(params).items() if key != "run"}
    return found


def read_checkpoint(folder: Path, name: str, *, pictures: bool = True) -> Checkpoint:
    """One checkpoint's files; its metrics must be those of its outcomes. `pictures`: its samples too."""
    stage = name if name in ("base", "sft") else "train"
    training = read_json(folder / "training.json", stage, dict)
    curves_file = needed(folder / "curves.csv", stage)
    try:
        curves = pd.read_csv(curves_file)
        curves = curves.astype("float64")
    except ValueError as error:
        raise ValueError(f"{curves_file}: wanted numbers in columns, got {str(error).splitlines()[0]}; "
                         f"run the {stage} stage again") from error
    if "step" not in curves.columns:
        raise ValueError(f"{curves_file}: wanted a column `step`, got {', '.join(curves.columns[:5])}; "
                         f"run the {stage} stage again")
    table = read_table(needed(folder / "benchmarks.csv", "evaluate"))
    outcomes = read_outcomes(needed(folder / "outcomes.csv", "evaluate"), empty=not table.empty)
    metrics = read_json(folder / "metrics.json", "evaluate", dict)
    for file, derived in (("outcomes.csv", {} if outcomes.empty else compute_metrics(outcomes)),
                          ("benchmarks.csv", table_metrics(table))):
        if stale := [key for key, value in derived.items() if metrics.get(key) != value]:
            raise ValueError(f"{folder / 'metrics.json'}: {stale[0]} is {metrics.get(stale[0])}, but {file} beside it gives "
                             f"{derived[stale[0]]}; one of the two is of another run, evaluate again")
    samples = read_json(folder / "samples" / "samples.json", "evaluate", list) if pictures else []
    for sample in samples:
        if not isinstance(sample, dict) or Path(str(sample.get("image"))).name != sample.get("image"):
            raise ValueError(f"{folder / 'samples' / 'samples.json'}: every sample must name an image beside it, got "
                             f"{str(sample)[:120]}; run the evaluate stage again")
        needed(folder / "samples" / sample["image"], "evaluate")
    understanding = read_understanding(needed(folder / "understanding.csv", "evaluate"),
                                       empty="greedy" not in set(outcomes["thinking"]))
    return Checkpoint(name, folder, outcomes, table, understanding, metrics, training, curves, samples)


def needed(path: Path, stage: str) -> Path:
    """The path itself. Raises ValueError naming it and the stage that makes it, if there is no such file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the {stage} stage makes it (`dvc repro` runs what is needed, `dvc checkout` "
                         "restores what was made before)")
    return path


def read_json(path: Path, stage: str, kind: type) -> Any:
    """A JSON file. Raises ValueError naming it, if it is missing, damaged or of another kind."""
    try:
        content = json.loads(needed(path, stage).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); run the {stage} stage again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: wanted a JSON {'object' if kind is dict else 'array'}, got {type(content).__name__}; "
                         f"run the {stage} stage again")
    return content
