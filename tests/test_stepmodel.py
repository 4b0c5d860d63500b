"""The step on many GPUs, on paper: its parts by hand, and against what one small machine can count."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace

import pytest
import torch
from small import ROOT

from unigrpo.config import load_config
from unigrpo.footprint import Case
from unigrpo.models.mot import MoTConfig
from unigrpo.plan import model_sizes
from unigrpo.roofline import GPUS, Loads, rollout_phases, training_phases
from unigrpo.stepmodel import (
    LATENCY,
    NETWORK_BANDWIDTH,
    NODE_BANDWIDTH,
    all_reduce_seconds,
    at_scale,
    gather_seconds,
    longest,
    model_step,
    show_steps,
)

sys.path.insert(0, str(ROOT / "benchmarks"))


def bagel(gpus: int = 8, **train) -> Case:
    config = load_config("bagel_7b", run="unigrpo", root=ROOT)
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    model = MoTConfig(vocab_size=152_064, **config.model.model_dump())
    return Case(config, model, model_sizes(config, 152_064), gpus, 64, 256)


def test_collectives_by_hand():
    """8 GPUs pass 7/8 of 8 GB twice at 450 GB/s: 31 ms. 16 add one exchange of a sixteenth each way over 50 GB/s: 20 ms."""
    assert all_reduce_seconds(8e9, 1) == 0
    assert all_reduce_seconds(8e9, 8) == pytest.approx(2 * 7 / 8 * 8e9 / NODE_BANDWIDTH, rel=0.01)
    more = all_reduce_seconds(8e9, 16) - all_reduce_seconds(8e9, 8)
    assert more == pytest.approx(2 * 8e9 / 16 / NETWORK_BANDWIDTH, rel=0.01)
    assert gather_seconds(8e9, 8) == pytest.approx(7 / 8 * 8e9 / NODE_BANDWIDTH, rel=0.01)
    between = gather_seconds(8e9, 512) - gather_seconds(8e9, 8)  # an eighth for each, from 63 of 64 nodes: 20 ms
    assert between == pytest.approx(63 / 64 * 8e9 / 8 / NETWORK_BANDWIDTH + 63 * LATENCY)


@pytest.mark.parametrize("rows", [1, 8, 128])
def test_the_longest_thinking_is_what_sampling_it_gives(rows):
    draw, spread, limit = random.Random(0), 0.37, 44
    centre = math.log(17) - spread**2 / 2
    tries = [max(min(limit, draw.lognormvariate(centre, spread)) for _ in range(rows)) for _ in range(4000)]
    assert longest(17, limit, rows, spread) == pytest.approx(sum(tries) / len(tries), rel=0.02)
    assert longest(17, limit, rows, 0.0) == 17


def test_the_longest_thinking_against_the_tiny_scale_s_own():
    """Of `tiny` after its warm-up: 17.0 tokens on average, logarithms spread by 0.366; the longest of 8, 32 and 128 drawn
    from its 2,048 evaluated thinkings are 26.5, 31.9 and 34.9 tokens. Its tail is lighter, so the model waits too long."""
    for rows, seen in ((8, 26.5), (32, 31.9), (128, 34.9)):
        assert seen <= longest(17.0, 44, rows, 0.366) <= 1.2 * seen


def test_its_arithmetic_is_what_a_step_of_tiny_runs():
    """The roofline's operations of one training step against those that are counted while it runs."""
    from phases import Clock, Products
    from training_step import make_setting, run_step, scale_config

    config = scale_config("tiny", thinking=12, prompts_per_step=2, group_size=4)
    setting = make_setting(config, device=torch.device("cpu"))
    with Products() as products:
        clock = Clock(read=lambda: float(products.flops))
        rollouts = run_step(setting, setting.policy, config, clock).rollouts
    loads = Loads(round(float(rollouts.prompt_lengths.float().mean())), 12, 8, 8)
    model = setting.policy.model.config
    planned = {name: work.flops * count for name, (work, count) in
               (rollout_phases(config, model, loads) | training_phases(config, model, loads)).items()}
    assert clock.seconds["denoise"] == pytest.approx(planned["denoising"], rel=0.1)
    updates = clock.seconds["replay"] + clock.seconds["backward"]
    assert updates == pytest.approx(planned["updates"], rel=0.2)


def test_a_step_by_its_parts():
    gpu = GPUS["h200"]
    step = model_step(bagel(), gpu, layout="sharded", thinking=256)
    assert step.images == 768
    assert step.rows == 96
    assert step.seconds == pytest.approx(step.sampling + step.waiting + step.reward + step.updates + step.communication)
    even = model_step(bagel(), gpu, layout="sharded", thinking=256, spread=0.0, reward_seconds=0.0)
    assert even.waiting == even.reward == 0
    more = model_step(replace(bagel(), gpus=16), gpu, layout="replicated", thinking=256)
    assert more.rows == 48
    assert more.sampling < 0.6 * step.sampling


def test_the_recommended_steps():
    """Full fine-tuning fits only where weights are spread over a node; whole weights on every GPU leave adapters."""
    steps = at_scale(bagel(), GPUS["h200"], thinking=256)
    assert [(s.gpus, s.layout, s.trained) for s in steps] == [
        (gpus, layout, trained) for gpus in (8, 64, 512) for layout, trained in (("sharded", "all"), ("replicated", "LoRA 64"))]
    assert [s.images for s in steps[::2]] == [768, 128 * 24, 1024 * 24]  # whole prompts on every GPU for both updates
    assert all(s.memory < 141e9 for s in steps)
    assert "512" in show_steps(steps, 24)[-1]
