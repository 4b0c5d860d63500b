"""The paper's claims as data, and what the experiments say of each: a verdict that follows the interval, and a plain sentence.

    verdict of a comparison  =  supported      its interval lies wholly on the claimed side of 0, or of -margin
                                not supported  it lies wholly on the other side
                                undecided      neither, or fewer than SEEDS seeds
                                not run        an arm has no results
    verdict of a claim       =  that of the comparisons that decide: supported if all are, not supported if one is not

A comparison is a signed sum of one measure over arms, cells and kinds of prompts. Within a seed its interval resamples prompts,
the same for all its parts; over seeds it is Student's t on the seeds' values. A claim that needs all of its comparisons needs
no correction for their number: each must hold at its own level (an intersection-union test).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from unigrpo.evaluation.benchmark_table import measures as benchmark_measures
from unigrpo.evaluation.outcomes import HEADLINE, measure, significant
from unigrpo.evaluation.sentinel import compare_standing
from unigrpo.evaluation.statistics import Measure
from unigrpo.report import benchmarks
from unigrpo.report.data import HEADLINE_METRIC, drawn
from unigrpo.report.reading import Checkpoint, Inputs
from unigrpo.report.resampling import Statistics, across, over_seeds

SEEDS = 3                   # fewer decide nothing
MARGIN = 0.03               # of exact accuracy: what "loses nothing" may lose
SUPPORTED, REFUTED, UNDECIDED, NOT_RUN, OBSERVED = "supported", "not supported", "undecided", "not run", "observed"
GUIDED = ("on", "on")
SENTINEL, VELOCITY, CALLS = "drift/sentinel", "drift/velocity_mse", "cost/model_calls_per_image"
Cell = tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """a minus b, or within one arm a cell minus another, or both: the difference of such differences.

    Args:
        a, b: arms; the same twice compares cells or prompts within it.
        words: how the sentence names it, after the number.
        metric: exact accuracy, or a number of a whole checkpoint (`NUMBERS`).
        cells, prompts: one, or first minus second. Prompts are all, reasoning or plain.
        direction: the claimed sign. margin: how far beyond 0 on the other side still counts (non-inferiority).
        decides: whether the claim hangs on it; the others are shown with a verdict of their own.
    """

    a: str
    b: str
    words: str
    metric: str = HEADLINE_METRIC
    cells: tuple[Cell, ...] = (HEADLINE,)
    prompts: tuple[str, ...] = ("all",)
    direction: int = 1
    margin: float = 0.0
    decides: bool = True

    def terms(self) -> list[tuple[int, str, Cell, str]]:
        """(sign, arm, cell, prompts) of each part."""
        parts = [list(zip((1, -1), choices, strict=False)) for choices in (
            (self.a, self.b) if self.a != self.b else (self.a,), self.cells, self.prompts)]
        return [(s * t * u, arm, cell, which)                                                  # type: ignore[misc]
                for (s, arm), (t, cell), (u, which) in product(*parts)]

    def rule(self) -> str:
        """The rule in words."""
        side = "above" if self.direction > 0 else "below"
        scale, _, name = unit(self.metric)
        return f"the interval lies {side} {-self.direction * scale * self.margin:g} {name}" if self.margin \
            else f"the interval lies {side} 0"


@dataclass(frozen=True)
class Claim:
    """One claim: what the paper says, and what would show it here.

    Args:
        name: its key. statement: of the paper, in a sentence. subject: what the verdict's sentence is about, {score} being the
            accuracy that was measured.
    """

    name: str
    title: str
    statement: str
    subject: str
    comparisons: tuple[Comparison, ...] = ()


def against(others: Sequence[str], **settings: Any) -> tuple[Comparison, ...]:
    """unigrpo against each of the arms."""
    return tuple(Comparison("unigrpo", other, f"against {other}", **settings) for other in others)


REGULARIZERS = ("no_regularizer", "latent_kl", "latent_kl_published")
CLAIMS = (
    Claim("joint", "Joint training beats training one of the two",
          "Training thinking and image together with one reward beats training either alone, and supervised training of the "
          "same cost.",
          "{score} of unigrpo",
          against(("text_only", "image_only", "image_context", "sft_longer"))),
    Claim("guidance", "Training without guidance loses nothing",
          f"Rollouts without classifier-free guidance take fewer model calls and lose no more than {100 * MARGIN:g} points, "
          "with or without guidance at evaluation. The author adds that without the velocity penalty the policy distils "
          "guidance and over-sharpens where guidance is then turned on.",
          "{score} of unigrpo",
          (Comparison("unigrpo", "cfg_rollout", "against cfg_rollout, both without guidance", margin=MARGIN),
           Comparison("unigrpo", "cfg_rollout", "against cfg_rollout, both with guidance", cells=(GUIDED,), margin=MARGIN),
           Comparison("unigrpo", "no_regularizer", "against no_regularizer in what turning guidance on gains",
                      cells=(GUIDED, HEADLINE), decides=False),
           Comparison("unigrpo", "cfg_rollout", "against cfg_rollout", metric=CALLS, direction=-1, decides=False))),
    Claim("penalty", "The velocity penalty resists reward hacking",
          f"With the velocity penalty the policy is as accurate as with another penalty or none (to {100 * MARGIN:g} points), "
          "and what nobody rewards changes less.",
          "unigrpo, which has the velocity penalty,",
          (*against(REGULARIZERS, margin=MARGIN), *against(REGULARIZERS, metric=SENTINEL, direction=-1),
           *against(REGULARIZERS, metric=VELOCITY, direction=-1, decides=False))),
    Claim("settings", "Which settings matter",
          "RatioNorm, the SDE window, its noise, the group size, the number of updates, the image loss in the text context and "
          "the scale of advantages: one small sweep each.",
          "{score}"),
    Claim("thinking", "Thinking helps",
          "Images drawn after thinking are right more often than without it or with another prompt's. Beside it: whether it "
          "gains more where the prompt must be thought about.",
          "{score} of unigrpo with its own thinking",
          (Comparison("unigrpo", "unigrpo", "against none", cells=(HEADLINE, ("off", "off"))),
           Comparison("unigrpo", "unigrpo", "against another prompt's", cells=(HEADLINE, ("off", "shuffled"))),
           Comparison("unigrpo", "unigrpo", "against none, reasoning prompts", cells=(HEADLINE, ("off", "off")),
                      prompts=("reasoning",), decides=False),
           Comparison("unigrpo", "unigrpo", "against none, plain prompts", cells=(HEADLINE, ("off", "off")),
                      prompts=("plain",), decides=False),
           Comparison("unigrpo", "unigrpo", "between these two", cells=(HEADLINE, ("off", "off")),
                      prompts=("reasoning", "plain"), decides=False))),
)


# ----------------------------------------------------------------------------------------------------- numbers and values

def sentinel_drift(found: Checkpoint, inputs: Inputs) -> float | None:
    """The largest change since the warm-up among the sentinel's statistics of the evaluation, 1 being what is allowed.

    What is allowed of some statistics is a share of their value at the warm-up: one that was 0 there has no unit and is left
    out.
    """
    warm = next(iter(inputs.arms().get("sft", [])), None)
    changes = {} if warm is None else compare_standing(warm.metrics, found.metrics)
    units = [float(entry["change"]) / float(entry["allowed"]) for entry in changes.values() if entry["allowed"] > 0]
    return max(units, default=None)


def trained_drift(found: Checkpoint, inputs: Inputs, name: str) -> float | None:
    """A distance from the reference (`velocity_mse`, `latent_kl`) at the end of training: its mean over the last third of the
    monitored steps. Those are the same for every arm; steps between them know it only where it is part of the loss."""
    curves, metric = found.curves, f"image/{name}"
    if metric not in curves or found.run not in inputs.settings:
        return None
    monitored = curves.loc[curves["step"] % inputs.settings[found.run]["train.monitor_every"] == 0, metric]
    values = monitored.tail(max(1, len(monitored) // 3)).dropna()
    return significant(float(values.mean())) if len(values) else None


def calls_per_image(found: Checkpoint, _inputs: Inputs) -> float | None:
    """Model calls that one image of the training's rollouts took."""
    images = found.training.get("cost/images")
    return found.training["cost/model_calls"] / images if images and "cost/model_calls" in found.training else None


NUMBERS: dict[str, Callable[[Checkpoint, Inputs], float | None]] = {
    SENTINEL: sentinel_drift,
    VELOCITY: lambda found, inputs: trained_drift(found, inputs, "velocity_mse"),
    CALLS: calls_per_image,
}
UNITS = {SENTINEL: (1.0, ".2f", "of the sentinel's allowance"),
         VELOCITY: (1e4, ".2f", "x 1e-4 of velocity MSE"), CALLS: (1.0, ".1f", "model calls an image")}


def unit(metric: str) -> tuple[float, str, str]:
    """(factor, format, name) of a difference for people: points of a share, unless it is a number of a whole checkpoint."""
    return UNITS.get(metric, (100.0, ".1f", "points"))


def part(found: Checkpoint, cell: Cell, which: str, *, whole: bool) -> Measure | None:
    """The accuracy of one cell on some of the prompts; None where there are no such outcomes. It is the exact verifier's; where
    the shapes world was not drawn, that of the headline's benchmark, which knows no kinds of prompts.

    Args:
        whole: keep a row for every prompt, the others as zeros, so that it can be paired with other prompts' measures.
    """
    table = found.outcomes
    if table.empty:
        *start, name = benchmarks.headline_metric(found.benchmarks).split("/")
        named = "/".join([*start, "cfg_{}-thinking_{}".format(*cell), name])
        return benchmark_measures(found.benchmarks).get(named) if which == "all" else None
    rows = table[(table["cfg"] == cell[0]) & (table["thinking"] == cell[1])].sort_values("prompt_id", ignore_index=True)
    keep = pd.Series(True, index=rows.index) if which == "all" else rows["needs_reasoning"] == (which == "reasoning")
    if not keep.any():
        return None
    if not whole:
        return measure(rows[keep], "exact")
    kept = measure(rows, "exact")
    return Measure(np.where(keep, kept.numerator, 0), np.where(keep, kept.denominator, 0), prompts=kept.prompts)


def headline_measure(found: Checkpoint) -> Measure:
    """The accuracy in the headline cell, on all prompts."""
    accuracy = part(found, HEADLINE, "all", whole=False)
    assert accuracy is not None
    return accuracy


def evaluate(comparison: Comparison, inputs: Inputs, statistics: Statistics) -> dict[str, Any]:
    """A comparison's values, seed by seed and over seeds, and its verdict: one entry of a claim's `comparisons`."""
    arms = inputs.arms()
    members = {name: {c.seed: c for c in arms.get(name, [])} for name in (comparison.a, comparison.b)}
    shared = [seed for seed in members[comparison.a] if seed in members[comparison.b]]
    found: dict[str | None, dict[str, Any]] = {}
    for seed in shared:
        if comparison.metric in NUMBERS:
            numbers = [NUMBERS[comparison.metric](members[name][seed], inputs) for name in (comparison.a, comparison.b)]
            if numbers[0] is not None and numbers[1] is not None:
                found[seed] = {"value": significant(numbers[0] - numbers[1]), "low": None, "high": None}
            continue
        parts = [(sign, part(members[arm][seed], cell, which, whole=len(comparison.prompts) > 1))
                 for sign, arm, cell, which in comparison.terms()]
        if all(one is not None for _, one in parts):
            found[seed] = statistics.contrast([(sign, one) for sign, one in parts if one is not None])
    entry: dict[str, Any] = {
        "a": comparison.a, "b": comparison.b, "words": comparison.words,
        "metric": comparison.metric if comparison.metric in NUMBERS else drawn(inputs.checkpoints[0])["headline_metric"],
        "cell": " - ".join("cfg_{}-thinking_{}".format(*cell) for cell in comparison.cells),
        "prompts": " - ".join(comparison.prompts), "rule": comparison.rule(), "margin": comparison.margin,
        "direction": comparison.direction, "decides": comparison.decides,
        "seeds": [{"seed": seed, **single} for seed, single in found.items()]}
    if not found:
        return entry | {"mean": None, "low": None, "high": None, "over": None, "verdict": NOT_RUN}
    over = across(found)
    return entry | {"mean": over["value"], "low": over["low"], "high": over["high"], "over": over["over"],
                    "verdict": verdict(over["low"], over["high"], comparison, len(found))}


def verdict(low: float | None, high: float | None, comparison: Comparison, seeds: int) -> str:
    """What an interval says of a comparison."""
    if low is None or high is None or seeds < SEEDS:
        return UNDECIDED
    near, far = (low, high) if comparison.direction > 0 else (-high, -low)
    return SUPPORTED if near > -comparison.margin else REFUTED if far < -comparison.margin else UNDECIDED


def together(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A claim's verdict from those of its comparisons."""
    found = [one["verdict"] for one in comparisons if one["decides"]]
    return NOT_RUN if NOT_RUN in found or not found else REFUTED if REFUTED in found \
        else SUPPORTED if all(one == SUPPORTED for one in found) else UNDECIDED


# -------------------------------------------------------------------------------------------------------------- sentences

def signed(value: float, metric: str) -> str:
    """A difference in the unit people read, with a real minus."""
    scale, form, _ = unit(metric)
    return f"{scale * value:+{form}}"


def phrase(entry: Mapping[str, Any]) -> str:
    """'+3.2 points against text_only (+1.0 to +5.4)', with what is wrong where its verdict is not the claimed one."""
    inside = ["no interval" if entry["low"] is None else
              f"{signed(entry['low'], entry['metric'])} to {signed(entry['high'], entry['metric'])}"]
    inside += {UNDECIDED: ["undecided"], REFUTED: ["the other way"]}.get(entry["verdict"], [])
    return f"{signed(entry['mean'], entry['metric'])} {unit(entry['metric'])[2]} {entry['words']} ({', '.join(inside)})"


def interval_words(entries: Sequence[Mapping[str, Any]]) -> str:
    """Which intervals a sentence holds."""
    seeds = max((len(entry["seeds"]) for entry in entries), default=0)
    if seeds < 2:
        return "one seed, 95 % intervals over prompts, and fewer than three seeds decide nothing"
    return f"95 % t intervals over {seeds} seeds" + ("" if seeds >= SEEDS else ", and fewer than three decide nothing")


def sentence(claim: Claim, said: str, comparisons: Sequence[Mapping[str, Any]], reasons: Mapping[str, str], score: str) -> str:
    """One plain sentence, written from the numbers.

    Args:
        said: the verdict. reasons: arm -> why it has no results. score: what the accuracy is called.
    """
    there = [one for one in comparisons if one["verdict"] != NOT_RUN]
    decide = [phrase(one) for one in there if one["decides"]]
    beside = [phrase(one) for one in there if not one["decides"] and one["metric"] != VELOCITY]  # the frontier shows that one
    lacking = {arm for one in comparisons if one["verdict"] == NOT_RUN for arm in (one["a"], one["b"])}
    whys = {reasons[arm]: [other for other in sorted(lacking) if reasons.get(other) == reasons[arm]]
            for arm in sorted(lacking) if arm in reasons}
    absent = [f"{', '.join(arms)} ({why})" for why, arms in whys.items()]
    parts = [f"{claim.subject.format(score=score)} stands at {'; '.join(decide)}"] if decide else []
    parts += [f"there are no results of {', '.join(absent)}"] if absent else []
    end = f" ({interval_words(there)})" if there else ""
    return f"{said.capitalize()}: {'; and '.join(parts) or 'nothing to compare'}{end}." + \
        (f" Beside it: {'; '.join(beside)}." if beside else "")


def build_claims(inputs: Inputs, statistics: Statistics, reasons: Mapping[str, str],
                 observed: Mapping[str, tuple[str, str]], score: str) -> list[dict[str, Any]]:
    """`claims` of the report.

    Args:
        score: what the accuracy is called in sentences.
        reasons: arm -> why it has no results.
        observed: claim -> (verdict, sentence) of what single seeds showed: a claim without comparisons has no other, to the
            others it is added.
    """
    found = []
    for claim in CLAIMS:
        comparisons = [evaluate(one, inputs, statistics) for one in claim.comparisons]
        said, text = observed.get(claim.name, (NOT_RUN, ""))
        if claim.comparisons:
            said = together(comparisons)
            text = sentence(claim, said, comparisons, reasons, score) + (f" {text}" if text else "")
        found.append({"name": claim.name, "title": claim.title, "statement": claim.statement, "verdict": said,
                      "sentence": text or f"{NOT_RUN.capitalize()}: there are no such runs.", "comparisons": comparisons})
    return found


def mean_over_seeds(values: Sequence[float | None]) -> float | None:
    """The mean of what is there, 6 significant digits."""
    there = [value for value in values if value is not None]
    return over_seeds(there)["value"] if there else None
