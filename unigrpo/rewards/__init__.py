"""The built-in rewards by name. A reward maps (images, prompts, thinking) to records; `credit.py` weighs them."""

from __future__ import annotations

from unigrpo.rewards.shapes import RewardFunction, shapes_exact, shapes_graded, shapes_tolerant

REWARDS: dict[str, RewardFunction] = {
    "shapes_graded": shapes_graded,
    "shapes_exact": shapes_exact,
    "shapes_tolerant": shapes_tolerant,
}


def get_reward(name: str) -> RewardFunction:
    """The built-in reward of this name.

    Raises: ValueError listing the names, if there is none.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; choose from {', '.join(sorted(REWARDS))} (params: reward)")
    return REWARDS[name]
