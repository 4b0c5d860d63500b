"""One denoising transition, shared by sampling and replay.

The flow goes from noise (sigma = 1) to image (sigma = 0): latents = (1 - sigma) clean + sigma noise, velocity = noise - clean.
Each stochastic transition is a Gaussian; sampling draws from it, replay scores what was drawn.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

TransitionKind = Literal["flow_sde", "cps", "dance", "ode"]
Reduction = Literal["mean", "sum"]


class Transition(NamedTuple):
    """What one transition did; `lead` is the shape of the latents without their latent dimensions, (B,) or (B, W).

    Args:
        next_latents: like the latents; drawn or given, always detached.
        mean: like the latents, carries gradient.
        std: (lead) standard deviation of the transition per latent element; 0 where it is deterministic.
        log_prob: (lead) nats, mean or sum over latent elements; 0 where std is 0.
        diffusion_coef: (lead) std / sqrt(-dt) for flow_sde and dance; for CPS the same quotient, without meaning of its own.
    """

    next_latents: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor
    diffusion_coef: Tensor


def transition(latents: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, *,
               sigma_max: float | Tensor, noise_level: float, kind: TransitionKind = "flow_sde",
               noise: Tensor | None = None, next_latents: Tensor | None = None,
               reduction: Reduction = "mean", latent_dims: int = 2) -> Transition:
    """Draw (next_latents is None) or score (next_latents given) one step from sigma to sigma_next < sigma.

    next_latents ~ Normal(mean, std^2), with dt = sigma_next - sigma < 0, x the latents, v the velocity, a the noise level:

        flow_sde  g = a sqrt(sigma / (1 - sigma));  std = g sqrt(-dt)
                  mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt
        cps       std = sigma_next sin(a pi/2)
                  mean = (1 - sigma_next) (x - sigma v) + sigma_next cos(a pi/2) (x + (1 - sigma) v)
        dance     std = a sqrt(-dt);  mean = x + v dt + a^2 dt (x - (1 - sigma) (x - sigma v)) / (2 sigma^2)
        ode       std = 0;  mean = x + v dt

    log_prob = mean (or sum) over latent elements of -(next - mean)^2 / (2 std^2) - ln std - ln(2 pi)/2. Where std is 0
    (ode, noise level 0, the last CPS step) the transition has no density: log_prob is defined as 0 and has no gradient.
    With reduction="mean" it is the D-th part of a log-density, so a clip on its ratio shrinks with sqrt(D).

    Runs in float32, or in float64 if the latents or the velocity are float64.

    Args:
        latents: (B, *latent) or (B, W, *latent), state before the step.
        velocity: same shape, d latents / d sigma of the policy; carries gradient.
        sigma: in (0, 1]; a number, or a tensor that broadcasts with the latents and is constant over latent dimensions,
            such as (W, 1, 1): replay scores all window steps at once.
        sigma_next: in [0, sigma), like sigma.
        sigma_max: sigmas[1] of the schedule. Stands in for sigma where sigma == 1, as g would be infinite there.
        noise_level: a >= 0; at most 1 for cps. Flow-GRPO's eta.
        kind: which transition.
        noise: like the latents, standard normal; needed to draw from a stochastic kind, treated as constant.
        next_latents: like the latents, treated as constant.
        reduction: over latent elements.
        latent_dims: how many trailing dimensions are latent: 2 for (N, C).
    Returns: Transition.
    Raises: ValueError for an unknown kind or reduction, shapes that differ, neither noise nor next_latents, or both.
    Source: Flow-GRPO arXiv:2505.05470; CPS arXiv:2509.05952; DanceGRPO arXiv:2505.07818.
    """
    _check(latents, velocity, noise, next_latents, noise_level, kind, reduction)
    dtype = torch.promote_types(torch.promote_types(latents.dtype, velocity.dtype), torch.float32)
    x, v = latents.to(dtype), velocity.to(dtype)
    sigma, sigma_next, sigma_max = (torch.as_tensor(s, dtype=dtype, device=x.device) for s in (sigma, sigma_next, sigma_max))
    dt = sigma_next - sigma
    if kind == "flow_sde":
        # Equality, not a threshold: a schedule that starts at 0.9999 must not be mistaken for one that starts at 1.
        coef = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma)))
        mean = x * (1 + coef**2 * dt / (2 * sigma)) + v * (1 + coef**2 * (1 - sigma) / (2 * sigma)) * dt
        std = coef * torch.sqrt(-dt)
    elif kind == "cps":
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        mean = (1 - sigma_next) * (x - sigma * v) + sigma_next * math.cos(noise_level * math.pi / 2) * (x + (1 - sigma) * v)
        coef = std / torch.sqrt(-dt)
    elif kind == "dance":
        coef = torch.full_like(sigma, noise_level)
        mean = x + v * dt + 0.5 * noise_level**2 * dt * (x - (1 - sigma) * (x - sigma * v)) / sigma**2
        std = coef * torch.sqrt(-dt)
    else:
        coef = std = torch.zeros_like(dt)
        mean = x + v * dt
    if next_latents is None:
        next_latents = mean if noise is None else mean + std * noise.to(dtype)
    next_latents = next_latents.to(dtype).detach()

    stochastic = std > 0
    scale = torch.where(stochastic, std, 1.0)  # a harmless scale, so that no gradient is NaN where the result is dropped
    elements = -((next_latents - mean) ** 2) / (2 * scale**2) - torch.log(scale) - 0.5 * math.log(2 * math.pi)
    elements = torch.where(stochastic, elements, 0.0)
    dims = tuple(range(-latent_dims, 0))
    log_prob = elements.mean(dims) if reduction == "mean" else elements.sum(dims)
    return Transition(next_latents, mean, _lead(std, x, latent_dims), log_prob, _lead(coef, x, latent_dims))


def _lead(value: Tensor, latents: Tensor, latent_dims: int) -> Tensor:
    """A quantity that is constant over latent dimensions, without them."""
    value = value.reshape((1,) * (latents.ndim - value.ndim) + tuple(value.shape))
    if any(size != 1 for size in value.shape[-latent_dims:]):
        raise ValueError("sigma must be a number or a tensor constant over the last "
                         f"{latent_dims} dimensions, got {tuple(value.shape)} for latents {tuple(latents.shape)}")
    return value[(...,) + (0,) * latent_dims].expand(latents.shape[:-latent_dims])


def _check(latents: Tensor, velocity: Tensor, noise: Tensor | None, next_latents: Tensor | None,
           noise_level: float, kind: str, reduction: str) -> None:
    """Refuse what cannot be a transition."""
    if kind not in get_args(TransitionKind):
        raise ValueError(f"unknown transition kind {kind!r}; choose one of {', '.join(get_args(TransitionKind))}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {', '.join(get_args(Reduction))}")
    if noise_level < 0 or (kind == "cps" and noise_level > 1):
        raise ValueError(f"noise_level must be >= 0 (and <= 1 for cps), got {noise_level} for {kind}")
    for name, value in (("velocity", velocity), ("noise", noise), ("next_latents", next_latents)):
        if value is not None and value.shape != latents.shape:
            raise ValueError(f"{name} must have the latents' shape {tuple(latents.shape)}, got {tuple(value.shape)}")
    if noise is not None and next_latents is not None:
        raise ValueError("give noise to draw the next latents or next_latents to score them, not both")
    if noise is None and next_latents is None and kind != "ode" and noise_level > 0:
        raise ValueError(f"drawing a {kind} transition with noise_level {noise_level} needs noise")
