"""Schedule, windows and the transition: by hand, replay, statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unigrpo.flow.schedule import choose_window, sigma_schedule
from unigrpo.flow.sde import TransitionKind, transition

STOCHASTIC: tuple[TransitionKind, ...] = ("flow_sde", "cps", "dance")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- schedule ---------------------------------------------------------------------------------------------------------

def test_schedule_by_hand() -> None:
    # S = 4, shift 3: u = 1, .75, .5, .25, 0 -> 3u / (1 + 2u) = 1, 2.25/2.5, 1.5/2, .75/1.5, 0
    assert sigma_schedule(4, 3.0, torch.float64).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)


@given(st.integers(1, 200), st.floats(0.05, 20))
def test_schedule_is_exact_at_the_ends_and_decreases(num_steps: int, shift: float) -> None:
    single, double = sigma_schedule(num_steps, shift), sigma_schedule(num_steps, shift, torch.float64)
    for sigmas in (single, double):
        assert sigmas[0] == 1
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
        assert len(sigmas) == num_steps + 1
    assert torch.equal(single, double.float())


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (4, 0.0)])
def test_schedule_refuses(num_steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="num_steps >= 1 and shift > 0"):
        sigma_schedule(num_steps, shift)


# --- windows ----------------------------------------------------------------------------------------------------------

@given(st.sampled_from(["subset", "contiguous", "sliding"]), st.integers(0, 5), st.integers(1, 8), st.data())
def test_window_is_sorted_distinct_and_inside(kind: str, start: int, length: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, length))
    seed, step = data.draw(st.integers(0, 100)), data.draw(st.integers(0, 100))
    window = choose_window(kind, size, (start, start + length), np.random.default_rng(seed), step)
    assert window == choose_window(kind, size, (start, start + length), np.random.default_rng(seed), step)
    assert len(window) == size
    assert list(window) == sorted(set(window))
    assert start <= window[0]
    assert window[-1] < start + length
    assert kind == "subset" or window == tuple(range(window[0], window[0] + size))


def test_window_kinds() -> None:
    rng = np.random.default_rng(0)
    assert choose_window("all", 1, (1, 4), rng) == (1, 2, 3)
    slid = [choose_window("sliding", 2, (0, 4), rng, step, every=2) for step in range(7)]
    assert slid == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (0, 1)]
    drawn = {choose_window("subset", 2, (0, 4), rng) for _ in range(200)}
    assert len(drawn) == 6  # every pair of four occurs
    with pytest.raises(ValueError, match="subset, all, contiguous, sliding"):
        choose_window("random", 2, (0, 4), rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[1, 4\].*got 5"):
        choose_window("subset", 5, (0, 4), rng)
    with pytest.raises(ValueError, match="start < stop"):
        choose_window("all", 1, (4, 4), rng)


# --- the transition ---------------------------------------------------------------------------------------------------

def test_flow_sde_by_hand() -> None:
    # sigma .5 -> .25, a = 1: g^2 = .5 / .5 = 1, dt = -.25, std = sqrt(.25) = .5
    # mean = 2 (1 - .25 / 1) + 4 (1 + .5 / 1) (-.25) = 1.5 - 1.5 = 0;  next = 0 + .5 * 3 = 1.5
    # log_prob = -3^2 / 2 - ln .5 - ln(2 pi) / 2
    x, v, eps = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (2.0, 4.0, 3.0))
    out = transition(x, v, 0.5, 0.25, sigma_max=0.9, noise_level=1.0, noise=eps)
    assert out.mean.item() == pytest.approx(0, abs=1e-15)
    assert out.next_latents.item() == pytest.approx(1.5)
    assert out.std.item() == pytest.approx(0.5)
    assert out.log_prob.item() == pytest.approx(-4.5 + math.log(2) - 0.5 * math.log(2 * math.pi))
    assert out.diffusion_coef.item() == pytest.approx(1.0)


def test_cps_keeps_the_noise_level() -> None:
    # clean 1, noise 2 at sigma .5: x = 1.5, v = 1. To sigma .4: std = .4 sin(45 deg), mean = .6 * 1 + .4 cos(45 deg) * 2,
    # so that fresh and old noise together have amount sqrt(std^2 + (.4 cos)^2) = .4
    x, v = torch.full((1, 1, 1), 1.5, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    out = transition(x, v, 0.5, 0.4, sigma_max=0.9, noise_level=0.5, kind="cps", noise=torch.zeros_like(x))
    half = math.sqrt(0.5)
    assert out.std.item() == pytest.approx(0.4 * half)
    assert out.mean.item() == pytest.approx(0.6 + 0.8 * half)


def test_pure_noise_uses_sigma_max() -> None:
    # At sigma = 1 with sigma_next = sigmas[1]: std = a exactly and mean = x (1 - a^2 / 2) + v dt.
    sigmas, a = sigma_schedule(25, 3.0, torch.float64), 0.8
    x, v = normal(2, 3, 4, dtype=torch.float64), normal(2, 3, 4, seed=1, dtype=torch.float64)
    out = transition(x, v, sigmas[0], sigmas[1], sigma_max=sigmas[1], noise_level=a, noise=torch.zeros_like(x))
    torch.testing.assert_close(out.std, torch.full((2,), a, dtype=torch.float64))
    torch.testing.assert_close(out.mean, x * (1 - a**2 / 2) + v * (sigmas[1] - 1))


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_replay_scores_what_was_sampled(kind: TransitionKind, reduction: str) -> None:
    sigmas = sigma_schedule(8, 3.0)
    settings = {"sigma_max": sigmas[1], "noise_level": 0.7, "kind": kind, "reduction": reduction}
    x = normal(3, 5, 4)
    velocities = [normal(3, 5, 4, seed=10 + i) for i in range(8)]
    drawn, before = [], []
    for i in range(8):
        before.append(x)
        drawn.append(transition(x, velocities[i], sigmas[i], sigmas[i + 1], noise=normal(3, 5, 4, seed=50 + i), **settings))
        x = drawn[-1].next_latents
        same = transition(before[i], velocities[i], sigmas[i], sigmas[i + 1], next_latents=x, **settings)
        assert torch.equal(same.log_prob, drawn[i].log_prob)
        assert torch.equal(same.mean, drawn[i].mean)
    # All steps of all rows at once, each with its own sigma: what replay does.
    at = torch.arange(8)
    packed = transition(torch.stack(before, 1), torch.stack(velocities, 1), sigmas[at].view(8, 1, 1),
                        sigmas[at + 1].view(8, 1, 1), next_latents=torch.stack([d.next_latents for d in drawn], 1), **settings)
    assert packed.log_prob.shape == packed.std.shape == packed.diffusion_coef.shape == (3, 8)
    for name in ("mean", "std", "log_prob", "diffusion_coef"):
        torch.testing.assert_close(getattr(packed, name), torch.stack([getattr(d, name) for d in drawn], 1),
                                   rtol=1e-6, atol=1e-6)


def test_log_prob_is_torchs_gaussian() -> None:
    x, v, to = (normal(2, 3, 4, seed=i, dtype=torch.float64) for i in range(3))
    for reduction in ("mean", "sum"):
        out = transition(x, v, 0.6, 0.5, sigma_max=0.9, noise_level=0.7, next_latents=to, reduction=reduction)
        each = torch.distributions.Normal(out.mean, out.std[:, None, None]).log_prob(to)
        torch.testing.assert_close(out.log_prob, getattr(each, reduction)((1, 2)))


@pytest.mark.parametrize(("kind", "noise_level", "sigma_next"), [("ode", 0.7, 0.1), ("flow_sde", 0.0, 0.1), ("cps", 0.8, 0.0)])
def test_deterministic_steps_score_zero_without_nan(kind: TransitionKind, noise_level: float, sigma_next: float) -> None:
    x = normal(2, 3, 4)
    v = normal(2, 3, 4, seed=1).requires_grad_()
    out = transition(x, v, 0.2, sigma_next, sigma_max=0.9, noise_level=noise_level, kind=kind, noise=normal(2, 3, 4, seed=2))
    assert torch.equal(out.next_latents, out.mean)
    assert (out.std == 0).all()
    assert (out.log_prob == 0).all()
    (out.log_prob.sum() + out.mean.sum()).backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()
    torch.testing.assert_close(out.mean, x + v * (sigma_next - 0.2), rtol=1e-5, atol=1e-6)  # Euler in all three


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_mixed_window_with_a_deterministic_step_has_finite_gradients(kind: TransitionKind) -> None:
    sigmas = sigma_schedule(4, 3.0)
    v = normal(2, 4, 3, 2).requires_grad_()
    out = transition(normal(2, 4, 3, 2, seed=1), v, sigmas[:-1].view(4, 1, 1), sigmas[1:].view(4, 1, 1), kind=kind,
                     sigma_max=sigmas[1], noise_level=0.8, next_latents=normal(2, 4, 3, 2, seed=2))
    out.log_prob.sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()
    assert out.log_prob.isfinite().all()
    assert (v.grad[:, 0] != 0).any()
    assert (kind != "cps" or (v.grad[:, -1] == 0).all())


def test_gradient_reaches_the_velocity_only_through_the_mean() -> None:
    # d log_prob / d v = (next - mean) / std^2 / D * d mean / d v; next_latents is the action and stays constant.
    x, v, eps = (normal(1, 2, 3, seed=i, dtype=torch.float64) for i in range(3))
    v.requires_grad_()
    out = transition(x, v, 0.6, 0.5, sigma_max=0.9, noise_level=0.7, noise=eps)
    out.log_prob.sum().backward()
    slope = (1 + 0.7**2 / 2) * -0.1
    torch.testing.assert_close(v.grad, eps / out.std.item() / 6 * slope)
    assert not out.next_latents.requires_grad


def test_half_precision_velocities_are_computed_in_float32() -> None:
    x, v = normal(1, 2, 3), normal(1, 2, 3, seed=1).bfloat16()
    half = transition(x, v, 0.6, 0.5, sigma_max=0.9, noise_level=0.7, noise=x)
    full = transition(x, v.float(), 0.6, 0.5, sigma_max=0.9, noise_level=0.7, noise=x)
    assert half.log_prob.dtype == half.next_latents.dtype == torch.float32
    assert torch.equal(half.mean, full.mean)


def test_transition_refuses() -> None:
    x = normal(2, 3, 4)
    base = {"sigma": 0.6, "sigma_next": 0.5, "sigma_max": 0.9, "noise_level": 0.7}
    with pytest.raises(ValueError, match="flow_sde, cps, dance, ode"):
        transition(x, x, **base, kind="ddim", noise=x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mean, sum"):
        transition(x, x, **base, reduction="max", noise=x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs noise"):
        transition(x, x, **base)
    with pytest.raises(ValueError, match="not both"):
        transition(x, x, **base, noise=x, next_latents=x)
    with pytest.raises(ValueError, match="velocity must have"):
        transition(x, x[:1], **base, noise=x)
    with pytest.raises(ValueError, match="<= 1 for cps"):
        transition(x, x, **(base | {"noise_level": 1.2}), kind="cps", noise=x)
    with pytest.raises(ValueError, match="constant over the last 2"):
        transition(x, x, **(base | {"sigma": torch.full((4,), 0.6)}), noise=x)


# --- statistics -------------------------------------------------------------------------------------------------------

TARGET_MEAN, TARGET_STD = 1.5, 0.5


def exact_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[noise - clean | x] for clean ~ N(m, s^2): both are linear in x, as everything is Gaussian."""
    variance = (1 - sigma) ** 2 * TARGET_STD**2 + sigma**2
    gap = x - (1 - sigma) * TARGET_MEAN
    return sigma / variance * gap - (TARGET_MEAN + (1 - sigma) * TARGET_STD**2 / variance * gap)


def sample(kind: TransitionKind, noise_level: float, drift_sign: float) -> tuple[float, float]:
    """Mean and std of 20k samples after 50 steps; drift_sign -1 flips the SDE's correction of the Euler step."""
    sigmas = sigma_schedule(50, 1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, 1, generator=generator)
    for i in range(50):
        v = exact_velocity(x, sigmas[i])
        out = transition(x, v, sigmas[i], sigmas[i + 1], sigma_max=sigmas[1], noise_level=noise_level, kind=kind,
                         noise=torch.randn(x.shape, generator=generator))
        euler = x + v * (sigmas[i + 1] - sigmas[i])
        x = out.next_latents + (drift_sign - 1) * (out.mean - euler)
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize(("kind", "noise_level"), [("ode", 0.0), ("flow_sde", 0.3), ("flow_sde", 0.7), ("dance", 0.3)])
def test_samples_match_the_target(kind: TransitionKind, noise_level: float) -> None:
    mean, std = sample(kind, noise_level, drift_sign=1)
    assert mean == pytest.approx(TARGET_MEAN, abs=0.03)
    assert std == pytest.approx(TARGET_STD, rel=0.04)


def test_samples_miss_the_target_if_the_drift_is_flipped() -> None:
    mean, std = sample("flow_sde", 0.7, drift_sign=-1)
    assert not (mean == pytest.approx(TARGET_MEAN, abs=0.03) and std == pytest.approx(TARGET_STD, rel=0.04))
    assert std > 1.3 * TARGET_STD
