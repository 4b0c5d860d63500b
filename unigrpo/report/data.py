"""What a report says, as one dictionary: values and intervals from outcomes, counted cost, digests of the inputs.

    arms[run][metric]        = {value, low, high, over, seeds}   one checkpoint: bootstrap over prompts; several: t interval
    differences["a-b"][...]  likewise, paired: the same prompts and the same noise on both sides
    controls[run][...]       likewise, between cells of one checkpoint: what the thinking contributes
    understanding["a-b"], sentinel[checkpoint]: see effects.py

`over` says what the interval is over, `seeds` holds every training seed singly. Seeds vary RL only: all intervals are
conditional on one base and one warm-up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from unigrpo.config import Config, load_config, read_yaml
from unigrpo.digests import flatten, sha256_inputs
from unigrpo.evaluation.benchmark_table import measures as benchmark_measures
from unigrpo.evaluation.benchmark_table import read_table, table_metrics
from unigrpo.evaluation.controls import read_understanding, thinking_effects, understanding_change
from unigrpo.evaluation.outcomes import (
    CFG,
    HEADLINE,
    MEASURES,
    THINKING,
    cell,
    compute_metrics,
    measure,
    read_outcomes,
    significant,
)
from unigrpo.evaluation.statistics import LEVEL, Measure, value_of
from unigrpo.report import benchmarks
from unigrpo.report.effects import sentinel_of
from unigrpo.report.resampling import Statistics, across
from unigrpo.stages import MAIN_RUN, read_experiment, report_inputs

FOLDERS = {"main": "report", "experiments": "experiments"}      # report -> its folder below artifacts/<scale>/
FAILURE = "failed.json"          # of a run that ended with an error: {"error": its message}
PREFIX = "bench/shapes/"
HEADLINE_METRIC = f"{PREFIX}exact"


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
    """Run -> its params at this scale, dotted keys, without what no run may change."""
    runs = read_yaml(root / "params" / "runs.yaml")
    return {run: {key: value for key, value in flatten(load_config(scale, run=run, root=root).model_dump(mode="json")).items()
                  if key != "run"} for run in runs}


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


# --------------------------------------------------------------------------------------------------------- statistics

def named_measures(outcomes: pd.DataFrame) -> dict[str, Measure]:
    """Metric name -> measure, for every metric that `compute_metrics` gives a value."""
    head = cell(outcomes)
    found = {name: measure(head, name) for name in MEASURES}
    found |= {f"exact/{tag}": measure(rows, "exact") for tag, rows in head.groupby("tag")}
    found |= {f"reasoning/{kind}": measure(rows, "exact") for kind, rows in head.groupby("reasoning") if kind}
    found |= {f"exact/{name}": measure(head[head["needs_reasoning"] == needs], "exact")
              for name, needs in (("reasoning", True), ("plain", False))}
    for (cfg, thinking), rows in outcomes.groupby(["cfg", "thinking"]):
        rows = rows.sort_values("prompt_id", ignore_index=True)
        names = ("exact", "geneval") if thinking == "off" else ("exact", "geneval", "thinking_accuracy")
        found |= {f"cfg_{cfg}-thinking_{thinking}/{name}": measure(rows, name) for name in names}
    return {PREFIX + name: value for name, value in sorted(found.items()) if not math.isnan(value_of(value))}


def all_measures(checkpoint: Checkpoint) -> dict[str, Measure]:
    """Metric name -> measure, of all that a checkpoint was evaluated on."""
    shapes = {} if checkpoint.outcomes.empty else named_measures(checkpoint.outcomes)
    return shapes | benchmark_measures(checkpoint.benchmarks)


def combine(per_seed: Mapping[str | None, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Seed -> metric -> interval, as metric -> entry; metrics that a seed lacks are left out."""
    common = [metric for metric in next(iter(per_seed.values())) if all(metric in found for found in per_seed.values())]
    return {metric: across({seed: found[metric] for seed, found in per_seed.items()}) for metric in common}


def difference_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Which arms are compared: each stage with the one before, every run with sft, and unigrpo with every other run."""
    main = MAIN_RUN.partition("/")[0]
    runs = [arm for arm in arms if arm not in ("base", "sft")]
    pairs = [(run, "sft") for run in runs] + list(pairwise(["sft", "base"]))
    if main in runs:
        pairs += [(main, "base")] + [(main, run) for run in runs if run != main]
    return [(a, b) for a, b in pairs if a in arms and b in arms]


def build_report(inputs: Inputs, config: Config, statistics: Statistics) -> dict[str, Any]:
    """The numbers that every report has: all of the main report.json.

    Raises: ValueError if two checkpoints were evaluated on different prompts.
    """
    arms = inputs.arms()
    measures = {c.name: all_measures(c) for c in inputs.checkpoints}
    check_alike(measures, drawn(inputs.checkpoints[0])["headline_metric"])
    scores = benchmarks.labels(benchmarks.common_names({c.name: c.benchmarks for c in inputs.checkpoints}))
    values = {run: combine({c.seed: {metric: statistics.value(found) for metric, found in measures[c.name].items()}
                            for c in members}) for run, members in arms.items()}
    differences = {}
    for first, second in difference_pairs([run for run in arms if not inputs.is_point(run)]):
        matched = match_seeds(arms[first], arms[second])
        if matched:
            differences[f"{first}-{second}"] = combine({
                a.seed: compare(statistics, measures[a.name], measures[b.name], a.name, b.name) for a, b in matched})
    controls = {run: combine({c.seed: thinking_effects(c.outcomes, statistics.difference) for c in members})
                for run, members in arms.items()}
    warm = next(iter(arms.get("sft", [])), None)
    trained = [c for c in inputs.checkpoints if c.run not in ("base", "sft")]
    lost = {}
    if warm is not None and not warm.understanding.empty:
        lost = {f"{run}-sft": combine({c.seed: understanding_change(warm.understanding, c.understanding, statistics.difference)
                                       for c in members if not c.understanding.empty})
                for run, members in arms.items()
                if run not in ("base", "sft") and not all(c.understanding.empty for c in members)}
    report = {
        "scale": inputs.scale, "report": inputs.which, "arms": values, "differences": differences,
        "controls": {run: found for run, found in controls.items() if found}, "understanding": lost,
        "sentinel": {c.name: sentinel_of(c.training, warm.metrics if warm else None, c.metrics) for c in trained},
        "cost": {c.name: {key.removeprefix("cost/"): value for key, value in sorted(c.training.items())
                          if key.startswith("cost/")} for c in inputs.checkpoints},
        "measured": measured(inputs, config), "exposure": exposure(inputs, config), "inputs": inputs.digests,
        **({"scores": scores} if scores else {}),
    }
    return report | {"headline": headline(report)}


def check_alike(measures: Mapping[str, Mapping[str, Measure]], metric: str) -> None:
    """Raises ValueError naming a checkpoint that lacks the headline metric of the first one."""
    first = next(iter(measures))
    if lacking := [name for name, found in measures.items() if metric not in found]:
        raise ValueError(f"{first} and {lacking[0]} were not evaluated alike: {lacking[0]} has no {metric}; evaluate both "
                         "again with the same evaluate.benchmarks")


def match_seeds(first: Sequence[Checkpoint], second: Sequence[Checkpoint]) -> list[tuple[Checkpoint, Checkpoint]]:
    """Checkpoints of two arms that belong together: the same seed, or the only checkpoint of an arm without seeds."""
    alone = {c.seed: c for c in second}
    return [(c, alone.get(c.seed, alone.get(None))) for c in first if c.seed in alone or None in alone]  # type: ignore[misc]


def compare(statistics: Statistics, first: Mapping[str, Measure], second: Mapping[str, Measure], first_name: str,
            second_name: str) -> dict[str, dict[str, Any]]:
    """Metric -> paired difference, for the metrics both checkpoints have."""
    try:
        return {metric: statistics.difference(found, second[metric]) for metric, found in first.items()
                if metric in second}
    except ValueError as error:
        raise ValueError(f"{first_name} and {second_name} were not evaluated alike: {error}; evaluate both again "
                         "(their outcomes.csv must list the same prompts)") from error


def measured(inputs: Inputs, config: Config) -> dict[str, Any]:
    """How the numbers were made: counted in the outcomes where they can be, from params otherwise."""
    first = inputs.checkpoints[0]
    return {
        **drawn(first),
        "cells": sorted({f"cfg_{cfg}-thinking_{thinking}" for checkpoint in inputs.checkpoints
                         for table in (checkpoint.outcomes, checkpoint.benchmarks) for cfg, thinking in
                         zip(table["cfg"], table["thinking"], strict=True)}),
        "headline_cell": "cfg_{}-thinking_{}".format(*HEADLINE),
        "model_calls": config.evaluate.num_steps, "guidance_scale": config.evaluate.guidance_scale,
        "evaluation_seed": config.evaluate.seed, "level": LEVEL, "resamples": config.report.bootstrap,
        "within_a_seed": "percentile bootstrap over prompts; differences paired by prompt, on the same noise",
        "across_seeds": "mean and Student's t interval over training seeds, conditional on one base and one warm-up",
    }


def drawn(first: Checkpoint) -> dict[str, Any]:
    """The headline metric, its prompts and images, as counted in a checkpoint; and what else was drawn."""
    others = {} if first.benchmarks.empty else {"benchmarks": benchmarks.sets(first.benchmarks)}
    if first.outcomes.empty:
        return {**benchmarks.facts(first.benchmarks), "headline_metric": benchmarks.headline_metric(first.benchmarks), **others}
    head = cell(first.outcomes)
    images = sorted(set(head["images"]))
    return {"prompts": len(head), "reasoning_prompts": int(head["needs_reasoning"].sum()),
            "images_per_prompt": images[0] if len(images) == 1 else images, "headline_metric": HEADLINE_METRIC, **others}


def exposure(inputs: Inputs, config: Config) -> dict[str, Any]:
    """What the warm-up showed the model of each cell, from params: the evaluation is fair only where this is not 0.

    `cells` are shares of the warm-up's samples drawn in the cell's context, `unconditional` the shares without the prompt and
    the thinking, which guidance needs beside it. Shuffled thinking contradicts its prompt, which no sample does on purpose.
    `thinking_error` is the wanted share of wrong plans among reasoning prompts, `wrong_plans` the counted one.
    """
    dropped, direct = config.sft.condition_dropout, config.sft.direct_share
    shares = {"on": 1 - direct, "greedy": 1 - direct, "off": direct}
    cells = {f"cfg_{cfg}-thinking_{thinking}": thinking for cfg in CFG for thinking in THINKING
             if cfg == "off" or thinking not in ("greedy", "truncated")}
    sft = next((c.training for c in inputs.checkpoints if c.name == "sft"), {})
    return {"cells": {name: significant((1 - dropped) * shares.get(thinking, 0.0)) for name, thinking in cells.items()},
            "unconditional": {name: significant(dropped * shares.get(thinking, 1 - direct)) for name, thinking in cells.items()
                              if name.startswith("cfg_on")},
            "thinking_error": config.sft.thinking_error, "systematic_share": config.sft.systematic_share,
            "wrong_plans": sft.get("data/wrong_plans_of_reasoning")}


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report's first sentence, and the numbers in it."""
    main = MAIN_RUN.partition("/")[0]
    pair = f"{main}-sft"
    if pair not in report["differences"]:
        return {"difference": pair, "sentence": f"This report has no {main} to compare with sft."}
    arms, facts = report["arms"], report["measured"]
    metric = facts["headline_metric"]
    gain = report["differences"][pair][metric]
    before, after = (arms[name][metric]["value"] for name in ("sft", main))
    seeds = len(gain["seeds"])
    interval = "too few prompts for an interval" if gain["low"] is None else \
        f"95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}" + (f" over {seeds} seeds" if seeds > 1 else "")
    if metric != HEADLINE_METRIC:
        said = benchmarks.sentence(report["scores"][metric], (before, after), gain, interval, facts)
        return {"difference": pair, "metric": metric, **{key: gain[key] for key in ("value", "low", "high")}, "sentence": said}
    verb = "does not reliably change" if gain["low"] is None or gain["low"] <= 0 <= gain["high"] else \
        ("raises" if gain["value"] > 0 else "lowers")
    count = facts["images_per_prompt"]
    sentence = (f"On {facts['prompts']} unseen prompts with {count} image{'' if count == 1 else 's'} each, UniGRPO {verb} "
                f"exact accuracy: {100 * before:.1f} % after the warm-up, {100 * after:.1f} % after training, "
                f"{100 * gain['value']:+.1f} points ({interval}).")
    return {"difference": pair, "metric": HEADLINE_METRIC, **{key: gain[key] for key in ("value", "low", "high")},
            "sentence": sentence}

