"""One probe of a policy, and what the sentinel wants to know of it: the reward, and everything that is not rewarded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from unigrpo.config import Config
from unigrpo.evaluate import draw_grid
from unigrpo.evaluation.guards import (
    Estimate,
    Floats,
    ImageSigns,
    border_color,
    describe_images,
    estimate,
    image_guards,
    join_signs,
    over_steps,
    thinking_guards,
)
from unigrpo.evaluation.outcomes import HEADLINE
from unigrpo.evaluation.sentinel import GOLD, Sentinel
from unigrpo.evaluation.shapes import verdict_rows
from unigrpo.rewards import RewardFunction, get_reward
from unigrpo.rollout import BagelPolicy
from unigrpo.types import PromptRecord

SCORERS = {"shapes_exact": "exact", "shapes_graded": "graded", "geneval": "geneval", "thinking": "plan_right"}
"""Scorer -> its column of the verdicts. Those that are not optimised guard the others."""


@dataclass(frozen=True)
class Look:
    """What a probe saw: S images of each of P prompts, a prompt's side by side.

    Args:
        verdicts: one row an image. signs: of the images. texts: their thinkings.
        rewards: (P, S) weighted sums of what is optimised, NaN where missing.
    """

    verdicts: pd.DataFrame
    signs: ImageSigns
    texts: list[str]
    rewards: Floats

    @property
    def samples(self) -> int:
        """S."""
        return int(self.rewards.shape[1])


def look(policy: BagelPolicy, prompts: Sequence[PromptRecord], config: Config, *, samples: int, seed: int,
         rewards: Mapping[str, RewardFunction] | None = None) -> Look:
    """Draw the headline cell for some prompts, always with the same noise, and judge it.

    Args:
        rewards: by name, every one of config.reward.weights; the built-in ones by default.
    """
    functions = {name: get_reward(name) for name in config.reward.weights} if rewards is None else rewards
    policy.model.eval()
    frames, signs, texts, scores = [], [], [], []
    for batch in draw_grid(policy, prompts, config, [HEADLINE], samples=samples, batch=config.evaluate.batch, seed=seed):
        records = [record for record, _ in batch.rows]
        frames.append(verdict_rows(batch.images, records, batch.texts, samples=[i for _, i in batch.rows], cfg=batch.cfg,
                                   cell=batch.cell))
        signs.append(describe_images(batch.images))
        texts += batch.texts
        values = {reward.name: reward.value for function in functions.values()
                  for reward in function(batch.images, records, batch.texts)}
        scores.append(sum(weight * values[name].double().numpy() for name, weight in config.reward.weights.items() if weight))
    policy.model.train()
    return Look(pd.concat(frames, ignore_index=True), join_signs(signs), texts,
                np.concatenate(scores).reshape(-1, samples))


def guards_of(seen: Look, sentinel: Sentinel, curves: Sequence[Mapping[str, float]],
              optimised: Collection[str]) -> dict[str, Estimate]:
    """All guards of a probe.

    Args:
        seen: the probe. sentinel: keeps the background of its first probe.
        curves: logged rows of the training steps since the last probe, this one's included.
        optimised: names of the rewards that are; the other scorers are gold.
    """
    if sentinel.background is None:
        sentinel.background = border_color(seen.signs)
    found = image_guards(seen.signs, samples=seen.samples, background=sentinel.background)
    found |= thinking_guards(seen.texts, samples=seen.samples)
    for guard, metric in (("thinking_entropy", "thinking/rollout_entropy"), ("velocity_drift", "image/velocity_mse")):
        if (logged := over_steps(curves, metric)) is not None:
            found[guard] = logged
    return found | {GOLD + name: estimate(seen.verdicts[column].to_numpy(np.float64).reshape(-1, seen.samples))
                    for name, column in SCORERS.items() if name not in optimised}
