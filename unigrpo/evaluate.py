"""Drawing a benchmark: every prompt in every cell of the grid guidance {off, on} x thinking {on, off, shuffled, greedy}.

Noise is keyed by (prompt, sample) alone, so cells and checkpoints are paired: they differ in the policy, not in luck.
Sampling is the ODE of the same schedule; nothing here is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unigrpo.config import Config
from unigrpo.contexts import prefill
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.bagel import concatenate_rows
from unigrpo.rollout import BagelPolicy
from unigrpo.sampling import Guidance, denoise, think
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord

GRID = (("off", "on"), ("off", "off"), ("off", "shuffled"), ("off", "greedy"),
        ("on", "on"), ("on", "off"), ("on", "shuffled"))
"""(guidance, thinking) of every cell; the first is the headline cell."""


@dataclass(frozen=True)
class Thoughts:
    """Thinking tokens of every (prompt, sample), padded on the right, and their decoded texts."""

    tokens: Tensor
    lengths: Tensor
    texts: list[str]

    def select(self, rows: Sequence[int]) -> Thoughts:
        """Other rows, in the order given."""
        index = torch.as_tensor(rows)
        return Thoughts(self.tokens[index], self.lengths[index], [self.texts[i] for i in rows])


@dataclass(frozen=True)
class DrawnBatch:
    """Images of a batch of (prompt, sample) in one cell."""

    cfg: str
    cell: str
    rows: list[tuple[PromptRecord, int]]
    texts: list[str]
    images: np.ndarray


@torch.no_grad()
def write_thoughts(policy: BagelPolicy, pairs: Sequence[tuple[PromptRecord, int]], config: Config, *, seed: int, batch: int,
                   greedy: bool = False) -> Thoughts:
    """Thinking for every (prompt, sample): sampled from uniforms keyed by both, or greedy."""
    limit, parts, texts = config.rollout.max_thinking_tokens, [], []
    for start in range(0, len(pairs), batch):
        part = pairs[start:start + batch]
        tokens, lengths = policy.encode([p for p, _ in part])
        context = prefill(policy.model, tokens, lengths, room=limit + 1)
        uniforms = np.stack([generator(seed, "evaluate-thinking", p.id, i).random(limit, dtype=np.float32) for p, i in part])
        segment = think(policy.model, policy.special, context, torch.from_numpy(uniforms),
                        temperature=config.rollout.temperature, top_k=config.rollout.top_k, greedy=greedy)
        parts.append((segment.tokens, segment.lengths))
        texts += policy.texts(segment)
    width = max(t.shape[1] for t, _ in parts)
    pad = policy.special.pad
    return Thoughts(torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=pad) for t, _ in parts]),
                    torch.cat([n for _, n in parts]), texts)


def shuffled_rows(prompts: int, samples: int, seed: int) -> list[int]:
    """Row i * samples + k takes the k-th thinking of another prompt: one keyed cycle through all prompts."""
    order = generator(seed, "evaluate-shuffle").permutation(prompts)
    other = np.empty(prompts, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return [int(other[i]) * samples + k for i in range(prompts) for k in range(samples)]


@torch.no_grad()
def draw(policy: BagelPolicy, pairs: Sequence[tuple[PromptRecord, int]], thoughts: Thoughts | None, config: Config, *,
         guided: bool, seed: int) -> np.ndarray:
    """Images (B, H, W, 3) for (prompt, sample) pairs, conditioned on the given thinking, or on the prompt alone."""
    settings, model = config.evaluate, policy.model
    tokens, lengths = (part.to(model.device)
                       for part in policy.encode([p for p, _ in pairs], thinking=thoughts is not None))
    if thoughts is not None:
        start = torch.full((len(pairs), 1), policy.special.bos, dtype=torch.int64, device=model.device)
        tokens, lengths = concatenate_rows(tokens, lengths, torch.cat([start, thoughts.tokens], dim=1), thoughts.lengths + 1,
                                           policy.special.pad)
    shape = (model.config.grid[0] * model.config.grid[1], model.config.token_channels)
    context = prefill(model, tokens, lengths, room=shape[0] + 2)
    noise = np.stack([generator(seed, "evaluate-latents", p.id, i).standard_normal(shape, np.float32) for p, i in pairs])
    guidance = None
    if guided:
        dropped = policy.dropped_context(len(pairs), thinking=thoughts is not None, room=shape[0] + 2)
        guidance = Guidance(dropped, settings.guidance_scale, settings.guidance_renorm, settings.guidance_interval)
    drawing = denoise(model, policy.markers, context, torch.from_numpy(noise),
                      sigma_schedule(settings.num_steps, config.rollout.shift), guidance=guidance)
    return policy.decode(drawing.final_latents)


def draw_grid(policy: BagelPolicy, prompts: Sequence[PromptRecord], config: Config,
              grid: Sequence[tuple[str, str]] = GRID, *, samples: int, batch: int, seed: int) -> Iterator[DrawnBatch]:
    """All images of a benchmark, batch by batch, cell by cell.

    Args:
        prompts: P records; every one is drawn `samples` times in every cell of `grid`.
        batch: images a forward; changes no image beyond rounding.
    """
    pairs = [(p, i) for p in prompts for i in range(samples)]
    cells = {cell for _, cell in grid}
    thoughts: dict[str, Thoughts | None] = {"off": None}
    if cells & {"on", "shuffled"}:
        own = write_thoughts(policy, pairs, config, seed=seed, batch=batch)
        thoughts["on"] = own
        if "shuffled" in cells:
            thoughts["shuffled"] = own.select(shuffled_rows(len(prompts), samples, seed))
    if "greedy" in cells:
        once = write_thoughts(policy, [(p, 0) for p in prompts], config, seed=seed, batch=batch, greedy=True)
        thoughts["greedy"] = once.select([i for i in range(len(prompts)) for _ in range(samples)])
    for cfg, cell in grid:
        source = thoughts[cell]
        for start in range(0, len(pairs), batch):
            part = pairs[start:start + batch]
            chosen = None if source is None else source.select(range(start, start + len(part)))
            images = draw(policy, part, chosen, config, guided=cfg == "on", seed=seed)
            yield DrawnBatch(cfg, cell, part, [""] * len(part) if chosen is None else chosen.texts, images)
