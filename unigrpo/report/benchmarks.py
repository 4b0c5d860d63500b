"""GenEval and T2I-CompBench in a report: which score each metric is, how it was measured, and the sentence about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from unigrpo.evaluation.benchmark_table import GENEVAL, OVERALL, is_partial, parts, score_names
from unigrpo.evaluation.outcomes import HEADLINE

NO_SCORE = "a partial set is no score of the benchmark"


def common_names(tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Metric -> the name of its score, for all checkpoints together.

    Raises: ValueError if a metric has another name in another checkpoint: they were not scored alike.
    """
    names: dict[str, tuple[str, str]] = {}
    for checkpoint, table in tables.items():
        for metric, name in score_names(table).items():
            first, known = names.setdefault(metric, (checkpoint, name))
            if known != name:
                raise ValueError(f"{first} and {checkpoint} were not evaluated alike: {metric} is {known} there and {name} "
                                 "here; evaluate both again with the same models and prompts")
    return {metric: name for metric, (_, name) in names.items()}


def labels(names: Mapping[str, str]) -> dict[str, str]:
    """Metric -> what a reader sees: the score's own name, which task or category, which cell, and whether it is partial."""
    found = {}
    for metric in sorted(names, key=order):
        _, benchmark, *cell, part = metric.split("/")
        words = [names[metric]] + ([part] if benchmark.startswith(GENEVAL) and part != OVERALL else [])
        words += [cell[0].replace("cfg_", "guidance ").replace("-thinking_", ", thinking ")] if cell else []
        found[metric] = ", ".join(words) + (" (partial)" if is_partial(names[metric]) else "")
    return found


def order(metric: str) -> tuple[bool, bool, str]:
    """The headline cell first, GenEval's overall before its tasks."""
    return "/cfg_" in metric, not metric.endswith(f"/{OVERALL}"), metric


def main_rows(scores: Mapping[str, str]) -> dict[str, str]:
    """The metrics of a short table: the headline cell, and GenEval's overall of the other cells."""
    head = "/cfg_{}-thinking_{}/".format(*HEADLINE)
    return {metric: scores[metric] for metric in sorted(scores, key=order)
            if "/cfg_" not in metric or (metric.endswith(f"/{OVERALL}") and head not in metric)}


def headline_metric(table: pd.DataFrame) -> str:
    """The metric of the headline where the shapes world was not drawn: GenEval's overall, else the first category."""
    return min((metric for metric, _ in parts(table)), key=order)


def facts(table: pd.DataFrame) -> dict[str, Any]:
    """What the table says of how the headline metric was measured."""
    rows = dict(parts(table))[headline_metric(table)]
    images = sorted(set(rows["images"]))
    return {"prompts": len(rows), "images_per_prompt": int(images[0]) if len(images) == 1 else [int(n) for n in images]}


def sets(table: pd.DataFrame) -> list[str]:
    """One line a score of the headline cell: its name, prompts and images."""
    head = table[(table["cfg"] == HEADLINE[0]) & (table["thinking"] == HEADLINE[1])]
    return [f"{name}: {len(rows)} prompts, {int(rows['images'].sum())} images" + (f"; {NO_SCORE}" if is_partial(name) else "")
            for name, rows in head.groupby("score")]


def sentence(label: str, scores: Sequence[float], gain: Mapping[str, Any], interval: str, facts: Mapping[str, Any]) -> str:
    """The report's first sentence.

    Args:
        label: of `labels`. scores: after the warm-up and after training. gain: their difference. interval: it, in words.
    """
    reliable = gain["low"] is not None and not gain["low"] <= 0 <= gain["high"]
    verb = ("raises" if gain["value"] > 0 else "lowers") if reliable else "does not reliably change"
    before, after = scores
    return (f"On {facts['prompts']} prompts with {facts['images_per_prompt']} images each, UniGRPO {verb} {label}: "
            f"{100 * before:.1f} % after the warm-up, {100 * after:.1f} % after training, {100 * gain['value']:+.1f} points "
            f"({interval}).")
