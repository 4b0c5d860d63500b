"""Muon in the parameters' own precision, all matrices of one shape at a time.

torch.optim.Muon orthogonalises in bfloat16, one matrix after another. CPUs without bfloat16 instructions emulate them: there
the optimizer took three times as long as forward and backward together (1.3 s of 1.7 s a step at scale tiny), here 10 % of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from unigrpo.distributed import ALONE, World

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steepest at zero, singular values end in about [0.7, 1.2]
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix U S V^T.

        X <- a X + (b G + c G G) X,   G = X X^T,   from X = matrix / |matrix|_F

    Args:
        matrices: (N, rows, columns) float.
    Returns: (N, rows, columns), singular values near 1; those of a zero matrix stay 0.
    Source: Muon, https://kellerjordan.github.io/posts/muon; the coefficients and the count are torch.optim.Muon's.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by lr sqrt(max(1, rows / columns)) in each singular direction.

        m <- momentum m + (1 - momentum) g,   W <- W - lr sqrt(max(1, rows / columns)) orthogonalize(lerp(g, m, momentum))

    Args:
        parameters: matrices. lr: learning rate. momentum: Nesterov's, in [0, 1).
        world: processes that share the work; all of them hold all matrices and equal gradients.
    Raises: ValueError for a parameter that is not a matrix.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, world: World = ALONE) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.world = world
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.dtype].append(p)
            for (shape, _), parameters in alike.items():
                self._step(parameters, group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5, group["momentum"])

    def _step(self, parameters: list[nn.Parameter], lr: float, momentum: float) -> None:
        """One step of matrices of one shape."""
        updates = []
        for p in parameters:
            assert p.grad is not None
            average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(average, momentum))
        for p, update in zip(parameters, self.world.on_shares(orthogonalize, torch.stack(updates)), strict=True):
            p.add_(update, alpha=-lr)
