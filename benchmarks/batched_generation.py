"""Batched against serial generation of one prompt's group, side by side in one run, with the outputs compared.

    python benchmarks/batched_generation.py [--scale small] [--group 16] [--repeats 3] [--write FILE.md]

Serial is the same code with a token budget of 1, so one rollout at a time; it computes the prompt's prefix once for the group,
as batched generation does. Sizes take turns in every repeat, so that a busy machine slows all of them; medians are shown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from unigrpo.config import Config, load_config
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord, Rollouts
from unigrpo.worlds.shapes import sample_record, vocabulary

ROOT = Path(__file__).parents[1]
LOG_PROB_BOUND = 1e-4  # nats: batched and serial log-probs of the same tokens and steps


def random_policy(config: Config) -> BagelPolicy:
    """The scale's model with random weights, whose thinking never stops, so that all are as long as they may be."""
    tokenizer = word_tokenizer(vocabulary())
    torch.manual_seed(0)
    model = MoTModel(MoTConfig(vocab_size=len(tokenizer), **config.model.model_dump())).eval()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.05)  # zero at birth, which would draw the same image from any context
    policy = BagelPolicy(model, tokenizer, system_prompt=config.rollout.system_prompt)
    policy.special = replace(policy.special, eos=-1)                         # an id that is never drawn
    return policy


def run(policy: BagelPolicy, config: Config, prompts: Sequence[PromptRecord], group: int,
        budget: int | None) -> tuple[float, Rollouts]:
    """Seconds of one group's rollouts, and the rollouts."""
    sampling = config.rollout.model_copy(update={"token_budget": budget, "shared_noise": False})
    start = time.perf_counter()
    rollouts = policy.generate(prompts, group_size=group, sampling=sampling,
                               generators=lambda purpose, *key: generator(0, purpose, *key))
    return time.perf_counter() - start, rollouts


def compare(one: Rollouts, other: Rollouts) -> dict[str, float]:
    """Tokens and initial noise must be equal; the largest differences of what is rounded. Raises AssertionError."""
    assert torch.equal(one.text.tokens, other.text.tokens)
    assert torch.equal(one.text.mask, other.text.mask)
    gaps = {"text log-probs": one.text.rollout_log_probs - other.text.rollout_log_probs,
            "image log-probs": one.image.rollout_log_probs - other.image.rollout_log_probs,
            "final latents": one.image.final_latents - other.image.final_latents}
    found = {name: float(gap.abs().max()) for name, gap in gaps.items()}
    assert max(found["text log-probs"], found["image log-probs"]) <= LOG_PROB_BOUND, found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="small")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(args.scale, run="unigrpo", root=ROOT)
    policy = random_policy(config)
    prompts = [sample_record(generator(0, "benchmark-prompt"))]
    prefix = policy.encode(prompts)[0].shape[1]
    row = prefix + config.rollout.max_thinking_tokens + 1 + policy.model.config.grid[0] * policy.model.config.grid[1] + 2
    sizes = sorted({1, min(4, args.group), args.group})
    run(policy, config, prompts, 2, None)                                    # warm up
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    outputs: dict[int, Rollouts] = {}
    for _ in range(args.repeats):
        for size in sizes:
            spent, outputs[size] = run(policy, config, prompts, args.group, size * row)
            seconds[size].append(spent)
    gaps = {size: compare(outputs[1], outputs[size]) for size in sizes[1:]}
    medians = {size: statistics.median(values) for size, values in seconds.items()}
    parameters = sum(p.numel() for p in policy.model.parameters())
    command = " ".join(["python benchmarks/batched_generation.py", *sys.argv[1:]])
    lines = ["# Batched against serial generation", "",
             f"One prompt's group of {args.group} on scale `{args.scale}` ({parameters / 1e6:.0f}M parameters, random "
             f"weights): {config.rollout.max_thinking_tokens} thinking tokens and {config.rollout.num_steps} denoising "
             f"steps a rollout, {args.threads} thread(s), {platform.machine()}, median of {args.repeats} runs in turns.", "",
             "| rollouts at a time | seconds | images/s | against serial | largest gap of log-probs, nats |",
             "|---|---|---|---|---|"]
    for size in sizes:
        gap = "–" if size == 1 else f"{max(gaps[size]['text log-probs'], gaps[size]['image log-probs']):.1e}"
        lines.append(f"| {size} | {medians[size]:.2f} | {args.group / medians[size]:.2f} | {medians[1] / medians[size]:.1f}x "
                     f"| {gap} |")
    lines += ["", f"Thinking tokens are equal, and log-probs agree to {LOG_PROB_BOUND:g} nats, or the run fails. Serial is the "
              "same code with one rollout in the cache at a time.", "", f"    {command}", ""]
    print("\n".join(lines))
    if args.write is not None:
        args.write.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
