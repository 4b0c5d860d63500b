"""The schema of params/: pydantic models hold the rules, the yaml files hold every value.

`load_config("tiny", run="unigrpo", seed=0)` merges params/base.yaml, params/scales/tiny.yaml and the run's entry of
params/runs.yaml, checks the result and names the key, what was wanted, what came and the file to change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


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


class ModelConfig(Section):
    """The decoder; see unigrpo.models.mot.MoTConfig."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    rms_norm_eps: float
    rope_theta: float
    initializer_range: float
    latent_channels: Positive
    latent_patch_size: Positive
    latent_downsample: Positive
    max_latent_size: Positive
    image_size: tuple[Positive, Positive]
    prediction: Literal["velocity", "clean"]
    min_sigma: float = Field(gt=0)
    timestep_shift: float = Field(gt=0)
    attention_dropout: Share

    @model_validator(mode="after")
    def check(self) -> Self:
        """Sizes that must divide each other."""
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 4 * num_attention_heads="
                             f"{4 * self.num_attention_heads}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                             f"num_key_value_heads={self.num_key_value_heads}")
        stride = self.latent_patch_size * self.latent_downsample
        for side in self.image_size:
            if side % stride or side // stride > self.max_latent_size:
                raise ValueError(f"image_size={self.image_size} must be multiples of latent_patch_size * latent_downsample="
                                 f"{stride}, at most {stride * self.max_latent_size}")
        return self


class SupervisedConfig(Section):
    """Supervised training, shared by base and sft."""

    seed: int
    steps: Positive
    texts_per_step: Positive
    images_per_text: Positive
    muon_lr: Rate
    adam_lr: Rate
    warmup: Count
    final_lr_share: Share
    text_weight: Rate
    image_weight: Rate
    grad_clip: float = Field(gt=0)
    condition_dropout: Share
    precision: Literal["fp32", "bf16"]
    log_every: Positive
    checkpoint_every: Positive


class BaseConfig(SupervisedConfig):
    """The base stage: a model trained from scratch on rendered scenes, or a released checkpoint."""

    source: Literal["scratch"]
    plan_share: Share
    pair_share: Share


class DriftGate(Section):
    """When sft refuses a checkpoint worse than its base on held-out scenes."""

    max_image_loss_ratio: float = Field(gt=0)
    scenes: Positive


class SftConfig(SupervisedConfig):
    """The warm-up on (prompt, thinking, image)."""

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
    max_missing: Share


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


class MismatchConfig(Section):
    """How far rollout and replay log-probs may differ before the first update: text in nats, image in units of its clip."""

    text: float = Field(gt=0)
    image: float = Field(gt=0)


class TrainConfig(Section):
    """The RL loop."""

    num_steps: Positive
    updates_per_rollout: Positive
    micro_batch: Positive
    experts: tuple[Literal["understanding", "generation"], ...] = Field(min_length=1)
    max_mismatch: MismatchConfig
    monitor_every: Positive
    probe_every: Positive
    probe_prompts: Positive
    gallery_every: Positive
    checkpoint_every: Positive
    max_skipped: Count


class EvaluateConfig(Section):
    """The benchmark of a checkpoint."""

    seed: int
    benchmarks: tuple[Literal["shapes"], ...] = Field(min_length=1)
    prompts: Positive
    images_per_prompt: Positive
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
    """Where and how stages run: nothing here may change a number except the thread count, which is part of exactness."""

    threads: Positive
    resources: GpuConfig


class Config(Section):
    """Everything a stage may read."""

    scale: str
    run: str | None
    seed: int
    world: WorldConfig
    curate: CurateConfig
    model: ModelConfig
    base: BaseConfig
    sft: SftConfig
    rollout: RolloutConfig
    reward: RewardConfig
    credit: CreditConfig
    objective: ObjectiveConfig
    optim: OptimConfig
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
        if self.evaluate.prompts > self.curate.eval:
            raise ValueError(f"evaluate.prompts={self.evaluate.prompts} must be at most curate.eval={self.curate.eval}")
        if self.train.probe_prompts > self.curate.validation:
            raise ValueError(f"train.probe_prompts={self.train.probe_prompts} must be at most curate.validation="
                             f"{self.curate.validation}")
        return self


def read_yaml(path: Path) -> dict[str, Any]:
    """A yaml mapping, read safely. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: a scale is a file of params/scales/, "
                         f"of which there are {sorted(p.stem for p in path.parent.glob('*.yaml'))}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(content).__name__}")
    return content


def merge(values: dict[str, Any], change: dict[str, Any], origin: dict[tuple[str, ...], Path], path: Path,
          prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """`change` over `values`, mapping by mapping; `origin` remembers which file a key came from."""
    out = dict(values)
    for key, value in change.items():
        place = (*prefix, str(key))
        origin[place] = path
        if isinstance(value, dict):
            old = out.get(key)
            replaces = place == ("reward", "weights")  # another set of rewards, not additions to the old one
            value = merge(old if isinstance(old, dict) and not replaces else {}, value, origin, path, place)
        elif isinstance(out.get(key), dict) and value is None:
            value = out[key]  # a section left empty changes nothing
        out[key] = value
    return out


def load_config(scale: str, *, run: str | None = None, seed: int = 0, root: Path | str = ".") -> Config:
    """The checked configuration of a scale, and of a run where one is named.

    Args:
        scale: a file of params/scales/. run: an entry of params/runs.yaml. seed: of the RL run; varies RL only.
        root: the project's root folder.
    Raises: ValueError naming key, what was wanted, what came and the file.
    """
    params = Path(root) / "params"
    origin: dict[tuple[str, ...], Path] = {}
    values = merge({}, read_yaml(params / "base.yaml"), origin, params / "base.yaml")
    path = params / "scales" / f"{scale}.yaml"
    values = merge(values, read_yaml(path), origin, path)
    if run is not None:
        path = params / "runs.yaml"
        runs = read_yaml(path)
        if run not in runs:
            raise ValueError(f"run must be one of {sorted(runs)}, the entries of {path}, got {run!r}")
        values = merge(values, runs[run] or {}, origin, path)
    try:
        return Config(scale=scale, run=run, seed=seed, **values)
    except ValidationError as error:
        raise ValueError(explain(error, origin, params / "base.yaml")) from None


def explain(error: ValidationError, origin: dict[tuple[str, ...], Path], default: Path) -> str:
    """One line a problem: key, what was wanted, what came, where to change it."""
    lines = []
    for problem in error.errors():
        place = tuple(str(p) for p in problem["loc"])
        file = next((origin[place[:n]] for n in range(len(place), 0, -1) if place[:n] in origin), default)
        key = ".".join(place) or "params"
        given = problem.get("input")
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key} is not a key (unknown, or misspelt); remove it from {file}")
        elif problem["type"] == "missing":
            lines.append(f"{key} must be set; add it to {file}")
        elif isinstance(given, dict | BaseModel):
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}; change it in {file}")
        else:
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(given, str) and "e" in given else ""
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}, got {given!r}{hint}; change it in {file}")
    return "\n".join(lines)
