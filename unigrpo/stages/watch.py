"""The probes of a run: the policy draws the same prompts again, and the sentinel looks for what nobody rewards.

    look     draws and judges        watch    tells the sentinel, and makes metrics of what it saw
    guards   what it compares        keep     the weights of the last probe without a suspicion, outside DVC's outputs
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unigrpo.config import Config
from unigrpo.distributed import ALONE, World
from unigrpo.evaluate import DrawnBatch, draw_grid
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
from unigrpo.evaluation.sentinel import GOLD, Alarm, Sentinel
from unigrpo.evaluation.shapes import are_shapes, verdict_rows
from unigrpo.resume import STATE
from unigrpo.rewards import RewardFunction, get_reward
from unigrpo.rollout import BagelPolicy
from unigrpo.stages.loading import save_policy
from unigrpo.types import PromptRecord

SCORERS = {"shapes_exact": "exact", "shapes_graded": "graded", "geneval": "geneval", "thinking": "plan_right"}
"""Scorer -> its column of the verdicts. Those that are not optimised guard the others."""


@dataclass(frozen=True)
class Look:
    """What a probe saw: S images of each of P prompts, a prompt's side by side.

    Args:
        verdicts: one row an image; None for pictures of anything but shapes, which the verifier cannot read.
        signs: of the images. texts: their thinkings.
        rewards: (P, S) weighted sums of what is optimised, NaN where missing.
    """

    verdicts: pd.DataFrame | None
    signs: ImageSigns
    texts: list[str]
    rewards: Floats

    @property
    def samples(self) -> int:
        """S."""
        return int(self.rewards.shape[1])


@dataclass(frozen=True)
class Lookout:
    """What watches a run: the prompts of its probes, its rewards by name, its sentinel, and where good weights are kept."""

    prompts: Sequence[PromptRecord]
    rewards: Mapping[str, RewardFunction]
    sentinel: Sentinel
    good: Path


def reward_functions(config: Config) -> dict[str, RewardFunction]:
    """The rewards of a run by name; models load here. Raises ValueError for a name or options that do not exist."""
    return {name: get_reward(name, config.reward.options.get(name)) for name in config.reward.weights}


def look(policy: BagelPolicy, prompts: Sequence[PromptRecord], config: Config, *, samples: int, seed: int,
         rewards: Mapping[str, RewardFunction] | None = None, world: World = ALONE) -> Look:
    """Draw the headline cell for some prompts, always with the same noise, and judge it.

    Args:
        rewards: by name, every one of config.reward.weights; made from config by default.
        world: processes that share the prompts; all of them see everything.
    """
    functions = reward_functions(config) if rewards is None else rewards
    policy.model.eval()
    frames, signs, texts, scores = [], [], [], []
    for batch in undisturbed(policy, draw_grid(policy, world.share(prompts), config, [HEADLINE], samples=samples,
                                               batch=config.evaluate.batch, seed=seed)):
        records = [record for record, _ in batch.rows]
        if are_shapes(batch.images, records):
            frames.append(verdict_rows(batch.images, records, batch.texts, samples=[i for _, i in batch.rows], cfg=batch.cfg,
                                       cell=batch.cell))
        signs.append(describe_images(batch.images))
        texts += batch.texts
        values = {reward.name: reward.value for function in functions.values()
                  for reward in function(batch.images, records, batch.texts)}
        scores.append(sum(weight * values[name].double().numpy() for name, weight in config.reward.weights.items() if weight))
    policy.model.train()
    frames, signs, texts, scores = (join_lists(world.gather(part)) for part in (frames, signs, texts, scores))
    whole = len(frames) == len(signs)  # a few pictures that can be judged would be another set of prompts
    return Look(pd.concat(frames, ignore_index=True) if whole else None, join_signs(signs), texts,
                np.concatenate(scores).reshape(-1, samples))


def undisturbed(policy: BagelPolicy, batches: Iterator[DrawnBatch]) -> Iterator[DrawnBatch]:
    """The batches, drawn while all weights are here: processes may have different numbers of them."""
    with policy.gathered():
        yield from batches


def join_lists(parts: Sequence[list[Any]]) -> list[Any]:
    """Lists in a row."""
    return [item for part in parts for item in part]


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
    if seen.verdicts is None:
        return found
    return found | {GOLD + name: estimate(seen.verdicts[column].to_numpy(np.float64).reshape(-1, seen.samples))
                    for name, column in SCORERS.items() if name not in optimised}


def watch(seen: Look, sentinel: Sentinel, step: int, curves: Sequence[Mapping[str, float]],
          optimised: Collection[str]) -> tuple[dict[str, float], list[Alarm]]:
    """Tell the sentinel of a probe.

    Args:
        step: of the probe. curves, optimised: see `guards_of`.
    Returns: metrics: probe/reward and, of shapes, probe/{exact,graded,geneval,thinking_accuracy}, never a benchmark: few
        prompts, and choices look at them; sentinel/<guard> of what is measured here alone; sentinel/alarms, how many are on;
        and the alarms that rise. A probe without any reward (a server that died) tells the sentinel nothing.
    """
    guards = guards_of(seen, sentinel, curves, optimised)
    metrics = {f"sentinel/{name}": found.value for name, found in guards.items()
               if not name.startswith(GOLD) and name not in ("velocity_drift", "thinking_entropy")}
    if seen.verdicts is not None:
        metrics |= {f"probe/{metric}": float(seen.verdicts[column].to_numpy(np.float64).mean()) for metric, column in
                    (("exact", "exact"), ("graded", "graded"), ("geneval", "geneval"), ("thinking_accuracy", "plan_right"))}
    if np.isnan(seen.rewards).all():
        return metrics | {"probe/reward_missing": 1.0}, []
    metrics["probe/reward"] = float(np.nanmean(seen.rewards))
    alarms = [] if np.isnan(seen.rewards).any(axis=1).all() else sentinel.watch(step, estimate(seen.rewards), guards)
    return metrics | {"sentinel/alarms": float(len(sentinel.raised))}, alarms


def since_last_probe(curves: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The logged rows after the last probe's."""
    probed = [index for index, row in enumerate(curves) if any(name.startswith("sentinel/") for name in row)]
    return list(curves[probed[-1] + 1 if probed else 0:])


def good_folder(root: Path, name: str) -> Path:
    """Where the last good weights of a run lie, beside the resume folders: no result, so no output of DVC's."""
    return root / STATE / "good" / name


def keep_good(folder: Path, policy: BagelPolicy, step: int, world: World = ALONE) -> None:
    """Keep the policy of a probe without a suspicion, in place of the one before; a kill leaves one of the two.

    All processes call this, the main one writes.
    """
    new = folder / f"step-{step:06d}"
    partial = folder / ".partial"
    if world.main:
        shutil.rmtree(partial, ignore_errors=True)
    save_policy(partial, policy, world=world)
    if not world.main:
        return
    shutil.rmtree(new, ignore_errors=True)
    partial.rename(new)
    for old in folder.glob("step-*"):
        if old != new:
            shutil.rmtree(old)
