"""Token distributions: sampling, log-probs and the weights of text actions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum_norm"]


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probs of tokens under the full softmax, before any truncation.

    log p(token) = log_softmax(logits / temperature)[token]

    Truncation (top-k) restricts sampling only: sampling and replay score with the same full distribution.

    Args:
        logits: (..., V); float64 is kept, everything else is computed in float32.
        tokens: (...) int64.
        temperature: > 0, the one that sampled.
    Returns: (...) nats, carries gradient.
    Raises: ValueError if temperature <= 0.
    Source: the convention shared by public UniGRPO training code.
    """
    return _scaled(logits, temperature).log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def sampling_probs(logits: Tensor, temperature: float, top_k: int = 0) -> Tensor:
    """The distribution tokens are drawn from: softmax over the top_k largest logits (0: all of them).

    Logits that tie with the k-th are all kept, so that the result does not depend on how a device breaks ties.

    Args:
        logits: (..., V). temperature: > 0. top_k: >= 0.
    Returns: (..., V) probabilities, float32 (float64 if the logits are).
    Raises: ValueError if temperature <= 0 or top_k < 0.
    """
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {top_k}")
    scaled = _scaled(logits, temperature)
    if 0 < top_k < scaled.shape[-1]:
        threshold = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    return scaled.softmax(dim=-1)


def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int = 0,
                  greedy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF, from one uniform number per row.

    token = the first index with cdf > u * cdf[-1] and positive probability, in vocabulary order.

    Edges: u = 0 gives the first token of positive probability, and u at or near 1, where float32 rounding leaves no
    such index, the last one. A token of probability 0 is never drawn.

    Args:
        logits: (B, V); -inf forbids a token.
        uniforms: (B,) in [0, 1), one per row and position, drawn by the rollout's own generator. Not used if greedy.
        temperature: > 0.
        top_k: 0 keeps all tokens.
        greedy: take the largest logit (the first of equals) instead of drawing.
    Returns: tokens (B,) int64; log_probs (B,) nats of the full softmax (see token_log_probs); entropy (B,) nats of the
        distribution that is sampled from (with greedy, the one that would be).
    Raises: ValueError if temperature <= 0 or top_k < 0.
    """
    probs = sampling_probs(logits, temperature, top_k)
    if greedy:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = probs.cumsum(dim=-1)
        threshold = uniforms.to(probs.dtype)[:, None] * cdf[:, -1:]
        positive = probs > 0  # also guards against a parallel scan whose rounding is not monotonic
        hit = (cdf > threshold) & positive
        last = probs.shape[-1] - 1 - positive.flip(-1).int().argmax(dim=-1)
        tokens = torch.where(hit.any(dim=-1), hit.int().argmax(dim=-1), last)
    return tokens, token_log_probs(logits, tokens, temperature), torch.special.entr(probs).sum(dim=-1)


def sequence_weights(mask: Tensor, aggregation: Aggregation = "sequence_mean", horizon: int | None = None, *,
                     num_sequences: int | None = None, num_tokens: int | None = None,
                     dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of actions for a loss that is a plain weighted sum.

    sequence_mean        w_bk = mask_bk / (length_b * num_sequences): mean per sequence, then over sequences
    token_mean           w_bk = mask_bk / num_tokens: long sequences count more
    sequence_sum_norm    w_bk = mask_bk / (horizon * num_sequences): no preference for short sequences; does not sum to 1

    Args:
        mask: (B, K) bool, True on trained actions. Rows without any weigh nothing and are not counted.
        aggregation: which mean.
        horizon: the constant length of sequence_sum_norm, needed there only.
        num_sequences: non-empty sequences of the whole optimizer step, if `mask` is one micro-batch or rank of it.
        num_tokens: trained actions of the whole optimizer step, likewise.
        dtype: of the weights.
    Returns: (B, K) >= 0, summing to 1 over the optimizer step for the two means.
    Raises: ValueError for an unknown aggregation, or sequence_sum_norm without horizon.
    Source: GRPO arXiv:2402.03300 (sequence mean); DAPO arXiv:2503.14476 (token mean); Dr. GRPO arXiv:2503.20783 (sum).
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"unknown aggregation {aggregation!r}; choose one of {', '.join(get_args(Aggregation))}")
    lengths = mask.sum(dim=1, keepdim=True)                                    # (B, 1)
    sequences = int((lengths > 0).sum()) if num_sequences is None else num_sequences
    weights = mask.to(dtype)
    if aggregation == "token_mean":
        return weights / max(int(lengths.sum()) if num_tokens is None else num_tokens, 1)
    if aggregation == "sequence_mean":
        return weights / (lengths.clamp(min=1) * max(sequences, 1))
    if horizon is None or horizon < 1:
        raise ValueError(f"sequence_sum_norm divides by a constant horizon >= 1, got {horizon}")
    return weights / (horizon * max(sequences, 1))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, in float32 or float64."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0 (use greedy for the most likely token), got {temperature}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
