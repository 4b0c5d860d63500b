"""The BAGEL Mixture-of-Transformers decoder, one class for both scales.

Two expert sets share one attention: text and image markers use the understanding experts, image latents the
generation experts (`*_moe_gen`). Tokens therefore travel as two streams, `und` and `gen`, each a plain batch of
matrices: no gather, no scatter, no Python loop over samples. Order within a stream carries no meaning: rotary positions
and the attention mask say where a token stands.

Official state-dict keys, norms, positions and time embedding: BAGEL, arXiv 2505.14683 (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, apply_rotary_pos_emb

TIME_FREQUENCIES = 256


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
        timestep_shift: shift of the schedule, used in training and sampling.
    """

    model_type = "unigrpo_mot"

    def __init__(self, vocab_size: int = 152064, hidden_size: int = 3584, intermediate_size: int = 18944,
                 num_hidden_layers: int = 28, num_attention_heads: int = 28, num_key_value_heads: int = 4,
                 rms_norm_eps: float = 1e-6, rope_theta: float = 1e6, hidden_act: str = "silu",
                 initializer_range: float = 0.02, latent_channels: int = 16, latent_patch_size: int = 2,
                 latent_downsample: int = 8, max_latent_size: int = 64, image_size: tuple[int, int] = (1024, 1024),
                 prediction: str = "velocity", min_sigma: float = 0.05, timestep_shift: float = 3.0,
                 attention_dropout: float = 0.0, **kwargs) -> None:
        if prediction not in ("velocity", "clean"):
            raise ValueError(f"model.prediction must be 'velocity' or 'clean', got {prediction!r}")
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.rms_norm_eps, self.rope_theta = num_key_value_heads, rms_norm_eps, rope_theta
        self.hidden_act, self.initializer_range, self.attention_dropout = hidden_act, initializer_range, attention_dropout
        self.latent_channels, self.latent_patch_size = latent_channels, latent_patch_size
        self.latent_downsample, self.max_latent_size = latent_downsample, max_latent_size
        self.image_size, self.prediction = tuple(image_size), prediction
        self.min_sigma, self.timestep_shift = min_sigma, timestep_shift
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


@dataclass
class Context:
    """Cached keys and values of what an image, or the next text token, may attend to.

    Args:
        keys, values: per layer (B, heads_kv, L, head_dim), keys after norm and rotary embedding. Columns from `used`
            on are reserved room.
        mask: (B, L) bool, True on columns that hold a token of that row.
        positions: (B,) int64, the next rotary position.
        used: columns filled so far.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    positions: Tensor
    used: int

    def repeat(self, group_size: int, room: int = 0) -> Context:
        """Each row `group_size` times (one prompt's siblings share its prefix), with `room` free columns behind."""
        def grow(cache: Tensor) -> Tensor:
            rows, heads, _, width = cache.shape
            out = cache.new_zeros(rows * group_size, heads, self.used + room, width)
            out[:, :, :self.used] = cache[:, :, :self.used].repeat_interleave(group_size, dim=0)
            return out

        mask = F.pad(self.mask[:, :self.used].repeat_interleave(group_size, dim=0), (0, room))
        return Context([grow(k) for k in self.keys], [grow(v) for v in self.values], mask,
                       self.positions.repeat_interleave(group_size), self.used)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm computed in float32 whatever the dtype, as in BAGEL and Qwen2."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if x.dtype == torch.float32:
            return super().forward(x)
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Joint attention over both streams: one softmax, expert-specific projections and q/k norms."""

    o_proj: nn.Linear
    o_proj_moe_gen: nn.Linear

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for expert in ("", "_moe_gen"):
            setattr(self, f"q_proj{expert}", nn.Linear(config.hidden_size, width))
            setattr(self, f"k_proj{expert}", nn.Linear(config.hidden_size, kv_width))
            setattr(self, f"v_proj{expert}", nn.Linear(config.hidden_size, kv_width))
            setattr(self, f"o_proj{expert}", nn.Linear(width, config.hidden_size, bias=False))
            setattr(self, f"q_norm{expert}", RMSNorm(self.head_dim, eps=config.rms_norm_eps))
            setattr(self, f"k_norm{expert}", RMSNorm(self.head_dim, eps=config.rms_norm_eps))

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor], expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> queries, keys, values (..., heads, head_dim); q/k normed per head before the rotation."""
        query = getattr(self, f"q_proj{expert}")(x).unflatten(-1, (self.heads, self.head_dim))
        key = getattr(self, f"k_proj{expert}")(x).unflatten(-1, (self.kv_heads, self.head_dim))
        value = getattr(self, f"v_proj{expert}")(x).unflatten(-1, (self.kv_heads, self.head_dim))
        query, key = getattr(self, f"q_norm{expert}")(query), getattr(self, f"k_norm{expert}")(key)
        query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=-2)
        return query, key, value

    def forward(self, und: Tensor, gen: Tensor | None, rotary_und: tuple[Tensor, Tensor],
                rotary_gen: tuple[Tensor, Tensor] | None, mask: Tensor, cache: tuple[Tensor, Tensor, int] | None,
                compact: Compact | None) -> tuple[Tensor, Tensor | None]:
        """Attention output per stream, projected. With a cache, new keys and values are written behind its columns."""
        parts: tuple[Tensor, ...] = self.project(und, rotary_und, "")
        if compact is not None:
            parts = tuple(compact.spread(part) for part in parts)
        split = parts[0].shape[1]
        if gen is not None and rotary_gen is not None:
            streams = self.project(gen, rotary_gen, "_moe_gen")
            parts = tuple(torch.cat(pair, dim=1) for pair in zip(parts, streams, strict=True))
        query, key, value = (part.transpose(1, 2) for part in parts)                    # (B, heads, T, head_dim)
        if cache is not None:
            keys, values, used = cache
            stop = used + key.shape[2]
            keys[:, :, used:stop], values[:, :, used:stop] = key, value
            key, value = keys[:, :, :stop], values[:, :, :stop]
        out = attend(query, key, value, mask).transpose(1, 2).flatten(2)
        first = out[:, :split] if compact is None else compact.gather(out[:, :split])
        return self.o_proj(first), None if gen is None else self.o_proj_moe_gen(out[:, split:])


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention with grouped keys. On a CPU it runs in float32: its bfloat16 backward is 8x slower."""
    grouped = query.shape[1] != key.shape[1]
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, attn_mask=mask,
                                              enable_gqa=grouped)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask,
                                              enable_gqa=grouped).to(value.dtype)


COMPACT_MULTIPLE = 64  # tokens; few distinct sizes, as matrix kernels are compiled once a size


@dataclass(frozen=True)
class Compact:
    """Where the real tokens of a padded batch stand, so that padding is attended around but never computed.

    Args:
        index: (M,) int64 places of the computed tokens in the flattened (B * T) batch: the real ones, and as much padding
            as makes M a multiple of COMPACT_MULTIPLE where there is enough. rows, columns: B and T.
    """

    index: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, lengths: Tensor, columns: int, behind: int = 0) -> Compact:
        """The first `lengths` of `columns` columns, and all of `behind` further ones."""
        place = torch.arange(columns + behind, device=lengths.device)
        valid = ((place < lengths[:, None]) | (place >= columns)).flatten()
        index, padding = valid.nonzero()[:, 0], (~valid).nonzero()[:, 0]
        index = torch.cat([index, padding[:-len(index) % COMPACT_MULTIPLE]]).sort().values
        return cls(index, len(lengths), columns + behind)

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (M, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def spread(self, x: Tensor) -> Tensor:
        """(M, ...) -> (B, T, ...), zeros where there is padding."""
        out = x.new_zeros(self.rows * self.columns, *x.shape[1:]).index_copy(0, self.index, x)
        return out.unflatten(0, (self.rows, self.columns))


class MoTLayer(nn.Module):
    """Pre-norm decoder layer with hard routing by token kind."""

    input_layernorm: RMSNorm
    input_layernorm_moe_gen: RMSNorm
    post_attention_layernorm: RMSNorm
    post_attention_layernorm_moe_gen: RMSNorm

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        text_config = Qwen2Config(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
                                  hidden_act=config.hidden_act)
        self.self_attn = Attention(config)
        self.mlp, self.mlp_moe_gen = Qwen2MLP(text_config), Qwen2MLP(text_config)
        for name in ("input_layernorm", "input_layernorm_moe_gen",
                     "post_attention_layernorm", "post_attention_layernorm_moe_gen"):
            setattr(self, name, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(self, und: Tensor, gen: Tensor | None, rotary_und: tuple[Tensor, Tensor],
                rotary_gen: tuple[Tensor, Tensor] | None, mask: Tensor, cache: tuple[Tensor, Tensor, int] | None,
                compact: Compact | None) -> tuple[Tensor, Tensor | None]:
        """One layer over both streams, (B, Tu, D) or compacted (M, D), and (B, Tg, D)."""
        out_und, out_gen = self.self_attn(self.input_layernorm(und),
                                          None if gen is None else self.input_layernorm_moe_gen(gen),
                                          rotary_und, rotary_gen, mask, cache, compact)
        und = und + out_und
        und = und + self.mlp(self.post_attention_layernorm(und))
        if gen is not None:
            gen = gen + out_gen
            gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und, gen


class Decoder(nn.Module):
    """Embedding, layers and the two final norms (`language_model.model`)."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Decoder and head, named as in the official state dict."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of sigma in [0, 1] (not times 1000), [cos | sin], then a two-layer MLP."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, config.hidden_size), nn.SiLU(),
                                 nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, sigma: Tensor) -> Tensor:
        """(...,) -> (..., D)."""
        half = TIME_FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = sigma.float()[..., None] * torch.exp(-math.log(10_000.0) * exponent)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """Frozen 2-D sin-cos table: first half of the channels encodes the column, second half the row."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_table(side, width), requires_grad=False)


def sincos_table(side: int, width: int) -> Tensor:
    """(side * side, width) float32; each half is [sin | cos] with base 10000 (MAE, DiT and BAGEL alike)."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies                    # (side, width/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                                      # (side, width/2)
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


class MoTModel(PreTrainedModel):
    """The unified model: text logits from the understanding stream, velocities from the generation stream."""

    config_class = MoTConfig
    config: MoTConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False

    def __init__(self, config: MoTConfig) -> None:
        super().__init__(config)
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbedder(config)
        self.vae2llm = nn.Linear(config.token_channels, config.hidden_size)
        self.llm2vae = nn.Linear(config.hidden_size, config.token_channels)
        self.latent_pos_embed = PositionTable(config.max_latent_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Gaussian matrices, zero biases; llm2vae starts at zero, as BAGEL initialises it."""
        if isinstance(module, nn.Linear):
            std = 0.0 if module is self.llm2vae else self.config.initializer_range
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PositionTable):
            module.pos_embed.data.copy_(sincos_table(self.config.max_latent_size, self.config.hidden_size))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D)."""
        return self.language_model.model.embed_tokens(tokens)

    def embed_latents(self, latents: Tensor, sigma: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens at their noise levels, with the table of 2-D positions added.

        Args:
            latents: (B, M, N, C), M image blocks of N tokens each, row-major over the grid.
            sigma: broadcastable to (B, M), in [0, 1].
            grid: (rows, columns) of tokens; the config's image size by default.
        Returns: (B, M, N, D).
        Raises: ValueError if the grid does not fit N or the position table (a wide grid would silently wrap).
        """
        rows, columns = grid or self.config.grid
        side = self.config.max_latent_size
        if rows * columns != latents.shape[-2] or max(rows, columns) > side:
            raise ValueError(f"image grid must have {latents.shape[-2]} tokens and sides of at most "
                             f"model.max_latent_size={side}, got {rows}x{columns}")
        index = (torch.arange(rows, device=latents.device)[:, None] * side
                 + torch.arange(columns, device=latents.device)).flatten()
        place = self.latent_pos_embed.pos_embed[index]                                          # (N, D)
        time = self.time_embedder(sigma.expand(latents.shape[:2]))[:, :, None]                   # (B, M, 1, D)
        return self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + (time + place.to(time.dtype))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, T) positions -> cos, sin (B, T, head_dim), computed in float32; recomputed, so no buffer to load."""
        width = self.config.head_dim
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        angles = positions[..., None].float() * self.config.rope_theta**-exponent
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, und: Tensor, und_positions: Tensor, mask: Tensor, gen: Tensor | None = None,
                gen_positions: Tensor | None = None, context: Context | None = None,
                compact: Compact | None = None) -> tuple[Tensor, Tensor | None]:
        """Both streams through all layers and their final norms.

        Args:
            und: (B, Tu, D) embeddings for the understanding experts (text, markers).
            und_positions: (B, Tu) rotary positions.
            mask: bool, broadcastable to (B, 1, Tu + Tg, Lc + Tu + Tg); True where a query may attend to a key. Keys
                are ordered [context | und | gen]. Every query needs at least one key.
            gen, gen_positions: (B, Tg, D) and (B, Tg) for the generation experts (latents), or None.
            context: cached keys and values; new ones are written behind its `used` columns, which the caller advances.
            compact: which of the und tokens are real; the others are neither computed nor attended to (mask them).
        Returns: final-normed hidden states (B, Tu, D) and (B, Tg, D) or None.
        """
        decoder = self.language_model.model
        if compact is not None:
            und, und_positions = compact.gather(und), compact.gather(und_positions)
        rotary_und = self.rotary(und_positions, und.dtype)
        rotary_gen = None if gen_positions is None else self.rotary(gen_positions, und.dtype)
        for i, layer in enumerate(decoder.layers):
            cache = None if context is None else (context.keys[i], context.values[i], context.used)
            und, gen = layer(und, gen, rotary_und, rotary_gen, mask, cache, compact)
        und = decoder.norm(und) if compact is None else compact.spread(decoder.norm(und))
        return und, None if gen is None else decoder.norm_moe_gen(gen)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) understanding states -> (..., V) float32 logits."""
        return self.language_model.lm_head(hidden).float()

    def velocity(self, hidden: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """Generation states -> velocity noise - clean, float32.

        Args:
            hidden: (B, M, N, D), latents: (B, M, N, C) the network's input, sigma: broadcastable to (B, M).
        """
        out = self.llm2vae(hidden).float()
        if self.config.prediction == "velocity":
            return out
        sigma = sigma.expand(latents.shape[:2])[..., None, None].float()
        return (latents.float() - out) / sigma.clamp(min=self.config.min_sigma)

    def empty_context(self, rows: int, length: int) -> Context:
        """A context without tokens and room for `length` columns."""
        config, weight = self.config, self.llm2vae.weight
        def zeros() -> list[Tensor]:
            return [weight.new_zeros(rows, config.num_key_value_heads, length, config.head_dim)
                    for _ in range(config.num_hidden_layers)]
        return Context(zeros(), zeros(), torch.zeros(rows, length, dtype=torch.bool, device=weight.device),
                       torch.zeros(rows, dtype=torch.int64, device=weight.device), 0)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch * C): tokens row-major, features in the order (row, column, channel)."""
    rows, channels, height, width = images.shape
    x = images.view(rows, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(rows, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (B, N, patch * patch * C) -> (B, C, H, W)."""
    rows, channels = tokens.shape[0], tokens.shape[2] // patch**2
    x = tokens.view(rows, grid[0], grid[1], patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(rows, channels, grid[0] * patch, grid[1] * patch)
