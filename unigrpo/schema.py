"""The schema of params/: pydantic models hold the rules, the yaml files hold every value (unigrpo.config reads them)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from unigrpo.schema_benchmarks import BenchmarkRules
from unigrpo.schema_compute import RemoteConfig
from unigrpo.schema_model import AutoencoderConfig, Count, ModelConfig, Positive, Rate, Section, Share
from unigrpo.schema_rl import (
    REWARD_NAMES,
    SIZED_REWARD,
    THRESHOLDS,
    CreditConfig,
    LoraSection,
    ObjectiveConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)

__all__ = [
    "REWARD_NAMES",
    "SIZED_REWARD",
    "THRESHOLDS",
    "AutoencoderConfig",
    "Config",
    "ObjectiveConfig",
    "OptimConfig",
    "PromptFile",
    "RolloutConfig",
    "SupervisedConfig",
    "TrainConfig",
]

WORLD_PIXELS = 32  # side of a picture of the shapes world


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
    processes: Positive | None
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
    """Where and how stages run: nothing here may change a number except the counts of threads and processes and the
    instructions, which are part of exactness, and the device, all by rounding."""

    threads: Positive
    processes: Positive
    instructions: Literal["native", "avx2"]
    sharding: Literal["none", "full"]
    slots: Positive
    patience_minutes: float = Field(gt=0)
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
        self.check_shares()
        self.check_sharding()
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

    def processes(self, stage: str) -> int:
        """How many processes share a stage."""
        return self.own_processes(stage) or self.compute.processes

    def processes_key(self, stage: str) -> str:
        """The key of params that says so."""
        return f"{stage}.processes" if self.own_processes(stage) else "compute.processes"

    def own_processes(self, stage: str) -> int | None:
        """What a stage's own section says on it, where it may."""
        return {"train": self.train.processes, "evaluate": self.evaluate.processes}.get(stage)

    def check_shares(self) -> None:
        """Updates and processes take equally many whole prompt groups, micro-batches equally many rollouts."""
        prompts, updates, processes = (self.rollout.prompts_per_step, self.train.updates_per_rollout, self.processes("train"))
        parts = updates * processes
        if prompts % parts:
            near = sorted({max(parts, prompts - prompts % parts), prompts + parts - prompts % parts})
            raise ValueError(f"rollout.prompts_per_step={prompts} must be a multiple of train.updates_per_rollout={updates} "
                             f"times {self.processes_key('train')}={processes}: an update takes whole prompt groups, as many "
                             f"from each process; the nearest valid values are {near}")
        rows = prompts // parts * self.rollout.group_size
        if rows % min(self.train.micro_batch, rows):
            valid = [d for d in range(1, rows + 1) if rows % d == 0]
            near_two = sorted(valid, key=lambda d: abs(d - self.train.micro_batch))[:2]
            raise ValueError(f"train.micro_batch={self.train.micro_batch} must divide the {rows} rollouts of an update and "
                             f"process; the nearest valid values are {sorted(near_two)}")
        for section in ("base", "sft"):
            texts, processes = getattr(self, section).texts_per_step, self.compute.processes
            if texts % processes:
                near = sorted({max(processes, texts - texts % processes), texts + processes - texts % processes})
                raise ValueError(f"{section}.texts_per_step={texts} must be a multiple of compute.processes={processes}; the "
                                 f"nearest valid values are {near}")

    def check_sharding(self) -> None:
        """Weights are spread over several processes, and no optimizer needs whole matrices."""
        if self.compute.sharding == "none":
            return
        for stage in ("sft", "train"):
            if self.processes(stage) == 1:
                raise ValueError(f"compute.sharding=full needs more than one process, got {self.processes_key(stage)}=1; raise "
                                 "it, or set compute.sharding to none")
        for section, used in (("base", self.base.source == "scratch"), ("sft", True)):
            if used and getattr(self, section).optimizer == "muon":
                raise ValueError(f"compute.sharding=full needs {section}.optimizer=adamw, got muon: it orthogonalises whole "
                                 "matrices, and every process would hold rows of them")
        if self.lora.rank:
            raise ValueError(f"compute.sharding=full trains all weights, and lora.rank={self.lora.rank} trains adapters, which "
                             "are small and lie on every process; set compute.sharding to none, or lora.rank to 0")

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
