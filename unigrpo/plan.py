"""What a run will do, before it does it: prompts, images, updates, parameters, memory, seconds and cost.

Seconds come from a one-step probe on this machine for small models, and from the roofline of a named GPU for large ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unigrpo.config import Config
from unigrpo.evaluate import GRID
from unigrpo.footprint import USABLE, Case, Sizes, adapter_count, fits, layer_sizes, memory, peak, refuse, warmup_memory
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.roofline import guided_calls, window_steps

if TYPE_CHECKING:
    from unigrpo.roofline import Work

MIB = 1024**2
PROBE_LIMIT = 50_000_000  # parameters up to which the probe runs here
PEAK = "peak (sampling or updating)"
PROMPT_TOKENS = 64  # of system and user prompt, where nobody says how many


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    Args:
        counts: name -> how many. memory: part -> bytes of RL in one process. seconds: stage -> estimate, or empty.
    """

    counts: dict[str, int]
    memory: dict[str, float]
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
    model = MoTConfig(vocab_size=vocabulary, **config.model.model_dump())
    optimised = adapter_count(config, model) if config.lora.rank else sum(trained[name] for name in train.experts)
    group = rollout.group_size
    calls = rollout.num_steps if rollout.guidance_scale <= 1 else guided_calls(
        rollout.num_steps, rollout.shift, rollout.guidance_interval)
    rollouts = rollout.prompts_per_step * group
    counts = {
        "parameters": total, "parameters, understanding experts": understanding,
        "parameters, generation experts": generation, "parameters trained by RL": optimised,
        "prompts a step": rollout.prompts_per_step, "rollouts a prompt": group, "images a step": rollouts,
        "updates a step": train.updates_per_rollout, "rollouts an update": rollouts // train.updates_per_rollout,
        "micro-batches an update": max(1, rollouts // train.updates_per_rollout // train.micro_batch),
        "model calls an image": calls, "trained denoising steps an image": window_steps(config),
        "thinking tokens at most": rollout.max_thinking_tokens, "steps": train.num_steps,
        "prompts in all": train.num_steps * rollout.prompts_per_step, "images in all": train.num_steps * rollouts,
        "updates in all": train.num_steps * train.updates_per_rollout,
        "evaluation images a checkpoint": len(GRID) * evaluation.prompts * evaluation.images_per_prompt,
    }
    case = Case(config, model, model_sizes(config, vocabulary), 1, PROMPT_TOKENS, rollout.max_thinking_tokens)
    seconds = measure(config) if probe and total <= PROBE_LIMIT else {}
    return Plan(counts, memory(case), seconds)


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
    lines += [f"  {name:<34}{value / MIB:>18,.1f}" for name, value in plan.memory.items() if value]
    lines += [f"  {PEAK:<34}{peak(plan.memory) / MIB:>18,.1f}", ""]
    if plan.seconds:
        lines += [f"seconds on this machine, {config.compute.threads} threads (from one step of each, fresh weights)"]
        lines += [f"  {name:<34}{duration(value):>18}" for name, value in plan.seconds.items()]
    else:
        lines += [f"no time estimate: without --no-probe, models of up to {PROBE_LIMIT:,} parameters are timed here"]
    return "\n".join(lines)


@dataclass(frozen=True)
class GpuPlan:
    """A run on some GPUs.

    Args:
        name: of unigrpo.roofline.GPUS. gpus: how many. price: of one GPU for an hour, any currency; None if unknown.
        memory: part -> bytes on each GPU. peak: bytes. phases: (stage, phase, seconds of one step or of the stage).
        hours: stage -> wall-clock hours. utilisation: share of the GPUs' peak arithmetic that a training step reaches.
        images: drawn in all of RL.
        warmup: bytes on each GPU in the sft stage. usable: bytes of a GPU that a stage may take.
    """

    name: str
    gpus: int
    price: float | None
    memory: dict[str, float]
    peak: float
    phases: tuple[tuple[str, str, float], ...]
    hours: dict[str, float]
    utilisation: float
    images: int
    warmup: float
    usable: float

    @property
    def gpu_hours(self) -> float:
        """Of all stages together."""
        return self.gpus * sum(self.hours.values())


def gpu_plan(config: Config, *, vocabulary: int, gpu: str, gpus: int, price: float | None = None,
             prompt: int = PROMPT_TOKENS, thinking: int | None = None) -> GpuPlan:
    """Memory and time of a run on GPUs, from the roofline; parameters' parts are sharded, rows are split evenly.

    RL is refused where it does not fit. Of sft the plan says whether it does: RL may start from a checkpoint made elsewhere.

    Args:
        prompt, thinking: tokens on average; thinking is rollout.max_thinking_tokens by default, an upper bound.
    Raises: ValueError for an unknown GPU, a number of GPUs that does not divide the rollouts, or a run that does not fit:
        the message names the largest parts and the nearest settings that fit.
    """
    from unigrpo.roofline import GPUS, Loads, evaluation_work, rollout_phases, training_phases, warmup_work

    if gpu not in GPUS:
        raise ValueError(f"--gpu must be one of {sorted(GPUS)}, got {gpu!r}")
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    if gpus < 1 or rollouts % gpus:
        near = [n for n in range(1, rollouts + 1) if rollouts % n == 0]
        raise ValueError(f"--gpus={gpus} must divide a step's {rollouts} rollouts; the nearest that do are "
                         f"{sorted(sorted(near, key=lambda n: abs(n - gpus))[:2])}")
    model = MoTConfig(vocab_size=vocabulary, **config.model.model_dump())
    thinking = config.rollout.max_thinking_tokens if thinking is None else thinking
    case = Case(config, model, model_sizes(config, vocabulary), gpus, prompt, thinking)
    device = GPUS[gpu]
    if not fits(case, device):
        raise ValueError(refuse(case, device, gpu))
    loads = Loads(prompt, thinking, case.rows, case.batch)

    def seconds(phase: tuple[Work, int]) -> float:
        return phase[0].seconds(device) * phase[1]

    step = rollout_phases(config, model, loads) | training_phases(config, model, loads)
    spent = {name: seconds(phase) for name, phase in step.items()}
    flops = sum(work.flops * count for work, count in step.values())
    sample, samples = warmup_work(config, model, loads)
    drawn = {name: seconds(phase) / gpus for name, phase in evaluation_work(config, model, loads).items()}
    phases = (("sft", "a step", sample.seconds(device) * config.sft.texts_per_step / gpus),
              *(("train, a step", name, value) for name, value in spent.items()),
              *(("evaluate, a checkpoint", name, value) for name, value in drawn.items()))
    hours = {"sft": sample.seconds(device) * samples / gpus / 3600,
             "train": sum(spent.values()) * config.train.num_steps / 3600,
             "evaluate, base, sft and run": 3 * sum(drawn.values()) / 3600}
    return GpuPlan(gpu, gpus, price, memory(case), peak(memory(case)), phases, hours,
                   flops / sum(spent.values()) / device.flops, rollouts * config.train.num_steps, warmup_memory(case),
                   USABLE * device.memory)


def model_sizes(config: Config, vocabulary: int) -> Sizes:
    """Parameters by part, counted on the meta device."""
    from unigrpo.models.autoencoder import Autoencoder

    total, understanding, generation = model_parameters(config, vocabulary)
    trained = {"understanding": understanding, "generation": generation}
    autoencoder = 0
    if config.autoencoder is not None:
        values = config.autoencoder.model_dump(include={"latent_channels", "block_out_channels", "layers_per_block",
                                                        "norm_num_groups"})
        with torch.device("meta"):
            autoencoder = sum(p.numel() for p in Autoencoder(values).parameters())
    model = MoTConfig(vocab_size=vocabulary, **config.model.model_dump())
    tables = model.hidden_size * (model.max_latent_size**2 + (model.vit_max_patches**2 if model.vision else 0))
    return Sizes(total, total - tables, sum(trained[name] for name in config.train.experts), layer_sizes(model), autoencoder)


def show_gpu(plan: GpuPlan) -> str:
    """A plan on GPUs as text."""
    from unigrpo.roofline import BANDWIDTH_SHARE, COMPUTE_SHARE, GPUS

    gpu = GPUS[plan.name]
    lines = [f"on {plan.gpus} x {plan.name}: {gpu.flops / 1e12:.0f} TFLOP/s bfloat16, {gpu.bandwidth / 1e12:.2f} TB/s, "
             f"{gpu.memory / 1e9:.0f} GB each ({gpu.source})", "", "memory on each GPU, GB"]
    lines += [f"  {name:<34}{value / 1e9:>18,.2f}" for name, value in plan.memory.items() if value]
    lines += [f"  {PEAK:<34}{plan.peak / 1e9:>18,.2f}", f"  {'peak of the sft stage':<34}{plan.warmup / 1e9:>18,.2f}",
              *(["  which does not fit: lower sft.texts_per_step, take more GPUs, or start RL from a checkpoint",
                 "  that was warmed up elsewhere"] if plan.warmup > plan.usable else []), "",
              f"seconds, roofline at {COMPUTE_SHARE:.0%} of the arithmetic and {BANDWIDTH_SHARE:.0%} of the bandwidth"]
    lines += [f"  {f'{stage}: {name}':<44}{value:>8,.1f}" for stage, name, value in plan.phases]
    lines += [f"  a training step reaches {plan.utilisation:.0%} of the peak arithmetic", "", "hours"]
    lines += [f"  {stage:<34}{value:>18,.1f}" for stage, value in plan.hours.items()]
    lines += ["", f"images {plan.images:,}, GPU-hours {plan.gpu_hours:,.0f}"
              + ("" if plan.price is None else f", cost {plan.gpu_hours * plan.price:,.0f} at {plan.price:g} a GPU-hour")]
    return "\n".join(lines)


def vocabulary_size(config: Config, root: Path) -> int:
    """Of the scale's tokenizer: the imported checkpoint's (the released model's where it is not there yet), or the world's."""
    import json

    from unigrpo.worlds.shapes import vocabulary

    if config.base.checkpoint is None:
        return len(word_tokenizer(vocabulary()))
    path = root / config.base.checkpoint / "config.json"
    return int(json.loads(path.read_text())["vocab_size"]) if path.is_file() else MoTConfig().vocab_size


def plan_run(scale: str, run: str, root: Path, *, probe: bool = True, gpu: str | None = None, gpus: int | None = None,
             price: float | None = None, thinking: int | None = None) -> str:
    """The plan of a run, as text.

    Args:
        gpu, gpus: a name of unigrpo.roofline.GPUS and how many; by default, for a model too large to probe here, h200 and
            compute.resources.gpu. price: of a GPU-hour. thinking: tokens on average, at most rollout.max_thinking_tokens.
    Raises: ValueError where the params do not fit together, or into the GPUs.
    """
    from unigrpo.config import load_config

    config = load_config(scale, run=run, root=root)
    size = vocabulary_size(config, root)
    if thinking is not None and not 0 <= thinking <= config.rollout.max_thinking_tokens:
        raise ValueError(f"--thinking={thinking} must lie in [0, rollout.max_thinking_tokens="
                         f"{config.rollout.max_thinking_tokens}]")
    plan = make_plan(config, vocabulary=size, probe=probe and gpu is None)
    large = plan.counts["parameters"] > PROBE_LIMIT
    if gpu is None and not large:
        return show(config, plan)
    there = gpu_plan(config, vocabulary=size, gpu=gpu or "h200", gpus=config.compute.resources.gpu if gpus is None else gpus,
                     price=price, thinking=thinking)
    head = show(config, plan).split("\nmemory, MiB")[0]
    return f"{head}\n{show_gpu(there)}"
