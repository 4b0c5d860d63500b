"""Sampling and replaying trajectories with a Mixture-of-Transformers model: thinking first, then the image.

Sampling runs without gradient on cached contexts: a prompt's prefix is computed once for its group, text decodes one
token a step for the whole batch until all have ended, and while denoising only the image block runs. Replay recomputes
text and every window step in one packed forward with gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from unigrpo.adapters import adapters_off
from unigrpo.contexts import prefill, read_system_prompt, take_rows
from unigrpo.flow.guidance import Renorm, combine_guidance, guidance_active, model_calls
from unigrpo.flow.schedule import choose_window, sigma_schedule
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.bagel import SpecialTokens, causal_mask, concatenate_rows, encode_segments, packed_mask
from unigrpo.models.mot import Compact, Context, MoTModel, unpatchify
from unigrpo.policy import Draw
from unigrpo.sampling import Guidance, denoise, image_velocity, think
from unigrpo.schema import RolloutConfig
from unigrpo.text import token_log_probs
from unigrpo.types import SHARED_FIELDS, FlowSegment, PromptRecord, Replay, Rollouts, Segment, TextSegment

DECODED_PIXELS = 4 * 1024 * 1024  # pixels the autoencoder decodes at a time


class BagelPolicy:
    """The unified policy of a MoT model: implements unigrpo.policy.UnifiedPolicy.

    Args:
        model, tokenizer: of one checkpoint.
        system_prompt: text of the segment that precedes a prompt when the model is to think; "" for none;
            "@PATH/inferencer.py" reads BAGEL's own from a checkout of the official code, see read_system_prompt.
        guidance: (scale, renorm, interval) of the policy's own classifier-free guidance, used in rollout and replay
            alike; None, the paper's choice, trains without.
        context_gradient: True lets the image loss reach the text context (the policy's true gradient).
        autoencoder: turns latents into pixels; None where the model draws pixel patches.
    """

    sharded = False  # unigrpo.sharding spreads the weights over processes

    def __init__(self, model: MoTModel, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str,
                 guidance: tuple[float, Renorm, tuple[float, float]] | None = None, context_gradient: bool = True,
                 autoencoder: Autoencoder | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.system_prompt = (read_system_prompt(Path(system_prompt[1:]).expanduser()) if system_prompt.startswith("@")
                              else system_prompt)
        self.special = SpecialTokens.of(tokenizer)
        self.guidance, self.context_gradient, self.autoencoder = guidance, context_gradient, autoencoder
        self.reference_weights: dict[str, Tensor] = {}

    @property
    def markers(self) -> Tensor:
        """(2,) ids of an image's start and end, on the model's device."""
        return torch.tensor([self.special.image_start, self.special.image_end], device=self.model.device)

    @property
    def guidance_scale(self) -> float:
        """Of the policy's own guidance; 1.0 means none."""
        return 1.0 if self.guidance is None else self.guidance[0]

    def encode(self, prompts: Sequence[PromptRecord] | Sequence[str], *, thinking: bool = True) -> tuple[Tensor, Tensor]:
        """Prompt contexts: [system][prompt] when the model is to think, [prompt] when not. Tokens (P, Tp), lengths (P,)."""
        texts = [p if isinstance(p, str) else p.prompt for p in prompts]
        system = [self.system_prompt] if thinking and self.system_prompt else []
        return encode_segments(self.tokenizer, [[*system, text] for text in texts])

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the text-dropped context of a policy that thinks."""
        return int(encode_segments(self.tokenizer, [[self.system_prompt] if self.system_prompt else []])[1][0])

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
        tokens, lengths = (part.to(self.model.device) for part in self.encode(prompts))
        prefix = prefill(self.model, tokens, lengths)
        sigmas = sigma_schedule(sampling.num_steps, sampling.shift)
        window = choose_window(sampling.window.kind, sampling.window.size, sampling.window.range,
                               rng=generators("window"), step=step)
        parts = [self._sample(siblings, rows, group_size, prefix, sampling, generators, sigmas, window)
                 for rows in self.budgeted(len(siblings), prefix.used, sampling)]
        text, image = (join_segments(column, self.special.pad) for column in zip(*parts, strict=True))
        return Rollouts(tuple(p for p, _ in siblings), tokens.repeat_interleave(group_size, dim=0),
                        lengths.repeat_interleave(group_size), (text, image), group_size,
                        stop_token=self.special.eos, temperature=sampling.temperature, guidance_scale=self.guidance_scale,
                        cost={"text_tokens": int(text.mask.sum()), "images": len(siblings),
                              "model_calls": model_calls(sigmas, self.guidance and self.guidance[2]) * len(siblings)})

    def budgeted(self, rows: int, prefix: int, sampling: RolloutConfig) -> Sequence[Tensor]:
        """Row indices of the chunks that are sampled at a time: as many whole rows as `token_budget` cache tokens hold.

        A row caches its prefix, its longest thinking and its image, and once more system segment and image with guidance.

        Args:
            prefix: columns of the prompts' cache.
        """
        index = torch.arange(rows)
        if sampling.token_budget is None:
            return [index]
        image = int(np.prod(self.model.config.grid)) + 2
        columns = prefix + sampling.max_thinking_tokens + 1 + image
        if self.guidance is not None:
            columns += image + encode_segments(self.tokenizer, [[self.system_prompt]])[0].shape[1]
        return index.split(max(1, sampling.token_budget // columns))

    def _sample(self, siblings: Sequence[tuple[PromptRecord, int]], rows: Tensor, group_size: int, prefix: Context,
                sampling: RolloutConfig, generators: Draw, sigmas: Tensor,
                window: Sequence[int]) -> tuple[TextSegment, FlowSegment]:
        """Thinking and image of some of the rollouts. Draws are keyed by rollout, so the choice of rows moves no number."""
        chosen, count = [siblings[int(row)] for row in rows], int(np.prod(self.model.config.grid))
        context = take_rows(prefix, rows // group_size, sampling.max_thinking_tokens + 1 + count + 2)
        uniforms = np.stack([generators("thinking", p.id, i).random(sampling.max_thinking_tokens, dtype=np.float32)
                             for p, i in chosen])
        text = think(self.model, self.special, context, torch.from_numpy(uniforms), temperature=sampling.temperature,
                     top_k=sampling.top_k)
        shape = (count, self.model.config.token_channels)
        noise = np.stack([generators("latents", p.id, 0 if sampling.shared_noise else i).standard_normal(shape, np.float32)
                          for p, i in chosen])
        step_noise = np.stack([generators("transition", p.id, i).standard_normal((len(window), *shape), np.float32)
                               for p, i in chosen])
        guidance = None
        if self.guidance is not None:
            guidance = Guidance(self.dropped_context(len(chosen), room=count + 2), *self.guidance)
        drawing = denoise(self.model, self.markers, context, torch.from_numpy(noise), sigmas, window=window,
                          step_noise=torch.from_numpy(step_noise), kind=sampling.transition,
                          noise_level=sampling.noise_level, guidance=guidance)
        image = FlowSegment("image_flow", drawing.log_probs, torch.ones_like(drawing.log_probs, dtype=torch.bool),
                            latents=drawing.latents, next_latents=drawing.next_latents,
                            final_latents=drawing.final_latents, steps=torch.tensor(window), sigmas=sigmas)
        return text, image

    def replay(self, rollouts: Rollouts, *, velocities: bool = True) -> Replay:
        """One packed forward [prompt | thinking | image at window step 1 | image at step 2 | ...].

        Args:
            velocities: False replays the text alone (runs whose image branch is not trained).
        Returns: Replay with gradient where gradients are enabled.
        """
        model, text, image = self.model, rollouts.text, rollouts.image
        start = torch.full((len(rollouts), 1), self.special.bos, dtype=torch.int64, device=text.tokens.device)
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
        index = rollouts.prompt_lengths[:, None] + torch.arange(text.tokens.shape[1], device=lengths.device)
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
        positions = torch.arange(columns, device=tokens.device).expand(rows, columns)
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
        tokens, lengths = (part.to(latents.device) for part in encode_segments(self.tokenizer, system))
        _, dropped = self.packed(tokens, lengths, latents, sigma)
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

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the model may be called without the other processes' doing: all weights are here anyway, or gathered."""
        yield

    def settle(self) -> None:
        """Give up gathered weights, where there are any."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """(B, N, C) final latents -> (B, H, W, 3) float32 in [0, 1]. Pixel patches need no autoencoder."""
        return self.decode_grid(latents, self.model.config.grid)

    @torch.no_grad()
    def decode_grid(self, latents: Tensor, grid: tuple[int, int]) -> np.ndarray:
        """The same for an image grid (rows, columns) of another size; a few images at a time, to bound memory."""
        stride = self.model.config.latent_patch_size * self.model.config.latent_downsample
        together = max(1, DECODED_PIXELS // (grid[0] * grid[1] * stride**2))
        out = []
        for part in latents.split(together if self.autoencoder is not None else len(latents)):
            pixels = unpatchify(part, self.model.config.latent_patch_size, grid)
            if self.autoencoder is not None:
                pixels = self.autoencoder.decode(pixels)
            out.append((pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(out)

    def texts(self, segment: TextSegment) -> list[str]:
        """Decoded texts of a segment, the stop token left out."""
        rows = [row[keep].tolist() for row, keep in zip(segment.tokens, segment.mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def thinking_texts(self, rollouts: Rollouts) -> list[str]:
        """See UnifiedPolicy.thinking_texts."""
        return self.texts(rollouts.text)


def join_segments(parts: Sequence[Segment], filler: int) -> Segment:
    """One segment of all rows of several: token columns padded to the longest, with `filler` for ids."""
    if len(parts) == 1:
        return parts[0]
    width, joined = max(part.mask.shape[1] for part in parts), {}
    for item in fields(parts[0]):
        values = [getattr(part, item.name) for part in parts]
        if isinstance(values[0], Tensor) and item.name not in SHARED_FIELDS:
            joined[item.name] = torch.cat([
                pad(v, (0, width - v.shape[1]), value=filler if item.name == "tokens" else 0) if v.ndim == 2 else v
                for v in values])
    return replace(parts[0], **joined)  # type: ignore[arg-type]
