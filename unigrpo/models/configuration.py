"""Configuration of the Mixture-of-Transformers model: one class for every scale. Defaults are BAGEL-7B-MoT's."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

VISION_KEYS = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"}
VISION_DEFAULTS = {"num_channels": 3, "layer_norm_eps": 1e-6}


class MoTConfig(PretrainedConfig):
    """Configuration of the decoder and of what it draws.

    Args:
        latent_channels: channels of the autoencoder's latent (BAGEL 16; `tiny` draws RGB pixels, 3).
        latent_patch_size: side of a latent patch that makes one image token.
        latent_downsample: pixels per latent cell (BAGEL 8, pixels 1).
        max_latent_size: rows and columns of the frozen position table, in image tokens.
        image_size: (height, width) in pixels that rollouts draw.
        prediction: what llm2vae emits: "velocity" (BAGEL) or "clean", the clean image, which the model turns into
            a velocity. Clean-image prediction with the velocity loss learns far faster on raw pixel patches.
        min_sigma: the divisor's floor when a clean image becomes a velocity.
        timestep_shift: shift of the noise levels in supervised training; sampling has its own (rollout.shift).
        vision: settings of the SigLIP tower that reads images, or None for a model without: hidden_size,
            intermediate_size, num_hidden_layers (as built: BAGEL 26), num_attention_heads, patch_size, image_size,
            and, if they differ from SigLIP's, num_channels and layer_norm_eps.
        vit_max_patches: rows and columns of the frozen position table of image inputs (BAGEL 70).
    """

    model_type = "unigrpo_mot"

    def __init__(self, vocab_size: int = 152064, hidden_size: int = 3584, intermediate_size: int = 18944,
                 num_hidden_layers: int = 28, num_attention_heads: int = 28, num_key_value_heads: int = 4,
                 rms_norm_eps: float = 1e-6, rope_theta: float = 1e6, hidden_act: str = "silu",
                 initializer_range: float = 0.02, latent_channels: int = 16, latent_patch_size: int = 2,
                 latent_downsample: int = 8, max_latent_size: int = 64, image_size: tuple[int, int] = (1024, 1024),
                 prediction: str = "velocity", min_sigma: float = 0.05, timestep_shift: float = 3.0,
                 attention_dropout: float = 0.0, vision: dict[str, Any] | None = None, vit_max_patches: int = 70,
                 **kwargs) -> None:
        if prediction not in ("velocity", "clean"):
            raise ValueError(f"model.prediction must be 'velocity' or 'clean', got {prediction!r}")
        if vision is not None:
            missing, unknown = VISION_KEYS - set(vision), set(vision) - VISION_KEYS - VISION_DEFAULTS.keys()
            if missing or unknown:
                raise ValueError(f"model.vision must have the keys {sorted(VISION_KEYS)} and may have "
                                 f"{sorted(VISION_DEFAULTS)}; missing {sorted(missing)}, unknown {sorted(unknown)}")
            vision = VISION_DEFAULTS | vision
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.rms_norm_eps, self.rope_theta = num_key_value_heads, rms_norm_eps, rope_theta
        self.hidden_act, self.initializer_range, self.attention_dropout = hidden_act, initializer_range, attention_dropout
        self.latent_channels, self.latent_patch_size = latent_channels, latent_patch_size
        self.latent_downsample, self.max_latent_size = latent_downsample, max_latent_size
        self.image_size, self.prediction = tuple(image_size), prediction
        self.min_sigma, self.timestep_shift = min_sigma, timestep_shift
        self.vision, self.vit_max_patches = vision, vit_max_patches
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def token_channels(self) -> int:
        """C: numbers in one image token."""
        return self.latent_patch_size**2 * self.latent_channels

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image tokens at `image_size`."""
        stride = self.latent_patch_size * self.latent_downsample
        return self.image_size[0] // stride, self.image_size[1] // stride

    def to_dict(self) -> dict[str, Any]:
        """As saved in config.json; a model without a vision tower does not mention one."""
        out = super().to_dict()
        if self.vision is None:
            out.pop("vision", None)
            out.pop("vit_max_patches", None)
        return out
