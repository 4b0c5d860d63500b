"""Losses: the clipped surrogate, the ratio of image steps, and the ways to stay near a reference."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor,
                           *, clip_low: float, clip_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO-clip surrogate over K actions: text tokens or SDE steps.

    L = -sum_bk w_bk min(r_bk A_b, clip(r_bk, 1 - clip_low, 1 + clip_high) A_b),   r = exp(log_probs - old_log_probs)

    For RatioNorm, pass its log-ratio as log_probs and zeros as old_log_probs.

    Args:
        log_probs: (B, K) nats, current policy, carries gradient.
        old_log_probs: (B, K) nats, from the weights that sampled. Treated as constant; may be -inf where weights are 0.
        advantages: (B,) one per rollout, shared by its text and its image. Treated as constant.
        weights: (B, K) >= 0, sum to 1 over the whole optimizer step (all micro-batches, all ranks), so that
            accumulated gradients (summed over ranks) equal one large batch. Token or sequence mean is chosen here.
        clip_low, clip_high: >= 0; ~0.2 for tokens, 1e-6 to 1e-4 for image steps.
    Returns: scalar loss; detached scalar metrics, weighted by `weights`, that add up over micro-batches and ranks:
        ratio_mean; ratio_variation, the mean of (r - 1)^2; clip_fraction, where the clip binds given the sign of the
        advantage; above_fraction and below_fraction, where r leaves the interval whatever the sign; approx_kl, the mean
        of log_ratio^2 / 2.
    Raises: ValueError if shapes differ.
    Source: GRPO arXiv:2402.03300; clip-higher DAPO arXiv:2503.14476; over SDE steps Flow-GRPO arXiv:2505.05470.
    """
    if not (log_probs.shape == old_log_probs.shape == weights.shape):
        raise ValueError("log_probs, old_log_probs and weights must share one shape (B, K), got "
                         f"{tuple(log_probs.shape)}, {tuple(old_log_probs.shape)}, {tuple(weights.shape)}")
    if log_probs.ndim != 2 or advantages.shape != log_probs.shape[:1]:
        raise ValueError(f"advantages must be (B,) for log_probs (B, K), got {tuple(advantages.shape)} "
                         f"and {tuple(log_probs.shape)}")
    advantages = advantages.detach()[:, None]                                      # (B, 1)
    log_ratio = torch.where(weights > 0, log_probs - old_log_probs.detach(), 0.0)  # (B, K)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(torch.minimum(ratio * advantages, clipped * advantages) * weights).sum()
    with torch.no_grad():
        above, below = ratio > 1 + clip_high, ratio < 1 - clip_low
        binds = (above & (advantages > 0)) | (below & (advantages < 0))
        metrics = {
            "ratio_mean": (ratio * weights).sum(),
            "ratio_variation": ((ratio - 1).square() * weights).sum(),
            "clip_fraction": (binds * weights).sum(),
            "above_fraction": (above * weights).sum(),
            "below_fraction": (below * weights).sum(),
            "approx_kl": (log_ratio.square() * weights).sum() / 2,
        }
    return loss, metrics


def ratio_norm_log_ratio(log_probs: Tensor, old_log_probs: Tensor, means: Tensor, old_means: Tensor, std: Tensor) -> Tensor:
    """RatioNorm: the log-ratio of image steps without its bias and without its step-dependent scale.

    log r_hat = std (log r + <(mean - old_mean)^2> / (2 std^2)) = <noise (mean - old_mean)>,   < > = mean over elements

    The plain log-ratio is negative on average, more so at small std, so a clip binds on one side only. The squared term
    carries gradient: it cancels the quadratic part of log r. Each step of each sample uses its own std. See
    projected_log_ratio for the same number with less rounding.

    Args:
        log_probs: (B, W) nats, mean over latent elements, current policy.
        old_log_probs: (B, W) nats, constant.
        means: (B, W, *latent) transition means, current policy.
        old_means: (B, W, *latent) transition means of the weights that sampled, constant.
        std: (B, W), or what broadcasts to it: transition std. Where it is 0 the result is 0.
    Returns: (B, W), carries gradient.
    Raises: ValueError if shapes differ.
    Source: GRPO-Guard arXiv:2510.22319 (RatioNorm), per sample and per step.
    """
    _same_shape(means, old_means)
    safe = torch.where(std > 0, std, 1.0)
    squared = _element_mean((means - old_means.detach()) ** 2, log_probs.ndim)
    log_ratio = log_probs - old_log_probs.detach()
    return torch.where(std > 0, safe * (log_ratio + squared / (2 * safe**2)), 0.0)


def projected_log_ratio(means: Tensor, old_means: Tensor, next_latents: Tensor, std: Tensor) -> Tensor:
    """RatioNorm by its identity: the mean's move projected on the noise that was drawn.

    log r_hat = <(next_latents - old_mean) / std * (mean - old_mean)>

    Equal to ratio_norm_log_ratio in value and gradient, without subtracting two log-probs of size 1 to find a number of
    size 1e-6: in float32 the rounding error is orders of magnitude below the clip.

    Args:
        means, old_means, next_latents: (B, W, *latent); only `means` carries gradient.
        std: (B, W) or what broadcasts to it. Where it is 0 the result is 0.
    Returns: (B, W).
    Raises: ValueError if shapes differ.
    Source: derived from GRPO-Guard arXiv:2510.22319; tested to be the same.
    """
    _same_shape(means, old_means)
    _same_shape(means, next_latents)
    old = old_means.detach()
    projection = _element_mean((next_latents.detach() - old) * (means - old), 2)
    return torch.where(std > 0, projection / torch.where(std > 0, std, 1.0), 0.0)


def inverse_dt_weights(dt: Tensor) -> Tensor:
    """Step weights 1 / |dt|, scaled to mean 1: GRPO-Guard's gradient reweight (off in our recipe).

    Args:
        dt: (W,) non-zero step sizes of the window, any sign.
    Returns: (W,), multiplies the weights of clipped_surrogate_loss.
    Source: GRPO-Guard arXiv:2510.22319.
    """
    inverse = 1 / dt.abs()
    return inverse / inverse.mean()


def latent_kl(means: Tensor, ref_means: Tensor, *, std: Tensor, diffusion_coef: Tensor | None = None,
              true: bool = True) -> Tensor:
    """KL from policy to reference of one transition, per latent element.

    true:       <(mean - ref_mean)^2> / (2 std^2), exact for Gaussians of equal variance
    published:  <(mean - ref_mean)^2> / (2 diffusion_coef^2), which lacks a factor 1 / |dt|

    Args:
        means: (B, W, *latent), carries gradient.
        ref_means: (B, W, *latent), constant.
        std: (B, W) transition std.
        diffusion_coef: (B, W), needed for the published variant only.
        true: which variant.
    Returns: (B, W) nats per element; 0 where the transition is deterministic and the KL undefined.
    Raises: ValueError if shapes differ, or diffusion_coef is missing.
    Source: Flow-GRPO arXiv:2505.05470 and its public code (published variant).
    """
    _same_shape(means, ref_means)
    scale = std if true else diffusion_coef
    if scale is None:
        raise ValueError("the published latent KL (true=False) needs diffusion_coef")
    squared = _element_mean((means - ref_means.detach()) ** 2, scale.ndim)
    return torch.where(scale > 0, squared / (2 * torch.where(scale > 0, scale, 1.0) ** 2), 0.0)


def velocity_mse(velocity: Tensor, ref_velocity: Tensor) -> Tensor:
    """Squared velocity gap to the reference, with the same weight at every noise level.

    <(velocity - ref_velocity)^2>, mean over latent elements

    Args:
        velocity: (B, W, *latent), carries gradient.
        ref_velocity: (B, W, *latent), constant.
    Returns: (B, W).
    Raises: ValueError if shapes differ.
    Source: UniGRPO arXiv:2603.23500 (velocity MSE). The paper's reduction is unknown; a mean keeps weights portable.
    """
    _same_shape(velocity, ref_velocity)
    return _element_mean((velocity - ref_velocity.detach()) ** 2, 2)


def k3_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Per-action estimate of KL(policy || reference), non-negative and low in variance.

    k3 = exp(d) - d - 1,   d = ref_log_probs - log_probs

    Args:
        log_probs: any shape, nats, carries gradient.
        ref_log_probs: same shape, constant.
    Returns: same shape, nats.
    Raises: ValueError if shapes differ.
    Source: Schulman, "Approximating KL divergence" (2020); GRPO arXiv:2402.03300.
    """
    _same_shape(log_probs, ref_log_probs)
    gap = ref_log_probs.detach() - log_probs
    return torch.expm1(gap) - gap


def _element_mean(value: Tensor, lead: int) -> Tensor:
    """Mean over all dimensions after the first `lead`."""
    return value.flatten(lead).mean(dim=-1)


def _same_shape(first: Tensor, second: Tensor) -> None:
    """Broadcasting here would average over the wrong elements in silence."""
    if first.shape != second.shape:
        raise ValueError(f"both tensors must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
