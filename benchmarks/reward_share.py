"""What rewards cost of a training step at scale tiny: in the training process, and by a reward server on the same machine.

    python benchmarks/reward_share.py [--scale tiny] [--steps 4] [--write FILE.md]

Fresh weights, whole steps of unigrpo.train; the first step of each arrangement warms up and does not count. CPU seconds are
those of the training process, so that a busy machine does not move them; a server's own work shows in the wall time only.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from unigrpo.config import Config, load_config
from unigrpo.rewards.registry import make_reward
from unigrpo.rewards.shapes import RewardFunction
from unigrpo.seeding import generator
from unigrpo.stages.base import fresh_policy
from unigrpo.train import train
from unigrpo.types import Reward, Rollouts
from unigrpo.update import rl_optimizer, trainable_experts
from unigrpo.worlds.shapes import sample_record

ROOT = Path(__file__).parents[1]
Clock = Callable[[], float]


def measure(config: Config, rewards: dict[str, RewardFunction], steps: int) -> dict[str, float]:
    """Median over steps of wall and CPU seconds, of the rewards and of the whole step, and the rewards' shares."""
    torch.manual_seed(0)
    policy = fresh_policy(config)
    policy.model.train()
    experts = trainable_experts(policy.model, config.train.experts)
    policy.freeze_reference([name for parameters in experts.values() for name in parameters])
    prompts = [sample_record(generator(0, "reward-share", i)) for i in range(config.rollout.prompts_per_step)]
    clocks: tuple[Clock, Clock] = (time.perf_counter, time.process_time)
    spent: list[list[float]] = []
    marks = [[clock() for clock in clocks]]

    def score(rollouts: Rollouts) -> list[Reward]:
        images, texts = policy.decode(rollouts.image.final_latents), policy.thinking_texts(rollouts)
        start = [clock() for clock in clocks]
        records = [record for reward in rewards.values() for record in reward(images, rollouts.prompts, texts)]
        spent.append([clock() - begun for clock, begun in zip(clocks, start, strict=True)])
        return records

    whole = config.model_copy(update={"train": config.train.model_copy(update={"num_steps": steps + 1})})
    train(policy, rl_optimizer(experts, config.optim), lambda step: prompts, score, whole, draw=partial(generator, 0),
          log=lambda *_: marks.append([clock() for clock in clocks]), save=lambda step: None)
    found = {}
    for place, name in enumerate(("wall", "cpu")):
        lengths = [after[place] - before[place] for before, after in pairwise(marks[1:])]
        found[f"step_{name}"] = statistics.median(lengths)
        found[f"reward_{name}"] = statistics.median(row[place] for row in spent[1:])
        found[f"share_{name}"] = found[f"reward_{name}"] / found[f"step_{name}"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    config = load_config(args.scale, run="unigrpo", root=ROOT)
    torch.set_num_threads(1)
    names = list(config.reward.weights)
    command = [sys.executable, "-m", "unigrpo", "serve-rewards", *names, "--port", "0"]
    rows = {"in the training process": measure(config, {name: make_reward(name) for name in names}, args.steps)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[0]
            for label, options in (("by a server, PNG", {}), ("by a server, float32", {"exact": True})):
                remote = {name: make_reward(name, {"server": {"url": url, "batch": 128, **options}}) for name in names}
                rows[label] = measure(config, remote, args.steps)
        finally:
            server.kill()
    images = config.rollout.prompts_per_step * config.rollout.group_size
    lines = ["# Rewards' share of a step\n",
             f"Scale `{args.scale}`: {', '.join(f'`{name}`' for name in names)} of {images} images a step, median of "
             f"{args.steps} steps, 1 thread, {platform.machine()}, on a machine that was busy with other work.\n",
             "| rewards | step, CPU s | rewards, CPU s | share of CPU | step, wall s | rewards, wall s | share of wall |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {label} | {row['step_cpu']:.2f} | {row['reward_cpu']:.3f} | {row['share_cpu']:.1%} | "
              f"{row['step_wall']:.2f} | {row['reward_wall']:.3f} | {row['share_wall']:.1%} |" for label, row in rows.items()]
    written = f" --write {args.write}" if args.write else ""
    lines.append(f"\n    python benchmarks/reward_share.py --steps {args.steps}{written}")
    print("\n".join(lines))
    if args.write:
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
