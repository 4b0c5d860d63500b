"""Intervals: bootstrap over prompts within a seed, Student's t across seeds.

Prompts are the unit of resampling, since the images of one prompt succeed and fail together: an interval over images would be
too narrow. Checkpoints are compared on the same prompts and the same noise, so a prompt's two results are resampled together.
Every measure is a ratio of sums over prompts (right images over images, say), which covers conditional shares too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 500             # resamples drawn at once, which bounds the memory

Floats = npt.NDArray[np.float64]


class Measure(NamedTuple):
    """A measure's parts, one entry per prompt.

        value = mean over strata of  sum(numerator) / sum(denominator)  within the stratum

    Args:
        numerator: (P,) e.g. right images of the prompt.
        denominator: (P,) e.g. images of the prompt.
        strata: (P,) labels, resampled apart and weighed alike (GenEval's mean over tags); None for one stratum.
        prompts: (P,) ids, to pair two measures; None if the caller answers for the order.
    """

    numerator: npt.ArrayLike
    denominator: npt.ArrayLike
    strata: npt.ArrayLike | None = None
    prompts: npt.ArrayLike | None = None


def value_of(measure: Measure) -> float:
    """The measure itself; NaN where there is nothing to divide by (the images of right plans, if no plan was right)."""
    numerator, denominator = np.asarray(measure.numerator, np.float64), np.asarray(measure.denominator, np.float64)
    strata = np.zeros(numerator.size) if measure.strata is None else np.asarray(measure.strata)
    totals = np.asarray([[part[strata == name].sum() for part in (numerator, denominator)] for name in np.unique(strata)])
    if totals.size == 0 or (totals[:, 1] <= 0).any():
        return math.nan
    return float((totals[:, 0] / totals[:, 1]).mean())


def mean_interval(measure: Measure, rng: np.random.Generator, *, resamples: int = RESAMPLES) -> dict[str, float]:
    """A measure with its bootstrap interval over prompts.

    Args:
        measure: P >= 2 prompts.
        rng: keyed, e.g. generator(seed, "bootstrap", "exact").
        resamples: draws of P prompts with replacement.
    Returns: value, low, high (percentile bootstrap, 95 %), prompts.
    Raises: ValueError if there are fewer than two prompts or nothing to divide by.
    """
    values, draws = _bootstrap([measure], rng, resamples)
    return _interval(values[0], draws[0], np.size(measure.numerator))


def paired_difference(first: Measure, second: Measure, rng: np.random.Generator, *,
                      resamples: int = RESAMPLES) -> dict[str, float]:
    """First minus second, both measured on the same prompts: each resample takes the same prompts from both.

    Args:
        first, second: measures with the same prompts in the same order (checked where both carry ids).
        rng: keyed, e.g. generator(seed, "bootstrap", "unigrpo-sft", "exact").
    Returns: value, low, high (percentile bootstrap, 95 %), prompts.
    Raises: ValueError if the prompts differ, are fewer than two, or there is nothing to divide by.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
    """
    _check_pairs(first, second)
    values, draws = _bootstrap([first, second], rng, resamples)
    return _interval(values[0] - values[1], draws[0] - draws[1], np.size(first.numerator))


def across_seeds(differences: Sequence[float]) -> dict[str, float | list[float] | None]:
    """The mean over training seeds of per-seed values, with a t interval. Conditional on one base: seeds vary RL only.

        mean +- t(0.975; n - 1) * std / sqrt(n),   std with n - 1

    Args:
        differences: one finite value per seed.
    Returns: value, low, high, seeds (the values). One seed has no interval: low and high are None.
    Raises: ValueError if there are none or some are not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"an interval over seeds needs at least one finite value, got {list(differences)}")
    mean, half = float(values.mean()), None
    if values.size > 1:
        half = float(stdtrit(values.size - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / math.sqrt(values.size))
    return {"value": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half,
            "seeds": [float(value) for value in values]}


def _bootstrap(measures: Sequence[Measure], rng: np.random.Generator, resamples: int) -> tuple[Floats, Floats]:
    """The measures' values (M,) and their resampled values (M, resamples), with common draws.

    A resample without anything to divide by (a conditional share whose condition never occurred) is NaN.
    """
    if resamples < 1:
        raise ValueError(f"the bootstrap needs at least one resample, got {resamples}")
    parts = np.stack([np.stack([np.asarray(measure.numerator, dtype=np.float64),
                                np.asarray(measure.denominator, dtype=np.float64)]) for measure in measures])   # (M, 2, P)
    size = parts.shape[2]
    if size < 2:
        raise ValueError(f"a bootstrap over prompts needs at least two prompts, got {size}")
    strata = np.zeros(size, dtype=np.int64) if measures[0].strata is None else np.asarray(measures[0].strata)
    values, draws = np.zeros(len(measures)), np.zeros((len(measures), resamples))
    names = np.unique(strata)
    for name in names:
        members = np.ascontiguousarray(parts[:, :, strata == name])                          # (M, 2, P of the stratum)
        totals = members.sum(axis=2)
        if (totals[:, 1] <= 0).any():
            raise ValueError("a measure's denominator sums to 0 over its prompts, so that it has no value"
                             + ("" if measures[0].strata is None else f" (stratum {name})"))
        values += totals[:, 0] / totals[:, 1] / len(names)
        count = members.shape[2]
        for start in range(0, resamples, CHUNK):
            rows = rng.integers(count, size=(min(CHUNK, resamples - start), count), dtype=np.int32)
            sums = np.stack([[part[rows].sum(axis=1) for part in pair] for pair in members])  # (M, 2, chunk)
            with np.errstate(invalid="ignore"):
                draws[:, start:start + len(rows)] += sums[:, 0] / sums[:, 1] / len(names)
    return values, draws


def _interval(value: float, draws: Floats, prompts: int) -> dict[str, float]:
    """Percentiles of the resamples that have a value."""
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high), "prompts": prompts}


def _check_pairs(first: Measure, second: Measure) -> None:
    """Refuse measures that cannot be paired."""
    sizes = np.size(first.numerator), np.size(second.numerator)
    if sizes[0] != sizes[1]:
        raise ValueError(f"a paired difference needs the same prompts on both sides, got {sizes[0]} and {sizes[1]} prompts")
    if first.prompts is not None and second.prompts is not None:
        differ = np.flatnonzero(np.asarray(first.prompts) != np.asarray(second.prompts))
        if differ.size:
            at = int(differ[0])
            raise ValueError("a paired difference needs the same prompts in the same order, but number "
                             f"{at} is {np.asarray(first.prompts)[at]} and {np.asarray(second.prompts)[at]}")
