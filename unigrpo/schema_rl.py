"""The schema of params/, reinforcement learning: sampling, reward, credit, objective, optimizer, adapters, the loop."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unigrpo.schema_model import Count, Positive, Rate, Section, Share

# Names are known here, so that a wrong one is refused when the config is loaded and not after the warm-up; tests compare them
# with unigrpo.rewards and evaluation.sentinel, which may not be imported this early.
REWARD_NAMES = ("blip_vqa", "clip_score", "geneval_soft_mask2former_hf", "geneval_soft_shapes", "geneval_strict_mask2former_hf",
                "geneval_strict_shapes", "judge", "mixture", "pickscore", "shapes_exact", "shapes_graded", "shapes_tolerant")
SIZED_REWARD = r"(geneval_(?:soft|strict)_mask2former_hf)_(\d{1,5})px"   # at another input size it is another reward
THRESHOLDS = ("sigmas", "in_a_row", "release", "baseline_probes", "reward_rise", "edge_density", "brightness", "color_entropy",
              "hue_entropy", "background_drift", "group_diversity", "velocity_drift", "thinking_length", "thinking_repetition",
              "thinking_entropy", "distinct_texts", "gold")


class WindowConfig(Section):
    """Which denoising steps are stochastic and trained."""

    kind: Literal["subset", "all", "contiguous", "sliding"]
    size: Positive
    range: tuple[Count, Positive]


class RolloutConfig(Section):
    """Sampling of trajectories."""

    prompts_per_step: Positive
    group_size: int = Field(ge=2)
    system_prompt: str
    max_thinking_tokens: Positive
    temperature: float = Field(gt=0)
    top_k: Count
    num_steps: int = Field(ge=2)
    shift: float = Field(gt=0)
    transition: Literal["flow_sde", "cps", "dance"]
    noise_level: float = Field(gt=0)
    window: WindowConfig
    shared_noise: bool
    token_budget: Positive | None
    guidance_scale: float = Field(ge=1)
    guidance_renorm: Literal["global", "channel", "text_channel"]
    guidance_interval: tuple[Share, Share]

    @model_validator(mode="after")
    def check(self) -> Self:
        """The window lies inside the steps."""
        start, stop = self.window.range
        if not 0 <= start < stop <= self.num_steps:
            raise ValueError(f"window.range must lie in [0, num_steps={self.num_steps}], got ({start}, {stop})")
        if self.window.size > stop - start:
            raise ValueError(f"window.size must be at most the range's {stop - start} steps, got {self.window.size}")
        return self


class RewardConfig(Section):
    """Weighted rewards, and how many may be missing before the run stops."""

    weights: dict[str, float] = Field(min_length=1)
    options: dict[str, dict[str, Any]]
    max_missing: Share

    @model_validator(mode="after")
    def check(self) -> Self:
        """Rewards exist, and options belong to one of the run."""
        for name in self.weights:
            if name not in REWARD_NAMES and ":" not in name and not re.fullmatch(SIZED_REWARD, name):
                raise ValueError(f"unknown reward {name!r} in weights; choose from {', '.join(REWARD_NAMES)}, or module:name "
                                 "for a function of your own")
        if not any(self.weights.values()):
            raise ValueError(f"one of the weights must not be 0, got {self.weights}")
        if unknown := sorted(set(self.options) - set(self.weights)):
            raise ValueError(f"options must belong to rewards of weights, {sorted(self.weights)}, got {unknown}")
        return self


class CreditConfig(Section):
    """From rewards to advantages."""

    strategy: Literal["shared_terminal"]
    std: Literal["group", "batch", "none"]
    ddof: Literal[0, 1]
    eps: float = Field(ge=0)
    clamp: float | None


class TextObjective(Section):
    """GRPO over thinking tokens."""

    weight: Rate
    clip_low: float = Field(gt=0)
    clip_high: float = Field(gt=0)
    aggregation: Literal["sequence_mean", "token_mean"]
    kl_weight: Rate


class ImageObjective(Section):
    """Flow-GRPO over the window steps. The clip is given at 65,536 latent elements and scaled by sqrt(65536 / D)."""

    weight: Rate
    clip_low: float = Field(gt=0)
    clip_high: float = Field(gt=0)
    ratio_norm: bool
    regularizer: Literal["none", "latent_kl", "latent_kl_published", "velocity_mse"]
    regularizer_weight: Rate
    regularizer_decay: bool
    context_gradient: Literal["full", "stop"]


class ObjectiveConfig(Section):
    """J = J_text + J_image."""

    text: TextObjective
    image: ImageObjective

    @model_validator(mode="after")
    def check(self) -> Self:
        """Something is learnt from the reward."""
        if not self.text.weight and not self.image.weight:
            raise ValueError("one of text.weight and image.weight must be above 0, got 0 and 0: nothing would be trained")
        return self


class OptimConfig(Section):
    """AdamW over the trained experts."""

    understanding_lr: Rate
    generation_lr: Rate
    betas: tuple[Share, Share]
    eps: float = Field(gt=0)
    weight_decay: Rate
    grad_clip: float = Field(gt=0)
    warmup: Count
    decay: Literal["none", "linear"]
    master_weights: Literal["fp32", "bf16"]


class LoraSection(Section):
    """Low-rank adapters on the matrices of the trained experts, in RL; rank 0 trains the weights themselves."""

    rank: Count
    alpha: Positive
    dropout: Share
    targets: tuple[Literal["attention", "mlp"], ...] = Field(min_length=1)
    lr_scale: float = Field(gt=0)

    @model_validator(mode="after")
    def check(self) -> Self:
        """Replay must see the weights that sampled."""
        if self.dropout > 0:
            raise ValueError(f"dropout must be 0, got {self.dropout}: RL replays rollouts and dropout would make every "
                             "ratio noise")
        return self


class MismatchConfig(Section):
    """How far rollout and replay log-probs may differ before the first update: text in nats, image in units of its clip."""

    text: float = Field(gt=0)
    image: float = Field(gt=0)


class SentinelConfig(Section):
    """The alarm for reward hacking: what it does when it rises, and where it does (thresholds of evaluation/sentinel.py)."""

    stop: bool
    keep_good: bool
    thresholds: dict[str, float]

    @model_validator(mode="after")
    def check(self) -> Self:
        """Thresholds exist."""
        if unknown := sorted(set(self.thresholds) - set(THRESHOLDS)):
            raise ValueError(f"unknown threshold {unknown[0]!r}; choose from {', '.join(THRESHOLDS)}")
        if any(value < 0 for value in self.thresholds.values()):
            raise ValueError(f"thresholds must be at least 0, got {self.thresholds}")
        return self


class TrainConfig(Section):
    """The RL loop."""

    method: Literal["unigrpo", "sft"]
    num_steps: Positive
    updates_per_rollout: Positive
    micro_batch: Positive
    processes: Positive | None
    experts: tuple[Literal["understanding", "generation"], ...] = Field(min_length=1)
    precision: Literal["fp32", "bf16"]
    activation_checkpointing: bool
    max_mismatch: MismatchConfig
    monitor_every: Positive
    probe_every: Positive
    probe_prompts: Positive
    sentinel: SentinelConfig
    gallery_every: Positive
    checkpoint_every: Positive
    max_skipped: Count
