"""One training step of RL on many GPUs, on paper: arithmetic, communication, waiting for the longest thinking, rewards.

    step = sampling + waiting + reward + updates + communication

The processes share nothing but sums (unigrpo.distributed): each samples, scores and replays its own prompts, and gradients are
added up before every optimizer step. Weights lie whole on every GPU (`replicated`), or are spread over all of them and gathered
layer by layer, for sampling all at once (`sharded`, unigrpo.sharding). Arithmetic is unigrpo.roofline's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unigrpo.footprint import Case, adapter_count, fits, memory, peak
from unigrpo.roofline import Gpu, Loads, decode_step, rollout_phases, training_phases

NODE = 8                   # GPUs that share a fast link
NODE_BANDWIDTH = 450e9     # bytes/s a GPU and direction: NVLink 4, 900 GB/s both ways (NVIDIA H100 and H200 datasheets)
NETWORK_BANDWIDTH = 50e9   # bytes/s a GPU: one 400 Gb/s adapter each, as in NVIDIA's DGX H100 and H200
LATENCY = 20e-6            # seconds of one hop of a collective
SPREAD = 0.45              # standard deviation of the logarithm of thinking lengths, where nobody has measured it
REWARD_SECONDS = 0.05      # of one image on one GPU, a detector's forward; nothing is known of a judge's
HIDDEN = 0.5               # share of a sharded layer's gathering that the layer before hides


@dataclass(frozen=True)
class Step:
    """Seconds of one training step. trained: all, or the adapters' rank. images: of the step, on all GPUs. rows: of them on
    one. memory: bytes on one at the peak."""

    gpus: int
    layout: str
    trained: str
    images: int
    rows: int
    micro_batch: int
    sampling: float
    waiting: float
    reward: float
    updates: float
    communication: float
    memory: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.sampling + self.waiting + self.reward + self.updates + self.communication

    @property
    def rate(self) -> float:
        """Images a second and GPU."""
        return self.images / self.seconds / self.gpus


def all_reduce_seconds(size: float, gpus: int) -> float:
    """Adding up `size` bytes over GPUs: a ring in the node, then one of the nodes, each GPU with its part of the sum."""
    if gpus == 1:
        return 0.0
    inside, nodes = min(gpus, NODE), -(-gpus // NODE)
    spent = 2 * (inside - 1) * (size / inside / NODE_BANDWIDTH + LATENCY)
    if nodes > 1:
        spent += 2 * (nodes - 1) * (size / inside / nodes / NETWORK_BANDWIDTH + LATENCY)
    return spent


def gather_seconds(size: float, gpus: int) -> float:
    """Every GPU getting `size` bytes that are spread over all: each its part of a node's over the network, then the node's own.

    Adding up and spreading as many bytes of gradients is the same way back.
    """
    inside, nodes = min(gpus, NODE), -(-gpus // NODE)
    spent = (inside - 1) * (size / inside / NODE_BANDWIDTH + LATENCY)
    if nodes > 1:
        spent += (nodes - 1) * (size / inside / nodes / NETWORK_BANDWIDTH + LATENCY)
    return spent


def longest(mean: float, limit: int, rows: int, spread: float = SPREAD) -> float:
    """The expected longest of `rows` thinkings: logarithms are normal, and none is longer than the limit.

    E max = integral over t of 1 - P(length <= t)^rows, by the trapezoid rule. `mean` is that of the lengths without a limit.
    """
    if spread == 0 or rows == 0 or mean <= 0:
        return min(mean, limit)
    centre = math.log(mean) - spread**2 / 2
    points = [limit * i / 512 for i in range(513)]
    tail = [1.0 if t == 0 else 1 - (0.5 * (1 + math.erf((math.log(t) - centre) / spread / math.sqrt(2))))**rows for t in points]
    return sum((a + b) / 2 for a, b in itertools.pairwise(tail)) * limit / 512


def model_step(case: Case, gpu: Gpu, *, layout: str, thinking: float, spread: float = SPREAD,
               reward_seconds: float = REWARD_SECONDS) -> Step:
    """The step of a case, whose rows are split evenly.

    Args:
        layout: replicated | sharded. thinking: tokens on average. spread: see SPREAD. reward_seconds: of one image, on one
            GPU; 0 where another machine scores while the next rollouts are drawn.
    """
    config, model, n = case.config, case.model, case.gpus
    limit = config.rollout.max_thinking_tokens
    mean = Loads(case.prompt, round(thinking), case.rows, case.batch)
    step = rollout_phases(config, model, mean)
    sampling = sum(work.seconds(gpu) * count for work, count in step.values())
    # A batch decodes until its longest row ends, and the sum of gradients waits for the GPU with the longest of all.
    token = decode_step(model, case.prompt + thinking / 2, case.batch).seconds(gpu)
    turns = -(-case.rows // case.batch)
    waiting = turns * token * max(0.0, longest(thinking, limit, case.batch * n, spread) - thinking)
    updates = sum(work.seconds(gpu) * count for work, count in training_phases(config, model, mean).values())
    trained = adapter_count(config, model) if config.lora.rank else case.sizes.trained
    if layout == "sharded":
        item = 2 if config.train.precision == "bf16" else 4
        whole = gather_seconds(item * float(case.sizes.total), n)
        micro = -(-case.rows // min(config.train.micro_batch, case.rows))
        passes = 2 + 1 + 1                     # anchor of half the rollouts, reference, forward, backward: gathered each time
        gradients = gather_seconds(4.0 * trained, n)   # of every micro-batch
        communication = whole + (1 - HIDDEN) * micro * (passes * whole + gradients)
    else:
        communication = config.train.updates_per_rollout * all_reduce_seconds(4.0 * trained, n)
    parts = memory(case if layout == "sharded" else alone(case))
    weights = f"LoRA {config.lora.rank}" if config.lora.rank else "all"
    return Step(n, layout, weights, case.rows * n, case.rows, min(config.train.micro_batch, case.rows), sampling, waiting,
                reward_seconds * case.rows, updates, communication, peak(parts))


def alone(case: Case) -> Case:
    """One GPU's share as a run of its own: what whole weights on every GPU take there."""
    rollout = case.config.rollout
    rows = case.rows
    prompts = max(1, rows // rollout.group_size)
    share = rollout.model_copy(update={"prompts_per_step": prompts, "group_size": -(-rows // prompts)})
    return replace(case, gpus=1, config=case.config.model_copy(update={"rollout": share}))


LAYOUTS = ("replicated", "sharded")


def recommend(case: Case, gpu: Gpu, *, thinking: float, layouts: Sequence[str] = LAYOUTS,
              micro_batches: Sequence[int] = (1, 2, 4, 8), adapters: int = 64, **known: float) -> Step | None:
    """The fastest layout and micro-batch that fit for a number of GPUs; None where nothing does.

    Of equal speeds the smaller micro-batch. Adapters of rank `adapters` are tried where the run's own way does not fit.
    """
    for rank in (case.config.lora.rank, case.config.lora.rank or adapters):
        found = []
        for layout in layouts:
            if rank and layout == "sharded":   # adapters are small and lie on every process
                continue
            for micro in micro_batches:
                train = case.config.train.model_copy(update={"micro_batch": micro})
                lora = case.config.lora.model_copy(update={"rank": rank})
                tried = replace(case, config=case.config.model_copy(update={"train": train, "lora": lora}))
                if micro <= tried.rows and fits(tried if layout == "sharded" else alone(tried), gpu):
                    found.append(model_step(tried, gpu, layout=layout, thinking=thinking, **known))
        if found:
            return min(found, key=lambda step: (round(step.seconds, 3), step.micro_batch))
    return None


def at_scale(case: Case, gpu: Gpu, *, thinking: float, counts: Sequence[int] = (8, 64, 512)) -> list[Step]:
    """The fastest step on each number of GPUs, and the fastest with whole weights on every GPU.

    A process takes whole prompts for every update, so where the run has too few of them the step has as many as give each
    GPU one: more rollouts a step, of which a reader must know.
    """
    found: list[Step] = []
    for gpus in counts:
        rollout, smallest = case.config.rollout, gpus * case.config.train.updates_per_rollout
        prompts = -(-rollout.prompts_per_step // smallest) * smallest
        config = case.config.model_copy(update={"rollout": rollout.model_copy(update={"prompts_per_step": prompts})})
        best = [recommend(replace(case, config=config, gpus=gpus), gpu, thinking=thinking, layouts=layouts)
                for layouts in (LAYOUTS, LAYOUTS[:1])]
        found += [step for step in dict.fromkeys(best) if step is not None]
    return found


def show_steps(steps: Sequence[Step], group_size: int) -> list[str]:
    """The table of `unigrpo plan`."""
    if not steps:
        return ["  no layout fits 8, 64 or 512 GPUs"]
    lines = [f"  {'GPUs':>5}  {'weights':<11}{'trained':>9}{'prompts':>8}{'micro':>6}{'sample':>8}{'wait':>7}{'reward':>7}"
             f"{'update':>8}{'link':>7}{'step':>8}{'images/s/GPU':>14}"]
    for s in steps:
        lines.append(f"  {s.gpus:>5}  {s.layout:<11}{s.trained:>9}{s.images // group_size:>8}{s.micro_batch:>6}"
                     f"{s.sampling:>8.1f}{s.waiting:>7.1f}{s.reward:>7.1f}{s.updates:>8.1f}{s.communication:>7.1f}"
                     f"{s.seconds:>8.1f}{s.rate:>14.3f}")
    return lines
