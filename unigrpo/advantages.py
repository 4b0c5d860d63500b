"""Group-relative advantages."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Std = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, group_size: int, *, std: Std = "group", ddof: int = 0, eps: float = 1e-4,
                     eps_inside: bool = False, clamp: float | None = None) -> tuple[Tensor, dict[str, float]]:
    """How much better each rollout did than its siblings.

    A_i = (r_i - mean_g) / (std + eps),   or / sqrt(std^2 + eps) with eps_inside,   or r_i - mean_g with std="none"

    A NaN reward is missing: it enters no mean and no std, and its advantage is 0 (it pushes nowhere). Siblings that are
    all equal, or fewer than two that have a reward, get exactly 0, whatever eps is. Computed in float64.

    Args:
        rewards: (B,), B = P * group_size, siblings contiguous; NaN where missing.
        group_size: G >= 2.
        std: of the prompt's group, of all rewards of the batch (raw, not centred), or no division. With the group's
            population std |A| never exceeds sqrt(G - 1).
        ddof: 0 for the population std, 1 for the sample std.
        eps: in reward units (squared if inside); large enough to crush the scorer's own noise.
        eps_inside: add eps to the variance instead of the std.
        clamp: bound on |A|, None for none.
    Returns: (B,) advantages of the rewards' dtype, detached; {"zero_std_groups": share of groups without any signal,
        "missing": share of missing rewards}.
    Raises: ValueError if B is not a multiple of group_size, or a choice is unknown.
    Source: GRPO arXiv:2402.03300; batch std Flow-GRPO's global_std; no division Dr. GRPO arXiv:2503.20783.
    """
    if std not in get_args(Std):
        raise ValueError(f"unknown advantage std {std!r}; choose one of {', '.join(get_args(Std))}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (population) or 1 (sample), got {ddof}")
    if rewards.ndim != 1 or group_size < 2 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards must be (P * group_size,) with group_size >= 2, got shape {tuple(rewards.shape)} "
                         f"and group_size {group_size}")
    values = rewards.detach().to(torch.float64).reshape(-1, group_size)   # (P, G)
    present = ~values.isnan()
    filled = values.nan_to_num(0.0)
    count = present.sum(dim=1, keepdim=True)                              # (P, 1)
    mean = filled.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(present, values - mean, 0.0)
    # Equality instead of a small std: rounding leaves equal rewards a std of 1e-17, which a small eps would blow up.
    lowest = torch.where(present, values, torch.inf).amin(dim=1, keepdim=True)
    highest = torch.where(present, values, -torch.inf).amax(dim=1, keepdim=True)
    silent = (lowest == highest) | (count < 2)                            # (P, 1)
    if std == "none":
        scale = torch.ones_like(mean)
    else:
        if std == "group":
            variance = centred.square().sum(dim=1, keepdim=True) / (count - ddof).clamp(min=1)
        else:
            batch = values[present]
            variance = (batch - batch.mean()).square().sum() / max(batch.numel() - ddof, 1)
        scale = torch.sqrt(variance + eps) if eps_inside else torch.sqrt(variance) + eps
    # Where the scale is 0 (eps 0, equal rewards) the group is silent and its quotient is dropped.
    advantages = torch.where(present & ~silent, centred / scale, 0.0)
    if clamp is not None:
        advantages = advantages.clamp(-clamp, clamp)
    stats = {"zero_std_groups": silent.double().mean().item(), "missing": (~present).double().mean().item()}
    return advantages.reshape(-1).to(rewards.dtype), stats
