"""How long the stages of a run take on this machine, measured: a few steps of each with fresh weights, nothing kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unigrpo.config import Config
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord

SMALL = 10_000_000  # parameters up to which the evaluation is timed on 64 images a cell; on 16 above


def measure(config: Config) -> dict[str, float]:
    """Stage -> seconds, from the second of two steps of each, and from a few images of every cell of the evaluation.

    The probes of training count; starting, saving and galleries do not.
    """
    from unigrpo.evaluate import GRID
    from unigrpo.roofline import drawn_sets
    from unigrpo.stages.base import caption_batch, fresh_policy
    from unigrpo.stages.loading import save_policy
    from unigrpo.stages.sft import warmup_batch
    from unigrpo.stages.train import rl_start

    with _threads(config.compute.threads):
        policy = fresh_policy(config)
        autoencoder = _autoencoder(policy, config)
        prompts = [_prompt(config, i) for i in range(max(32, config.rollout.prompts_per_step))]
        seconds = {"base": autoencoder + _supervised(policy, config.base, partial(caption_batch, policy, config)),
                   "sft": _supervised(policy, config.sft, partial(warmup_batch, policy, prompts, config))}
        with tempfile.TemporaryDirectory(prefix="unigrpo-plan-") as folder:  # RL starts from a checkpoint
            save_policy(Path(folder) / "checkpoint", policy)
            size = sum(p.numel() for p in policy.model.parameters())
            del policy
            trained, optimizer = rl_start(Path(folder) / "checkpoint", config)
        step = _training_step(trained, optimizer, config, prompts[:config.rollout.prompts_per_step])
        images = 64 if size <= SMALL else 16
        headline = _image(trained, config, prompts, GRID[:1], images=images)
        evaluation = sum(drawn.prompts * (drawn.controls * _image(trained, config, prompts, drawn.cells, images=images)
                                          + (drawn.images - drawn.controls) * headline)
                         for drawn in drawn_sets(config).values())
    probed = (1 + -(-config.train.num_steps // config.train.probe_every)) * config.train.probe_prompts * 2
    return {**seconds, "train": step * config.train.num_steps + probed * headline,
            "evaluate, each checkpoint": evaluation}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many threads of torch, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prompt(config: Config, index: int) -> PromptRecord:
    """A prompt of the world with a thinking, as the curate stage writes them."""
    from unigrpo.prompts.curate import add_thinking
    from unigrpo.worlds.shapes import sample_record

    return add_thinking([sample_record(generator(0, "plan", index))], seed=0, error_share=config.sft.thinking_error,
                        systematic_share=config.sft.systematic_share)[0]


def _autoencoder(policy: BagelPolicy, config: Config) -> float:
    """Give the policy a barely trained autoencoder, where the scale has one; seconds that training it takes."""
    from unigrpo.stages.pixels import train_autoencoder

    settings, size, device = config.autoencoder, max(config.model.image_size), policy.model.device
    if settings is None or (training := settings.training) is None:
        return 0.0

    def timed(steps: int) -> float:
        short = settings.model_copy(update={"training": training.model_copy(update={"steps": steps})})
        start = time.perf_counter()
        policy.autoencoder = train_autoencoder(short, size=size, device=device)
        return time.perf_counter() - start

    timed(1)
    return training.steps * max(0.0, timed(5) - timed(1)) / 4


def _supervised(policy: BagelPolicy, settings: Any, batches: Callable[[int], Any]) -> float:
    """Seconds of a supervised stage."""
    from unigrpo.sft import supervised_optimizers, train_supervised

    marks: list[float] = []
    policy.model.train()
    if settings.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    train_supervised(policy, supervised_optimizers(policy.model, settings), batches, settings.model_copy(update={"steps": 2}),
                     log=lambda *_: marks.append(time.perf_counter()), save=lambda step: None)
    if settings.activation_checkpointing:
        policy.model.activation_checkpointing_disable()
    policy.model.eval()
    return (marks[1] - marks[0]) * settings.steps


def _training_step(policy: BagelPolicy, optimizer: torch.optim.Optimizer, config: Config, prompts: list[PromptRecord]) -> float:
    """Seconds of a step of RL."""
    from unigrpo.stages.train import rewards_of
    from unigrpo.stages.watch import reward_functions
    from unigrpo.train import train

    marks: list[float] = []
    policy.model.train()
    if config.train.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    two = config.model_copy(update={"train": config.train.model_copy(update={"num_steps": 2})})
    train(policy, optimizer, lambda step: prompts, partial(rewards_of, policy, reward_functions(config)), two,
          draw=partial(generator, 0), log=lambda *_: marks.append(time.perf_counter()), save=lambda step: None)
    policy.model.eval()
    return marks[1] - marks[0]


def _image(policy: BagelPolicy, config: Config, prompts: list[PromptRecord], grid: Sequence[tuple[str, str]], *,
           images: int) -> float:
    """Seconds to draw and judge an image in every cell of a grid."""
    from unigrpo.evaluate import draw_grid
    from unigrpo.evaluation.shapes import verdict_rows

    records = prompts[:max(1, min(images // 2, config.evaluate.prompts))]
    start = time.perf_counter()
    for batch in draw_grid(policy, records, config, grid, samples=2, batch=config.evaluate.batch, seed=0):
        verdict_rows(batch.images, [r for r, _ in batch.rows], batch.texts, samples=[i for _, i in batch.rows], cfg=batch.cfg,
                     cell=batch.cell)
    return (time.perf_counter() - start) / (2 * len(records))
