"""Mixed precision: bfloat16 weights that compute, float32 masters that are optimised.

A bfloat16 number has 8 bits: with steps of 1e-6 a weight of 0.02 would never move. Gradients of micro-batches are summed in
float32 too, so that an update does not depend on how it is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class MasterAdamW(torch.optim.AdamW):
    """AdamW over float32 copies of the parameters it is given; after each step the parameters are the copies, rounded.

    Its parameter groups hold the copies: gradients are clipped there. A backward pass moves each gradient to its copy, in
    float32, and frees it. State (and a resumed run's) is the two moments and the copy.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **settings: Any) -> None:
        self.rounded: list[Tensor] = [p for group in groups for p in group["params"]]
        self.masters = [p.detach().float().clone() for p in self.rounded]
        copies = iter(self.masters)
        super().__init__([{**group, "params": [next(copies) for _ in group["params"]]} for group in groups], **settings)
        for parameter, master in zip(self.rounded, self.masters, strict=True):
            parameter.register_post_accumulate_grad_hook(_collector(master))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the copies, then the parameters are the copies rounded to their own type."""
        assert closure is None
        super().step()
        self._round()

    def _round(self) -> None:
        for parameter, master in zip(self.rounded, self.masters, strict=True):
            parameter.data.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state with each float32 copy beside its moments."""
        out = super().state_dict()
        state = {i: {**out["state"].get(i, {}), "master": master} for i, master in enumerate(self.masters)}
        return {**out, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; the parameters follow. Raises ValueError where a copy is missing."""
        state = {int(i): dict(values) for i, values in state_dict["state"].items()}
        missing = [i for i in range(len(self.masters)) if "master" not in state.get(i, {})]
        if missing:
            raise ValueError(f"an optimizer state of float32 masters must hold all {len(self.masters)}, "
                             f"{len(missing)} are missing; it was saved with another train.precision")
        for i, master in enumerate(self.masters):
            master.copy_(state[i].pop("master"))
        super().load_state_dict({**state_dict, "state": {i: values for i, values in state.items() if values}})
        self._round()


def _collector(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a fresh gradient to the master's, in float32, and frees it."""
    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        fresh = parameter.grad.float()
        master.grad = fresh if master.grad is None else master.grad.add_(fresh)
        parameter.grad = None
    return collect
