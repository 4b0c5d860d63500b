"""Sampling on cached contexts, without gradient: thinking token by token, then the image step by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo.contexts import attend_image, image_query, put_rows, take_rows, visible
from unigrpo.flow.guidance import Renorm, combine_guidance, guidance_active
from unigrpo.flow.sde import TransitionKind, transition
from unigrpo.models.bagel import SpecialTokens
from unigrpo.models.mot import Context, MoTModel
from unigrpo.text import sample_tokens
from unigrpo.types import TextSegment

KEEP_MULTIPLE = 16  # rows that go on thinking together, on a CPU: matrix kernels treat the last few rows of a product apart
KEEP_SHARE = 0.5    # of the rows: with no more of them left, the caches of those that still think are copied


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: contexts with something dropped, and how far to push away from them.

    Args:
        context: without the last text. scale: acts above 1. renorm, renorm_min: see combine_guidance.
        interval: (low, high], of the shifted noise level; outside it both scales are 1.
        image_context: without images and thinking; None where it equals the conditional context, whose velocity is then
            used and no forward spent. image_scale: acts above 1.
    """

    context: Context
    scale: float
    renorm: Renorm
    interval: tuple[float, float]
    image_context: Context | None = None
    image_scale: float = 1.0
    renorm_min: float = 0.0

    def active(self, sigma: Tensor) -> bool:
        """Whether it changes the velocity at this noise level."""
        return self.scale > 1.0 and guidance_active(float(sigma), self.interval)


@dataclass(frozen=True)
class Drawing:
    """What denoising leaves behind: (B, W, N, C) states and actions of the window, (B, W) log-probs, the final latents."""

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    final_latents: Tensor


def think(model: MoTModel, special: SpecialTokens, context: Context, uniforms: Tensor, *, temperature: float = 1.0,
          top_k: int = 0, greedy: bool = False, close: bool = False) -> TextSegment:
    """Decode one thinking segment a row, in place on the context, until every row has stopped.

    The fresh start token is fed first; sampled ids, the stop token included, are fed as they are. A row that has ended
    feeds nothing more: its later columns are masked, never padded over (a stop token overwritten by padding leaves the
    image conditioned on a context that was never trained). On a CPU, where a step costs what its rows cost, rows that have
    ended are left out of the later steps (see `still_thinking`); the others' numbers stay as they are, bit for bit.

    Args:
        context: with room for uniforms.shape[1] + 1 columns (one more with `close`); holds the thinking afterwards.
        uniforms: (B, T) in [0, 1), one a token, T the longest thinking allowed.
        close: feed the stop token to rows that reached T without it, as BAGEL's inferencer ends every segment. Rollouts
            do not: they condition on what was sampled and nothing else.
    Returns: a TextSegment trimmed to the longest row.
    """
    rows, limit = uniforms.shape
    device = context.mask.device
    tokens = torch.full((rows, limit), special.pad, dtype=torch.int64, device=device)
    log_probs, entropy = torch.zeros(rows, limit, device=device), torch.zeros(rows, limit, device=device)
    mask = torch.zeros(rows, limit, dtype=torch.bool, device=device)
    feeding = torch.ones(rows, dtype=torch.bool, device=device)
    token, uniforms = torch.full((rows,), special.bos, dtype=torch.int64, device=device), uniforms.to(device)
    live, index = context, torch.arange(rows, device=device)  # the rows that are fed, and which ones of the context they are
    for step in range(limit + 1):
        hidden = feed(model, live, token, feeding)
        sampling = feeding & (token != special.eos)
        if step == limit or not sampling.any():
            break
        drawn, log_prob, spread = sample_tokens(model.logits(hidden), uniforms[index, step], temperature=temperature,
                                                top_k=top_k, greedy=greedy)
        token = torch.where(sampling, drawn, special.pad)
        tokens[index, step], mask[index, step] = token, sampling
        log_probs[index, step] = torch.where(sampling, log_prob, 0.0)
        entropy[index, step] = torch.where(sampling, spread, 0.0)
        feeding = sampling
        if (kept := still_thinking(feeding)) is not None:
            if live is not context:
                put_rows(context, index, live)
            token, feeding, index = token[kept], feeding[kept], index[kept]
            live = take_rows(context, index, limit - step + close)
    if close and sampling.any():
        feed(model, live, torch.full_like(token, special.eos), sampling)
    if live is not context:
        put_rows(context, index, live)
    longest = int(mask.sum(dim=1).max())
    return TextSegment("text_ar", log_probs[:, :longest], mask[:, :longest], tokens=tokens[:, :longest],
                       entropy=entropy[:, :longest])


def still_thinking(feeding: Tensor) -> Tensor | None:
    """Which of the rows (R,) bool to go on with, once enough have ended: indices in order; None to go on with all.

    Those that still think, and as many others as make a multiple of KEEP_MULTIPLE. On an accelerator, where a step costs its
    weights' bytes rather than its rows, and a second cache has no room, always all.
    """
    rows = len(feeding)
    if feeding.device.type != "cpu" or rows <= KEEP_MULTIPLE:
        return None
    count = -(-int(feeding.sum()) // KEEP_MULTIPLE) * KEEP_MULTIPLE
    if count > KEEP_SHARE * rows:
        return None
    return feeding.int().argsort(descending=True, stable=True)[:count].sort().values


def feed(model: MoTModel, context: Context, token: Tensor, rows: Tensor) -> Tensor:
    """One token (B,) to the rows (B,) bool of a context, in place; the others' new column is masked. States (B, D)."""
    context.mask[:, context.used] = rows
    hidden, _ = model(model.embed_text(token[:, None]), context.positions[:, None],
                      context.mask[:, None, None, :context.used + 1], context=context)
    context.used += 1
    context.positions = context.positions + rows
    return hidden[:, 0]


def image_velocity(model: MoTModel, markers: Tensor, context: Context, latents: Tensor, sigma: Tensor, *,
                   grid: tuple[int, int] | None = None) -> Tensor:
    """Velocity of one image block against a cached context, which is left as it was.

    Args:
        markers: (2,) ids of the image's start and end marker.
        context: with room for N + 2 columns.
        latents: (B, N, C), sigma: scalar.
    Returns: (B, N, C) float32.
    """
    und, gen = image_query(model, markers, latents, sigma, grid=grid)
    out = attend_image(model, und, gen, context, visible(context, latents.shape[1] + 2))
    return model.velocity(out[:, None], latents[:, None], sigma)[:, 0]


def denoise(model: MoTModel, markers: Tensor, context: Context, noise: Tensor, sigmas: Tensor, *,
            window: Sequence[int] = (), step_noise: Tensor | None = None, kind: TransitionKind = "flow_sde",
            noise_level: float = 0.0, guidance: Guidance | None = None, grid: tuple[int, int] | None = None,
            trace: list[Tensor] | None = None) -> Drawing:
    """Draw images: SDE steps inside the window, Euler steps outside.

    Args:
        noise: (B, N, C) float32 initial latents; sigmas: (S+1,) float32 from 1 to 0.
        window: schedule indices of the stochastic steps; step_noise: (B, W, N, C) their noise.
        kind, noise_level: the transition, see unigrpo.flow.sde.
        guidance: its passes share the embedded image block with the conditional one; norms are per sample.
        trace: if given, receives the state before every step.
    """
    device = context.mask.device
    latents, step_noise = noise.to(device), None if step_noise is None else step_noise.to(device)
    branches = [context]
    if guidance is not None:
        branches.append(guidance.context)
        if guidance.image_context is not None and guidance.image_scale > 1.0:
            branches.append(guidance.image_context)
    masks = [visible(branch, latents.shape[1] + 2) for branch in branches]
    states: list[Tensor] = []
    actions: list[Tensor] = []
    scores: list[Tensor] = []
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if trace is not None:
            trace.append(latents)
        active = guidance is not None and guidance.active(sigma)
        und, gen = image_query(model, markers, latents, sigma, grid=grid)
        velocities = [model.velocity(attend_image(model, und, gen, branch, mask)[:, None], latents[:, None], sigma)[:, 0]
                      for branch, mask in itertools.islice(zip(branches, masks, strict=True), None if active else 1)]
        velocity = velocities[0]
        if guidance is not None and active:
            velocity = combine_guidance(velocity, velocities[1], velocities[2] if len(velocities) > 2 else velocity,
                                        text_scale=guidance.scale, image_scale=guidance.image_scale,
                                        renorm=guidance.renorm, renorm_min=guidance.renorm_min)
        stochastic = step in window
        move = transition(latents, velocity, sigma, sigma_next, sigma_max=sigmas[1], noise_level=noise_level,
                          kind=kind if stochastic else "ode",
                          noise=step_noise[:, len(states)] if stochastic and step_noise is not None else None)
        if stochastic:
            states.append(latents)
            actions.append(move.next_latents)
            scores.append(move.log_prob)
        latents = move.next_latents
    empty = latents.new_zeros(len(latents), 0, *latents.shape[1:])
    return Drawing(torch.stack(states, dim=1) if states else empty, torch.stack(actions, dim=1) if actions else empty,
                   torch.stack(scores, dim=1) if scores else latents.new_zeros(len(latents), 0), latents)
