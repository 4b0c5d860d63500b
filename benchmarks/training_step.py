"""A whole training step, phase by phase, beside the serial reference in the same process and the floor of its matrix products.

    python benchmarks/training_step.py --scale tiny [--repeats 3] [--json FILE.json] [--write FILE.md]

Batched and serial steps take turns, so that a busy machine slows both; medians are shown, ratios first. The step is
unigrpo.train's own, in the middle of a run (neither its first nor a monitored one), with learning rates of 0, so that every
repeat does the same work. Exits 1 where a bound is missed. docs/benchmarks/training_step.md tells how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import phases
import torch
from pages import put
from phases import PHASES, ROLLOUT, UPDATE, Clock, Products, best, floor_seconds, measured_bandwidth
from serial import SerialPolicy
from torch import Tensor

import unigrpo.train
from unigrpo.config import Config, load_config
from unigrpo.journal import Journal
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator
from unigrpo.stages.session import save_picture
from unigrpo.stages.train import rewards_of, rl_start
from unigrpo.stages.watch import reward_functions
from unigrpo.tracking import Tracker
from unigrpo.types import Reward, Rollouts
from unigrpo.update import rl_optimizer, trainable_experts
from unigrpo.worlds.shapes import sample_record, vocabulary
from unigrpo.worlds.shapes.detect import forget

ROOT = Path(__file__).parents[1]
LOG_PROB_BOUND = 1e-4   # nats, of batched and serial log-probs of the same tokens and steps
GRADIENT_BOUND = 1e-3   # norm of the difference of both gradients, in norms of the serial one
SERIAL = {"tiny": {"rollout": 10.0, "update": 2.0, "step": 5.0}, "small": {"rollout": 6.0, "packed replay": 1.7},
          "bagel_7b": {"rollout": 4.0}}
"""Scale -> what must be so many times as fast as the serial reference."""
SHARES = {"tiny": {"reward": 0.05, "tracking and galleries": 0.03}}
ACCOUNTED = 0.95        # of a step's seconds lie in named phases
MATRIX_GOAL = 0.45      # of tiny's step on two cores are the matrix products alone; a goal, reported and not enforced
GPU_RATES = {(512, 0): ("rollout images/s", 2.0), (512, 256): ("step images/s", 0.7)}  # (pixels, thinking tokens), one H200
GPU_MEMORY = 0.10       # relative difference of measured and planned peak memory


class Onward(int):
    """A step to start with that equals none: every step is then one in the middle of a run."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return False


@dataclass
class Setting:
    """What is measured: a policy with random weights (or a checkpoint's), and everything a step of it takes."""

    config: Config
    policy: BagelPolicy
    optimizer: torch.optim.Optimizer
    prompts: Sequence[Any]
    synchronize: Callable[[], None]
    rewards: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.policy.model.device


@dataclass
class Outcome:
    """One measured step: seconds by phase, and the gradients of its updates where they were asked for."""

    clock: Clock
    rollouts: Rollouts
    gradients: list[dict[str, Tensor]]


def scale_config(scale: str, *, thinking: int | None = None, **rollout: Any) -> Config:
    """The scale's run `unigrpo`, with changes of its rollout."""
    config = load_config(scale, run="unigrpo", root=ROOT)
    if thinking is not None:
        rollout["max_thinking_tokens"] = thinking
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout),
                                     "train": config.train.model_copy(update={"num_steps": 2, "monitor_every": 1000})})


def make_setting(config: Config, *, device: torch.device, checkpoint: Path | None = None) -> Setting:
    """Random weights whose thinking never stops, so that every rollout is as long as it may be; or a checkpoint."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    prompts = [sample_record(generator(0, "benchmark-prompt", i)) for i in range(config.rollout.prompts_per_step)]
    if checkpoint is not None:
        policy, optimizer = rl_start(checkpoint, config)
    else:
        policy = random_policy(config, device)
        experts = trainable_experts(policy.model, config.train.experts)
        optimizer = rl_optimizer(experts, config.optim)
        if not config.lora.rank:
            policy.freeze_reference([name for parameters in experts.values() for name in parameters])
            for value in policy.reference_weights.values():  # or the penalty and its gradient were 0
                value.mul_(1.01)
    for group in optimizer.param_groups:
        group["peak_lr"] = 0.0
    if config.train.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.model.train()
    rewards = reward_functions(config) if all(name.startswith("shapes") for name in config.reward.weights) else {}
    return Setting(config, policy, optimizer, prompts, synchronize, rewards)


def random_policy(config: Config, device: torch.device) -> BagelPolicy:
    """The scale's model, autoencoder and adapters with random weights."""
    tokenizer = word_tokenizer(vocabulary())
    if device.type == "cuda" and config.scale == "bagel_7b":
        from bagel_7b_gpu import BAGEL_VOCABULARY
        from bagel_7b_gpu import random_policy as on_gpu

        return on_gpu(config, vocabulary_size=BAGEL_VOCABULARY, device=device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = MoTModel(MoTConfig(vocab_size=len(tokenizer), **config.model.model_dump())).to(device)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.05)  # zero at birth, which would draw the same image from any context
    autoencoder = None
    if config.autoencoder is not None:
        values = config.autoencoder.model_dump(include={"latent_channels", "block_out_channels", "layers_per_block",
                                                        "norm_num_groups"})
        autoencoder = Autoencoder({**values, "scaling_factor": 1.0, "shift_factor": 0.0}).to(device)
    policy = BagelPolicy(model, tokenizer, system_prompt=config.rollout.system_prompt, autoencoder=autoencoder)
    policy.special = replace(policy.special, eos=-1)                         # an id that is never drawn
    return policy


def drawn_rewards(clock: Clock, setting: Setting, rollouts: Rollouts) -> list[Reward]:
    """The run's rewards, timed, with other values: pictures of random weights all score alike, and would teach nothing."""
    forget()  # every repeat draws the same pictures
    with clock.phase("reward"):
        found = rewards_of(setting.policy, setting.rewards, rollouts)
    names = [reward.name for reward in found] or list(setting.config.reward.weights)
    return [Reward(name, torch.from_numpy(generator(0, "benchmark-reward", name).random(len(rollouts), dtype="float32")))
            for name in names]


@contextmanager
def captured(gradients: list[dict[str, Tensor]]) -> Iterator[None]:
    """Inside, a copy of the gradients is kept before every optimizer step."""
    own = unigrpo.train.move_weights

    def keep(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append({str(i): p.grad.detach().clone() for i, p in enumerate(parameters) if p.grad is not None})
        return own(optimizer, *args, **kwargs)

    unigrpo.train.move_weights = keep
    try:
        yield
    finally:
        unigrpo.train.move_weights = own


def run_step(setting: Setting, policy: BagelPolicy, config: Config, clock: Clock | None = None) -> Outcome:
    """One step of unigrpo.train, by phase."""
    clock, kept, gradients = clock or Clock(setting.synchronize), list[Rollouts](), list[dict[str, Tensor]]()
    with captured(gradients), clock.watching(policy):
        unigrpo.train.train(policy, setting.optimizer, lambda step: setting.prompts, partial(drawn_rewards, clock, setting),
                            config, draw=partial(generator, 0), save=lambda step: None, start_step=Onward(1),
                            log=lambda step, metrics, rollouts, *rest: kept.append(rollouts))
    return Outcome(clock, kept[-1], gradients)


def serial_config(config: Config) -> Config:
    """The same step with one rollout a forward."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})})


def compare(ours: Outcome, serial: Outcome, sampled: Rollouts) -> dict[str, float]:
    """How far batched and serial numbers are apart. `sampled`: by the serial policy. Raises AssertionError beyond the bounds.

    Trajectories whose every token is equal are compared; a token that rounding flipped is counted. Both updates took the same
    rollouts, so gradients must agree whatever was flipped.
    """
    width = max(ours.rollouts.text.tokens.shape[1], sampled.text.tokens.shape[1])
    ids = [torch.nn.functional.pad(r.text.tokens, (0, width - r.text.tokens.shape[1]), value=-1) *
           torch.nn.functional.pad(r.text.mask, (0, width - r.text.mask.shape[1])) for r in (ours.rollouts, sampled)]
    same = (ids[0] == ids[1]).all(dim=1)
    short = min(ours.rollouts.text.tokens.shape[1], sampled.text.tokens.shape[1])
    text = ours.rollouts.text.rollout_log_probs[same, :short] - sampled.text.rollout_log_probs[same, :short]
    image = ours.rollouts.image.rollout_log_probs[same] - sampled.image.rollout_log_probs[same]
    distances = []
    for mine, other in zip(ours.gradients, serial.gradients, strict=True):
        assert mine.keys() == other.keys()
        gap = sum(float((mine[name].double() - other[name].double()).square().sum()) for name in mine) ** 0.5
        distances.append(gap / sum(float(value.double().square().sum()) for value in other.values()) ** 0.5)
    found = {"rollouts with equal tokens": float(same.float().mean()), "text log-probs, nats": float(text.abs().max()),
             "image log-probs, nats": float(image.abs().max()), "gradients, relative": max(distances)}
    bound = LOG_PROB_BOUND if next(iter(ours.gradients[0].values())).dtype == torch.float32 else 0.1
    assert found["rollouts with equal tokens"] >= 0.95 or bound > LOG_PROB_BOUND, found
    assert max(found["text log-probs, nats"], found["image log-probs, nats"]) <= bound, found
    assert found["gradients, relative"] <= (GRADIENT_BOUND if bound == LOG_PROB_BOUND else 0.1), found
    return found


def tracking_seconds(setting: Setting, rollouts: Rollouts) -> float:
    """Of one step: its metrics into the tracker's journal, and its share of the pictures for people."""
    train = setting.config.train
    gallery_every = load_config(setting.config.scale, run="unigrpo", root=ROOT).train.gallery_every
    values = {f"part/quantity_{i}": 0.5 for i in range(60)}
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(Journal(Path(folder), "benchmark"))
        log = best(lambda: tracker.log_metrics(0, values), lambda: None, repeats=3, inner=20)
        rows = torch.arange(0, len(rollouts), rollouts.group_size)

        def pictures() -> None:
            for number, image in enumerate(setting.policy.decode(rollouts.image.final_latents[rows])):
                save_picture(image, Path(folder) / f"{number}.png")
        gallery = best(pictures, setting.synchronize, repeats=2, inner=1)
    assert train.gallery_every > 0
    return log + gallery / gallery_every


def packed_against_separate(setting: Setting, rollouts: Rollouts, window: int, repeats: int) -> dict[str, float]:
    """Replay with gradient and the penalty's replay without, of a micro-batch: packed, and with a forward for every step.

    Both have the same rows a forward, so packing alone is compared. Raises AssertionError if the gradients differ.
    """
    serial, model = SerialPolicy.of(setting.policy), setting.policy.model
    batch = rollouts.select(torch.arange(min(setting.config.train.micro_batch, len(rollouts))))
    assert batch.image.latents.shape[1] == window
    times: dict[str, list[float]] = {"packed": [], "separate": []}
    gradients: dict[str, list[Tensor]] = {}
    for _ in range(repeats + 1):
        for name, policy in (("packed", setting.policy), ("separate", serial)):
            model.zero_grad(set_to_none=True)
            setting.synchronize()
            start = phases.read_clock()
            with policy.reference(), torch.no_grad():
                reference = policy.replay(batch).velocities
            replay = policy.replay(batch)
            ((replay.velocities - reference).square().mean() + replay.text_log_probs.mean()).backward()
            setting.synchronize()
            times[name].append(phases.read_clock() - start)
            gradients[name] = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    gap = sum(float((a - b).double().square().sum()) for a, b in zip(*gradients.values(), strict=True)) ** 0.5
    size = sum(float(b.double().square().sum()) for b in gradients["separate"]) ** 0.5
    assert gap <= GRADIENT_BOUND * size or setting.device.type == "cuda", (gap, size)
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {"ratio": median["separate"] / median["packed"], "window": window, "rows": len(batch),
            "gradients, relative": gap / size, **{f"{name} s": value for name, value in median.items()}}


def bound(value: float, limit: float, kind: str) -> dict[str, Any]:
    """One bound: kind is `at least` or `at most`."""
    return {"value": value, "limit": limit, "kind": kind, "met": value >= limit if kind == "at least" else value <= limit}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one scale."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    changes = {name: value for name, value in (("prompts_per_step", args.prompts), ("group_size", args.group)) if value}
    config = scale_config(args.scale, thinking=args.thinking, **changes)
    if args.scale == "bagel_7b" and device.type == "cpu":
        raise SystemExit("bagel_7b's 29 GB of weights are measured on a GPU, and there is none; tiny and small run here")
    torch.set_num_threads(args.threads or config.compute.threads)
    setting = make_setting(config, device=device, checkpoint=args.checkpoint)
    serial = SerialPolicy.of(setting.policy)
    run_step(setting, setting.policy, config)                                # warm up
    ours, others = list[Outcome](), list[Outcome]()
    for _ in range(args.repeats):
        ours.append(run_step(setting, setting.policy, config))
        if len(others) < args.serial_repeats:
            serial.answer = ours[-1].rollouts
            others.append(run_step(setting, serial, serial_config(config)))
    checks = compare(ours[0], others[0], serial.sampled)
    medians = [{phase: statistics.median(o.clock.seconds[phase] for o in runs) for phase in PHASES} for runs in (ours, others)]
    totals = [statistics.median(o.clock.total for o in runs) for runs in (ours, others)]
    with Products() as products:
        run_step(setting, setting.policy, config)
    bandwidth = measured_bandwidth(device, setting.synchronize)
    floor = floor_seconds(products, device, setting.synchronize, bandwidth=bandwidth if device.type == "cuda" else None)
    tracking = tracking_seconds(setting, ours[0].rollouts)

    def part(index: int, names: Sequence[str]) -> float:
        return sum(medians[index][name] for name in names)

    ratios = {"rollout": part(1, ROLLOUT) / part(0, ROLLOUT), "update": part(1, UPDATE) / part(0, UPDATE),
              "step": totals[1] / totals[0]}
    shares = {"reward": medians[0]["reward"] / totals[0], "tracking and galleries": tracking / totals[0]}
    packed = None
    if args.scale != "tiny":
        wide = scale_config(args.scale, thinking=args.thinking, **changes | {
            "window": config.rollout.window.model_copy(update={"size": 3})})
        drawn = setting.policy.generate(setting.prompts, group_size=config.rollout.group_size, sampling=wide.rollout,
                                        generators=partial(generator, 0))
        packed = packed_against_separate(setting, drawn, 3, args.repeats)
        ratios["packed replay"] = packed["ratio"]
    accounted = 1 - medians[0]["everything else"] / totals[0]
    bounds = {f"{name} against serial": bound(ratios[name], limit, "at least")
              for name, limit in SERIAL.get(args.scale, {}).items()}
    bounds |= {f"share of {name}": bound(shares[name], limit, "at most") for name, limit in SHARES.get(args.scale, {}).items()}
    bounds["share of the step in named phases"] = bound(accounted, ACCOUNTED, "at least")
    rollouts = ours[0].rollouts
    lengths = rollouts.text.lengths.float()
    return {
        "scale": args.scale, "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "clock": "CPU" if args.cpu_seconds else "wall", "torch": torch.__version__,
        "repeats": [len(ours), len(others)],
        "shape": {"prompts": config.rollout.prompts_per_step, "group": config.rollout.group_size,
                  "thinking, mean": float(lengths.mean()), "thinking, longest": int(lengths.max()),
                  "denoising steps": config.rollout.num_steps, "window": len(rollouts.image.steps),
                  "micro-batch": config.train.micro_batch, "weights": "checkpoint" if args.checkpoint else "random",
                  "parameters": sum(p.numel() for p in setting.policy.model.parameters())},
        "bounds": bounds, "against serial": ratios, "matrix share of the step": floor / totals[0],
        "seconds": {"step": totals[0], "serial step": totals[1], "floor": floor, "tracking and galleries": tracking},
        "phases": {phase: {"seconds": medians[0][phase], "share": medians[0][phase] / totals[0],
                           "serial seconds": medians[1][phase],
                           "against serial": medians[1][phase] / max(medians[0][phase], 1e-9)} for phase in PHASES},
        "shares": shares, "equal to serial": checks, "packed replay": packed,
        "counted": {"operators": products.calls, "matrix FLOP": products.flops,
                    "different products": len(products.counts) + len(products.attention)},
        "bandwidth, bytes/s": bandwidth,
    }


def gpu_rates(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second and memory of BAGEL-7B's shape on one GPU: 512 px, 15 calls, no guidance, LoRA on a window of 3."""
    from unigrpo.footprint import Case, memory, peak
    from unigrpo.plan import model_sizes

    found: dict[str, Any] = {"bounds": {}}
    group = args.group or 8
    for (pixels, thinking), (name, limit) in GPU_RATES.items():
        config = scale_config("bagel_7b", thinking=thinking, prompts_per_step=2, group_size=group, num_steps=15)
        config = config.model_copy(update={
            "model": config.model.model_copy(update={"image_size": (pixels, pixels)}),
            "lora": config.lora.model_copy(update={"rank": config.lora.rank or 64}),
            "train": config.train.model_copy(update={"micro_batch": args.micro_batch, "activation_checkpointing": True})})
        setting = make_setting(config, device=torch.device("cuda"))
        run_step(setting, setting.policy, config)
        torch.cuda.reset_peak_memory_stats()
        outcome = run_step(setting, setting.policy, config)
        images = len(outcome.rollouts)
        seconds = sum(outcome.clock.seconds[phase] for phase in ROLLOUT) if name.startswith("rollout") else outcome.clock.total
        case = Case(config, setting.policy.model.config, model_sizes(config, setting.policy.model.config.vocab_size), 1,
                    int(outcome.rollouts.prompt_lengths.max()), thinking)
        planned, measured = peak(memory(case)), torch.cuda.max_memory_allocated()
        key = f"{pixels} px, {thinking} thinking tokens"
        found["bounds"] |= {f"{key}: {name}": bound(images / seconds, limit, "at least"),
                            f"{key}: memory off the plan": bound(abs(measured / planned - 1), GPU_MEMORY, "at most")}
        found[key] = {"seconds": outcome.clock.seconds, "images": images, "memory, bytes": measured, "planned, bytes": planned}
        del setting
        torch.cuda.empty_cache()
    return found


def table(result: dict[str, Any]) -> list[str]:
    """The page, ratios first."""
    shape, seconds = result["shape"], result["seconds"]
    lines = [f"## `{result['scale']}`: {shape['prompts']} prompts x {shape['group']} rollouts", "",
             f"{shape['parameters'] / 1e6:,.1f}M parameters ({shape['weights']} weights), {shape['thinking, mean']:.0f} tokens "
             f"of thinking on average, {shape['denoising steps']} denoising steps, window {shape['window']}, micro-batches of "
             f"{shape['micro-batch']}; {result['threads']} thread(s), {result['device']}, torch {result['torch']}; medians of "
             f"{result['repeats'][0]} steps and {result['repeats'][1]} serial ones in turns.", "",
             "| bound | measured | wanted | met |", "|---|---|---|---|"]
    for name, value in result["bounds"].items():
        shown = "{:.1f}x" if "serial" in name else "{:.1%}"
        lines.append(f"| {name} | {shown.format(value['value'])} | {value['kind']} {shown.format(value['limit'])} "
                     f"| {'yes' if value['met'] else '**no**'} |")
    lines += ["", "| phase | against serial | share of the step | seconds | serial seconds |", "|---|---|---|---|---|"]
    for phase, row in result["phases"].items():
        ratio = f"{row['against serial']:.1f}x" if row["serial seconds"] > 0.001 and row["seconds"] > 0.001 else "–"
        lines.append(f"| {phase} | {ratio} | {row['share']:.1%} | {row['seconds']:.3f} | {row['serial seconds']:.3f} |")
    lines += [f"| **step** | **{result['against serial']['step']:.1f}x** | 100 % | {seconds['step']:.3f} "
              f"| {seconds['serial step']:.3f} |", "",
              f"The step's matrix products alone take {seconds['floor']:.3f} s, {result['matrix share of the step']:.0%} of "
              f"it. Counted: {result['counted']['operators']:,} operators, {result['counted']['matrix FLOP'] / 1e9:,.1f} "
              f"GFLOP of products of {result['counted']['different products']} shapes. Tracking and galleries, which the step "
              f"leaves out, take {seconds['tracking and galleries'] * 1e3:.1f} ms more.", "",
              "Equal to the serial reference: " + ", ".join(f"{name} {value:.3g}" for name, value in
                                                             result["equal to serial"].items()) + "."]
    if packed := result["packed replay"]:
        lines += ["", f"Packed replay with its penalty, window {packed['window']}, {packed['rows']} rows a forward: "
                  f"{packed['packed s']:.3f} s against {packed['separate s']:.3f} s with a forward for the text and for every "
                  f"step, {packed['ratio']:.2f}x; gradients differ by {packed['gradients, relative']:.1e} of their norm."]
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="tiny", choices=sorted(SERIAL))
    parser.add_argument("--prompts", type=int, help="in place of the scale's own")
    parser.add_argument("--group", type=int)
    parser.add_argument("--thinking", type=int, help="tokens at most")
    parser.add_argument("--micro-batch", type=int, default=1, help="of the GPU's rates")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serial-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, help="compute.threads of the scale by default")
    parser.add_argument("--checkpoint", type=Path, help="an sft checkpoint of the scale, in place of random weights")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true", help="read CPU seconds: for a busy machine, with --threads 1")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a page: the table goes between its marks, or to its end")
    args = parser.parse_args()
    if args.cpu_seconds:
        if args.threads != 1:
            parser.error("--cpu-seconds adds up all threads; measure with --threads 1")
        phases.use_cpu_seconds()
    result = measure(args)
    lines = table(result)
    if args.scale == "bagel_7b":
        result["rates"] = gpu_rates(args)
        result["bounds"] |= result["rates"].pop("bounds")
        lines += ["```", json.dumps(result["rates"], indent=1), "```", ""]
    print("\n".join(lines))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.write is not None:
        put(args.write, f"{args.scale} {result['shape']['prompts']}x{result['shape']['group']}", lines)
    missed = [name for name, value in result["bounds"].items() if not value["met"]]
    for name in missed:
        print(f"missed: {name}: {result['bounds'][name]}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    sys.exit(main())
