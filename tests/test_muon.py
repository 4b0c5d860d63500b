"""Muon against its definition, against torch's, and its batching."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unigrpo.muon import Muon, orthogonalize


def by_hand(matrix):
    """The iteration for one matrix in float64, as the source states it."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_each_matrix_of_a_stack_is_orthogonalised_alone(shape):
    scales = torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * scales
    out = orthogonalize(matrices)
    for matrix, got in zip(matrices, out, strict=True):
        wanted = by_hand(matrix if shape[0] <= shape[1] else matrix.T)
        torch.testing.assert_close(got.double(), wanted if shape[0] <= shape[1] else wanted.T, atol=1e-4, rtol=1e-4)
        values = torch.linalg.svdvals(got)
        assert 0.3 < values.min() < values.max() < 1.3


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_steps_are_those_of_torch_up_to_its_bfloat16():
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(*shape, generator=generator) for shape in ((16, 16), (16, 48), (48, 16), (16, 48))]
    moved = []
    for optimizer in (Muon, torch.optim.Muon):
        parameters = [nn.Parameter(value.clone()) for value in start]
        settings = {} if optimizer is Muon else {"weight_decay": 0.0}
        stepped = optimizer(parameters, lr=0.1, momentum=0.9, **settings)
        gradients = torch.Generator().manual_seed(2)
        for _ in range(4):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=gradients)
            stepped.step()
        moved.append([p.detach() - value for p, value in zip(parameters, start, strict=True)])
    for ours, theirs in zip(*moved, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_parameter_without_gradient_stays_and_a_vector_is_refused():
    still, moving = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([still, moving], lr=0.1)
    moving.grad = torch.eye(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3, 3))
    assert not torch.equal(moving, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"takes matrices, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.ones(3))], lr=0.1)
