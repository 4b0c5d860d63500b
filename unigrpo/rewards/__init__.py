"""Rewards by name. A reward maps (images, prompts, thinking) to records; `credit.py` weighs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unigrpo.rewards.registry import make_reward
from unigrpo.rewards.shapes import RewardFunction, shapes_exact, shapes_graded, shapes_tolerant

REWARDS: dict[str, RewardFunction] = {
    "shapes_graded": shapes_graded,
    "shapes_exact": shapes_exact,
    "shapes_tolerant": shapes_tolerant,
}


def get_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward of this name with these options (docs/rewards.md).

    Args:
        name: of REWARDS; of `registry.FACTORIES`, whose models load now; or `module:name`, a function of the user's.
    Raises: ValueError listing the names, if there is none; or the options, if it does not take these.
    """
    return REWARDS[name] if name in REWARDS and not options else make_reward(name, options)
