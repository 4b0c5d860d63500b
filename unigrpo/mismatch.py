"""Rollout against replay: the gate that a run passes before its first update.

A policy gradient is right only if the replayed trajectory is the sampled one. Where the two differ the clip filters
noise and the run looks healthy (verl-omni #279, #280: a schedule off by one cost 500 clip widths). This module compares,
names what differs, and refuses.
"""

from __future__ import annotations

import torch
from torch import nn

from unigrpo.config import Config
from unigrpo.distributed import ALONE, World
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.policy import UnifiedPolicy
from unigrpo.types import Rollouts
from unigrpo.update import image_clip


class MismatchError(ValueError):
    """Rollout and replay disagree; the message names how."""


def mismatch_metrics(rollouts: Rollouts, config: Config, world: World = ALONE) -> dict[str, float]:
    """Mean and maximal absolute difference of recorded and replayed log-probs; of images, if replayed, in units of the clip.

    Args:
        rollouts: anchored, this process's. world: over whose rollouts the mean goes.
    """
    text, image = rollouts.text, rollouts.image
    assert text.old_log_probs is not None
    text_gap = (text.rollout_log_probs - text.old_log_probs).abs()[text.mask]
    sums = world.sum({"text": float(text_gap.double().sum()), "tokens": float(text_gap.numel())})
    found = {"mismatch/text": sums["text"] / sums["tokens"], **world.max({"mismatch/text_max": text_gap.max().item()})}
    if image.old_log_probs is None:
        return found
    clip = image_clip(config.objective.image.clip_high, image)
    image_gap = (image.rollout_log_probs - image.old_log_probs).abs() / clip
    sums = world.sum({"image": float(image_gap.double().sum()), "steps": float(image_gap.numel())})
    return found | {"mismatch/image": sums["image"] / sums["steps"],
                    **world.max({"mismatch/image_max": image_gap.max().item()})}


def check_rollouts(rollouts: Rollouts, config: Config, policy: UnifiedPolicy) -> None:
    """Refuse a run whose rollouts are not what the update will replay.

    Args:
        rollouts: anchored by `policy`.
    Raises: MismatchError naming every difference found: dropout, CFG, schedule, stop token, tokens, precision.
    """
    problems = _dropout(policy.model) + _guidance(rollouts, policy.guidance_scale) + _schedule(rollouts, config)
    problems += _stop_tokens(rollouts, config)
    metrics = mismatch_metrics(rollouts, config)
    limits = config.train.max_mismatch
    if not metrics["mismatch/text"] <= limits.text:
        problems.append(_first_differing_token(rollouts, limits.text, metrics["mismatch/text"]))
    if "mismatch/image" in metrics and not metrics["mismatch/image"] <= limits.image:
        problems.append(f"image log-probs of rollout and replay differ by {metrics['mismatch/image']:.3g} clip widths on "
                        f"average, more than train.max_mismatch.image={limits.image:g}: "
                        + ("the context differs already (see the text)" if metrics["mismatch/text"] > limits.text else
                           "same tokens, so look at schedule, noise level, dtype, CFG and adapters"))
    if problems:
        raise MismatchError("rollout and replay disagree before the first update:\n- " + "\n- ".join(problems))


def _dropout(model: nn.Module) -> list[str]:
    active = [name for name, module in model.named_modules()
              if isinstance(module, nn.Dropout | nn.Dropout2d | nn.AlphaDropout) and module.p > 0]
    if getattr(getattr(model, "config", None), "attention_dropout", 0.0) > 0:
        active.append("config.attention_dropout")
    return [f"dropout is on in {active[:3]} ({len(active)} places): RL needs dropout 0 everywhere, adapters included; "
            "set model.attention_dropout and the adapters' dropout to 0"] if active else []


def _guidance(rollouts: Rollouts, scale: float) -> list[str]:
    if rollouts.guidance_scale == scale:
        return []
    return [f"CFG differs: the rollout was sampled with guidance_scale {rollouts.guidance_scale:g} and is replayed with "
            f"{scale:g}; set rollout.guidance_scale once for both"]


def _schedule(rollouts: Rollouts, config: Config) -> list[str]:
    wanted, got = sigma_schedule(config.rollout.num_steps, config.rollout.shift), rollouts.image.sigmas.cpu()
    if got.shape == wanted.shape and torch.equal(got, wanted):
        return []
    return [f"the schedule differs: the rollout used {len(got) - 1} model calls {[round(s, 4) for s in got[:3].tolist()]}..., "
            f"rollout.num_steps={config.rollout.num_steps} and shift={config.rollout.shift:g} give "
            f"{[round(s, 4) for s in wanted[:3].tolist()]}..."]


def _stop_tokens(rollouts: Rollouts, config: Config) -> list[str]:
    text, stop_token = rollouts.text, rollouts.stop_token
    lengths = text.lengths
    last = text.tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    wrong = ((last != stop_token) & (lengths < config.rollout.max_thinking_tokens)).nonzero().flatten().tolist()
    if not wrong:
        return []
    row = wrong[0]
    return [f"the stop token is missing in {len(wrong)} of {len(lengths)} rollouts: rollout {row} ended after "
            f"{int(lengths[row])} tokens with id {int(last[row])} instead of {stop_token}; sampled ids must condition the "
            "image as they are, never overwritten by padding or dropped by decoding and re-encoding"]


def _first_differing_token(rollouts: Rollouts, limit: float, mean: float) -> str:
    text = rollouts.text
    assert text.old_log_probs is not None
    gap = torch.where(text.mask, (text.rollout_log_probs - text.old_log_probs).abs(), 0.0)
    row, column = divmod(int((gap > limit).flatten().int().argmax()), gap.shape[1])
    return (f"text log-probs of rollout and replay differ by {mean:.3g} nats on average, more than train.max_mismatch.text="
            f"{limit:g}; first at rollout {row}, thinking token {column} (id {int(text.tokens[row, column])}: recorded "
            f"{float(text.rollout_log_probs[row, column]):.5f}, replayed {float(text.old_log_probs[row, column]):.5f}): the "
            "context differs there, e.g. thinking decoded and re-encoded, a padding mask, positions or dtype")
