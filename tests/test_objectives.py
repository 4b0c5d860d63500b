"""Losses by hand, and the properties that make them policy gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unigrpo.flow.schedule import sigma_schedule
from unigrpo.flow.sde import Transition, transition
from unigrpo.objectives import (
    clipped_surrogate_loss,
    inverse_dt_weights,
    k3_kl,
    latent_kl,
    projected_log_ratio,
    ratio_norm_log_ratio,
    velocity_mse,
)
from unigrpo.text import sequence_weights

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the surrogate ----------------------------------------------------------------------------------------------------

def test_surrogate_by_hand() -> None:
    # ratios 1.5, 0.5 | 1.5, 0.5 with A = 2 | -1, clip to [.8, 1.2], weights 1/4
    # A = 2:  min(3, 2.4) = 2.4 (binds), min(1, 1.6) = 1
    # A = -1: min(-1.5, -1.2) = -1.5,    min(-.5, -.8) = -.8 (binds)
    # L = -(2.4 + 1 - 1.5 - .8) / 4 = -.275
    new = torch.tensor([[1.5, 0.5], [1.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    loss, metrics = clipped_surrogate_loss(new, torch.zeros_like(new), torch.tensor([2.0, -1.0]), torch.full((2, 2), 0.25),
                                           **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(-0.275)
    # d L / d log_prob = -w A r where the clip does not bind, else 0
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -0.25], [0.375, 0.0]], dtype=torch.float64))
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx({
        "ratio_mean": 1.0, "ratio_variation": 0.25, "clip_fraction": 0.5, "above_fraction": 0.5, "below_fraction": 0.5,
        "approx_kl": (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4})
    assert not any(value.requires_grad for value in metrics.values())


def test_clip_higher() -> None:
    # ratio 1.25 with A = 1: inside [.8, 1.28], so nothing binds
    loss, metrics = clipped_surrogate_loss(torch.tensor([[1.25]]).log(), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1),
                                           clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-1.25)
    assert metrics["clip_fraction"] == 0


@given(st.integers(0, 1000))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(seed: int) -> None:
    # -sum w A grad log pi: what REINFORCE with a baseline would use. The loss itself is -sum w A.
    logits = normal(3, 4, 6, seed=seed).requires_grad_()
    tokens = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(seed))
    log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    advantages, weights = normal(3, seed=seed + 1), normal(3, 4, seed=seed + 2).abs()
    loss, metrics = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages, weights, clip_low=0.0, clip_high=0.0)
    assert loss.item() == pytest.approx(-(weights * advantages[:, None]).sum().item())
    assert metrics["clip_fraction"] == 0
    assert metrics["ratio_variation"] == 0
    wide, _ = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages, weights, **CLIP)
    reinforce = -(weights * advantages[:, None] * log_probs).sum()
    (expected,) = torch.autograd.grad(reinforce, logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(wide, logits)[0], expected)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_micro_batches_add_up(seed: int, size: int) -> None:
    new = (0.3 * normal(6, 5, seed=seed)).requires_grad_()
    old, advantages = 0.3 * normal(6, 5, seed=seed + 1), normal(6, seed=seed + 2)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(seed)) < 0.7
    weights = sequence_weights(mask, dtype=torch.float64)
    loss, metrics = clipped_surrogate_loss(new, old, advantages, weights, **CLIP)
    (whole,) = torch.autograd.grad(loss, new, retain_graph=True)
    parts = [clipped_surrogate_loss(new[rows], old[rows], advantages[rows], weights[rows], **CLIP)
             for rows in torch.arange(6).split(size)]
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    torch.testing.assert_close(torch.autograd.grad(sum(part for part, _ in parts), new)[0], whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), value)


def test_padding_never_matters() -> None:
    new, old, advantages = normal(2, 3), normal(2, 3, seed=1), normal(2, seed=2)
    weights = torch.full((2, 3), 1 / 6, dtype=torch.float64)
    plain, metrics = clipped_surrogate_loss(new, old, advantages, weights, **CLIP)
    padded = torch.cat([new, torch.full((2, 2), 700.0, dtype=torch.float64)], 1).requires_grad_()
    old = torch.cat([old, torch.full((2, 2), -torch.inf, dtype=torch.float64)], 1)
    loss, padded_metrics = clipped_surrogate_loss(padded, old, advantages, torch.nn.functional.pad(weights, (0, 2)), **CLIP)
    loss.backward()
    torch.testing.assert_close((loss.detach(), padded_metrics), (plain, metrics))
    assert padded.grad is not None
    assert padded.grad.isfinite().all()
    assert (padded.grad[:, 3:] == 0).all()


def test_what_is_constant_gets_no_gradient() -> None:
    new, old, advantages = (normal(*shape).requires_grad_() for shape in ((2, 3), (2, 3), (2,)))
    clipped_surrogate_loss(new, old, advantages, torch.ones(2, 3), **CLIP)[0].backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None
    means, old_means, drawn = (normal(2, 3, 4, 5, seed=i).requires_grad_() for i in range(3))
    log_probs = new + means.mean((2, 3))
    ratio_norm_log_ratio(log_probs, old, means, old_means, torch.ones(2, 3)).sum().backward()
    projected_log_ratio(means, old_means, drawn, torch.ones(2, 3)).sum().backward()
    assert means.grad is not None
    assert old.grad is old_means.grad is drawn.grad is None


def test_surrogate_refuses_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 2\)"):
        clipped_surrogate_loss(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2), torch.zeros(2, 3), **CLIP)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        clipped_surrogate_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3), **CLIP)


# --- the ratio of image steps -----------------------------------------------------------------------------------------

def window(dtype: torch.dtype, step_size: float = 1e-2, elements: int = 64) -> tuple[Transition, Transition, Tensor]:
    """A window of three steps scored by old and new velocities, and the noise that was drawn."""
    sigmas = sigma_schedule(25, 3.0, dtype)
    at = torch.tensor([0, 2, 4])
    sigma, sigma_next = sigmas[at].view(3, 1, 1), sigmas[at + 1].view(3, 1, 1)
    x, v, noise, move = (normal(4, 3, elements, 4, seed=i, dtype=dtype) for i in range(4))
    settings = {"sigma_max": sigmas[1], "noise_level": 0.8}
    old = transition(x, v, sigma, sigma_next, noise=noise, **settings)
    velocity = (v + step_size * move).requires_grad_()
    new = transition(x, velocity, sigma, sigma_next, next_latents=old.next_latents, **settings)
    return old, new, noise


def test_ratio_norm_is_the_projection_on_the_noise() -> None:
    old, new, noise = window(torch.float64)
    hat = ratio_norm_log_ratio(new.log_prob, old.log_prob, new.mean, old.mean, old.std)
    torch.testing.assert_close(hat, (noise * (new.mean - old.mean)).mean((2, 3)), rtol=1e-9, atol=1e-13)
    projected = projected_log_ratio(new.mean, old.mean, old.next_latents, old.std)
    torch.testing.assert_close(projected, hat, rtol=1e-9, atol=1e-13)
    gradients = [torch.autograd.grad(value.sum(), new.mean, retain_graph=True)[0] for value in (hat, projected)]
    torch.testing.assert_close(gradients[0], noise / noise[0, 0].numel())  # eps / D: no std, no quadratic part
    torch.testing.assert_close(gradients[1], gradients[0])


def test_ratio_norm_removes_the_bias_of_the_plain_ratio() -> None:
    old, new, _ = window(torch.float64, step_size=1.0, elements=4096)
    plain = new.log_prob - old.log_prob
    hat = ratio_norm_log_ratio(new.log_prob, old.log_prob, new.mean, old.mean, old.std)
    assert (plain < 0).all()
    assert hat.min() < 0 < hat.max()


def test_ratio_norm_is_exactly_zero_on_policy_and_precise_in_float32() -> None:
    old, new, _ = window(torch.float32, step_size=0.0)
    assert (ratio_norm_log_ratio(new.log_prob, old.log_prob, new.mean, old.mean, old.std) == 0).all()
    assert (projected_log_ratio(new.mean, old.mean, old.next_latents, old.std) == 0).all()
    # Against the truth for the same (rounded) means, the projection beats the difference of log-probs.
    old, new, _ = window(torch.float32, step_size=1e-3)
    truth = projected_log_ratio(*(t.detach().double() for t in (new.mean, old.mean, old.next_latents, old.std)))
    error = (projected_log_ratio(new.mean, old.mean, old.next_latents, old.std).double() - truth).abs().max().item()
    by_difference = ratio_norm_log_ratio(new.log_prob, old.log_prob, new.mean, old.mean, old.std).double()
    assert error < 1e-10 < (by_difference - truth).abs().max().item() < 1e-6


def test_deterministic_steps_have_no_ratio() -> None:
    means = normal(1, 2, 3, 2).requires_grad_()
    std = torch.tensor([[0.0, 0.5]], dtype=torch.float64)
    zeros, moved = torch.zeros(1, 2, dtype=torch.float64), normal(1, 2, 3, 2, seed=1)
    for value in (ratio_norm_log_ratio(zeros, zeros, means, moved, std), projected_log_ratio(means, moved, moved + 1, std),
                  latent_kl(means, moved, std=std)):
        (gradient,) = torch.autograd.grad(value.sum(), means)
        assert value[0, 0] == 0
        assert value[0, 1] != 0
        assert gradient.isfinite().all()
        assert (gradient[0, 0] == 0).all()


def test_inverse_dt_weights() -> None:
    torch.testing.assert_close(inverse_dt_weights(torch.tensor([-0.1, -0.2])), torch.tensor([4 / 3, 2 / 3]))  # 10, 5 over 7.5


# --- staying near the reference ---------------------------------------------------------------------------------------

def test_penalties_by_hand() -> None:
    # gap (1, 3) in two elements: mean square 5. std .5, coefficient 2: 5 / (2 * .25) = 10, 5 / (2 * 4) = .625
    a, b = torch.tensor([[[[1.0, 3.0]]]]), torch.zeros(1, 1, 1, 2)
    std, coef = torch.tensor([[0.5]]), torch.tensor([[2.0]])
    assert velocity_mse(a, b).tolist() == [[5.0]]
    assert latent_kl(a, b, std=std).tolist() == [[10.0]]
    assert latent_kl(a, b, std=std, diffusion_coef=coef, true=False).tolist() == [[0.625]]
    # k3 at d = ln 2: 2 - ln 2 - 1
    assert k3_kl(torch.tensor([0.0]), torch.tensor([math.log(2.0)])).item() == pytest.approx(1 - math.log(2))


def test_latent_kl_is_torchs() -> None:
    a, b, std = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), normal(2, 3, seed=2).abs()
    wide = std[..., None, None]
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(a, wide), torch.distributions.Normal(b, wide))
    torch.testing.assert_close(latent_kl(a, b, std=std), exact.mean((2, 3)))


@pytest.mark.parametrize("penalty", [velocity_mse, k3_kl, lambda a, b: latent_kl(a, b, std=torch.ones(2, 3))])
def test_penalties_vanish_at_the_reference_and_push_back_off_it(penalty) -> None:
    reference = normal(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
    for offset in (0.0, 0.1, -0.1):
        value = (reference.detach() + offset).requires_grad_()
        cost = penalty(value, reference)
        cost.sum().backward()
        assert value.grad is not None
        assert reference.grad is None
        assert (cost >= 0).all()
        if offset == 0:
            assert (cost == 0).all()
            assert (value.grad == 0).all()
        else:
            assert (value.grad * offset > 0).all()  # descending it leads back


def test_penalties_refuse_shapes_that_would_broadcast() -> None:
    for call in (lambda: velocity_mse(torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5)),
                 lambda: k3_kl(torch.zeros(2, 3), torch.zeros(3)),
                 lambda: latent_kl(torch.zeros(2, 3, 4, 5), torch.zeros(4, 5), std=torch.ones(2, 3)),
                 lambda: projected_log_ratio(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.ones(2, 3))):
        with pytest.raises(ValueError, match="one shape"):
            call()
    with pytest.raises(ValueError, match="diffusion_coef"):
        latent_kl(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), std=torch.ones(1, 1), true=False)
