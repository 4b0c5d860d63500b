"""The schema of params/: pydantic models hold the rules, the yaml files hold every value (unigrpo.config reads them)."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unigrpo.schema_benchmarks import BenchmarkRules
from unigrpo.schema_compute import RemoteConfig
from unigrpo.schema_model import AutoencoderConfig, Count, ModelConfig, Positive, Rate, Section, Share

WORLD_PIXELS = 32  # side of a picture of the shapes world
# Names are known here, so that a wrong one is refused when the config is loaded and not after the warm-up; tests compare them
# with unigrpo.rewards and evaluation.sentinel, which may not be imported this early.
REWARD_NAMES = ("blip_vqa", "clip_score", "geneval_soft_mask2former_hf", "geneval_soft_shapes", "geneval_strict_mask2former_hf",
                "geneval_strict_shapes", "judge", "mixture", "pickscore", "shapes_exact", "shapes_graded", "shapes_tolerant")
SIZED_REWARD = r"(geneval_(?:soft|strict)_mask2former_hf)_(\d{1,5})px"   # at another input size it is another reward
THRESHOLDS = ("sigmas", "in_a_row", "release", "baseline_probes", "reward_rise", "edge_density", "brightness", "color_entropy",
              "hue_entropy", "background_drift", "group_diversity", "velocity_drift", "thinking_length", "thinking_repetition",
              "thinking_entropy", "distinct_texts", "gold")


class WorldConfig(Section):
    """The procedural world of coloured shapes, from which prompts and warm-up images are made."""

    reasoning_share: Share
    reasoning_kinds: tuple[Literal["arithmetic", "sides", "world_color", "negation", "opposite", "comparison", "ordinal",
                                   "mixture"], ...]
    reasoning_difficulty: Literal[1, 2]
    object_shares: tuple[Rate, Rate, Rate, Rate]
    cell_share: Share
    heldout_share: Share


class SplitShares(Section):
    """Shares of all specifications that each split owns."""

    sft: float = Field(gt=0)
    train: float = Field(gt=0)
    validation: float = Field(gt=0)
    eval: float = Field(gt=0)


class PromptFile(Section):
    """A file of prompts outside the project's own, and the digest of its bytes: a number depends on what the file said."""

    path: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class CurateConfig(Section):
    """How many prompts each split holds, and from which part of the specifications."""

    seed: int
    sft: Positive
    train: Positive
    validation: Positive
    eval: Positive
    shares: SplitShares
    heldout_eval_share: Share
    max_paraphrases: Positive
    files: dict[Literal["train", "validation", "eval"], PromptFile]
    protected: tuple[PromptFile, ...]
    allow: tuple[str, ...]


class SupervisedConfig(Section):
    """Supervised training, shared by base and sft."""

    seed: int
    steps: Positive
    texts_per_step: Positive
    images_per_text: Positive
    micro_batch: Positive | None
    optimizer: Literal["muon", "adamw"]
    muon_lr: Rate
    adam_lr: Rate
    warmup: Count
    final_lr_share: Share
    text_weight: Rate
    image_weight: Rate
    grad_clip: float = Field(gt=0)
    condition_dropout: Share
    precision: Literal["fp32", "bf16"]
    activation_checkpointing: bool
    log_every: Positive
    checkpoint_every: Positive


class BaseConfig(SupervisedConfig):
    """The base stage: a model trained from scratch on rendered scenes, or a released checkpoint."""

    source: Literal["scratch", "imported"]
    checkpoint: str | None
    plan_share: Share
    pair_share: Share

    @model_validator(mode="after")
    def check(self) -> Self:
        """An imported base names its checkpoint, one from scratch names none."""
        if (self.source == "imported") != (self.checkpoint is not None):
            raise ValueError(f"source={self.source} {'needs' if self.source == 'imported' else 'takes no'} checkpoint, got "
                             f"checkpoint={self.checkpoint!r}: the folder that `unigrpo import-bagel` wrote, or null")
        return self


class DriftGate(Section):
    """When sft refuses a checkpoint worse than its base on held-out scenes."""

    max_image_loss_ratio: float = Field(gt=0)
    scenes: Positive


class SftConfig(SupervisedConfig):
    """The warm-up on (prompt, thinking, image)."""

    data: str | None
    thinking_error: Share
    systematic_share: Share
    direct_share: Share
    drift: DriftGate


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

    num_steps: Positive
    updates_per_rollout: Positive
    micro_batch: Positive
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


class EvaluateConfig(BenchmarkRules):
    """The benchmarks of a checkpoint. `prompts`, `images_per_prompt` and `gallery` are those of the shapes world."""

    seed: int
    prompts: Positive
    images_per_prompt: Positive
    control_images: Positive | None
    num_steps: int = Field(ge=2)
    guidance_scale: float = Field(gt=1)
    guidance_renorm: Literal["global", "channel", "text_channel"]
    guidance_interval: tuple[Share, Share]
    batch: Positive
    gallery: Count


class ReportConfig(Section):
    """The report's statistics and gallery."""

    bootstrap: Positive
    gallery: Count


class GpuConfig(Section):
    """What a remote step asks for; a local run ignores it."""

    gpu: Positive
    cpu: Positive
    memory_mb: Positive
    shared_memory_mb: Positive


class ComputeConfig(Section):
    """Where and how stages run: nothing here may change a number except the thread count, which is part of exactness,
    and the device, by rounding."""

    threads: Positive
    device: Literal["cpu", "cuda", "auto"]
    resources: GpuConfig
    remote: RemoteConfig


class Config(Section):
    """Everything a stage may read."""

    scale: str
    run: str | None
    seed: int
    world: WorldConfig
    curate: CurateConfig
    model: ModelConfig
    autoencoder: AutoencoderConfig | None
    base: BaseConfig
    sft: SftConfig
    rollout: RolloutConfig
    reward: RewardConfig
    credit: CreditConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    lora: LoraSection
    train: TrainConfig
    evaluate: EvaluateConfig
    report: ReportConfig
    compute: ComputeConfig

    @model_validator(mode="after")
    def check(self) -> Self:
        """Rules that cross sections."""
        prompts, updates, group = (self.rollout.prompts_per_step, self.train.updates_per_rollout, self.rollout.group_size)
        if prompts % updates:
            near = sorted({max(updates, prompts - prompts % updates), prompts + updates - prompts % updates})
            raise ValueError(f"rollout.prompts_per_step={prompts} must be a multiple of train.updates_per_rollout={updates}: "
                             f"an update takes whole prompt groups; the nearest valid values are {near}")
        rows = prompts // updates * group
        if rows % min(self.train.micro_batch, rows):
            valid = [d for d in range(1, rows + 1) if rows % d == 0]
            near_two = sorted(valid, key=lambda d: abs(d - self.train.micro_batch))[:2]
            raise ValueError(f"train.micro_batch={self.train.micro_batch} must divide an update's {rows} rollouts; "
                             f"the nearest valid values are {sorted(near_two)}")
        if self.train.experts and self.model.attention_dropout > 0:
            raise ValueError(f"model.attention_dropout must be 0, got {self.model.attention_dropout}: RL replays rollouts "
                             "and dropout would make every ratio noise")
        self.check_pixels()
        self.evaluate.check_world(self.model.image_size, WORLD_PIXELS)
        if self.train.precision == "bf16" and self.optim.master_weights != "fp32":
            raise ValueError(f"optim.master_weights must be fp32 with train.precision=bf16, got {self.optim.master_weights}: "
                             f"bfloat16 has 8 bits, so a step of optim.understanding_lr={self.optim.understanding_lr:g} "
                             "would be rounded away")
        if (self.evaluate.control_images or 1) > self.evaluate.images_per_prompt:
            raise ValueError(f"evaluate.control_images={self.evaluate.control_images} must be at most evaluate."
                             f"images_per_prompt={self.evaluate.images_per_prompt}: they are the first of the same images")
        if self.evaluate.prompts > self.curate.eval:
            raise ValueError(f"evaluate.prompts={self.evaluate.prompts} must be at most curate.eval={self.curate.eval}")
        if self.train.probe_prompts > self.curate.validation:
            raise ValueError(f"train.probe_prompts={self.train.probe_prompts} must be at most curate.validation="
                             f"{self.curate.validation}")
        return self

    def check_pixels(self) -> None:
        """What the autoencoder emits is what the decoder draws."""
        model, vae = self.model, self.autoencoder
        if model.image_size != (WORLD_PIXELS, WORLD_PIXELS) and (self.base.source == "scratch" or self.sft.data is None):
            raise ValueError(f"model.image_size={model.image_size} needs base.source imported and sft.data: the shapes world "
                             f"draws pictures of {WORLD_PIXELS} x {WORLD_PIXELS} pixels")
        if vae is None:
            if (model.latent_channels, model.latent_downsample) != (3, 1):
                raise ValueError(f"without an autoencoder the model draws pixels: model.latent_channels must be 3 and "
                                 f"model.latent_downsample 1, got {model.latent_channels} and {model.latent_downsample}; "
                                 "set them, or the section autoencoder")
            return
        if vae.latent_channels != model.latent_channels:
            raise ValueError(f"autoencoder.latent_channels={vae.latent_channels} must equal model.latent_channels="
                             f"{model.latent_channels}")
        downsample = 2 ** (len(vae.block_out_channels) - 1)
        if downsample != model.latent_downsample:
            raise ValueError(f"autoencoder.block_out_channels has {len(vae.block_out_channels)} levels, which downsample by "
                             f"{downsample}; model.latent_downsample is {model.latent_downsample}")
        if (self.base.source == "scratch") != (vae.training is not None):
            raise ValueError(f"autoencoder.training must be {'set' if self.base.source == 'scratch' else 'null'} with "
                             f"base.source={self.base.source}: an autoencoder comes with an imported checkpoint, and is "
                             "trained otherwise")
