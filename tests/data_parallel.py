"""A few steps of RL and of supervised training, by one process or by several, on every process whole weights or its rows:
`data_parallel.py FOLDER MICRO_BATCH [sharded] [SETTINGS]`, the settings as JSON: sections of the config.

The main process writes what all of them sampled, the first gradients and the last weights.
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
from small import small_config, small_policy, small_prompts

from unigrpo.distributed import World, is_sharded, join, leave
from unigrpo.rollout import BagelPolicy
from unigrpo.schema import Config
from unigrpo.seeding import generator
from unigrpo.sft import Example, collate, supervised_optimizers, train_supervised
from unigrpo.train import train
from unigrpo.types import Reward, Rollouts
from unigrpo.update import rl_optimizer, trainable_experts
from unigrpo.worlds.shapes import caption_text, random_scene, render

STEPS = 5


def steps_config(micro_batch: int, **changes) -> Config:
    """Four prompts of four siblings in two updates, with changes to single sections."""
    config = whole_config(micro_batch)
    return config.model_copy(update={name: getattr(config, name).model_copy(update=change) for name, change in changes.items()})


def whole_config(micro_batch: int) -> Config:
    """See `steps_config`."""
    return small_config(rollout={"max_thinking_tokens": 8, "prompts_per_step": 4, "group_size": 4},
                        train={"num_steps": STEPS, "micro_batch": micro_batch, "monitor_every": 2, "updates_per_rollout": 2},
                        optim={"understanding_lr": 5e-4, "generation_lr": 4e-4, "warmup": 0, "eps": 1e-5},
                        credit={"std": "batch"}, reward={"max_missing": 1.0},
                        sft={"steps": STEPS, "texts_per_step": 8, "micro_batch": micro_batch})


def brightness(rollouts: Rollouts) -> list[Reward]:
    """Some reward of image and thinking, one of them missing."""
    value = rollouts.image.final_latents.mean(dim=(1, 2)) + 0.1 * rollouts.text.lengths
    missing = [p.id < "4" and i % rollouts.group_size == 1 for i, p in enumerate(rollouts.prompts)]
    return [Reward("shapes_graded", torch.where(torch.tensor(missing), float("nan"), value))]


def policy_of(config: Config, world: World, sharded: bool) -> BagelPolicy:
    """The small policy in RL's precision, its weights whole or this process's rows."""
    policy = small_policy(config)
    rounding = torch.bfloat16 if config.train.precision == "bf16" else None
    if sharded:
        from unigrpo.sharding import ShardedPolicy

        return ShardedPolicy(policy, world, rounding=rounding)
    policy.model.to(rounding)
    return policy


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.clone()


def reinforce(world: World, config: Config, sharded: bool) -> tuple[dict[str, torch.Tensor], list, list[dict[str, float]]]:
    """RL: first gradients and last weights, what was sampled, and the metrics of every step."""
    prompts, policy = small_prompts(12), policy_of(config, world, sharded)
    experts = trainable_experts(policy.model, config.train.experts)
    policy.freeze_reference([name for parameters in experts.values() for name in parameters])
    optimizer = rl_optimizer(experts, config.optim)
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

    optimizer.register_step_pre_hook(keep_first)
    train(policy, optimizer, lambda step: [prompts[(4 * step + i) % 12] for i in range(4)], brightness, config,
          draw=partial(generator, 0), log=log, save=lambda step: None, world=world)
    policy.settle()
    found |= {f"weight/{name}": whole(p.detach()) for name, p in policy.model.named_parameters() if p.requires_grad}
    return found, sorted(row for part in world.gather(sampled) for row in part), rows


def supervise(world: World, config: Config, sharded: bool) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Supervised training: the last weights and the metrics of every step."""
    policy, rows = policy_of(config.model_copy(update={"train": small_config().train}), world, sharded), []

    def batch(step: int):
        rng = np.random.default_rng(step)
        scenes = [random_scene(rng) for _ in range(8)]
        texts = [Example((), caption_text(scene, rng) if i % 3 else None) for i, scene in enumerate(scenes)]
        return collate(policy, texts, render(scenes, rng), rng, images_per_text=2)

    train_supervised(policy, supervised_optimizers(policy.model, config.sft, world), batch, config.sft,
                     log=lambda step, metrics: rows.append(metrics), save=lambda step: None, world=world)
    policy.settle()
    return {f"supervised/{name}": whole(p.detach()) for name, p in policy.model.named_parameters()}, rows


def run(folder: Path, micro_batch: int, processes: int, sharded: bool = False, **changes) -> None:
    """Everything, into a folder."""
    torch.set_num_threads(1)
    world, config = join(processes, "cpu"), steps_config(micro_batch, **changes)
    tensors, sampled, rows = reinforce(world, config, sharded)
    more, supervised_rows = supervise(world, config, sharded)
    digests = world.gather(float(sum(t.double().abs().sum() for t in (tensors | more).values())))
    assert len(set(digests)) == 1, "the processes hold different weights"
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in (tensors | more).items()}, folder / "tensors.safetensors")
        (folder / "rows.json").write_text(json.dumps({"sampled": sampled, "rl": rows, "supervised": supervised_rows}))
    leave()


if __name__ == "__main__":
    asked = sys.argv[3:]
    settings = json.loads(asked[-1]) if asked and asked[-1] != "sharded" else {}
    run(Path(sys.argv[1]), int(sys.argv[2]), int(os.environ.get("WORLD_SIZE", "1")), "sharded" in asked, **settings)
