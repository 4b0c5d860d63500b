"""The serial reference: our own code, used as the common implementations work.

One rollout at a time, its prompt prefilled for itself; the context is computed again for the image; the update replays one
rollout at a time, its text in one forward and every step of the window in one more, each computing the context again; the
penalty's velocities come from forwards of their own. Draws are keyed by rollout, so the numbers are those of the batched code
up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import unigrpo.rollout as batched
from unigrpo.flow.schedule import choose_window, sigma_schedule
from unigrpo.models.bagel import concatenate_rows
from unigrpo.policy import Draw
from unigrpo.rollout import BagelPolicy, join_segments
from unigrpo.schema import RolloutConfig
from unigrpo.types import FlowSegment, PromptRecord, Replay, Rollouts


class SerialPolicy(BagelPolicy):
    """The same weights, tokenizer and draws, at batch one. `answer`: rollouts to return in place of the sampled ones, so that
    an update can be compared on equal trajectories even where rounding has flipped a token."""

    answer: Rollouts | None = None

    @classmethod
    def of(cls, policy: BagelPolicy) -> SerialPolicy:
        """A serial policy that shares everything with a batched one."""
        if policy.guidance is not None:
            raise ValueError("the serial reference has no guidance; measure a run with rollout.guidance_scale 1")
        serial = cls.__new__(cls)
        serial.__dict__.update(copy.copy(policy.__dict__))
        return serial

    @torch.no_grad()
    def generate(self, prompts: Sequence[PromptRecord], *, group_size: int, sampling: RolloutConfig, generators: Draw,
                 step: int = 0) -> Rollouts:
        """See UnifiedPolicy.generate."""
        sigmas = sigma_schedule(sampling.num_steps, sampling.shift)
        window = choose_window(sampling.window.kind, sampling.window.size, sampling.window.range, rng=generators("window"),
                               step=step)
        tokens, lengths = (part.to(self.model.device) for part in self.encode(prompts))
        parts = [self.sample_one(p, i, tokens[row, None, :lengths[row]], sampling, generators, sigmas, window)
                 for row, p in enumerate(prompts) for i in range(group_size)]
        text, image = (join_segments(column, self.special.pad) for column in zip(*parts, strict=True))
        drawn = Rollouts(tuple(p for p in prompts for _ in range(group_size)), tokens.repeat_interleave(group_size, dim=0),
                         lengths.repeat_interleave(group_size), (text, image), group_size, stop_token=self.special.eos,
                         temperature=sampling.temperature, cost={})
        self.sampled = drawn
        return drawn if self.answer is None else self.answer

    def sample_one(self, prompt: PromptRecord, sibling: int, tokens: Tensor, sampling: RolloutConfig, generators: Draw,
                   sigmas: Tensor, window: Sequence[int]):
        """One rollout: prefill, think, prefill again, draw."""
        limit, count = sampling.max_thinking_tokens, int(np.prod(self.model.config.grid))
        length = torch.tensor([tokens.shape[1]], device=tokens.device)
        context = batched.prefill(self.model, tokens, length, room=limit + 1)
        uniforms = generators("thinking", prompt.id, sibling).random(limit, dtype=np.float32)[None]
        text = batched.think(self.model, self.special, context, torch.from_numpy(uniforms), temperature=sampling.temperature,
                             top_k=sampling.top_k)
        whole, lengths = self.with_thinking(tokens, length, text.tokens, text.lengths)
        context = batched.prefill(self.model, whole, lengths, room=count + 2)
        shape = (count, self.model.config.token_channels)
        noise = generators("latents", prompt.id, 0 if sampling.shared_noise else sibling).standard_normal(shape, np.float32)
        steps = generators("transition", prompt.id, sibling).standard_normal((len(window), *shape), np.float32)
        drawing = batched.denoise(self.model, self.markers, context, torch.from_numpy(noise[None]), sigmas, window=window,
                                  step_noise=torch.from_numpy(steps[None]), kind=sampling.transition,
                                  noise_level=sampling.noise_level)
        return text, FlowSegment("image_flow", drawing.log_probs, torch.ones_like(drawing.log_probs, dtype=torch.bool),
                                 latents=drawing.latents, next_latents=drawing.next_latents,
                                 final_latents=drawing.final_latents, steps=torch.tensor(window), sigmas=sigmas)

    def with_thinking(self, tokens: Tensor, lengths: Tensor, thinking: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """[prompt | start token | thinking] and its lengths."""
        start = torch.full((len(tokens), 1), self.special.bos, dtype=torch.int64, device=tokens.device)
        return concatenate_rows(tokens, lengths, torch.cat([start, thinking], dim=1), written + 1, self.special.pad)

    def replay(self, rollouts: Rollouts, *, velocities: bool = True) -> Replay:
        """The text in one forward, and one forward for each step of the window."""
        image = rollouts.image
        text = super().replay(rollouts, velocities=False)
        if not velocities:
            return text
        tokens, lengths = self.with_thinking(rollouts.prompt_tokens, rollouts.prompt_lengths, rollouts.text.tokens,
                                             rollouts.text.lengths)
        found = [self.packed(tokens, lengths, image.latents[:, step, None], sigma[None])[1]
                 for step, sigma in enumerate(image.sigmas[image.steps])]
        return Replay(text.text_log_probs, torch.cat(found, dim=1), text.text_entropy)  # type: ignore[arg-type]
