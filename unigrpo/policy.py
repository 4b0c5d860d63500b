"""The Protocol of a unified policy: what the trainer needs, and nothing of how a model does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from unigrpo.types import PromptRecord, Replay, Rollouts

Draw = Callable[..., np.random.Generator]
"""draw(purpose, *key) -> the generator of that purpose; the run's seed and step are already bound."""


class UnifiedPolicy(Protocol):
    """A model that writes its thinking and draws its image.

    `model` is the trained network; its parameters whose gradient is wanted have requires_grad set. `guidance_scale` is
    the policy's own classifier-free guidance, 1.0 for none.
    """

    @property
    def model(self) -> nn.Module:
        """The trained network."""
        ...

    @property
    def guidance_scale(self) -> float:
        """1.0 means no classifier-free guidance."""
        ...

    def generate(self, prompts: Sequence[PromptRecord], *, group_size: int, sampling: Any, generators: Draw,
                 step: int = 0) -> Rollouts:
        """Sample P * group_size trajectories; a prompt's prefix is computed once for its whole group.

        `step` is the training step: a sliding window moves with it.
        """
        ...

    def replay(self, rollouts: Rollouts, *, velocities: bool = True) -> Replay:
        """Log-probs of the sampled tokens and velocities at the stored latents, in one packed forward."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the weights are the reference's."""
        ...

    def decode(self, latents: Tensor) -> np.ndarray:
        """(B, N, C) final latents -> (B, H, W, 3) float32 images in [0, 1]."""
        ...

    def thinking_texts(self, rollouts: Rollouts) -> list[str]:
        """B decoded thinking texts, for rewards and people; nothing is ever conditioned on them."""
        ...
