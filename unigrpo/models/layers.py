"""One Mixture-of-Transformers layer: two expert sets, one attention over both streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, apply_rotary_pos_emb

from unigrpo.models.configuration import MoTConfig


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
                rotary_gen: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: tuple[Tensor, Tensor, int] | None,
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


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped keys. On a CPU it runs in float32: its bfloat16 backward is 8x slower."""
    if query.device.type != "cpu":
        return attend_grouped(query.to(value.dtype), key.to(value.dtype), value, mask)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask,
                                              enable_gqa=query.shape[1] != key.shape[1]).to(value.dtype)


def attend_grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same on an accelerator: with grouped heads and a mask, PyTorch is left with the kernel that stores all scores.

    Args:
        query: (B, heads, T, head_dim), key, value: (B, heads_kv, L, head_dim), mask: broadcastable to (B, 1, T, L) or None.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if mask is None or heads == kv_heads:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != kv_heads)
    if query.shape[2] == 1:  # decoding: the heads of a group become rows of one query, and the cache is not copied
        rows = query.unflatten(1, (kv_heads, -1)).squeeze(3)                             # (B, heads_kv, group, head_dim)
        return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask).flatten(1, 2).unsqueeze(2)
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


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


class MoTLayer(GradientCheckpointingLayer):
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
                rotary_gen: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: tuple[Tensor, Tensor, int] | None,
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
