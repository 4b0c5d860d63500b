"""Rewards that are made when they are first named: name -> factory, imported then and not before."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from unigrpo.rewards.shapes import RewardFunction
from unigrpo.schema import SIZED_REWARD

# By name and not by import: a stage depends on what it imports, and a run of the shapes world on none of these.
# The factories take the reward's options (docs/rewards.md) as keywords.
FACTORIES: dict[str, str] = {
    "geneval_soft_mask2former_hf": "unigrpo.rewards.geneval:soft_mask2former",
    "geneval_strict_mask2former_hf": "unigrpo.rewards.geneval:strict_mask2former",
    "geneval_soft_shapes": "unigrpo.rewards.geneval:soft_shapes",
    "geneval_strict_shapes": "unigrpo.rewards.geneval:strict_shapes",
    "pickscore": "unigrpo.rewards.pickscore:pickscore",
    "clip_score": "unigrpo.rewards.clip_score:clip_score",
    "blip_vqa": "unigrpo.rewards.blip_vqa:blip_vqa",
    "judge": "unigrpo.rewards.judge:judge",
    "mixture": "unigrpo.rewards.mixture:mixture",
}
REMOTE, CUSTOM = "unigrpo.rewards.client:remote_reward", "unigrpo.rewards.custom:custom"


def make_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward of this name with these options; the same one again for the same question, so that weights load once.

    Args:
        name: of `unigrpo.rewards.REWARDS`, of FACTORIES, or `module:name` for a function of the user's.
        options: keywords of its factory. With the key `server` alone, {"server": {"url": ...}}, the reward is scored by
            that reward server (`client.remote_reward`), which holds its options.
    Raises: ValueError for an unknown name (with the choices), or options that the reward does not take.
    """
    try:
        text = json.dumps(dict(options or {}), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options of the reward {name} must be JSON values ({error}), got {sorted(options or {})}") from error
    return _make(name, text)


@lru_cache(maxsize=32)
def _make(name: str, text: str) -> RewardFunction:
    """`make_reward` by hashable arguments."""
    from unigrpo.rewards import REWARDS

    options: dict[str, Any] = json.loads(text)
    if "server" in options:
        if len(options) > 1 or not isinstance(options["server"], dict):
            raise ValueError(f"the reward {name} is scored by a server, so that its options are only "
                             f"server: {{url: ...}}; the others belong to `unigrpo serve-rewards`: {sorted(options)}")
        return _call(f"{name} at a server", REMOTE, {"names": [name], **options["server"]})
    if ":" in name:
        return _call(name, CUSTOM, {"specification": name, "options": options})
    sized = re.fullmatch(SIZED_REWARD, name)
    if sized:
        options, name = {**options, "shorter": int(sized[2])}, sized[1]
    if name in FACTORIES:
        return _call(name, FACTORIES[name], options)
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; choose from {', '.join(sorted({*REWARDS, *FACTORIES}))}, or module:name "
                         "for a function of your own (params: reward)")
    if options:
        raise ValueError(f"the reward {name} takes no options, got {sorted(options)}")
    return REWARDS[name]


def _call(name: str, path: str, options: dict[str, Any]) -> RewardFunction:
    """The factory at `module:name` with options, where options it does not take are a user's mistake."""
    module, _, attribute = path.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        taken = ", ".join(inspect.signature(factory).parameters)
        raise ValueError(f"the reward {name} takes the options {taken}: {error}") from error
    reward: RewardFunction = factory(**options)
    return reward
