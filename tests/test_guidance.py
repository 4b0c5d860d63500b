"""BAGEL's guidance: by hand, per sample, limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unigrpo.flow.guidance import combine_guidance, guidance_active


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    # v = (3, 0), u = (3, -4), scale 2: u + 2 (v - u) = (3, 4), norm 5 > 3 -> times 3/5 = (1.8, 2.4)
    v, u = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[3.0, -4.0]]])
    torch.testing.assert_close(combine_guidance(v, u, text_scale=2.0), torch.tensor([[[1.8, 2.4]]]))
    # renorm_min .8 > 3/5 -> (2.4, 3.2); 1 switches it off
    torch.testing.assert_close(combine_guidance(v, u, text_scale=2.0, renorm_min=0.8), torch.tensor([[[2.4, 3.2]]]))
    torch.testing.assert_close(combine_guidance(v, u, text_scale=2.0, renorm_min=1.0), torch.tensor([[[3.0, 4.0]]]))
    # image branch w = (1, 4), scale 2: (1, 4) + 2 ((3, 4) - (1, 4)) = (5, 4)
    w = torch.tensor([[[1.0, 4.0]]])
    both = combine_guidance(v, u, w, text_scale=2.0, image_scale=2.0, renorm_min=1.0)
    torch.testing.assert_close(both, torch.tensor([[[5.0, 4.0]]]))


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_a_sample_does_not_depend_on_its_batch(renorm: str) -> None:
    v, u, w = (normal(3, 5, 4, seed=i) for i in range(3))
    scales = {"text_scale": 4.0, "image_scale": 1.5, "renorm": renorm}
    batch = combine_guidance(v, u, w, **scales)
    for i in range(3):
        torch.testing.assert_close(batch[i:i + 1], combine_guidance(v[i:i + 1], u[i:i + 1], w[i:i + 1], **scales))
    windows = combine_guidance(v[:, None], u[:, None], w[:, None], **scales)  # (B, W, N, C)
    torch.testing.assert_close(windows[:, 0], batch)


def test_renorm_never_grows_the_norm() -> None:
    v, u = normal(4, 5, 3), normal(4, 5, 3, seed=1)
    whole = combine_guidance(v, u, text_scale=5.0)
    assert (whole.flatten(1).norm(dim=1) <= v.flatten(1).norm(dim=1) * (1 + 1e-6)).all()
    tokens = combine_guidance(v, u, text_scale=5.0, renorm="channel")
    assert (tokens.norm(dim=-1) <= v.norm(dim=-1) * (1 + 1e-6)).all()


def test_scale_one_is_no_guidance_whatever_the_image_scale() -> None:
    v, u, w = (normal(2, 3, 4, seed=i) for i in range(3))
    assert torch.equal(combine_guidance(v, u, w, text_scale=1.0, image_scale=3.0), v)


def test_gradient_is_finite_even_at_zero_velocity() -> None:
    v = torch.zeros(1, 2, 3, requires_grad=True)
    combine_guidance(v, torch.zeros(1, 2, 3), text_scale=4.0).sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()


def test_refuses() -> None:
    v = normal(1, 2, 3)
    with pytest.raises(ValueError, match="global, channel, text_channel"):
        combine_guidance(v, v, text_scale=2.0, renorm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the image_dropped"):
        combine_guidance(v, v, text_scale=2.0, image_scale=2.0)


def test_interval_is_open_below_and_closed_above() -> None:
    assert guidance_active(1.0, (0.4, 1.0))
    assert guidance_active(torch.tensor(0.41), (0.4, 1.0))
    assert not guidance_active(0.4, (0.4, 1.0))
    assert not guidance_active(torch.tensor(0.4), (0.4, 1.0))
    assert not guidance_active(float(torch.tensor(0.4)), (0.4, 1.0))  # float32's 0.4 is above float64's
    assert guidance_active(0.6, (0.4, 0.6))
    assert not guidance_active(0.7, (0.4, 0.6))
