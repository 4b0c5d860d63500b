"""Sampling and replaying trajectories with a Mixture-of-Transformers model: thinking first, then the image.

Sampling runs without gradient on cached contexts: a prompt's prefix is computed once for its group, text decodes one
token a step for the whole batch until all have ended, and while denoising only the image block runs. Replay recomputes
text and every window step in one packed forward with gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unigrpo.adapters import adapters_off
from unigrpo.flow.guidance import Renorm, combine_guidance, guidance_active
from unigrpo.flow.schedule import choose_window, sigma_schedule
from unigrpo.flow.sde import TransitionKind, transition
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.bagel import SpecialTokens, causal_mask, concatenate_rows, encode_segments, packed_mask
from unigrpo.models.mot import Compact, Context, MoTModel, unpatchify
from unigrpo.policy import Draw
from unigrpo.schema import RolloutConfig
from unigrpo.text import sample_tokens, token_log_probs
from unigrpo.types import FlowSegment, PromptRecord, Replay, Rollouts, TextSegment


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: where the text is dropped, and how far to push away from it."""

    context: Context
    scale: float
    renorm: Renorm
    interval: tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """What denoising leaves behind: (B, W, N, C) states and actions of the window, (B, W) log-probs, the final latents."""

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    final_latents: Tensor


def prefill(model: MoTModel, tokens: Tensor, lengths: Tensor, *, room: int = 0) -> Context:
    """Cache the keys and values of a padded batch of text.

    Args:
        tokens: (B, L) int64 padded on the right, lengths: (B,) of real tokens, possibly 0.
        room: free columns to reserve behind the text.
    """
    rows, columns = tokens.shape
    context = model.empty_context(rows, columns + room)
    if columns:
        positions = torch.arange(columns).expand(rows, columns)
        model(model.embed_text(tokens), positions, causal_mask(lengths, columns), context=context,
              compact=Compact.of(lengths, columns))
    context.mask[:, :columns] = torch.arange(columns) < lengths[:, None]
    context.used, context.positions = columns, lengths.clone()
    return context


def think(model: MoTModel, special: SpecialTokens, context: Context, uniforms: Tensor, *, temperature: float = 1.0,
          top_k: int = 0, greedy: bool = False) -> TextSegment:
    """Decode one thinking segment a row, in place on the context, until every row has stopped.

    The fresh start token is fed first; sampled ids, the stop token included, are fed as they are. A row that has ended
    feeds nothing more: its later columns are masked, never padded over (a stop token overwritten by padding leaves the
    image conditioned on a context that was never trained).

    Args:
        context: with room for uniforms.shape[1] + 1 columns; holds the thinking afterwards.
        uniforms: (B, T) in [0, 1), one a token, T the longest thinking allowed.
    Returns: a TextSegment trimmed to the longest row.
    """
    rows, limit = uniforms.shape
    tokens = torch.full((rows, limit), special.pad, dtype=torch.int64)
    log_probs, entropy = torch.zeros(rows, limit), torch.zeros(rows, limit)
    mask = torch.zeros(rows, limit, dtype=torch.bool)
    feeding, token = torch.ones(rows, dtype=torch.bool), torch.full((rows,), special.bos, dtype=torch.int64)
    for step in range(limit + 1):
        context.mask[:, context.used] = feeding
        hidden, _ = model(model.embed_text(token[:, None]), context.positions[:, None],
                          context.mask[:, None, None, :context.used + 1], context=context)
        context.used += 1
        context.positions = context.positions + feeding
        sampling = feeding & (token != special.eos)
        if step == limit or not sampling.any():
            break
        drawn, log_prob, spread = sample_tokens(model.logits(hidden[:, 0]), uniforms[:, step], temperature=temperature,
                                                top_k=top_k, greedy=greedy)
        token = torch.where(sampling, drawn, special.pad)
        tokens[:, step], mask[:, step] = token, sampling
        log_probs[:, step] = torch.where(sampling, log_prob, 0.0)
        entropy[:, step] = torch.where(sampling, spread, 0.0)
        feeding = sampling
    longest = int(mask.sum(dim=1).max())
    return TextSegment("text_ar", log_probs[:, :longest], mask[:, :longest], tokens=tokens[:, :longest],
                       entropy=entropy[:, :longest])


def image_velocity(model: MoTModel, markers: Tensor, context: Context, latents: Tensor, sigma: Tensor, *,
                   grid: tuple[int, int] | None = None) -> Tensor:
    """Velocity of one image block against a cached context, which is left as it was.

    Args:
        markers: (2,) ids of the image's start and end marker.
        context: with room for N + 2 columns.
        latents: (B, N, C), sigma: scalar.
    Returns: (B, N, C) float32.
    """
    rows, tokens, _ = latents.shape
    positions = context.positions[:, None]
    mask = torch.cat([context.mask[:, :context.used], torch.ones(rows, tokens + 2, dtype=torch.bool)], dim=1)
    gen = model.embed_latents(latents[:, None], sigma, grid=grid)
    _, out = model(model.embed_text(markers).expand(rows, 2, -1), positions.expand(rows, 2), mask[:, None, None],
                   gen[:, 0], positions.expand(rows, tokens), context=context)
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
        trace: if given, receives the state before every step.
    """
    latents = noise
    states: list[Tensor] = []
    actions: list[Tensor] = []
    scores: list[Tensor] = []
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if trace is not None:
            trace.append(latents)
        velocity = image_velocity(model, markers, context, latents, sigma, grid=grid)
        if guidance is not None and guidance.scale > 1.0 and guidance_active(float(sigma), guidance.interval):
            dropped = image_velocity(model, markers, guidance.context, latents, sigma, grid=grid)
            velocity = combine_guidance(velocity, dropped, text_scale=guidance.scale, renorm=guidance.renorm)
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


class BagelPolicy:
    """The unified policy of a MoT model: implements unigrpo.policy.UnifiedPolicy.

    Args:
        model, tokenizer: of one checkpoint.
        system_prompt: text of the segment that precedes a prompt when the model is to think; "" for none.
        guidance: (scale, renorm, interval) of the policy's own classifier-free guidance, used in rollout and replay
            alike; None, the paper's choice, trains without.
        context_gradient: True lets the image loss reach the text context (the policy's true gradient).
        autoencoder: turns latents into pixels; None where the model draws pixel patches.
    """

    def __init__(self, model: MoTModel, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str,
                 guidance: tuple[float, Renorm, tuple[float, float]] | None = None, context_gradient: bool = True,
                 autoencoder: Autoencoder | None = None) -> None:
        self.model, self.tokenizer, self.system_prompt = model, tokenizer, system_prompt
        self.special = SpecialTokens.of(tokenizer)
        self.markers = torch.tensor([self.special.image_start, self.special.image_end])
        self.guidance, self.context_gradient, self.autoencoder = guidance, context_gradient, autoencoder
        self.reference_weights: dict[str, Tensor] = {}

    @property
    def guidance_scale(self) -> float:
        """Of the policy's own guidance; 1.0 means none."""
        return 1.0 if self.guidance is None else self.guidance[0]

    def encode(self, prompts: Sequence[PromptRecord] | Sequence[str], *, thinking: bool = True) -> tuple[Tensor, Tensor]:
        """Prompt contexts: [system][prompt] when the model is to think, [prompt] when not. Tokens (P, Tp), lengths (P,)."""
        texts = [p if isinstance(p, str) else p.prompt for p in prompts]
        system = [self.system_prompt] if thinking and self.system_prompt else []
        return encode_segments(self.tokenizer, [[*system, text] for text in texts])

    def dropped_context(self, rows: int, *, thinking: bool = True, room: int) -> Context:
        """The text-dropped context of classifier-free guidance: the system segment alone, or nothing."""
        system = [[self.system_prompt]] if thinking and self.system_prompt else [[]]
        tokens, lengths = encode_segments(self.tokenizer, system)
        return prefill(self.model, tokens, lengths).repeat(rows, room)

    @torch.no_grad()
    def generate(self, prompts: Sequence[PromptRecord], *, group_size: int, sampling: RolloutConfig,
                 generators: Draw, step: int = 0) -> Rollouts:
        """Sample thinking and images for every prompt, `group_size` siblings each. See UnifiedPolicy.generate."""
        siblings = [(p, i) for p in prompts for i in range(group_size)]
        tokens, lengths = self.encode(prompts)
        image_tokens, channels = int(np.prod(self.model.config.grid)), self.model.config.token_channels
        room = sampling.max_thinking_tokens + 1 + image_tokens + 2
        context = prefill(self.model, tokens, lengths).repeat(group_size, room)
        uniforms = np.stack([generators("thinking", p.id, i).random(sampling.max_thinking_tokens, dtype=np.float32)
                             for p, i in siblings])
        text = think(self.model, self.special, context, torch.from_numpy(uniforms), temperature=sampling.temperature,
                     top_k=sampling.top_k)
        sigmas = sigma_schedule(sampling.num_steps, sampling.shift)
        window = choose_window(sampling.window.kind, sampling.window.size, sampling.window.range,
                               rng=generators("window"), step=step)
        shape = (image_tokens, channels)
        noise = np.stack([generators("latents", p.id, 0 if sampling.shared_noise else i).standard_normal(shape, np.float32)
                          for p, i in siblings])
        step_noise = np.stack([generators("transition", p.id, i).standard_normal((len(window), *shape), np.float32)
                               for p, i in siblings])
        guidance = None
        if self.guidance is not None:
            guidance = Guidance(self.dropped_context(len(siblings), room=image_tokens + 2), *self.guidance)
        drawing = denoise(self.model, self.markers, context, torch.from_numpy(noise), sigmas, window=window,
                          step_noise=torch.from_numpy(step_noise), kind=sampling.transition,
                          noise_level=sampling.noise_level, guidance=guidance)
        image = FlowSegment("image_flow", drawing.log_probs, torch.ones_like(drawing.log_probs, dtype=torch.bool),
                            latents=drawing.latents, next_latents=drawing.next_latents,
                            final_latents=drawing.final_latents, steps=torch.tensor(window), sigmas=sigmas)
        calls = sampling.num_steps * (2 if guidance is not None else 1)
        return Rollouts(tuple(p for p, _ in siblings), tokens.repeat_interleave(group_size, dim=0),
                        lengths.repeat_interleave(group_size), (text, image), group_size,
                        stop_token=self.special.eos, temperature=sampling.temperature, guidance_scale=self.guidance_scale,
                        cost={"text_tokens": int(text.mask.sum()), "images": len(siblings),
                              "model_calls": calls * len(siblings)})

    def replay(self, rollouts: Rollouts, *, velocities: bool = True) -> Replay:
        """One packed forward [prompt | thinking | image at window step 1 | image at step 2 | ...].

        Args:
            velocities: False replays the text alone (runs whose image branch is not trained).
        Returns: Replay with gradient where gradients are enabled.
        """
        model, text, image = self.model, rollouts.text, rollouts.image
        start = torch.full((len(rollouts), 1), self.special.bos, dtype=torch.int64)
        tokens, lengths = concatenate_rows(rollouts.prompt_tokens, rollouts.prompt_lengths,
                                           torch.cat([start, text.tokens], dim=1), text.lengths + 1, self.special.pad)
        sigma = image.sigmas[image.steps]
        packed = velocities and self.context_gradient
        hidden, velocity = self.packed(tokens, lengths, image.latents if packed else None, sigma)
        if velocities and not self.context_gradient:
            velocity = self._against_frozen_context(tokens, lengths, image.latents, sigma)
        if velocity is None:
            velocity = torch.zeros_like(image.latents)
        elif self.guidance is not None:
            velocity = self._guided(velocity, image.latents, sigma)
        index = rollouts.prompt_lengths[:, None] + torch.arange(text.tokens.shape[1])
        index = index.clamp(max=tokens.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        logits = model.logits(hidden.gather(1, index))                                         # (B, T, V)
        log_probs = token_log_probs(logits, text.tokens, rollouts.temperature)
        with torch.no_grad():
            full = logits.log_softmax(dim=-1)
            entropy = -(full.exp() * full).sum(dim=-1) * text.mask
        return Replay(torch.where(text.mask, log_probs, 0.0), velocity, entropy)

    def packed(self, tokens: Tensor, lengths: Tensor, latents: Tensor | None, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """Text states (B, L, D) and, with latents (B, W, N, C), the velocities of all blocks, in one forward.

        `sigma` is (W,), or (B, W) where every row has noise levels of its own.
        """
        model, (rows, columns) = self.model, tokens.shape
        positions = torch.arange(columns).expand(rows, columns)
        if latents is None:
            hidden, _ = model(model.embed_text(tokens), positions, causal_mask(lengths, columns),
                              compact=Compact.of(lengths, columns))
            return hidden, None
        blocks, count = latents.shape[1:3]
        und = model.embed_text(torch.cat([tokens, self.markers.repeat(blocks).expand(rows, -1)], dim=1))
        image_position = lengths[:, None]
        hidden, out = model(und, torch.cat([positions, image_position.expand(rows, 2 * blocks)], dim=1),
                            packed_mask(lengths, columns, blocks, count), model.embed_latents(latents, sigma).flatten(1, 2),
                            image_position.expand(rows, blocks * count), compact=Compact.of(lengths, columns, 2 * blocks))
        assert out is not None
        velocity = model.velocity(out.view(rows, blocks, count, -1), latents, sigma)
        return hidden[:, :columns], velocity

    def _against_frozen_context(self, tokens: Tensor, lengths: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """Velocities (B, W, N, C) whose gradient stops at the text context."""
        count = latents.shape[2]
        with torch.no_grad():
            context = prefill(self.model, tokens, lengths)
        blocks = [image_velocity(self.model, self.markers, context.repeat(1, count + 2), latents[:, w], sigma[w])
                  for w in range(latents.shape[1])]
        return torch.stack(blocks, dim=1)

    def _guided(self, velocity: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """The guided velocity at every window step: the same rule as in the rollout."""
        assert self.guidance is not None
        scale, renorm, interval = self.guidance
        system = [[self.system_prompt] if self.system_prompt else []] * len(latents)
        _, dropped = self.packed(*encode_segments(self.tokenizer, system), latents, sigma)
        assert dropped is not None
        blocks = [combine_guidance(v, d, text_scale=scale, renorm=renorm) if guidance_active(float(s), interval) else v
                  for v, d, s in zip(velocity.unbind(1), dropped.unbind(1), sigma, strict=True)]
        return torch.stack(blocks, dim=1)

    def freeze_reference(self, names: Sequence[str]) -> None:
        """Remember today's values of the named parameters as the reference's."""
        parameters = dict(self.model.named_parameters())
        self.reference_weights = {name: parameters[name].detach().clone() for name in names}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the weights are the reference's: same tokens and latents, its own context.

        The trained parameters hold the frozen copy's values; adapters, where there are any, are off.
        """
        parameters = dict(self.model.named_parameters())
        own = {name: parameters[name].data for name in self.reference_weights}
        try:
            for name, value in self.reference_weights.items():
                parameters[name].data = value
            with adapters_off(self.model):
                yield
        finally:
            for name, value in own.items():
                parameters[name].data = value

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """(B, N, C) final latents -> (B, H, W, 3) float32 in [0, 1]. Pixel patches need no autoencoder."""
        pixels = unpatchify(latents, self.model.config.latent_patch_size, self.model.config.grid)
        if self.autoencoder is not None:
            pixels = self.autoencoder.decode(pixels)
        return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

    def texts(self, segment: TextSegment) -> list[str]:
        """Decoded texts of a segment, the stop token left out."""
        rows = [row[keep].tolist() for row, keep in zip(segment.tokens, segment.mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def thinking_texts(self, rollouts: Rollouts) -> list[str]:
        """See UnifiedPolicy.thinking_texts."""
        return self.texts(rollouts.text)
