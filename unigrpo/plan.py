"""What a run will do, before it does it: prompts, images, updates, parameters, memory, and seconds from a one-step probe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from unigrpo.config import Config
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel

MIB = 1024**2
PROBE_LIMIT = 50_000_000  # parameters up to which the probe runs here


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    Args:
        counts: name -> how many. memory: part -> bytes, fp32 master weights. seconds: stage -> estimate, or empty.
    """

    counts: dict[str, int]
    memory: dict[str, int]
    seconds: dict[str, float]


def model_parameters(config: Config, vocabulary: int) -> tuple[int, int, int]:
    """(all, understanding experts, generation experts); counted on the meta device, so nothing is allocated."""
    from unigrpo.update import expert_parameters

    with torch.device("meta"):
        model = MoTModel(MoTConfig(vocab_size=vocabulary, **config.model.model_dump()))
    experts = [sum(p.numel() for p in expert_parameters(model, name).values()) for name in ("understanding", "generation")]
    return sum(p.numel() for p in model.parameters()), experts[0], experts[1]


def make_plan(config: Config, *, vocabulary: int, probe: bool) -> Plan:
    """Counts and memory of the run, and with `probe` an estimate of its seconds measured on this machine."""
    rollout, train, evaluation = config.rollout, config.train, config.evaluate
    total, understanding, generation = model_parameters(config, vocabulary)
    trained = {"understanding": understanding, "generation": generation}
    optimised = sum(trained[name] for name in train.experts)
    group = rollout.group_size
    calls = 2 if rollout.guidance_scale > 1 else 1
    rollouts = rollout.prompts_per_step * group
    counts = {
        "parameters": total, "parameters, understanding experts": understanding,
        "parameters, generation experts": generation, "parameters trained by RL": optimised,
        "prompts a step": rollout.prompts_per_step, "rollouts a prompt": group, "images a step": rollouts,
        "updates a step": train.updates_per_rollout, "rollouts an update": rollouts // train.updates_per_rollout,
        "micro-batches an update": max(1, rollouts // train.updates_per_rollout // train.micro_batch),
        "model calls an image": rollout.num_steps * calls, "trained denoising steps an image":
            rollout.window.size if rollout.window.kind != "all" else rollout.window.range[1] - rollout.window.range[0],
        "thinking tokens at most": rollout.max_thinking_tokens, "steps": train.num_steps,
        "prompts in all": train.num_steps * rollout.prompts_per_step, "images in all": train.num_steps * rollouts,
        "updates in all": train.num_steps * train.updates_per_rollout,
        "evaluation images a checkpoint": 7 * evaluation.prompts * evaluation.images_per_prompt,
    }
    config_model = MoTConfig(vocab_size=vocabulary, **config.model.model_dump())
    image = config_model.grid[0] * config_model.grid[1]
    context = rollout.max_thinking_tokens + 32
    cache = 2 * config_model.num_hidden_layers * config_model.num_key_value_heads * config_model.head_dim * 4
    tokens = min(train.micro_batch, rollouts) * (context + rollout.window.size * (image + 2))
    # Kept for the backward pass, per token and layer: norms, q/k/v, attention, residuals (14 widths) and the MLP (4 inner).
    activation = config_model.num_hidden_layers * (14 * config_model.hidden_size + 4 * config_model.intermediate_size) * 4
    memory = {"weights": 4 * total, "gradients": 4 * optimised, "optimizer (two moments)": 8 * optimised,
              "reference (frozen copy)": 4 * optimised,
              "text and image caches of a rollout": rollouts * (context + image) * cache,
              "trajectories": rollouts * (4 * rollout.window.size + 1) * image * config_model.token_channels * 4,
              "activations of a micro-batch": tokens * activation}
    seconds = measure(config) if probe and total <= PROBE_LIMIT else {}
    return Plan(counts, memory, seconds)


def measure(config: Config) -> dict[str, float]:
    """Seconds of every stage, from one warm step of each kind with fresh weights on this machine."""
    from unigrpo.evaluate import draw_grid
    from unigrpo.evaluation.shapes import verdict_rows
    from unigrpo.seeding import generator
    from unigrpo.sft import supervised_optimizers, train_supervised
    from unigrpo.stages.base import caption_batch, fresh_policy
    from unigrpo.stages.train import rewards_of
    from unigrpo.train import train
    from unigrpo.update import rl_optimizer, trainable_experts
    from unigrpo.worlds.shapes import sample_record

    torch.set_num_threads(config.compute.threads)
    policy = fresh_policy(config)
    marks: list[float] = []
    policy.model.train()
    short = config.base.model_copy(update={"steps": 3})
    train_supervised(policy, supervised_optimizers(policy.model, config.base), partial(caption_batch, policy, config), short,
                     log=lambda step, metrics: marks.append(time.perf_counter()), save=lambda step: None)
    supervised = marks[-1] - marks[-2]
    prompts = [sample_record(generator(0, "plan", i)) for i in range(config.rollout.prompts_per_step)]
    experts = trainable_experts(policy.model, config.train.experts)
    policy.freeze_reference([name for parameters in experts.values() for name in parameters])
    two = config.model_copy(update={"train": config.train.model_copy(update={"num_steps": 2})})
    marks = []
    train(policy, rl_optimizer(experts, config.optim), lambda step: prompts, partial(rewards_of, policy, config), two,
          draw=partial(generator, 0), log=lambda *_: marks.append(time.perf_counter()), save=lambda step: None)
    step = marks[-1] - marks[-2]
    policy.model.eval()
    count = min(32, config.evaluate.prompts)
    records = [sample_record(generator(0, "plan-evaluate", i)) for i in range(count)]
    start = time.perf_counter()
    for batch in draw_grid(policy, records, config, samples=2, batch=config.evaluate.batch, seed=0):
        verdict_rows(batch.images, [r for r, _ in batch.rows], batch.texts, samples=[i for _, i in batch.rows], cfg=batch.cfg,
                     cell=batch.cell)
    image = (time.perf_counter() - start) / (count * 2)
    return {"base": supervised * config.base.steps, "sft": supervised * config.sft.steps,
            "train": step * config.train.num_steps,
            "evaluate, each checkpoint": image * config.evaluate.prompts * config.evaluate.images_per_prompt}


def show(config: Config, plan: Plan) -> str:
    """The plan as text."""
    from unigrpo.progress import duration

    title = f"scale {config.scale}" + (f", run {config.run}" if config.run else "")
    lines = [title, "", *(f"  {name:<34}{value:>18,}" for name, value in plan.counts.items()), "", "memory, MiB"]
    lines += [f"  {name:<34}{value / MIB:>18,.1f}" for name, value in plan.memory.items()]
    lines += [f"  {'sum':<34}{sum(plan.memory.values()) / MIB:>18,.1f}", ""]
    if plan.seconds:
        lines += [f"seconds on this machine, {config.compute.threads} threads (from one step of each, fresh weights)"]
        lines += [f"  {name:<34}{duration(value):>18}" for name, value in plan.seconds.items()]
    else:
        lines += [f"no time estimate: the probe runs models of up to {PROBE_LIMIT:,} parameters here"]
    return "\n".join(lines)


def plan_run(scale: str, run: str, root: Path, *, probe: bool = True) -> str:
    """The plan of a run, as text. Raises ValueError where the params do not fit together."""
    from unigrpo.config import load_config
    from unigrpo.worlds.shapes import vocabulary

    config = load_config(scale, run=run, root=root)
    return show(config, make_plan(config, vocabulary=len(word_tokenizer(vocabulary())), probe=probe))
