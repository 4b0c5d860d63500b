"""A few steps of RL and of supervised training, by one process or by several: `data_parallel.py FOLDER MICRO_BATCH [ALONE]`.

The main process writes what all of them sampled, the first gradients and the last weights. With ALONE, the folder of one
process's run, weights are spread over the processes, and whatever else is to be shown of that is done too: `spread_out`.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from small import draw, small_config, small_policy, small_prompts

from unigrpo.checkpoint import load_training_state, weights_digest
from unigrpo.config import merge
from unigrpo.distributed import World, is_sharded, join, leave, local
from unigrpo.rollout import BagelPolicy
from unigrpo.schema import Config
from unigrpo.seeding import generator
from unigrpo.sft import Example, collate, supervised_optimizers, train_supervised
from unigrpo.stages.loading import DTYPES, restore_progress, save_progress, spread
from unigrpo.tally import first_bad_gradient
from unigrpo.train import train
from unigrpo.types import Reward, Rollouts
from unigrpo.update import optimizer_step, rl_optimizer, trainable_experts
from unigrpo.worlds.shapes import caption_text, random_scene, render

STEPS, KEPT = 5, 2  # of a run, and those after which its training state is kept


def steps_config(micro_batch: int, **changes) -> Config:
    """Four prompts of four siblings in two updates; sections may be changed."""
    config = small_config(
        rollout={"max_thinking_tokens": 8, "prompts_per_step": 4, "group_size": 4},
        train={"num_steps": STEPS, "micro_batch": micro_batch, "monitor_every": 2, "updates_per_rollout": 2},
        optim={"understanding_lr": 5e-4, "generation_lr": 4e-4, "warmup": 0, "eps": 1e-5},
        credit={"std": "batch"}, reward={"max_missing": 1.0},
        sft={"steps": STEPS, "texts_per_step": 8, "micro_batch": micro_batch})
    return Config(**merge(config.model_dump(), changes, {}, Path()))


def brightness(rollouts: Rollouts) -> list[Reward]:
    """Some reward of image and thinking, one of them missing."""
    value = rollouts.image.final_latents.mean(dim=(1, 2)) + 0.1 * rollouts.text.lengths
    missing = [p.id < "4" and i % rollouts.group_size == 1 for i, p in enumerate(rollouts.prompts)]
    return [Reward("shapes_graded", torch.where(torch.tensor(missing), float("nan"), value))]


def policy_of(config: Config, world: World, sharded: bool) -> BagelPolicy:
    """The small policy in RL's precision, its weights whole or this process's rows of them."""
    dtype = DTYPES[config.train.precision]
    policy = small_policy(config)
    if sharded:
        return spread(policy, world, None if dtype == torch.float32 else dtype)
    policy.model.to(dtype)
    return policy


def whole(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """All rows of a tensor, of numbers that `dtype` holds."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor.clone()).to(dtype)


def reinforce(world: World, config: Config, *, sharded: bool = False, keep: Path | None = None,
              begin: Path | None = None) -> tuple[dict[str, torch.Tensor], list, list[dict[str, float]]]:
    """RL: first gradients and last weights, what was sampled, and the metrics of every step.

    Args:
        keep: where the training state after KEPT steps goes. begin: a folder with one to go on from.
    """
    prompts, policy = small_prompts(12), policy_of(config, world, sharded)
    experts = trainable_experts(policy.model, config.train.experts)
    policy.freeze_reference([name for parameters in experts.values() for name in parameters])
    optimizer, start = rl_optimizer(experts, config.optim), 0
    if begin is not None:
        state, tensors = load_training_state(begin)
        restore_progress(policy, [optimizer], tensors)
        start = state["step"]
        assert weights_digest(tensors["extra"]) == state["reference"]
    if config.train.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    found: dict[str, torch.Tensor] = {}
    sampled, rows = [], []

    def keep_first(optimizer, *_):
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if f"gradient/{name}" not in found:
                    found[f"gradient/{name}"] = whole(parameter.grad)

    def log(step: int, metrics: dict[str, float], rollouts: Rollouts, rewards: list[Reward]) -> None:
        rows.append(metrics)
        image, text = rollouts.image.final_latents.double().sum(dim=(1, 2)).tolist(), rollouts.text
        sampled.extend([step, record.id, i % rollouts.group_size, text.tokens[i, :text.lengths[i]].tolist(), image[i]]
                       for i, record in enumerate(rollouts.prompts))

    def save(step: int) -> None:
        if keep is not None and step + 1 == KEPT:
            save_progress(keep, step + 1, policy, [optimizer], lambda extra: {"reference": weights_digest(extra)}, world)

    optimizer.register_step_pre_hook(keep_first)
    train(policy, optimizer, lambda step: [prompts[(4 * step + i) % 12] for i in range(4)], brightness, config,
          draw=partial(generator, 0), log=log, save=save, start_step=start, world=world)
    policy.settle()
    found |= {f"weight/{name}": whole(p.detach(), DTYPES[config.train.precision])
              for name, p in policy.model.named_parameters() if p.requires_grad}
    return found, sorted(row for part in world.gather(sampled) for row in part), rows


def supervise(world: World, config: Config, *, sharded: bool = False) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Supervised training: the last weights and the metrics of every step."""
    policy, rows = policy_of(small_config(), world, sharded), []

    def batch(step: int):
        rng = np.random.default_rng(step)
        scenes = [random_scene(rng) for _ in range(8)]
        texts = [Example((), caption_text(scene, rng) if i % 3 else None) for i, scene in enumerate(scenes)]
        return collate(policy, texts, render(scenes, rng), rng, images_per_text=2)

    train_supervised(policy, supervised_optimizers(policy.model, config.sft, world), batch, config.sft,
                     log=lambda step, metrics: rows.append(metrics), save=lambda step: None, world=world)
    policy.settle()
    return {f"supervised/{name}": whole(p.detach()) for name, p in policy.model.named_parameters()}, rows


def write(folder: Path, world: World, tensors: dict[str, torch.Tensor], rows: dict[str, list]) -> None:
    """One run's results, the same in all processes."""
    digests = world.gather(float(sum(t.double().abs().sum() for t in tensors.values())))
    assert len(set(digests)) == 1, "the processes hold different weights"
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "tensors.safetensors")
        (folder / "rows.json").write_text(json.dumps(rows))


def run(folder: Path, config: Config, world: World, **options) -> None:
    """RL and supervised training, into a folder. options: of `reinforce`."""
    tensors, sampled, rows = reinforce(world, config, **options)
    more, supervised_rows = supervise(world, config, sharded=options.get("sharded", False))
    write(folder, world, tensors | more, {"sampled": sampled, "rl": rows, "supervised": supervised_rows})


def uneven(world: World, config: Config) -> dict[str, torch.Tensor]:
    """Every process samples, replays and checks its own rollouts, whose thinkings are 1 token long in the first and up to 60 in
    the second, as they are with whole weights."""
    limit = (1, 60)[world.rank]
    sampling = config.rollout.model_copy(update={"max_thinking_tokens": limit})
    found = []
    for sharded in (True, False):
        policy = policy_of(config, world, sharded)
        trainable_experts(policy.model, config.train.experts)
        rollouts = policy.generate(small_prompts(2 + world.rank), group_size=2, sampling=sampling, generators=draw)
        replay = policy.replay(rollouts)
        (replay.text_log_probs.sum() + replay.velocities.square().sum()).backward()
        found.append((rollouts.text.tokens, rollouts.image.final_latents, replay.text_log_probs.detach()))
    assert found[0][0].shape[1] == found[1][0].shape[1] <= limit
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)
    return {"lengths": world.gather_rows(torch.tensor([float(found[0][0].shape[1])]))}


def not_finite(world: World, config: Config) -> dict[str, torch.Tensor]:
    """A gradient that is not finite in the second process's rows alone: no process steps, and it is named there."""
    policy = policy_of(config, world, True)
    experts = trainable_experts(policy.model, config.train.experts)
    optimizer = rl_optimizer(experts, config.optim)
    rollouts = policy.generate(small_prompts(1), group_size=2, sampling=config.rollout, generators=draw)
    policy.replay(rollouts).text_log_probs.sum().backward()
    name, parameter = next(iter(experts["understanding"].items()))
    if world.rank == 1:
        local(parameter.grad)[0] = float("nan")
    before = [local(p.detach()).clone() for group in optimizer.param_groups for p in group["params"]]
    assert first_bad_gradient(optimizer) == (f"the gradient of {name}" if world.rank == 1 else "")
    stats = optimizer_step(optimizer, 1.0, 1.0, world)
    after = [local(p.detach()) for group in optimizer.param_groups for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"skipped": world.gather_rows(torch.tensor([stats["optim/skipped"]]))}


def spread_out(folder: Path, micro_batch: int, world: World, alone: Path) -> None:
    """All that sharded weights are to do: train, in bfloat16 too, go on from one process's state, sample at any length."""
    config = steps_config(micro_batch, sft={"optimizer": "adamw"}, train={"activation_checkpointing": True})
    run(folder, config, world, sharded=True, keep=folder / "resume")
    resumed, sampled, rows = reinforce(world, config, sharded=True, begin=alone / "resume")
    write(folder / "resumed", world, resumed, {"sampled": sampled, "rl": rows})
    half = steps_config(micro_batch, train={"precision": "bf16", "num_steps": 2, "max_mismatch": {"text": 1.0, "image": 1e9}})
    for name, sharded in (("half", True), ("half_replicated", False)):
        tensors, sampled, rows = reinforce(world, half, sharded=sharded, keep=folder / name / "resume")
        write(folder / name, world, tensors, {"sampled": sampled, "rl": rows})
    write(folder / "uneven", world, uneven(world, config) | not_finite(world, config), {})


def main(folder: Path, micro_batch: int, alone: Path | None) -> None:
    """What this process does."""
    torch.set_num_threads(1)
    world = join(int(os.environ["WORLD_SIZE"]), "cpu")
    if alone is None:
        run(folder, steps_config(micro_batch), world)
    else:
        spread_out(folder, micro_batch, world, alone)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3:] else None)
