"""The schema of what a model is: decoder, image encoder and autoencoder. unigrpo.schema holds the rest."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class VisionConfig(Section):
    """The SigLIP encoder of images that the model looks at; see unigrpo.models.vision."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    patch_size: Positive
    image_size: Positive
    num_channels: Positive
    layer_norm_eps: float = Field(gt=0)

    @model_validator(mode="after")
    def check(self) -> Self:
        """Sizes that must divide each other."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                             f"{self.num_attention_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        return self


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
    vision: VisionConfig | None
    vit_max_patches: Positive

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


class AutoencoderTraining(Section):
    """Training of a fresh autoencoder on rendered scenes, before the base model's own."""

    seed: int
    steps: Positive
    images_per_step: Positive
    lr: Rate
    kl_weight: Rate


class AutoencoderConfig(Section):
    """The autoencoder between pixels and latents; see unigrpo.models.autoencoder."""

    latent_channels: Positive
    block_out_channels: tuple[Positive, ...] = Field(min_length=1)
    layers_per_block: Positive
    norm_num_groups: Positive
    scaling_factor: Annotated[float, Field(gt=0)] | None
    shift_factor: float | None
    posterior: Literal["mean", "sample"]
    training: AutoencoderTraining | None

    @model_validator(mode="after")
    def check(self) -> Self:
        """Group norm splits every level's channels; the latents' scale is measured or given."""
        if bad := [c for c in self.block_out_channels if c % self.norm_num_groups]:
            raise ValueError(f"block_out_channels must be multiples of norm_num_groups={self.norm_num_groups}, got {bad}")
        for name in ("scaling_factor", "shift_factor"):
            if (getattr(self, name) is None) != (self.training is not None):
                raise ValueError(f"{name} must be null where the autoencoder is trained here (it is measured then), and a "
                                 f"number where it is not, got {getattr(self, name)} with training "
                                 f"{'null' if self.training is None else 'set'}")
        return self
