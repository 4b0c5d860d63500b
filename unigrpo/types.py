"""Shared records and the legend of shapes.

Shapes used in every docstring: P prompts, G group_size, B = P * G rollouts (one prompt's rollouts are contiguous),
T text tokens, S denoising steps (model calls), W steps in the SDE window, K actions (T or W), V vocabulary,
N image tokens, C channels of an image token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

SegmentKind = Literal["text_ar", "image_flow"]


@dataclass(frozen=True)
class PromptRecord:
    """One prompt: GenEval's record schema plus what the pipeline needs to know about it.

    Args:
        id: 16 hex digits, sha256 of the canonical content.
        tag: GenEval category (single_object, two_object, counting, colors, position, color_attr).
        prompt: the text a user would write.
        include: clauses {"class", "count", "color"?, "position"?: [relation, index of the target clause]}.
        exclude: clauses {"class", "count"}: at least `count` of the class makes an image wrong.
        split: sft, train, validation or eval.
        source: where the record comes from (a generator's name, or a benchmark file).
        thinking: a rationale, where one is given (the sft split).
        needs_reasoning: True if the drawable content must be inferred from the prompt.
        reasoning: which kind of inference ("arithmetic", ...), None for plain prompts.
    """

    id: str
    tag: str
    prompt: str
    include: tuple[dict[str, Any], ...]
    exclude: tuple[dict[str, Any], ...] = ()
    split: str = ""
    source: str = ""
    thinking: str | None = None
    needs_reasoning: bool = False
    reasoning: str | None = None


@dataclass(frozen=True)
class Segment:
    """A contiguous run of actions of one kind in a trajectory.

    Args:
        kind: which codec samples, replays and regularises the segment.
        rollout_log_probs: (B, K) nats, recorded while sampling. For images the mean over latent elements.
        mask: (B, K) bool, True on sampled actions that are trained.
        old_log_probs: (B, K) nats, replayed at the weights that sampled, detached. None until anchored.
    """

    kind: SegmentKind
    rollout_log_probs: Tensor
    mask: Tensor
    old_log_probs: Tensor | None = None

    def select(self, rows: Tensor) -> Segment:
        """The same segment for a subset of rollouts: every tensor whose first dimension is B is indexed."""
        size = self.mask.shape[0]
        chosen = {name: value[rows] for name, value in vars(self).items()
                  if isinstance(value, Tensor) and name not in SHARED_FIELDS and value.shape[0] == size}
        return replace(self, **chosen)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TextSegment(Segment):
    """Sampled thinking tokens, the stop token included; rows are padded on the right.

    Args:
        tokens: (B, T) int64 token ids exactly as sampled; they condition the image as they are.
        entropy: (B, T) nats of the sampling distribution at each position; a diagnostic.
        ref_log_probs: (B, T) nats under the reference. None unless asked for.
    """

    tokens: Tensor = field(kw_only=True)
    entropy: Tensor = field(kw_only=True)
    ref_log_probs: Tensor | None = field(kw_only=True, default=None)

    @property
    def lengths(self) -> Tensor:
        """(B,) number of sampled tokens, the stop token included."""
        return self.mask.sum(dim=1)


@dataclass(frozen=True)
class FlowSegment(Segment):
    """The stochastic steps of one denoising trajectory.

    Args:
        latents: (B, W, N, C) float32, state before each window step.
        next_latents: (B, W, N, C) float32, the action: the state each window step drew.
        final_latents: (B, N, C) float32, the clean image's latents, after the last step.
        steps: (W,) int64, schedule indices of the window steps; shared by the batch.
        sigmas: (S+1,) float32, the schedule the rollout used; shared by the batch.
        old_means: (B, W, N, C) means of the transitions at the weights that sampled. None until anchored.
        ref_velocities: (B, W, N, C) velocities of the reference at `latents`. None unless asked for.
    """

    latents: Tensor = field(kw_only=True)
    next_latents: Tensor = field(kw_only=True)
    final_latents: Tensor = field(kw_only=True)
    steps: Tensor = field(kw_only=True)
    sigmas: Tensor = field(kw_only=True)
    old_means: Tensor | None = field(kw_only=True, default=None)
    ref_velocities: Tensor | None = field(kw_only=True, default=None)


SHARED_FIELDS = frozenset({"steps", "sigmas"})  # not indexed by rollout, whatever their length


@dataclass(frozen=True)
class Rollouts:
    """B trajectories: prompt contexts and an ordered tuple of segments. UniGRPO is (text_ar, image_flow).

    Args:
        prompts: B records, one per rollout; siblings share one object.
        prompt_tokens: (B, Tp) int64 context ids (system and prompt segments), padded on the right.
        prompt_lengths: (B,) int64.
        segments: in the order they were sampled.
        group_size: G; rows i*G..(i+1)*G-1 are siblings.
        stop_token: the id that ends a thinking.
        temperature: of the text sampling; log-probs are those of the tempered distribution.
        guidance_scale: classifier-free guidance of the policy that sampled the images; 1.0 means none.
        cost: counted work of sampling: text tokens, model calls, images.
    """

    prompts: tuple[PromptRecord, ...]
    prompt_tokens: Tensor
    prompt_lengths: Tensor
    segments: tuple[Segment, ...]
    group_size: int
    stop_token: int = -1
    temperature: float = 1.0
    guidance_scale: float = 1.0
    cost: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def text(self) -> TextSegment:
        """The thinking."""
        return next(s for s in self.segments if isinstance(s, TextSegment))

    @property
    def image(self) -> FlowSegment:
        """The drawing."""
        return next(s for s in self.segments if isinstance(s, FlowSegment))

    def select(self, rows: Tensor) -> Rollouts:
        """A subset of the rollouts, in the order of `rows`."""
        return replace(self, prompts=tuple(self.prompts[int(i)] for i in rows), prompt_tokens=self.prompt_tokens[rows],
                       prompt_lengths=self.prompt_lengths[rows], segments=tuple(s.select(rows) for s in self.segments))

    def with_segments(self, segments: Sequence[Segment]) -> Rollouts:
        """The same trajectories with replaced segments (anchors added, say)."""
        return replace(self, segments=tuple(segments))

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Row indices of consecutive chunks of at most `size` rollouts."""
        yield from torch.arange(len(self)).split(size)


@dataclass(frozen=True)
class Replay:
    """What one packed forward returns for a batch of rollouts.

    Args:
        text_log_probs: (B, T) nats of the sampled tokens under the current weights; 0 where masked.
        velocities: (B, W, N, C) float32 at the stored latents of the window steps.
        text_entropy: (B, T) nats, no gradient needed; a diagnostic.
    """

    text_log_probs: Tensor
    velocities: Tensor
    text_entropy: Tensor


@dataclass(frozen=True)
class Reward:
    """One named reward of a batch.

    Args:
        name: as it is logged.
        value: (B,) float32; NaN where it is missing, never a silent 0.
        segment: the index of the segment it belongs to, or None for the end of the trajectory.
    """

    name: str
    value: Tensor
    segment: int | None = None
