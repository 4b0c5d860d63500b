"""Scaling laws of our own code: seconds and peak memory of a training step against what makes it larger, each fitted.

    python benchmarks/scaling.py [--json FILE.json] [--write FILE.md]

One quantity grows, all others stay; the phases that it is about are compared with the floating-point operations that were
counted in them. The exponent is the slope between the two largest sizes, in logarithms: what matters is where a cost is going.
Exits 1 where seconds, or bytes, grow faster than the arithmetic does, by more than the slack. Sizes take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import phases
import torch
from pages import put
from phases import PHASES, Clock, Products
from torch.profiler import ProfilerActivity, profile
from training_step import Setting, make_setting, run_step, scale_config

from unigrpo.config import Config

SLACK = 0.25  # of an exponent of seconds over that of the counted operations: a busy machine, caches
MEMORY = {"prompts": 1.0, "group size": 1.0, "thinking length": 1.0, "image tokens": 2.0, "denoising steps": 0.0,
          "window": 2.0, "model width": 2.0}
"""What peak memory may grow with: rows, tokens, a mask of all tokens by all tokens, matrices."""
MEMORY_SLACK = 0.1
IMAGE = ("denoise", "anchor", "replay", "backward")


@dataclass(frozen=True)
class Law:
    """A quantity, its sizes, and the phases it is about."""

    name: str
    sizes: Sequence[int]
    phases: Sequence[str]


LAWS = (Law("prompts", (4, 8, 16), PHASES), Law("group size", (4, 8, 16), PHASES),
        Law("thinking length", (16, 32, 64), ("think",)), Law("image tokens", (16, 64, 144), IMAGE),
        Law("denoising steps", (4, 8, 16), ("denoise",)), Law("window", (1, 2, 4), ("anchor", "replay", "backward")),
        Law("model width", (128, 256, 512), PHASES))


def changed(law: Law, size: int) -> Config:
    """Scale tiny with 4 prompts x 4 rollouts, 16 tokens of thinking, and one quantity at a size of its own."""
    rollout: dict[str, Any] = {"prompts_per_step": 4, "group_size": 4}
    model: dict[str, Any] = {}
    thinking = 16
    if law.name == "prompts":
        rollout["prompts_per_step"] = size
    elif law.name == "group size":
        rollout["group_size"] = size
    elif law.name == "thinking length":
        thinking = size
    elif law.name == "denoising steps":
        rollout["num_steps"] = size
    elif law.name == "image tokens":
        side = math.isqrt(size)
        model = {"image_size": (8 * side, 8 * side), "max_latent_size": side}
    elif law.name == "model width":
        model = {"hidden_size": size, "intermediate_size": 3 * size, "num_attention_heads": size // 32,
                 "num_key_value_heads": size // 32}
    config = scale_config("tiny", thinking=thinking, **rollout)
    if law.name == "window":
        window = config.rollout.window.model_copy(update={"size": size, "range": (0, 4)})
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"window": window})})
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    if law.name == "image tokens":  # the reward reads pictures of 32 pixels
        config = config.model_copy(update={"reward": config.reward.model_copy(update={"weights": {"none": 1.0}})})
    return config


def peak_memory(setting: Setting) -> int:
    """Bytes that tensors took at once during a step, weights and optimizer aside."""
    if setting.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_step(setting, setting.policy, setting.config)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run_step(setting, setting.policy, setting.config)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent between the two largest sizes."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def measure(law: Law, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds, operations and bytes at every size, and their exponents."""
    settings = [make_setting(changed(law, size), device=device) for size in law.sizes]
    for setting in settings:
        run_step(setting, setting.policy, setting.config)
    seconds: list[list[float]] = [[] for _ in settings]
    for _ in range(repeats):
        for values, setting in zip(seconds, settings, strict=True):
            spent = run_step(setting, setting.policy, setting.config).clock.seconds
            values.append(sum(spent[phase] for phase in law.phases))
    work = []
    for setting in settings:
        with Products() as products:
            counter = Clock(read=lambda p=products: float(p.flops))
            run_step(setting, setting.policy, setting.config, counter)
        work.append(sum(counter.seconds[phase] for phase in law.phases))
    memory = [peak_memory(setting) for setting in settings]
    best = [min(values) for values in seconds]
    found = {"sizes": list(law.sizes), "phases": "step" if law.phases == PHASES else ", ".join(law.phases),
             "seconds": best, "median seconds": [statistics.median(values) for values in seconds], "FLOP": work,
             "bytes": memory, "exponent of seconds": slope(law.sizes, best), "exponent of FLOP": slope(law.sizes, work),
             "exponent of bytes": slope(law.sizes, memory)}
    found["met"] = (found["exponent of seconds"] <= found["exponent of FLOP"] + SLACK
                    and found["exponent of bytes"] <= MEMORY[law.name] + MEMORY_SLACK)
    return found


def table(results: dict[str, Any]) -> list[str]:
    """The page's table."""
    lines = ["| quantity | sizes | seconds of | exponent | of its arithmetic | exponent of peak memory | at most | met |",
             "|---|---|---|---|---|---|---|---|"]
    for name, row in results.items():
        lines.append(f"| {name} | {', '.join(map(str, row['sizes']))} | {row['phases']} | {row['exponent of seconds']:.2f} "
                     f"| {row['exponent of FLOP']:.2f} | {row['exponent of bytes']:.2f} | {MEMORY[name]:g} "
                     f"| {'yes' if row['met'] else '**no**'} |")
    lines += ["", "| quantity | seconds | GFLOP | MiB at the peak |", "|---|---|---|---|"]
    for name, row in results.items():
        lines.append(f"| {name} | {', '.join(f'{v:.3f}' for v in row['seconds'])} "
                     f"| {', '.join(f'{v / 1e9:.2f}' for v in row['FLOP'])} "
                     f"| {', '.join(f'{v / 2**20:.0f}' for v in row['bytes'])} |")
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[law.name for law in LAWS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true", help="read CPU seconds: for a busy machine, with one thread")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a page: the table goes between its marks, or to its end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_seconds:
        if args.threads != 1:
            parser.error("--cpu-seconds adds up all threads; measure with --threads 1")
        phases.use_cpu_seconds()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    results = {law.name: measure(law, args.repeats, device) for law in LAWS if not args.only or law.name in args.only}
    print("\n".join(table(results)))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.write is not None:
        put(args.write, "scaling", table(results))
    missed = [name for name, row in results.items() if not row["met"]]
    if missed:
        print(f"grows faster than its arithmetic: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
