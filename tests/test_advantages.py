"""Advantages and credit: by hand, invariances, missing rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unigrpo.advantages import group_advantages
from unigrpo.credit import assign_credit
from unigrpo.types import Reward, Segment

NAN = float("nan")
GROUPS = st.integers(2, 6).flatmap(lambda g: st.tuples(st.just(g), st.lists(
    st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=g, max_size=g), min_size=1, max_size=4)))
CHOICES = {"std": st.sampled_from(["group", "batch", "none"]), "ddof": st.sampled_from([0, 1]),
           "eps_inside": st.booleans()}


def test_by_hand() -> None:
    # group (0, 1, 0, 1): mean .5, population std .5, sample std sqrt(1/3); eps .1
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    for kwargs, size in (({}, 0.5 / 0.6), ({"ddof": 1}, 0.5 / (math.sqrt(1 / 3) + 0.1)),
                         ({"eps_inside": True}, 0.5 / math.sqrt(0.35)), ({"std": "none"}, 0.5), ({"clamp": 0.3}, 0.3)):
        values, _ = group_advantages(rewards, 4, eps=0.1, **kwargs)
        torch.testing.assert_close(values, sign * size)
    # batch (0, 2 | 4, 6): means 1, 5; std of all four sqrt(5)
    values, _ = group_advantages(torch.tensor([0.0, 2.0, 4.0, 6.0]), 2, std="batch", eps=0.0)
    torch.testing.assert_close(values, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / math.sqrt(5))


@given(GROUPS, st.fixed_dictionaries(CHOICES))
def test_sum_to_zero_and_ignore_a_shift(groups: tuple, choices: dict) -> None:
    size, rows = groups
    rewards = torch.tensor(rows, dtype=torch.float64).flatten()
    values, _ = group_advantages(rewards, size, **choices)
    torch.testing.assert_close(values.reshape(-1, size).sum(1), torch.zeros(len(rows), dtype=torch.float64), rtol=0, atol=1e-7)
    # A whole number keeps the three decimals nearly exact; what remains is rounding over a std of at least 1e-4.
    shifted, _ = group_advantages(rewards + 8.0, size, **choices)
    torch.testing.assert_close(shifted, values, rtol=1e-6, atol=1e-8)


@given(GROUPS)
def test_scale_free_and_bounded_without_eps(groups: tuple) -> None:
    size, rows = groups
    rewards = torch.tensor(rows, dtype=torch.float64).flatten()
    values, _ = group_advantages(rewards, size, eps=0.0)
    torch.testing.assert_close(group_advantages(rewards * 4, size, eps=0.0)[0], values)
    assert values.isfinite().all()
    assert values.abs().max() <= math.sqrt(size - 1) + 1e-9


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_whatever_eps(std: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.5], dtype=dtype)  # three times 0.1 has a mean off by an ulp
    values, stats = group_advantages(rewards, 3, std=std, eps=0.0)
    assert (values[:3] == 0).all()
    assert (values[3:5] != 0).all()
    assert stats == {"zero_std_groups": 0.5, "missing": 0.0}


def test_missing_rewards_push_nowhere() -> None:
    values, stats = group_advantages(torch.tensor([0.0, NAN, 1.0, 2.0, NAN, NAN, NAN, 5.0]), 4, eps=0.0)
    scale = math.sqrt(2 / 3)
    torch.testing.assert_close(values, torch.tensor([-1 / scale, 0, 0, 1 / scale, 0, 0, 0, 0]))
    assert stats == {"zero_std_groups": 0.5, "missing": 0.5}
    every, stats = group_advantages(torch.full((4,), NAN), 4, std="batch", ddof=1)
    assert (every == 0).all()
    assert stats == {"zero_std_groups": 1.0, "missing": 1.0}


def test_refuses() -> None:
    with pytest.raises(ValueError, match="group, batch, none"):
        group_advantages(torch.zeros(4), 2, std="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        group_advantages(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="ddof"):
        group_advantages(torch.zeros(4), 2, ddof=2)


def segments(count: int = 2) -> list[Segment]:
    return [Segment(kind="text_ar", rollout_log_probs=torch.zeros(4, 3), mask=torch.ones(4, 3, dtype=torch.bool))] * count


def test_credit_is_the_advantage_of_the_weighted_sum() -> None:
    rewards = [Reward("exact", torch.tensor([1.0, 0.0, 0.0, 0.0])), Reward("graded", torch.tensor([0.5, 0.5, 0.0, 0.0])),
               Reward("watched", torch.tensor([NAN, 3.0, 5.0, NAN]))]
    shared, metrics = assign_credit(rewards, segments(), group_size=2, weights={"exact": 1.0, "graded": 2.0, "watched": 0.0})
    expected, _ = group_advantages(torch.tensor([2.0, 1.0, 0.0, 0.0]), 2)
    assert len(shared) == 2
    assert all(torch.equal(one, expected) for one in shared)
    assert metrics == {"reward/mean": 0.75, "reward/std": pytest.approx(math.sqrt(0.6875)), "reward/exact": 0.25,
                       "reward/graded": 0.25, "reward/watched": 4.0, "reward/zero_std_groups": 0.5, "reward/missing": 0.0,
                       "advantage/abs_mean": pytest.approx(expected.abs().mean().item())}


def test_a_rollout_that_misses_one_weighted_reward_is_missing() -> None:
    rewards = [Reward("a", torch.tensor([1.0, 0.0, NAN, 0.0])), Reward("b", torch.tensor([0.0, 0.0, 1.0, 1.0]))]
    (text, _), metrics = assign_credit(rewards, segments(), group_size=4, weights={"a": 1.0, "b": 1.0})
    assert text[2] == 0
    assert metrics["reward/missing"] == 0.25
    assert metrics["reward/mean"] == pytest.approx(2 / 3)


def test_credit_refuses() -> None:
    reward = [Reward("a", torch.zeros(4))]
    with pytest.raises(ValueError, match="shared_terminal"):
        assign_credit(reward, segments(), group_size=2, weights={"a": 1.0}, strategy="causal")
    with pytest.raises(ValueError, match="'b'"):
        assign_credit(reward, segments(), group_size=2, weights={"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="non-zero"):
        assign_credit(reward, segments(), group_size=2, weights={"a": 0.0})
    with pytest.raises(ValueError, match="differ"):
        assign_credit(reward * 2, segments(), group_size=2, weights={"a": 1.0})
