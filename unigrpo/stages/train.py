"""The RL loop of one run: policy, reward and callables are put together here and handed to unigrpo.train."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from unigrpo.adapters import add_lora
from unigrpo.checkpoint import load_training_state, weights_digest
from unigrpo.config import Config, load_config
from unigrpo.cost import reinforcement_flops
from unigrpo.distributed import ALONE, World
from unigrpo.evaluation.sentinel import Sentinel, Thresholds
from unigrpo.prompts.records import read_records
from unigrpo.rewards import RewardFunction
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator, shuffled_index
from unigrpo.stages.loading import DTYPES, is_spread, load_policy, restore_progress, save_policy, save_progress, spread
from unigrpo.stages.session import Session, last_tenth, session
from unigrpo.stages.watch import Lookout, good_folder, keep_good, look, reward_functions, since_last_probe, watch
from unigrpo.train import refuse_missing, train
from unigrpo.types import PromptRecord, Reward, Rollouts
from unigrpo.update import rl_optimizer, trainable_experts

# By name and not by import: RL depends on no supervised training. A run that asks for it tracks this module's closure by
# digest (unigrpo.experiment).
SUPERVISED = "unigrpo.stages.longer"
PROBE_SEED = 1_000_003  # probes look at other noise than evaluation does
PROBE_SAMPLES = 2
INERT_PENALTY = 0.01  # a penalty whose gradient is this share of the policy's, or less, holds nothing


def run(scale: str, *, run: str, seed: int, root: Path = Path("."),
        provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Train one run of params/runs.yaml with one seed. Returns its metrics."""
    if load_config(scale, run=run, root=root).train.method == "sft":
        return importlib.import_module(SUPERVISED).run(scale, run=run, seed=seed, root=root, provenance=provenance)
    prompts, sft = f"artifacts/{scale}/prompts", f"artifacts/{scale}/sft/checkpoint"
    with session("train", f"{scale}-{run}-{seed}", scale=scale, run=run, seed=seed, output=f"artifacts/{scale}/{run}/{seed}",
                 inputs=(prompts, sft), root=root, provenance=provenance) as stage:
        config = stage.config
        rewards, sentinel = reward_functions(config), Sentinel(Thresholds.changed(config.train.sentinel.thresholds))
        policy, optimizer = rl_start(root / sft, config, stage.world)
        start = resume(stage, policy, optimizer, sentinel)
        records = read_records(root / prompts / "train.jsonl")
        probes = read_records(root / prompts / "validation.jsonl")[:config.train.probe_prompts]
        lookout = Lookout(probes, rewards, sentinel, good_folder(root, f"{scale}-{run}-{seed}"))
        stage.begin("", config.train.num_steps, start, stepwise=True)
        policy.model.train()
        if config.train.activation_checkpointing:
            policy.model.activation_checkpointing_enable()
        train(policy, optimizer, partial(step_prompts, records, config), partial(rewards_of, policy, rewards), config,
              draw=partial(generator, config.seed), log=partial(record, stage, policy, lookout),
              save=partial(save, stage, policy, optimizer, sentinel), start_step=start, skipped=skipped_updates(stage.curves),
              world=stage.world)
        policy.model.eval()
        save_policy(stage.output / "checkpoint", policy, origin=root / sft, world=stage.world)
        if stage.world.main and not sentinel.alarms:  # the run's own checkpoint is the good one
            shutil.rmtree(lookout.good, ignore_errors=True)
        return stage.write(summary(stage, policy, sentinel))


def rl_start(checkpoint: Path, config: Config, world: World = ALONE) -> tuple[BagelPolicy, torch.optim.Optimizer]:
    """The policy that a run starts from, its reference kept, and the optimizer of its trained experts."""
    policy = rl_policy(checkpoint, config, world)
    experts = trainable_experts(policy.model, config.train.experts)
    if config.lora.rank == 0:  # with adapters the reference is the model without them
        policy.freeze_reference([name for parameters in experts.values() for name in parameters])
    return policy, rl_optimizer(experts, config.optim, lr_scale=config.lora.lr_scale if config.lora.rank else 1.0)


def rl_policy(checkpoint: Path, config: Config, world: World = ALONE) -> BagelPolicy:
    """The policy of a run: the checkpoint's weights in the run's precision, its adapters, guidance and context gradient."""
    rollout, dtype = config.rollout, DTYPES[config.train.precision]
    # Frozen understanding experts compute the context, so that no gradient can reach it: one packed forward does then.
    full = config.objective.image.context_gradient == "full" or "understanding" not in config.train.experts
    guidance = (rollout.guidance_scale, rollout.guidance_renorm, rollout.guidance_interval)
    policy = load_policy(checkpoint, config, dtype=dtype, on_cpu=is_spread(config, world),
                         guidance=guidance if rollout.guidance_scale > 1 else None,
                         context_gradient=full)
    if is_spread(config, world):
        return spread(policy, world, None if dtype == torch.float32 else dtype)
    if config.lora.rank:
        add_lora(policy.model, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets,
                 experts=config.train.experts, seed=config.seed)
    return policy


def resume(stage: Session, policy: BagelPolicy, optimizer: torch.optim.Optimizer, sentinel: Sentinel) -> int:
    """Restore an interrupted run, its reference included. Returns the step to go on with."""
    found = load_training_state(stage.folder)
    if found is None:
        return 0
    state, tensors = found
    if weights_digest(tensors["extra"]) != state["reference"]:
        raise ValueError(f"{stage.folder} holds another reference than its state.json names; remove that folder to start again")
    restore_progress(policy, [optimizer], tensors)
    stage.restore(state)
    sentinel.restore(state["sentinel"])
    return int(state["step"])


def save(stage: Session, policy: BagelPolicy, optimizer: torch.optim.Optimizer, sentinel: Sentinel, step: int) -> None:
    """Save the training state every train.checkpoint_every steps, at the end, and where the process is asked to leave."""
    settings, leaving = stage.config.train, stage.asked_to_leave()
    if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.num_steps or leaving:
        save_progress(stage.folder, step + 1, policy, [optimizer],
                      lambda reference: {**stage.state(), "sentinel": sentinel.state(),
                                         "reference": weights_digest(reference)}, stage.world)
    if leaving:
        stage.leave(step + 1)


def skipped_updates(curves: Sequence[Mapping[str, float]]) -> int:
    """Updates that an interrupted run has skipped so far."""
    return int(sum(value for row in curves for name, value in row.items()
                   if name.startswith("update_") and name.endswith("/optim/skipped")))


def step_prompts(records: Sequence[PromptRecord], config: Config, step: int) -> list[PromptRecord]:
    """The P prompts of a step: epochs of keyed permutations of the train split."""
    size = config.rollout.prompts_per_step
    return [records[shuffled_index(i, len(records), config.seed, "train-order")] for i in range(step * size, (step + 1) * size)]


def rewards_of(policy: BagelPolicy, rewards: Mapping[str, RewardFunction], rollouts: Rollouts) -> list[Reward]:
    """Every weighted reward of a batch of rollouts."""
    images, texts = policy.decode(rollouts.image.final_latents), policy.thinking_texts(rollouts)
    return [found for reward in rewards.values() for found in reward(images, rollouts.prompts, texts)]


def record(stage: Session, policy: BagelPolicy, lookout: Lookout, step: int, metrics: dict[str, float],
           rollouts: Rollouts, rewards: Sequence[Reward]) -> None:
    """Log a step; probe the policy and keep pictures where their turn has come.

    Raises: ValueError where the sentinel raises an alarm and train.sentinel.stop is set.
    """
    settings = stage.config.train
    last = step + 1 == settings.num_steps
    alarm = ""
    if (step + 1) % settings.probe_every == 0 or step == 0 or last:
        probed, alarm = probe(stage, policy, lookout, step, metrics)
        metrics = metrics | probed
    if step % settings.gallery_every == 0 or last:
        add_pictures(stage, policy, rewards[0], step, rollouts)
    decay = metrics.get("optim/lr_factor", 1.0) if stage.config.objective.image.regularizer_decay else 1.0
    ratio = metrics.get("image/penalty_gradient_ratio", 1.0) / max(decay, 1e-30)  # a weight that decays is meant to get small
    if step > settings.num_steps // 2 and ratio < INERT_PENALTY:
        metrics = metrics | {"image/penalty_inert": 1.0}
        if stage.world.main and not any("image/penalty_inert" in row for row in stage.curves):
            print(f"{stage.name}: the penalty's gradient is {ratio:.1%} of the policy's; raise "
                  "objective.image.regularizer_weight, or call the run unregularised", file=sys.stderr, flush=True)
    shown = {"probe_exact": metrics["probe/exact"]} if "probe/exact" in metrics else {}
    stage.log(step, metrics, reward=metrics["reward/mean"], **shown)
    if alarm and settings.sentinel.stop:
        raise ValueError(f"{stage.name} stops at its sentinel's alarm, as train.sentinel.stop asks: {alarm}; change the reward "
                         "(or the threshold, if the change is wanted) in params")


def probe(stage: Session, policy: BagelPolicy, lookout: Lookout, step: int,
          metrics: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """Look at the policy; say an alarm on stderr and tag the run with it. Returns metrics, and the alarms in words."""
    sentinel = lookout.sentinel
    seen = look(policy, lookout.prompts, stage.config, samples=PROBE_SAMPLES, seed=PROBE_SEED, rewards=lookout.rewards,
                world=stage.world)
    refuse_missing(float(np.isnan(seen.rewards).mean()), f"the probe of step {step}", stage.config)
    found, alarms = watch(seen, sentinel, step, [*since_last_probe(stage.curves), metrics], lookout.rewards)
    if stage.config.train.sentinel.keep_good and sentinel.good == step:
        keep_good(lookout.good, policy, step, stage.world)
    if not alarms:
        return found, ""
    kept = f"; the weights of step {sentinel.good} are kept in {lookout.good}" if stage.config.train.sentinel.keep_good else ""
    words = "; ".join(alarm.sentence() for alarm in alarms) + kept
    if stage.world.main:
        print(f"{stage.name}: ALARM, {words}", file=sys.stderr, flush=True)
    stage.tracker.set_tags({"sentinel.alarm": ",".join(alarm.guard for alarm in sentinel.alarms),
                            "sentinel.good_step": str(sentinel.good)})
    return found, words


def add_pictures(stage: Session, policy: BagelPolicy, reward: Reward, step: int, rollouts: Rollouts) -> None:
    """The first rollout of every prompt of the main process into the gallery, with its reward, None where that is missing."""
    if not stage.world.main:
        return
    rows = torch.arange(0, len(rollouts), rollouts.group_size)
    images, texts = policy.decode(rollouts.image.final_latents[rows]), policy.thinking_texts(rollouts.select(rows))
    scores = reward.value[rows].tolist()
    stage.add_pictures(images, [
        {"step": step, "prompt": rollouts.prompts[int(i)].prompt, "thinking": text,
         "reward": None if math.isnan(score) else round(score, 4)}
        for i, text, score in zip(rows, texts, scores, strict=True)])


def summary(stage: Session, policy: BagelPolicy, sentinel: Sentinel) -> dict[str, float]:
    """Means over the last tenth of the run (see `last_tenth`), the last probe, the sentinel's alarms (guard -> first step), and
    counted work."""
    config, curves = stage.config, stage.curves
    model = policy.model.config
    out = last_tenth(curves, ("reward/mean", "reward/zero_std_groups", "text/clip_fraction", "image/clip_fraction",
                              "text/entropy", "image/velocity_mse", "image/latent_kl", "thinking/length",
                              "thinking/truncated", "mismatch/text", "mismatch/image"))
    out |= {name: row[name] for row in curves for name in row if name.startswith("probe/")}
    out |= {"sentinel/probes": float(sum("sentinel/alarms" in row for row in curves)),
            "sentinel/alarms": float(len(sentinel.alarms)), "sentinel/good_step": float(sentinel.good or 0)}
    out |= {f"sentinel/alarm/{alarm.guard}": float(alarm.step) for alarm in reversed(sentinel.alarms)}
    totals = {name: sum(row.get(name, 0.0) for row in curves) for name in
              ("cost/text_tokens", "cost/images", "cost/model_calls", "cost/prompt_tokens", "cost/reference_passes",
               "cost/image_replays")}
    prompts = config.rollout.prompts_per_step * len(curves)
    rollouts = int(totals["cost/images"])
    thinking, prompt = totals["cost/text_tokens"] / max(1, rollouts), totals["cost/prompt_tokens"] / max(1, rollouts)
    shares = {name: totals[f"cost/{name}"] / max(1, len(curves)) for name in ("reference_passes", "image_replays")}
    flops = reinforcement_flops(model, config, rollouts=rollouts, prompts=prompts, prompt_tokens=prompt,
                                thinking_tokens=thinking, model_calls=int(totals["cost/model_calls"]),
                                reference=shares["reference_passes"], images=shares["image_replays"],
                                dropped_tokens=float(policy.dropped_tokens))
    return out | {"cost/prompts": float(prompts), "cost/images": totals["cost/images"],
                  "cost/text_tokens": totals["cost/text_tokens"], "cost/model_calls": totals["cost/model_calls"],
                  "cost/updates": float(config.train.updates_per_rollout * len(curves)),
                  "cost/flops": flops}
