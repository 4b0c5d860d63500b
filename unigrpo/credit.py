"""From reward records to one advantage per rollout and segment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unigrpo.advantages import Std, group_advantages
from unigrpo.types import Reward, Segment

STRATEGIES = ("shared_terminal",)


def assign_credit(rewards: Sequence[Reward], segments: Sequence[Segment], *, group_size: int, weights: dict[str, float],
                  strategy: str = "shared_terminal", std: Std = "group", ddof: int = 0, eps: float = 1e-4,
                  eps_inside: bool = False, clamp: float | None = None) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """Advantages of every segment of the trajectories.

    shared_terminal: A = group_advantages(sum_n weights[n] reward_n), the same for the thinking and the image: one
    trajectory, one outcome. Siblings are the chains of a prompt; grouping images by their chain would give groups of one.

    A rollout that misses any weighted reward is missing as a whole: advantage 0, counted in reward/missing. A reward that is
    infinite is missing too. Rewards without a weight are logged only.

    Args:
        rewards: records of (B,) values, NaN where missing.
        segments: of the rollouts, in order; only their number matters to shared_terminal.
        group_size: G.
        weights: reward name -> weight.
        strategy: one of STRATEGIES.
        std, ddof, eps, eps_inside, clamp: see group_advantages.
    Returns: one (B,) tensor per segment; metrics reward/mean and reward/std (of the weighted sum, over rollouts that have
        one), reward/<name>, reward/zero_std_groups (share), reward/missing (share), advantage/abs_mean.
    Raises: ValueError for an unknown strategy, a weight without its reward, two rewards of one name or no weight at all.
    Source: UniGRPO arXiv:2603.23500 (one advantage for all text tokens and all image steps).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown credit strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    broken = {reward.name: reward.value.isinf() for reward in rewards}
    values = {reward.name: torch.where(broken[reward.name], math.nan, reward.value) for reward in rewards}
    if len(values) != len(rewards):
        raise ValueError(f"reward names must differ, got {[reward.name for reward in rewards]}")
    absent = sorted(set(weights) - set(values))
    if absent or not any(weights.values()):
        raise ValueError(f"every weighted reward must be given and one weight be non-zero: weights {weights}, "
                         f"rewards {sorted(values)}, absent {absent}")
    # A reward of weight 0 is left out rather than multiplied: 0 * NaN would make the rollout missing.
    total = torch.stack([weight * values[name] for name, weight in weights.items() if weight != 0]).sum(dim=0)
    advantages, stats = group_advantages(total, group_size, std=std, ddof=ddof, eps=eps, eps_inside=eps_inside, clamp=clamp)
    present = total[~total.isnan()].double()
    metrics = {
        "reward/mean": present.mean().item(),  # NaN where every rollout misses one
        "reward/std": present.std(correction=0).item() if len(present) else math.nan,
        **{f"reward/{name}": value.double().nanmean().item() for name, value in values.items()},
        "reward/zero_std_groups": stats["zero_std_groups"],
        "reward/missing": stats["missing"],
        "advantage/abs_mean": advantages.double().abs().mean().item(),
    }
    if infinite := sum(float(part.double().mean()) for part in broken.values()):
        metrics["reward/infinite"] = infinite
    return tuple(advantages for _ in segments), metrics
