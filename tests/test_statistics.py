"""Intervals: by hand, and how often they hold the truth on simulated outcomes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unigrpo.evaluation.statistics import Measure, across_seeds, mean_interval, paired_difference, value_of
from unigrpo.seeding import generator

REPLICATIONS, PROMPTS, IMAGES, RESAMPLES = 800, 100, 4, 400


def simulate(rng: np.random.Generator, gain: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Right images of two checkpoints per prompt. Prompts differ in difficulty, which both share; the true gain."""
    difficulty = rng.beta(1.0, 1.5, PROMPTS)
    better = difficulty + gain * (1 - difficulty)
    # The mean of Beta(1, 1.5) is 0.4, so the gain's is 0.6 of `gain`.
    return rng.binomial(IMAGES, difficulty), rng.binomial(IMAGES, better), 0.6 * gain


def test_paired_intervals_hold_the_truth_at_their_level() -> None:
    rng, images, held = generator(0, "test", "coverage"), np.full(PROMPTS, IMAGES), 0
    for _ in range(REPLICATIONS):
        before, after, truth = simulate(rng, gain=0.3)
        interval = paired_difference(Measure(after, images), Measure(before, images), rng, resamples=RESAMPLES)
        held += interval["low"] <= truth <= interval["high"]
    assert 0.93 <= held / REPLICATIONS <= 0.97


def test_intervals_of_a_share_hold_the_truth_at_their_level() -> None:
    """A conditional share with unequal denominators: right images among those of right plans."""
    rng, held = generator(0, "test", "share"), 0
    for _ in range(REPLICATIONS):
        plans = rng.binomial(IMAGES, rng.beta(2, 2, PROMPTS))
        interval = mean_interval(Measure(rng.binomial(plans, 0.55), plans), rng, resamples=RESAMPLES)
        held += interval["low"] <= 0.55 <= interval["high"]
    assert 0.93 <= held / REPLICATIONS <= 0.97


def test_pairing_narrows_the_interval() -> None:
    rng, images = generator(0, "test", "pairing"), np.full(PROMPTS, IMAGES)
    before, after, _ = simulate(rng, gain=0.3)
    paired = paired_difference(Measure(after, images), Measure(before, images), rng, resamples=2000)
    shuffled = paired_difference(Measure(after, images), Measure(rng.permutation(before), images), rng, resamples=2000)
    assert paired["value"] == pytest.approx(shuffled["value"])
    assert paired["high"] - paired["low"] < 0.9 * (shuffled["high"] - shuffled["low"])


def test_equal_checkpoints_have_no_difference() -> None:
    measure = Measure([1, 3, 0], [4, 4, 4])
    assert paired_difference(measure, measure, generator(0, "test")) == {"value": 0, "low": 0, "high": 0, "prompts": 3}


def test_two_prompts_by_hand() -> None:
    # Rates 0 and 1: a resample is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4, so the 2.5 % points are the ends.
    interval = mean_interval(Measure([0, 4], [4, 4]), generator(0, "test"))
    assert interval == {"value": 0.5, "low": 0.0, "high": 1.0, "prompts": 2}


def test_strata_weigh_alike_and_are_resampled_apart() -> None:
    # Tag a: 1 of 2 prompts; tag b: 4 of 4 prompts. The mean over tags is 3/4, pooled it would be 5/6; only tag a varies.
    measure = Measure([0, 1, 1, 1, 1, 1], np.ones(6), strata=list("aabbbb"))
    assert value_of(measure) == 0.75
    assert mean_interval(measure, generator(0, "test")) == {"value": 0.75, "low": 0.5, "high": 1.0, "prompts": 6}


def test_the_same_key_gives_the_same_interval() -> None:
    measure = Measure(np.arange(50) % 5, np.full(50, 4))
    first, again, other = (mean_interval(measure, generator(0, "test", key), resamples=200) for key in ("a", "a", "b"))
    assert first == again
    assert first != other


def test_seeds_by_hand() -> None:
    # Mean 0.2, std 0.1 (n - 1), t(0.975; 2) = 4.302653: half width 4.302653 * 0.1 / sqrt(3).
    interval = across_seeds([0.1, 0.2, 0.3])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert interval["seeds"] == [0.1, 0.2, 0.3]
    assert [interval[name] for name in ("value", "low", "high")] == pytest.approx([0.2, 0.2 - half, 0.2 + half])
    assert across_seeds([0.2]) == {"value": 0.2, "low": None, "high": None, "seeds": [0.2]}


def test_what_has_no_interval_is_refused() -> None:
    rng = generator(0, "test")
    assert math.isnan(value_of(Measure([0, 0], [0, 0])))
    with pytest.raises(ValueError, match="sums to 0"):
        mean_interval(Measure([0, 0], [0, 0]), rng)
    with pytest.raises(ValueError, match="at least two prompts, got 1"):
        mean_interval(Measure([1], [4]), rng)
    with pytest.raises(ValueError, match="3 and 2 prompts"):
        paired_difference(Measure([1, 1, 1], [4, 4, 4]), Measure([1, 1], [4, 4]), rng)
    with pytest.raises(ValueError, match="number 1 is b and c"):
        paired_difference(Measure([1, 1], [4, 4], prompts=["a", "b"]), Measure([1, 1], [4, 4], prompts=["a", "c"]), rng)
    with pytest.raises(ValueError, match="at least one finite"):
        across_seeds([float("nan")])
