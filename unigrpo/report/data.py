"""What a report says, as one dictionary: values and intervals from outcomes, counted cost, digests of the inputs.

    arms[run][metric]        = {value, low, high, over, seeds}   one checkpoint: bootstrap over prompts; several: t interval
    differences["a-b"][...]  likewise, paired: the same prompts and the same noise on both sides
    controls[run][...]       likewise, between cells of one checkpoint: what the thinking contributes
    understanding["a-b"], sentinel[checkpoint]: see effects.py

`over` says what the interval is over, `seeds` holds every training seed singly. Seeds vary RL only: all intervals are
conditional on one base and one warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from unigrpo.config import Config
from unigrpo.evaluation.benchmark_table import measures as benchmark_measures
from unigrpo.evaluation.controls import thinking_effects, understanding_change
from unigrpo.evaluation.outcomes import CFG, HEADLINE, MEASURES, THINKING, cell, measure, significant
from unigrpo.evaluation.statistics import LEVEL, Measure, value_of
from unigrpo.report import benchmarks
from unigrpo.report.effects import sentinel_of
from unigrpo.report.reading import Checkpoint, Inputs
from unigrpo.report.resampling import Statistics, across
from unigrpo.stages import MAIN_RUN

PREFIX = "bench/shapes/"
HEADLINE_METRIC = f"{PREFIX}exact"


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

