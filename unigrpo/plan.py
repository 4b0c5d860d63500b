"""What a run will do, before it does it: prompts, images, updates, parameters, memory, seconds and cost.

Seconds come from a one-step probe on this machine for small models, and from the roofline of a named GPU for large ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unigrpo.config import Config
from unigrpo.footprint import (
    MOMENTS,
    USABLE,
    Case,
    Sizes,
    adapter_count,
    evaluation_memory,
    fits,
    is_spread,
    layer_sizes,
    memory,
    peak,
    refuse,
    warmup_gpus,
    warmup_memory,
    warmup_rows,
    worst,
)
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.roofline import drawn_sets, rollout_calls, window_steps
from unigrpo.schema_benchmarks import SHAPES

if TYPE_CHECKING:
    from unigrpo.roofline import Work
    from unigrpo.stepmodel import Step

MIB = 1024**2
PROBE_LIMIT = 100_000_000  # parameters up to which a few steps run here: minutes on two cores for the 64M of `small`
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
    rollout, train = config.rollout, config.train
    total, understanding, generation = model_parameters(config, vocabulary)
    trained = {"understanding": understanding, "generation": generation}
    model = MoTConfig(vocab_size=vocabulary, **config.model.model_dump())
    optimised = adapter_count(config, model) if config.lora.rank else sum(trained[name] for name in train.experts)
    group = rollout.group_size
    rollouts = rollout.prompts_per_step * group
    counts = {
        "parameters": total, "parameters, understanding experts": understanding,
        "parameters, generation experts": generation, "parameters trained by RL": optimised,
        "prompts a step": rollout.prompts_per_step, "rollouts a prompt": group, "images a step": rollouts,
        "updates a step": train.updates_per_rollout, "rollouts an update": rollouts // train.updates_per_rollout,
        "micro-batches an update": max(1, rollouts // train.updates_per_rollout // train.micro_batch),
        "model calls an image": rollout_calls(rollout), "trained denoising steps an image": window_steps(config),
        "thinking tokens at most": rollout.max_thinking_tokens, "steps": train.num_steps,
        "prompts in all": train.num_steps * rollout.prompts_per_step, "images in all": train.num_steps * rollouts,
        "updates in all": train.num_steps * train.updates_per_rollout,
        "evaluation images a checkpoint": sum(drawn.total for drawn in drawn_sets(config).values()),
    }
    case = Case(config, model, model_sizes(config, vocabulary), 1, PROMPT_TOKENS, rollout.max_thinking_tokens)
    return Plan(counts, memory(case), probed(config, total) if probe and total <= PROBE_LIMIT else {})


def probed(config: Config, parameters: int) -> dict[str, float]:
    """Seconds of every stage, measured here; says beforehand what is going on."""
    from unigrpo.probe import measure

    print(f"plan: timing a few steps of {parameters / 1e6:,.1f}M parameters here; --no-probe leaves it out", file=sys.stderr,
          flush=True)
    return measure(config)


def show_counts(config: Config, plan: Plan) -> str:
    """What the plan counts, as text."""
    title = f"scale {config.scale}" + (f", run {config.run}" if config.run else "")
    return "\n".join([title, "", *(f"  {name:<48}{value:>18,}" for name, value in plan.counts.items())])


def show(config: Config, plan: Plan) -> str:
    """The plan of a run on this machine as text."""
    from unigrpo.progress import duration
    from unigrpo.stages.loading import compute_device

    lines = [show_counts(config, plan), "", "memory of training, MiB"]
    lines += [f"  {name:<48}{amount(value / MIB):>18}" for name, value in labelled(plan.memory)]
    lines += [""]
    if plan.seconds:
        where = torch.cuda.get_device_name() if compute_device(config.compute.device).type == "cuda" else (
            f"this machine with compute.threads={config.compute.threads}")
        lines += [f"time on {where}, from a few steps of each with fresh weights, h:mm:ss"]
        lines += [f"  {name:<48}{duration(value):>18}" for name, value in plan.seconds.items()]
    elif plan.counts["parameters"] > PROBE_LIMIT:
        lines += [f"no time estimate: models of up to {PROBE_LIMIT:,} parameters are timed here; --gpu plans for a GPU"]
    else:
        lines += ["no time estimate: --no-probe"]
    return "\n".join(lines)


def labelled(parts: dict[str, float]) -> list[tuple[str, float]]:
    """Parts of the memory with the moments they are alive in, and the peak with its own."""
    lines = []
    for name, value in parts.items():
        moments = [moment for moment, names in MOMENTS.items() if name in names]
        if value:
            lines.append((f"{', '.join(moments) or 'always'}: {name}", value))
    order = ["always", *MOMENTS]
    lines.sort(key=lambda line: order.index(line[0].split(":")[0].split(",")[0]))
    return [*lines, (f"peak, while {worst(parts)}", peak(parts))]


def amount(value: float) -> str:
    """A number with three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class GpuPlan:
    """A run on some GPUs.

    Args:
        name: of unigrpo.roofline.GPUS. gpus: how many. price: of one GPU for an hour, any currency; None if unknown.
        memory: part -> bytes on each GPU. peak: bytes. phases: (stage, phase, seconds of one step or of the stage).
        hours: stage -> wall-clock hours. utilisation: share of the GPUs' peak arithmetic that a training step reaches.
        images: drawn in all of RL.
        warmup: bytes on each GPU in the sft stage. warmup_gpus: the fewest that hold it; None: more than 64.
        evaluation: bytes on a GPU that evaluates. usable: bytes of a GPU that a stage may take.
        tokens: of prompt and thinking that time and memory are told for.
        at_scale: a training step on 8, 64 and 512 GPUs, see unigrpo.stepmodel. group_size: rollouts a prompt.
        layout: of the weights on several, in words.
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
    warmup_gpus: int | None
    evaluation: float
    usable: float
    tokens: tuple[int, int]
    at_scale: tuple[Step, ...] = ()
    group_size: int = 1
    layout: str = ""

    @property
    def gpu_hours(self) -> float:
        """Of all stages together."""
        return self.gpus * sum(self.hours.values())


def gpu_plan(config: Config, *, vocabulary: int, gpu: str, gpus: int, price: float | None = None,
             prompt: int = PROMPT_TOKENS, thinking: int | None = None) -> GpuPlan:
    """Memory and time of a run on GPUs, from the roofline; parameters' parts are spread, rows are split evenly.

    RL is refused where it does not fit. Of sft the plan says whether it does: RL may start from a checkpoint made elsewhere.

    Args:
        prompt, thinking: tokens on average; thinking is rollout.max_thinking_tokens by default, an upper bound.
    Raises: ValueError for an unknown GPU, a number of GPUs that does not divide the rollouts, or a run that does not fit:
        the message names the largest parts and the nearest settings that fit.
    """
    from unigrpo.roofline import GPUS, Loads, evaluation_work, rollout_phases, training_phases, warmup_phases
    from unigrpo.stepmodel import at_scale

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
    warmup = {name: seconds(phase) for name, phase in warmup_phases(
        config, model, Loads(prompt, thinking, *warmup_rows(config, gpus))).items()}
    drawn = {name: seconds(phase) / gpus for name, phase in evaluation_work(config, model, loads).items()}
    phases = (*(("sft, a step", name, value) for name, value in warmup.items()),
              *(("train, a step", name, value) for name, value in spent.items()),
              *(("evaluate, a checkpoint", name, value) for name, value in drawn.items()))
    hours = {"sft": sum(warmup.values()) * config.sft.steps / 3600,
             "train": sum(spent.values()) * config.train.num_steps / 3600,
             "evaluate (base, sft and the run)": 3 * sum(drawn.values()) / 3600}
    return GpuPlan(gpu, gpus, price, memory(case), peak(memory(case)), phases, hours,
                   flops / sum(spent.values()) / device.flops, rollouts * config.train.num_steps, warmup_memory(case),
                   warmup_gpus(case, device), evaluation_memory(case), USABLE * device.memory, (prompt, thinking),
                   tuple(at_scale(case, device, thinking=thinking)), config.rollout.group_size, layout_words(case))


def layout_words(case: Case) -> str:
    """How RL's weights lie on several GPUs, and what params must say for it."""
    if not is_spread(case):
        return "Every GPU holds all weights in RL: adapters are trained, which are small (compute.sharding: none)."
    told = "" if case.config.compute.sharding == "full" else "; set it, or each holds all of it"
    return f"Weights, gradients, moments and reference are spread over them (compute.sharding: full{told})."


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
    from unigrpo.stepmodel import show_steps

    gpu, (prompt, thinking) = GPUS[plan.name], plan.tokens
    lines = [f"on {plan.gpus} x {plan.name}: {gpu.flops / 1e12:.0f} TFLOP/s bfloat16, {gpu.bandwidth / 1e12:.2f} TB/s, "
             f"{gpu.memory / 1e9:.0f} GB each ({gpu.source}),",
             f"with {prompt} tokens of prompt and {thinking:,} of thinking in every rollout (--thinking: on average)"]
    if plan.gpus > 1:
        lines += [plan.layout]
    lines += ["", "memory of training on each GPU, GB", *(f"  {name:<48}{amount(value / 1e9):>18}"
                                                           for name, value in labelled(plan.memory))]
    lines += ["", f"peaks of the stages on each GPU, of {plan.usable / 1e9:.1f} GB that may be used, GB"]
    lines += [f"  {name:<48}{amount(value / 1e9):>18}"
              for name, value in (("sft", plan.warmup), ("train", plan.peak), ("evaluate", plan.evaluation))]
    lines += [f"  {line}" for line in _misfits(plan)]
    lines += ["", f"seconds, roofline at {COMPUTE_SHARE:.0%} of the arithmetic and {BANDWIDTH_SHARE:.0%} of the bandwidth"]
    lines += [f"  {f'{stage}: {name}':<48}{amount(value):>18}" for stage, name, value in plan.phases if value]
    lines += [f"  a training step reaches {plan.utilisation:.0%} of the peak arithmetic", "", "hours"]
    lines += [f"  {stage:<48}{amount(value):>18}" for stage, value in plan.hours.items()]
    lines += ["", "one training step of so many GPUs, on paper, with the configuration that is fastest there; seconds",
              *show_steps(plan.at_scale, plan.group_size)]
    cost = "--price tells the cost" if plan.price is None else (
        f"cost {amount(plan.gpu_hours * plan.price)} at {plan.price:g} a GPU-hour")
    return "\n".join([*lines, "", f"images {plan.images:,}, GPU-hours {amount(plan.gpu_hours)}, {cost}"])


def _misfits(plan: GpuPlan) -> list[str]:
    """What to do about the stages that do not fit; training does, or there would be no plan."""
    lines = []
    if plan.warmup > plan.usable:
        least = "more than 64 GPUs" if plan.warmup_gpus is None else f"--gpus {plan.warmup_gpus}"
        lines += [f"sft does not fit: it needs {least}, or start RL from a checkpoint that was warmed up elsewhere",
                  "(docs/scales.md)"]
    if plan.evaluation > plan.usable:
        lines += ["evaluate does not fit: lower evaluate.batch in params"]
    return lines


def absent(config: Config, root: Path) -> list[str]:
    """What a run reads and is not there yet, with where it comes from."""
    places = ((config.base.checkpoint, "base.checkpoint; `unigrpo import-bagel` writes it"),
              (config.sft.data, "sft.data; the examples of the warm-up, docs/scales.md"), *benchmark_files(config))
    return [f"not there yet: {place} ({source})" for place, source in places if place and not (root / place).exists()]


def benchmark_files(config: Config) -> list[tuple[str | None, str]]:
    """(path, where from) of the files that the benchmarks read."""
    settings, found = config.evaluate, list[tuple[str | None, str]]()
    compbench = ("prompts", "parses", "blip", "clip", "detector", "labels", "depth", "canary")
    for name, page, keys in (("geneval", "scoring", ("metadata", "detector", "colors", "canary")),
                             ("t2i_compbench", "scoring_t2i", compbench)):
        section = getattr(settings, name)
        if name in settings.benchmarks and section is not None:
            found += [(path, f"evaluate.{name}.{key}; docs/{page}.md") for key in keys
                      if (path := getattr(section, key)) != SHAPES]
    return found


def vocabulary_size(config: Config, root: Path) -> int:
    """Of the scale's tokenizer: the imported checkpoint's (the released model's where it is not there yet), or the world's."""
    from unigrpo.tensorfiles import read_json
    from unigrpo.worlds.shapes import vocabulary

    if config.base.checkpoint is None:
        return len(word_tokenizer(vocabulary()))
    path = root / config.base.checkpoint / "config.json"
    if not path.is_file():
        return MoTConfig().vocab_size
    size = read_json(path).get("vocab_size")
    if not isinstance(size, int):
        raise ValueError(f"{path} must have a number under vocab_size, got {size!r}; import the checkpoint again")
    return size


def plan_run(scale: str, run: str, root: Path, *, probe: bool = True, gpu: str | None = None, gpus: int | None = None,
             price: float | None = None, thinking: int | None = None) -> str:
    """The plan of a run, as text.

    Args:
        gpu, gpus: a name of unigrpo.roofline.GPUS and how many. Without, a model that is too large to be timed here is
            planned for compute.resources.gpu h200s, unless compute.device is cpu.
        price: of a GPU-hour. thinking: tokens on average, at most rollout.max_thinking_tokens.
    Raises: ValueError where the params do not fit together, or into the GPUs.
    """
    from unigrpo.config import load_config

    config = load_config(scale, run=run, root=root)
    size = vocabulary_size(config, root)
    if thinking is not None and not 0 <= thinking <= config.rollout.max_thinking_tokens:
        raise ValueError(f"--thinking={thinking} must lie in [0, rollout.max_thinking_tokens="
                         f"{config.rollout.max_thinking_tokens}]")
    if price is not None and price < 0:
        raise ValueError(f"--price must not be negative, got {price:g}")
    plan = make_plan(config, vocabulary=size, probe=probe and gpu is None)
    there = config.compute.resources.gpu if gpus is None else gpus
    if gpu is None and plan.counts["parameters"] > PROBE_LIMIT and config.compute.device != "cpu":
        gpu = "h200"
    if gpu is None:
        given = {"--gpus": gpus, "--price": price, "--thinking": thinking}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"without --gpu this scale is planned for this machine, and {', '.join(unused)} would have no "
                             "effect; name a GPU, or leave it out")
        text = show(config, plan)
    else:
        on_gpus = gpu_plan(config, vocabulary=size, gpu=gpu, gpus=there, price=price, thinking=thinking)
        text = f"{show_counts(config, plan)}\n\n{show_gpu(on_gpus)}"
    return "\n".join([text, *(["", *lines] if (lines := absent(config, root)) else [])])
