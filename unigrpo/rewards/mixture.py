"""A weighted sum of rewards under one name, each part logged.

`reward.weights` sums the rewards of a run already (`credit.py`), and that is the place for a plain sum. A mixture is for a
sum that needs a name of its own: one that is served by a reward server, scored by `unigrpo doctor`, or weighted again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.types import PromptRecord, Reward


def weighted_sum(name: str, parts: Mapping[str, RewardFunction], weights: Mapping[str, float], *,
                 threads: int = 1) -> RewardFunction:
    """sum_n weights[n] reward_n; a rollout that misses any weighted part is missing, as in `assign_credit`.

    Args:
        name: of the sum.
        parts: reward name -> function. The function's first record is the part; all its records are logged as
            `<name>/<record's name>`.
        weights: reward name -> weight; a part of weight 0 is logged only.
        threads: how many parts are computed at once; worth it where parts wait for a server or an endpoint.
    Returns: a reward whose first record is the sum.
    Raises: ValueError unless parts and weights have the same names and one weight is not zero.
    """
    if set(parts) != set(weights) or not any(weights.values()):
        raise ValueError(f"a mixture needs a weight for every part, and one that is not 0: parts {sorted(parts)}, "
                         f"weights {dict(weights)}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")

    def reward(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda part: parts[part](images, prompts, thinking), parts))
        # Weight 0 leaves a part out rather than multiplying it: 0 * NaN would make the rollout missing.
        terms = [weights[part] * records[0].value for part, records in zip(parts, found, strict=True) if weights[part] != 0]
        return [Reward(name, torch.stack(terms).sum(dim=0)),
                *(Reward(f"{name}/{record.name}", record.value) for records in found for record in records)]

    return reward


def mixture(weights: Mapping[str, float], options: Mapping[str, Mapping[str, object]] | None = None, *, name: str = "mixture",
            threads: int = 1) -> RewardFunction:
    """`weighted_sum` of rewards by name. options: reward name -> its own options."""
    from unigrpo.rewards.registry import make_reward

    given = dict(options or {})
    if stray := sorted(set(given) - set(weights)):
        raise ValueError(f"mixture: options for {', '.join(stray)}, which has no weight; weights are for {sorted(weights)}")
    return weighted_sum(name, {part: make_reward(part, given.get(part)) for part in weights}, weights, threads=threads)
