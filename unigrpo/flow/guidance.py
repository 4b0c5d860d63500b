"""Classifier-free guidance as BAGEL combines it: two scales, then a rescaled norm."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Renorm = Literal["global", "channel", "text_channel"]


def combine_guidance(velocity: Tensor, text_dropped: Tensor, image_dropped: Tensor | None = None, *, text_scale: float,
                     image_scale: float = 1.0, renorm: Renorm = "global", renorm_min: float = 0.0) -> Tensor:
    """The guided velocity of up to three branches that differ in their context.

    a = u + text_scale (v - u);   b = w + image_scale (a - w) if image_scale > 1 else a;   result = b k(v, b)
    k(p, q) = clamp(|p| / (|q| + 1e-8), renorm_min, 1)

    with v the conditional velocity, u without the last text, w without the image context (with thinking: without it).
    renorm="text_channel" rescales a before the image step and nothing after it.

    Args:
        velocity: (..., N, C), the full context.
        text_dropped: (..., N, C).
        image_dropped: (..., N, C); needed if both scales exceed 1.
        text_scale: guidance acts only above 1; at or below it the velocity is returned as it is, whatever image_scale.
        image_scale: the second scale acts only above 1.
        renorm: norm over the N tokens and C channels of one sample ("global"), or over the channels of each token.
            The official code takes one global norm over a packed batch; per sample is what it does at batch size 1.
        renorm_min: in [0, 1]; 1 switches the rescaling off.
    Returns: (..., N, C), float32 (float64 if the velocity is); with gradient of every branch given with gradient.
    Raises: ValueError for an unknown renorm, or image_scale > 1 without image_dropped.
    Source: BAGEL arXiv:2505.14683, released inference code.
    """
    if renorm not in get_args(Renorm):
        raise ValueError(f"unknown guidance renorm {renorm!r}; choose one of {', '.join(get_args(Renorm))}")
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    v, u = velocity.to(dtype), text_dropped.to(dtype)
    if text_scale <= 1:
        return v
    guided = u + text_scale * (v - u)
    if renorm == "text_channel":
        guided = guided * _rescale(v, guided, (-1,), renorm_min)
    if image_scale > 1:
        if image_dropped is None:
            raise ValueError(f"image_scale {image_scale} > 1 needs the image_dropped velocity")
        w = image_dropped.to(dtype)
        guided = w + image_scale * (guided - w)
    if renorm == "text_channel":
        return guided
    return guided * _rescale(v, guided, (-2, -1) if renorm == "global" else (-1,), renorm_min)


def guidance_active(sigma: float | Tensor, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at this noise level: low < sigma <= high, on the shifted sigma.

    Compared in float32, the schedule's precision, so that a bound that is a schedule point is met exactly.
    Source: BAGEL's released inference code (cfg_interval).
    """
    low, high = torch.tensor(interval, dtype=torch.float32)
    value = torch.as_tensor(sigma, dtype=torch.float32)
    return bool((low < value) & (value <= high))


def model_calls(sigmas: Tensor, interval: tuple[float, float] | None) -> int:
    """Model calls of one image over a schedule (S+1,): one a step, two where guidance is active. None: no guidance."""
    steps = len(sigmas) - 1
    return steps if interval is None else steps + sum(guidance_active(s, interval) for s in sigmas[:-1])


def _rescale(reference: Tensor, value: Tensor, dims: tuple[int, ...], minimum: float) -> Tensor:
    """How much to shrink `value` so that its norm does not exceed the reference's."""
    norm = torch.linalg.vector_norm(reference, dim=dims, keepdim=True)
    return (norm / (torch.linalg.vector_norm(value, dim=dims, keepdim=True) + 1e-8)).clamp(minimum, 1.0)
