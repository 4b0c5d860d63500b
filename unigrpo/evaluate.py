"""Drawing a benchmark: every prompt in every cell of a grid of guidance {off, on} and thinking {on, off, shuffled, ...}.

Noise is keyed by (prompt, sample) alone, so cells and checkpoints are paired: they differ in the policy, not in luck.
Sampling is the ODE of the same schedule; nothing here is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from unigrpo.config import Config
from unigrpo.contexts import prefill, take_rows
from unigrpo.distributed import ALONE, World
from unigrpo.evaluation.controls import truncate
from unigrpo.evaluation.outcomes import HEADLINE
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.bagel import concatenate_rows, encode_segments
from unigrpo.rollout import BagelPolicy
from unigrpo.sampling import Guidance, denoise, think
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord

GRID = (("off", "on"), ("off", "off"), ("off", "shuffled"), ("off", "truncated"), ("off", "greedy"),
        ("on", "on"), ("on", "off"), ("on", "shuffled"))
"""(guidance, thinking) of every cell; the first is the headline cell."""
GRIDS = {"all": GRID, "guidance": (HEADLINE, ("on", "on")), "headline": (HEADLINE,)}
"""What `cells` of an evaluation in params/experiment.yaml may say."""


def cell_images(config: Config, cell: tuple[str, str]) -> int:
    """Images a prompt in a cell: the headline cell has all of them, the others what evaluate.control_images says."""
    settings = config.evaluate
    return settings.images_per_prompt if cell == HEADLINE else settings.control_images or settings.images_per_prompt


def grid_images(config: Config, grid: Sequence[tuple[str, str]] = GRID) -> int:
    """Images of a checkpoint in some cells, by default in all."""
    return config.evaluate.prompts * sum(cell_images(config, cell) for cell in grid)


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
        records = {p.id: p for p, _ in part}                 # a prompt is read once for all its samples
        prefix = prefill(policy.model, *policy.encode(list(records.values())))
        place = {name: row for row, name in enumerate(records)}
        context = take_rows(prefix, torch.tensor([place[p.id] for p, _ in part]), limit + 1)
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


def halved(policy: BagelPolicy, thoughts: Thoughts) -> Thoughts:
    """The first half of every thinking, ended by the stop token as a whole one is."""
    tokens, lengths = truncate(thoughts.tokens, thoughts.lengths, stop=policy.special.eos, pad=policy.special.pad)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]
    return Thoughts(tokens, lengths, policy.tokenizer.batch_decode(rows, skip_special_tokens=True))


@torch.no_grad()
def draw(policy: BagelPolicy, pairs: Sequence[tuple[PromptRecord, int]], thoughts: Thoughts | None, config: Config, *,
         guided: Sequence[bool], seed: int) -> list[np.ndarray]:
    """Images (B, H, W, 3) for (prompt, sample) pairs, conditioned on the given thinking, or on the prompt alone.

    Args:
        guided: once without guidance, once with, or both, from one context.
    """
    settings, model = config.evaluate, policy.model
    tokens, lengths = (part.to(model.device)
                       for part in policy.encode([p for p, _ in pairs], thinking=thoughts is not None))
    if thoughts is not None:
        start = torch.full((len(pairs), 1), policy.special.bos, dtype=torch.int64, device=model.device)
        tokens, lengths = concatenate_rows(tokens, lengths, torch.cat([start, thoughts.tokens.to(model.device)], dim=1),
                                           thoughts.lengths.to(model.device) + 1, policy.special.pad)
    shape = (model.config.grid[0] * model.config.grid[1], model.config.token_channels)
    context = prefill(model, tokens, lengths, room=shape[0] + 2)
    noise = np.stack([generator(seed, "evaluate-latents", p.id, i).standard_normal(shape, np.float32) for p, i in pairs])
    guidance = None
    if any(guided):
        dropped = policy.dropped_context(len(pairs), thinking=thoughts is not None, room=shape[0] + 2)
        guidance = Guidance(dropped, settings.guidance_scale, settings.guidance_renorm, settings.guidance_interval)
    sigmas = sigma_schedule(settings.num_steps, config.rollout.shift)
    return [policy.decode(denoise(model, policy.markers, context, torch.from_numpy(noise), sigmas,
                                  guidance=guidance if on else None).final_latents) for on in guided]


@torch.no_grad()
def text_losses(policy: BagelPolicy, prompts: Sequence[PromptRecord], texts: Sequence[str], *,
                batch: int) -> dict[str, tuple[int, float]]:
    """How likely given thinkings are after their prompts: prompt id -> (tokens, the stop token among them; nats).

    Args:
        texts: one a prompt. batch: rows a forward.
    """
    found: dict[str, tuple[int, float]] = {}
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        context, lengths = policy.encode(prompts[part])
        target, target_lengths = encode_segments(policy.tokenizer, [(text,) for text in texts[part]])
        tokens, ends = (rows.to(policy.model.device) for rows in
                        concatenate_rows(context, lengths, target, target_lengths, policy.special.pad))
        columns = torch.arange(1, tokens.shape[1], device=tokens.device)
        wanted = (columns > lengths[:, None].to(tokens.device)) & (columns < ends[:, None])  # the start token is only fed
        hidden, _ = policy.packed(tokens, ends, None, torch.empty(0))
        nats = torch.nn.functional.cross_entropy(policy.model.logits(hidden[:, :-1][wanted]), tokens[:, 1:][wanted],
                                                 reduction="none").double().cpu()
        counts = wanted.sum(dim=1).cpu()
        sums = [float(row.sum()) for row in nats.split(counts.tolist())]
        found |= {p.id: (int(n), total) for p, n, total in zip(prompts[part], counts, sums, strict=True)}
    return found


def join_thoughts(policy: BagelPolicy, parts: Sequence[Thoughts]) -> Thoughts:
    """Thinkings in a row, padded to one width."""
    width = max(part.tokens.shape[1] for part in parts)
    tokens = torch.cat([torch.nn.functional.pad(part.tokens, (0, width - part.tokens.shape[1]), value=policy.special.pad)
                        for part in parts])
    return Thoughts(tokens, torch.cat([part.lengths for part in parts]), [text for part in parts for text in part.texts])


def think_grid(policy: BagelPolicy, prompts: Sequence[PromptRecord], cells: Set[str], config: Config, *, samples: int,
               batch: int, seed: int, world: World = ALONE) -> dict[str, Thoughts | None]:
    """The thinking of every (prompt, sample) in each of the cells, in every process; None for the cell without any."""
    def write(pairs: Sequence[tuple[PromptRecord, int]], greedy: bool = False) -> Thoughts:
        own = write_thoughts(policy, world.share(pairs), config, seed=seed, batch=batch, greedy=greedy)
        return join_thoughts(policy, world.gather(own))

    thoughts: dict[str, Thoughts | None] = {"off": None}
    if cells & {"on", "shuffled", "truncated"}:
        own = write([(p, i) for p in prompts for i in range(samples)])
        thoughts["on"] = own
        if "truncated" in cells:
            thoughts["truncated"] = halved(policy, own)
        if "shuffled" in cells:
            thoughts["shuffled"] = own.select(shuffled_rows(len(prompts), samples, seed))
    if "greedy" in cells:
        once = write([(p, 0) for p in prompts], greedy=True)
        thoughts["greedy"] = once.select([i for i in range(len(prompts)) for _ in range(samples)])
    return thoughts


def draw_grid(policy: BagelPolicy, prompts: Sequence[PromptRecord], config: Config,
              grid: Sequence[tuple[str, str]] = GRID, *, samples: int, batch: int, seed: int,
              control_samples: int | None = None, world: World = ALONE) -> Iterator[DrawnBatch]:
    """All images of a benchmark, thinking by thinking, batch by batch, without and with guidance from one context.

    Args:
        prompts: P records; every one is drawn `samples` times in every cell of `grid`.
        batch: images a forward; changes no image beyond rounding.
        control_samples: fewer, for all cells but the headline one; they are the first of its samples.
        world: processes that share the images: each yields its own.
    """
    thoughts = think_grid(policy, prompts, {cell for _, cell in grid}, config, samples=samples, batch=batch, seed=seed,
                          world=world)
    wanted = {cell: samples if cell == HEADLINE else min(samples, control_samples or samples) for cell in grid}
    for thinking in dict.fromkeys(thinking for _, thinking in grid):
        source = thoughts[thinking]
        edges = sorted({0, *(count for (_, cell), count in wanted.items() if cell == thinking)})
        for low, high in pairwise(edges):
            scales = [cfg for cfg, cell in grid if cell == thinking and wanted[cfg, cell] >= high]
            rows = world.share([i * samples + k for i in range(len(prompts)) for k in range(low, high)])
            for start in range(0, len(rows), batch):
                part = rows[start:start + batch]
                pairs = [(prompts[row // samples], row % samples) for row in part]
                chosen = None if source is None else source.select(part)
                texts = [""] * len(part) if chosen is None else chosen.texts
                drawn = draw(policy, pairs, chosen, config, guided=[cfg == "on" for cfg in scales], seed=seed)
                for cfg, images in zip(scales, drawn, strict=True):
                    yield DrawnBatch(cfg, thinking, pairs, texts, images)
