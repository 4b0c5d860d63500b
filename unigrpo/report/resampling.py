"""Intervals of one report, from draws that all its measures share.

The numbers are those of `mean_interval` and `paired_difference` of evaluation/statistics.py. They draw anew for every measure;
a report has dozens of checkpoints, so here it is counted once how often each resample takes each prompt, and a measure's
resamples are a product with these counts, kept for every difference that the measure is part of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unigrpo.evaluation.outcomes import significant
from unigrpo.evaluation.statistics import CHUNK, LEVEL, Measure, across_seeds, value_of
from unigrpo.seeding import generator

Floats = npt.NDArray[np.float64]


class Statistics:
    """Intervals of one report. Its draws do not depend on arm or metric: all that is measured on the same prompts shares its
    resamples, and a value that appears twice has one interval."""

    def __init__(self, *, seed: int, resamples: int) -> None:
        if resamples < 1:
            raise ValueError(f"report.bootstrap must be at least 1 resample, got {resamples}")
        self.seed, self.resamples = seed, resamples
        self._counts: dict[tuple[int, bytes], list[tuple[npt.NDArray[np.bool_], Floats]]] = {}
        self._draws: dict[tuple[bytes, ...], Floats] = {}

    def value(self, first: Measure) -> dict[str, Any]:
        """A value with its interval over prompts; without one where there are fewer than two prompts."""
        return self.contrast([(1, first)])

    def difference(self, first: Measure, second: Measure) -> dict[str, Any]:
        """First minus second with its paired interval over prompts."""
        return self.contrast([(1, first), (-1, second)])

    def contrast(self, terms: Sequence[tuple[int, Measure]]) -> dict[str, Any]:
        """A signed sum of measures of the same prompts, each resample taking the same prompts for all of them.

        Args:
            terms: (+1 or -1, measure). Measures of parts of the prompts have zeros in the other rows.
        Returns: value, low, high with 6 significant digits; low and high are None where there are fewer than two prompts.
        Raises: ValueError if the prompts differ, or there is nothing to divide by.
        """
        for _, other in terms[1:]:
            check_same_prompts(terms[0][1], other)
        value = float(sum(sign * value_of(found) for sign, found in terms))
        if np.size(terms[0][1].numerator) < 2:
            return {"value": significant(value), "low": None, "high": None}
        draws = sum((sign * self.draws(found) for sign, found in terms), np.zeros(self.resamples))
        low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return {"value": significant(value), "low": significant(float(low)), "high": significant(float(high))}

    def draws(self, found: Measure) -> Floats:
        """(resamples,) values of a measure, one a resample of its prompts; NaN where a resample has nothing to divide by."""
        parts = np.stack([np.asarray(found.numerator, dtype=np.float64), np.asarray(found.denominator, dtype=np.float64)])
        strata = np.zeros(parts.shape[1], dtype=np.int64) if found.strata is None \
            else np.unique(np.asarray(found.strata), return_inverse=True)[1].astype(np.int64)
        key = (parts.tobytes(), strata.tobytes())
        if key not in self._draws:
            counted = self.counts(strata)
            total = np.zeros(self.resamples)
            for members, counts in counted:
                if parts[1, members].sum() <= 0:
                    raise ValueError("a measure's denominator sums to 0 over its prompts, so that it has no value")
                sums = counts @ parts[:, members].T                                    # (resamples, 2)
                with np.errstate(invalid="ignore", divide="ignore"):
                    total += sums[:, 0] / sums[:, 1] / len(counted)
            self._draws[key] = total
        return self._draws[key]

    def counts(self, strata: npt.NDArray[np.int64]) -> list[tuple[npt.NDArray[np.bool_], Floats]]:
        """Of each stratum its members (P,), and how often each resample takes each of them (resamples, members).

        The draws are those of evaluation/statistics.py: prompts with replacement within each stratum, in chunks.
        """
        key = (strata.size, strata.tobytes())
        if key not in self._counts:
            rng = generator(self.seed, "bootstrap")
            self._counts[key] = []
            for name in np.unique(strata):
                members = strata == name
                size = int(members.sum())
                rows = []
                for start in range(0, self.resamples, CHUNK):
                    chunk = min(CHUNK, self.resamples - start)
                    drawn = rng.integers(size, size=(chunk, size), dtype=np.int32) + size * np.arange(chunk)[:, None]
                    rows.append(np.bincount(drawn.ravel(), minlength=chunk * size).reshape(chunk, size).astype(np.float64))
                self._counts[key].append((members, np.concatenate(rows)))
        return self._counts[key]


def check_same_prompts(first: Measure, second: Measure) -> None:
    """Raises ValueError naming the first prompt that differs."""
    sizes = np.size(first.numerator), np.size(second.numerator)
    if sizes[0] != sizes[1]:
        raise ValueError(f"a paired difference needs the same prompts on both sides, got {sizes[0]} and {sizes[1]} prompts")
    if first.prompts is not None and second.prompts is not None:
        differ = np.flatnonzero(np.asarray(first.prompts) != np.asarray(second.prompts))
        if differ.size:
            at = int(differ[0])
            raise ValueError("a paired difference needs the same prompts in the same order, but number "
                             f"{at} is {np.asarray(first.prompts)[at]} and {np.asarray(second.prompts)[at]}")


def across(singles: Mapping[str | None, Mapping[str, Any]]) -> dict[str, Any]:
    """One entry of `arms` or `differences` from its seeds, seed -> {value, low, high}."""
    seeds = {seed: dict(single) for seed, single in singles.items() if seed is not None}
    if len(singles) == 1:
        return {**next(iter(singles.values())), "over": "prompts", "seeds": seeds}
    return over_seeds([float(single["value"]) for single in singles.values()]) | {"over": "seeds", "seeds": seeds}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and t interval over seeds, 6 significant digits; one seed has no interval."""
    mean = across_seeds(values)
    return {name: None if mean[name] is None else significant(float(mean[name]))  # type: ignore[arg-type]
            for name in ("value", "low", "high")}
