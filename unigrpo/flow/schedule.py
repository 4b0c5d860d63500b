"""Which noise levels a trajectory visits, and which of its steps are stochastic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:  # numpy only names a type here: draws come from the caller's generator
    import numpy as np

WindowKind = Literal["subset", "all", "contiguous", "sliding"]


def sigma_schedule(num_steps: int, shift: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise amounts of S model calls, shifted towards noise.

    sigma_i = shift u_i / (1 + (shift - 1) u_i),   u_i = 1 - i / S,   i = 0..S

    Computed in float64 and rounded once, so that a float32 schedule is the correctly rounded float64 one.

    Args:
        num_steps: S, the number of model calls. BAGEL counts schedule points: its "50" is 49 here.
        shift: > 0; 1.0 spaces the steps evenly, 3.0 is BAGEL's.
        dtype: of the result. Rollout and replay must use the same tensor, not two computations of it.
    Returns: (S+1,) strictly decreasing, exactly 1 at the start and exactly 0 at the end.
    Raises: ValueError if num_steps < 1 or shift <= 0.
    Source: SD3 arXiv:2403.03206 (section 5.3.2); BAGEL arXiv:2505.14683.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"a schedule needs num_steps >= 1 and shift > 0, got num_steps={num_steps}, shift={shift}")
    u = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas[0] = 1.0  # exact, because the transition recognises pure noise by equality
    return sigmas.to(dtype)


def choose_window(kind: WindowKind, size: int, sde_window: tuple[int, int], rng: np.random.Generator,
                  step: int = 0, *, every: int = 1) -> tuple[int, ...]:
    """The schedule indices of the stochastic (trained) steps of one training step's rollouts.

    One call serves all rollouts of a training step: siblings must share their stochastic steps, and `rng` is keyed by
    (seed, purpose, step), never by rank.

    Args:
        kind: subset: `size` distinct indices of the window; contiguous: `size` adjacent ones at a random place;
            sliding: `size` adjacent ones that move up by one every `every` training steps and wrap; all: the window.
        size: how many stochastic steps; ignored by "all".
        sde_window: half-open (start, stop), 0 <= start < stop.
        rng: drawn from by subset and contiguous only.
        step: the training step, for sliding.
        every: training steps per place of the sliding window (MixGRPO: 25).
    Returns: sorted indices.
    Raises: ValueError for an unknown kind, or a size that does not fit.
    Source: Flow-GRPO-Fast and MixGRPO arXiv:2507.21802 (windows); a random subset as in public UniGRPO training code.
    """
    start, stop = sde_window
    if kind not in get_args(WindowKind):
        raise ValueError(f"unknown SDE window kind {kind!r}; choose one of {', '.join(get_args(WindowKind))}")
    if not 0 <= start < stop:
        raise ValueError(f"sde_window must be (start, stop) with 0 <= start < stop, got {sde_window}")
    if kind == "all":
        return tuple(range(start, stop))
    if not 1 <= size <= stop - start:
        raise ValueError(f"the number of SDE steps must lie in [1, {stop - start}] for sde_window {sde_window}, got {size}")
    if kind == "subset":
        return tuple(sorted(start + int(i) for i in rng.choice(stop - start, size=size, replace=False)))
    places = stop - start - size + 1
    first = start + (int(rng.integers(places)) if kind == "contiguous" else (step // every) % places)
    return tuple(range(first, first + size))
