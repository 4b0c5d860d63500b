"""What an update adds up over its micro-batches and processes, and what becomes of one whose numbers are not finite."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unigrpo.distributed import World, local
from unigrpo.schema import Config
from unigrpo.types import Replay
from unigrpo.update import Batch, optimizer_step


@dataclass
class Tally:
    """Of one update in one process: metrics that add up, and the first thing that is not finite, in words."""

    sums: dict[str, float] = field(default_factory=dict)
    bad: str = ""

    def add(self, loss: Tensor, parts: Mapping[str, Tensor], replay: Replay, batch: Batch) -> None:
        """Count a micro-batch."""
        self.bad = self.bad or first_not_finite(loss, replay, batch)
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)


def move_weights(optimizer: torch.optim.Optimizer, tally: Tally, factor: float, config: Config, world: World, *,
                 first: bool) -> dict[str, float]:
    """One optimizer step, skipped where loss or gradients are not finite in any process.

    Args:
        factor: of the learning rates. first: the update whose rollouts the weights themselves sampled: its ratio is 1.
    Returns: the update's metrics over all processes, gradient norms, and `optim/skipped` 0 or 1.
    """
    sums = world.sum(tally.sums)
    # Not "< 1e-12": a NaN is the optimizer step's to refuse and count.
    variation = sums["text/ratio_variation"] + sums.get("image/ratio_variation", 0.0)
    assert not first or not variation >= 1e-12, "ratio is not 1"
    tally.bad = tally.bad or first_bad_gradient(optimizer)
    lost = not math.isfinite(sums["text/loss"] + sums.get("image/loss", 0.0))
    return finish(sums) | optimizer_step(optimizer, factor, config.optim.grad_clip, world, skip=lost)


def report_skipped(stats: Mapping[str, float], tally: Tally, before: int, where: str, config: Config, world: World) -> int:
    """1 for an update that was skipped, which is said, 0 for any other.

    Args:
        before: updates that were skipped earlier. where: step and update, in words.
    Raises: ValueError if they are more than train.max_skipped now.
    """
    if not stats["optim/skipped"]:
        return 0
    bad, limit = next(filter(None, world.gather(tally.bad)), "a gradient's norm"), config.train.max_skipped
    if world.main:
        print(f"{where} is skipped, the {before + 1}. of train.max_skipped={limit}: not finite is {bad}", file=sys.stderr,
              flush=True)
    if before + 1 > limit:
        raise ValueError(f"{before + 1} updates had a loss or gradients that are not finite, the last at {where}: {bad}; lower "
                         "optim.*_lr in params, or resume from the last checkpoint")
    return 1


def finish(sums: dict[str, float]) -> dict[str, float]:
    """Sums over micro-batches to what is logged: roots of mean squares, and the penalty's share of the gradient."""
    out = {name: math.sqrt(value) if "rms" in name else value for name, value in sums.items() if "squared" not in name}
    if sums.get("image/policy_gradient_squared", 0.0) > 0:  # 0 where no group of the update has two different rewards
        policy, penalty = (math.sqrt(sums[f"image/{part}_gradient_squared"]) for part in ("policy", "penalty"))
        out["image/penalty_gradient_ratio"] = penalty / policy
    return out


def first_not_finite(loss: Tensor, replay: Replay, batch: Batch) -> str:
    """What of a micro-batch is not finite first, and of which prompts; "" if its loss is finite."""
    if torch.isfinite(loss):
        return ""
    used = batch.text_weights > 0
    for name, values in (("the advantage", batch.advantages[0]),
                         ("the thinking's log-prob", torch.where(used, replay.text_log_probs, 0.0)),
                         ("the image's velocity", replay.velocities)):
        rows = (~values.detach().isfinite()).reshape(len(values), -1).any(dim=1)
        if rows.any():
            ids = dict.fromkeys(batch.rollouts.prompts[i].id for i in rows.nonzero().flatten().tolist())
            return f"{name} of prompts {', '.join(ids)}"
    return f"the loss of prompts {', '.join(dict.fromkeys(record.id for record in batch.rollouts.prompts))}"


def first_bad_gradient(optimizer: torch.optim.Optimizer) -> str:
    """The first parameter whose gradient is not finite, by name; "" if all are."""
    return next((f"the gradient of {name}" for group in optimizer.param_groups
                 for name, parameter in zip(group["names"], group["params"], strict=True)
                 if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all()), "")
