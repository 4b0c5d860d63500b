"""UniGRPO's training loop (arXiv:2603.23500): think, draw, reward, credit, update.

The trainer is handed a policy, a reward and callables that log and save; it imports neither models nor worlds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from unigrpo.config import Config
from unigrpo.credit import assign_credit
from unigrpo.distributed import ALONE, World
from unigrpo.mismatch import check_rollouts, mismatch_metrics
from unigrpo.policy import Draw, UnifiedPolicy
from unigrpo.tally import Tally, move_weights, report_skipped
from unigrpo.types import PromptRecord, Reward, Rollouts
from unigrpo.update import (
    anchor,
    minibatches,
    objective,
    own_prompts,
    schedule_factor,
    trains_images,
    update_rows,
)

RewardFunction = Callable[[Rollouts], Sequence[Reward]]


def train(policy: UnifiedPolicy, optimizer: torch.optim.Optimizer, prompts: Callable[[int], Sequence[PromptRecord]],
          reward_fn: RewardFunction, config: Config, *, draw: Draw,
          log: Callable[[int, dict[str, float], Rollouts, list[Reward]], None], save: Callable[[int], None],
          start_step: int = 0, skipped: int = 0, world: World = ALONE) -> None:
    """Optimise the policy for config.train.num_steps rollouts.

    Args:
        policy, optimizer: the policy's trained parameters are the optimizer's, one group an expert.
        prompts: step -> the P prompts of that step; the step alone is the data cursor.
        reward_fn: B rollouts -> reward records, NaN where missing.
        draw: draw(purpose, *key) -> generator, the run's seed bound.
        log: called after every step with its metrics, and this process's rollouts and rewards. save: called after every
            step, decides itself. start_step: where a resumed run goes on. skipped: updates it has skipped before.
        world: the processes that share a step: each samples, scores and replays its prompts, gradients are added up.
    Raises: MismatchError before the first update; ValueError on too many missing rewards or skipped updates.
    """
    updates = config.train.updates_per_rollout
    for step in range(start_step, config.train.num_steps):
        mine = own_prompts(prompts(step), updates, draw("updates", step), world)
        rollouts = policy.generate(mine, group_size=config.rollout.group_size, sampling=config.rollout,
                                   generators=partial(draw_at, draw, step), step=step)    # thinking, then images
        rewards = list(reward_fn(rollouts))                                               # records; NaN where missing
        everyone = [replace(reward, value=world.gather_rows(reward.value)) for reward in rewards]
        advantages, metrics = assign_credit(everyone, rollouts.segments, group_size=config.rollout.group_size,
                                            weights=config.reward.weights, **config.credit.model_dump())
        refuse_missing(metrics["reward/missing"], f"step {step}", config)
        rows, monitored = update_rows(rollouts, updates), step % config.train.monitor_every == 0
        images, checked = monitored or trains_images(config), monitored or step == start_step
        rollouts = anchor(policy, rollouts, rows, config, images=images, first=checked,
                          reference=monitored or penalised(config))
        if compared := rows if monitored else rows[1:]:
            metrics |= mismatch_metrics(rollouts.select(torch.cat(compared)), config, world)
        if step == start_step:
            check_rollouts(rollouts, config, policy)
        own = [world.share_rows(advantage) for advantage in advantages]
        for update, minibatch in enumerate(minibatches(rollouts, own, config, rows, world)):   # one optimizer step each
            factor = schedule_factor(step * updates + update, config.train.num_steps * updates, config.optim)
            decay = factor if config.objective.image.regularizer_decay else 1.0
            tally = Tally()
            for batch in minibatch.micro_batches():                                       # carries its slice of the weights
                replay = policy.replay(batch.rollouts, velocities=images)                 # one packed forward
                if update == 0 and not checked:  # nothing has moved yet: the replay is its own anchor
                    batch = batch.anchored(replay, config, images=images)
                loss, parts = objective(replay, batch, config, decay=decay, images=images, measure_gradients=monitored)
                loss.backward()
                tally.add(loss, parts, replay, batch)
            stats = move_weights(optimizer, tally, factor, config, world, first=update == 0)
            skipped += report_skipped(stats, tally, skipped, f"step {step}, update {update + 1}", config, world)
            metrics |= {f"update_{update + 1}/{name}": value for name, value in stats.items()} | stats
        log(step, metrics | describe(rollouts, config, world), rollouts, rewards)
        save(step)


def refuse_missing(share: float, what: str, config: Config) -> None:
    """Raise ValueError where more rewards are missing than params allow; what was saved before is whole."""
    if share > config.reward.max_missing:
        raise ValueError(f"{share:.0%} of the rewards of {what} are missing, more than reward.max_missing="
                         f"{config.reward.max_missing:.0%}: look at the reward's own log; once it answers again, the same "
                         "command goes on from the last saved step")


def draw_at(draw: Draw, step: int, purpose: str, *key: str | int):
    """The generator of a purpose at a step."""
    return draw(purpose, step, *key)


def penalised(config: Config) -> bool:
    """True if the loss compares with the reference."""
    return config.objective.image.regularizer != "none" or config.objective.text.kl_weight > 0


def describe(rollouts: Rollouts, config: Config, world: World = ALONE) -> dict[str, float]:
    """Statistics of the sampled thinking and counted work, of all processes."""
    lengths = rollouts.text.lengths
    limit = config.rollout.max_thinking_tokens
    last = rollouts.text.tokens.gather(1, (lengths - 1)[:, None])[:, 0]
    stopped = last == last.new_tensor(rollouts.stop_token)
    sums = world.sum({"rollouts": float(len(rollouts)), "length": float(lengths.sum()),
                      "truncated": float(((lengths == limit) & ~stopped).sum()),
                      "entropy": float(rollouts.text.entropy.double().sum()),
                      "cost/prompt_tokens": float(rollouts.prompt_lengths.sum()),
                      **{f"cost/{name}": float(value) for name, value in rollouts.cost.items()}})
    return {"cost/reference_passes": float(rollouts.text.ref_log_probs is not None),
            "cost/image_replays": float(rollouts.image.old_means is not None),
            "thinking/length": sums["length"] / sums["rollouts"], "thinking/truncated": sums["truncated"] / sums["rollouts"],
            "thinking/rollout_entropy": sums["entropy"] / sums["length"],
            **world.max({"thinking/length_max": float(lengths.max())}),
            **{name: value for name, value in sums.items() if name.startswith("cost/")}}
