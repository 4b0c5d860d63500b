"""One optimizer step of UniGRPO: which rollouts it takes, what they are compared with, and the loss.

Every normaliser is global over the optimizer step, so gradients summed over micro-batches equal one large batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from unigrpo.adapters import has_adapters
from unigrpo.distributed import ALONE, World
from unigrpo.flow.sde import Transition, transition
from unigrpo.masters import MasterAdamW
from unigrpo.objectives import clipped_surrogate_loss, k3_kl, latent_kl, projected_log_ratio, velocity_mse
from unigrpo.policy import UnifiedPolicy
from unigrpo.schema import Config, ObjectiveConfig, OptimConfig
from unigrpo.text import sequence_weights
from unigrpo.types import FlowSegment, PromptRecord, Replay, Rollouts

CLIP_ELEMENTS = 65_536  # latent elements at which params state the image clip; it scales with sqrt(CLIP_ELEMENTS / D)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rollouts, their advantages per segment, and their slice of the optimizer step's weights."""

    rollouts: Rollouts
    advantages: tuple[Tensor, ...]
    text_weights: Tensor
    image_weights: Tensor

    def anchored(self, replay: Replay, config: Config, *, images: bool = True) -> Batch:
        """The batch with this replay as its anchor, as long as no weight has moved since it was sampled: its ratio is 1."""
        text, image = self.rollouts.text, self.rollouts.image
        if images:
            move = score(image, replay.velocities.detach(), config)
            image = replace(image, old_log_probs=move.log_prob, old_means=move.mean)
        text = replace(text, old_log_probs=replay.text_log_probs.detach())
        return replace(self, rollouts=self.rollouts.with_segments([text, image]))


@dataclass(frozen=True)
class Minibatch:
    """The rollouts of one optimizer step: whole prompt groups."""

    rows: Tensor
    rollouts: Rollouts
    advantages: tuple[Tensor, ...]
    micro_batch: int
    aggregation: str
    world: World = ALONE

    def micro_batches(self) -> Iterator[Batch]:
        """Consecutive micro-batches, each with its slice of the weights, which sum to 1 over all processes."""
        text = self.rollouts.text.mask[self.rows]
        counts = self.world.sum({"rows": float(len(text)), "sequences": float(text.any(dim=1).sum()),
                                 "tokens": float(text.sum())})
        text_weights = sequence_weights(text, self.aggregation, num_sequences=int(counts["sequences"]),  # type: ignore[arg-type]
                                        num_tokens=int(counts["tokens"]))
        window = self.rollouts.image.mask.shape[1]
        for chunk in torch.arange(len(self.rows)).split(self.micro_batch):
            rows = self.rows[chunk]
            yield Batch(self.rollouts.select(rows), tuple(a[rows].to(text.device) for a in self.advantages),
                        text_weights[chunk], torch.full((len(rows), window), 1.0 / (counts["rows"] * window),
                                                        dtype=torch.float64, device=text.device))


def own_prompts(prompts: Sequence[PromptRecord], updates: int, rng: np.random.Generator,
                world: World = ALONE) -> list[PromptRecord]:
    """This process's prompts of a step, update after update: disjoint sets in a keyed random order, the same number each.

    Raises: ValueError if the prompts cannot be split so.
    """
    if len(prompts) % (updates * world.size):
        raise ValueError(f"{len(prompts)} prompts a step must be a multiple of {updates} updates x {world.size} processes; "
                         "change rollout.prompts_per_step, train.updates_per_rollout or compute.processes in params")
    parts = np.split(rng.permutation(len(prompts)), updates)
    return [prompts[i] for part in parts for i in world.share(part.tolist())]


def update_rows(rollouts: Rollouts, updates: int) -> list[Tensor]:
    """Row indices of each update, see `own_prompts`: whole prompt groups, side by side."""
    return list(torch.arange(len(rollouts)).chunk(updates))


def minibatches(rollouts: Rollouts, advantages: Sequence[Tensor], config: Config, rows: Sequence[Tensor],
                world: World = ALONE) -> Iterator[Minibatch]:
    """One minibatch for each optimizer step."""
    for part in rows:
        yield Minibatch(part, rollouts, tuple(advantages), config.train.micro_batch, config.objective.text.aggregation, world)


def trains_images(config: Config) -> bool:
    """True if the loss has an image part. Where it has none, steps that measure nothing replay the text alone."""
    image = config.objective.image
    return image.weight > 0 or image.regularizer != "none"


def score(image: FlowSegment, velocities: Tensor, config: Config) -> Transition:
    """The window's transitions under given velocities: mean (B, W, N, C), std and log_prob (B, W) or what broadcasts."""
    sigma, sigma_next = (image.sigmas[image.steps + k][:, None, None].to(velocities.device) for k in (0, 1))
    return transition(image.latents, velocities, sigma, sigma_next, sigma_max=image.sigmas[1],
                      noise_level=config.rollout.noise_level, kind=config.rollout.transition,
                      next_latents=image.next_latents)


def anchor(policy: UnifiedPolicy, rollouts: Rollouts, rows: Sequence[Tensor], config: Config, *,
           reference: bool, images: bool = True, first: bool = True) -> Rollouts:
    """Old log-probs and means of every rollout at the weights that sampled, and the reference's velocities.

    Replayed in the micro-batches the updates will use, gradient enabled and then detached: same packing, kernels and
    mode, so the first update's ratio is exactly 1. Frozen once, before the first of the updates.

    Args:
        rows: of each update. reference: whether the reference's velocities are wanted.
        images: False replays the text alone: the images have no old values then.
        first: False leaves the first update's rows without old values (NaN): its own replay will do, see Batch.anchored.
    """
    text, image = rollouts.text, rollouts.image
    old_text, old_image = (torch.full_like(part.rollout_log_probs, math.nan) for part in (text, image))
    old_means = torch.full_like(image.latents, math.nan)
    ref_text = torch.zeros_like(old_text) if reference else None
    ref_velocities = torch.zeros_like(image.latents) if reference else None
    for update, chunk in ((u, c) for u, part in enumerate(rows) for c in part.split(config.train.micro_batch)):
        batch = rollouts.select(chunk)
        if first or update > 0:
            with torch.enable_grad():
                replay = policy.replay(batch, velocities=images)
            old_text[chunk] = replay.text_log_probs.detach()
            if images:
                move = score(batch.image, replay.velocities.detach(), config)
                old_image[chunk], old_means[chunk] = move.log_prob, move.mean
        if ref_velocities is not None and ref_text is not None:
            with policy.reference(), torch.no_grad():
                replay = policy.replay(batch, velocities=images)
            ref_velocities[chunk], ref_text[chunk] = replay.velocities, replay.text_log_probs
    return rollouts.with_segments([
        replace(text, old_log_probs=old_text, ref_log_probs=ref_text),
        replace(image, old_log_probs=old_image, old_means=old_means, ref_velocities=ref_velocities) if images else image])


def image_clip(clip: float, image: FlowSegment) -> float:
    """The clip of params, stated at 65,536 latent elements, at this image's number of elements."""
    return clip * math.sqrt(CLIP_ELEMENTS / image.latents[0, 0].numel())


def penalties(image: FlowSegment, move: Transition, velocities: Tensor, config: Config) -> dict[str, Tensor]:
    """(B, W) distances from the reference, all of them: one may be optimised, every one is measured."""
    assert image.ref_velocities is not None
    ref = score(image, image.ref_velocities, config)
    return {"velocity_mse": velocity_mse(velocities, image.ref_velocities),
            "latent_kl": latent_kl(move.mean, ref.mean, std=move.std.expand(velocities.shape[:2])),
            "latent_kl_published": latent_kl(move.mean, ref.mean, std=move.std.expand(velocities.shape[:2]), true=False,
                                             diffusion_coef=move.diffusion_coef.expand(velocities.shape[:2]))}


def objective(replay: Replay, batch: Batch, config: Config, *, decay: float = 1.0,
              measure_gradients: bool = False, images: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """loss = text.weight * L_text + image.weight * L_image + regularizer_weight * penalty; metrics that add up.

    Args:
        replay: of batch.rollouts, with gradient.
        decay: factor of the regulariser's weight at this step.
        measure_gradients: also compare the penalty's gradient with the policy's, at the velocities.
        images: False for a replay of the text alone. A part of weight 0 is measured and left out of the graph.
    Source: UniGRPO arXiv:2603.23500 (joint objective); GRPO-Guard arXiv:2510.22319 (RatioNorm).
    """
    settings: ObjectiveConfig = config.objective
    text, image = batch.rollouts.text, batch.rollouts.image
    assert text.old_log_probs is not None
    text_loss, text_metrics = clipped_surrogate_loss(
        replay.text_log_probs, text.old_log_probs, batch.advantages[0], batch.text_weights,
        clip_low=settings.text.clip_low, clip_high=settings.text.clip_high)
    metrics = {f"text/{name}": value for name, value in text_metrics.items()}
    metrics["text/entropy"] = (replay.text_entropy * batch.text_weights).sum()
    metrics["text/loss"] = text_loss.detach()
    loss = settings.text.weight * text_loss if settings.text.weight else torch.zeros_like(text_loss)
    if text.ref_log_probs is not None:
        kl = (k3_kl(replay.text_log_probs, text.ref_log_probs) * batch.text_weights).sum()
        metrics["text/kl"] = kl.detach()
        if settings.text.kl_weight:
            loss = loss + settings.text.kl_weight * kl
    if not images:
        return loss, metrics

    assert image.old_log_probs is not None
    assert image.old_means is not None
    move = score(image, replay.velocities, config)
    if settings.image.ratio_norm:
        log_ratio = projected_log_ratio(move.mean, image.old_means, image.next_latents, move.std.expand(move.log_prob.shape))
    else:
        log_ratio = move.log_prob - image.old_log_probs
    # A ratio of 1 +- 1e-6 needs more digits than float32 has.
    image_loss, image_metrics = clipped_surrogate_loss(
        log_ratio.double(), torch.zeros_like(log_ratio, dtype=torch.float64), batch.advantages[1].double(),
        batch.image_weights, clip_low=image_clip(settings.image.clip_low, image),
        clip_high=image_clip(settings.image.clip_high, image))
    metrics |= {f"image/{name}": value for name, value in image_metrics.items()}
    metrics["image/loss"] = image_loss.detach()
    with torch.no_grad():
        clip = image_clip(settings.image.clip_high, image)
        for i, step in enumerate(image.steps.tolist()):
            share = batch.image_weights[:, i] * log_ratio.shape[1]
            metrics[f"image/log_ratio_rms/step_{step}"] = (log_ratio[:, i].double().square() * share).sum()
            metrics[f"image/clip_fraction/step_{step}"] = ((log_ratio[:, i].abs() > clip) * share).sum()
    if settings.image.weight:
        loss = loss + settings.image.weight * image_loss

    if image.ref_velocities is not None:
        distances = penalties(image, move, replay.velocities, config)
        means = {name: (value * batch.image_weights).sum() for name, value in distances.items()}
        metrics |= {f"image/{name}": value.detach() for name, value in means.items()}
        if settings.image.regularizer != "none":
            penalty = decay * settings.image.regularizer_weight * means[settings.image.regularizer]
            if measure_gradients and replay.velocities.requires_grad:
                policy_part, = torch.autograd.grad(settings.image.weight * image_loss, replay.velocities, retain_graph=True)
                penalty_part, = torch.autograd.grad(penalty, replay.velocities, retain_graph=True)
                metrics["image/policy_gradient_squared"] = policy_part.double().square().sum()
                metrics["image/penalty_gradient_squared"] = penalty_part.double().square().sum()
            loss = loss + penalty
    return loss, metrics


EXPERTS = {"generation": "_moe_gen", "understanding": ""}


def expert_parameters(model: nn.Module, expert: str) -> dict[str, nn.Parameter]:
    """The decoder layers' parameters of one expert set, or their adapters where there are any.

    Embeddings, head, final norms, time embedder, projections and the image encoder are no expert's.
    """
    adapters = has_adapters(model)
    return {name: p for name, p in model.named_parameters()
            if name.startswith("language_model.") and ".layers." in name
            and ("_moe_gen" in name) == (expert == "generation") and (not adapters or ".lora_" in name)}


def trainable_experts(model: nn.Module, experts: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Set requires_grad: the chosen experts train, everything else is frozen. Returns expert -> its parameters."""
    model.requires_grad_(False)
    chosen = {expert: expert_parameters(model, expert) for expert in experts}
    for parameters in chosen.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    return chosen


def rl_optimizer(experts: dict[str, dict[str, nn.Parameter]], config: OptimConfig, *,
                 lr_scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW with one group, and one learning rate, an expert; with float32 masters where parameters are bfloat16.

    Args:
        experts: see `trainable_experts`. lr_scale: factor of both learning rates (adapters want larger ones).
    """
    rates = {"understanding": config.understanding_lr * lr_scale, "generation": config.generation_lr * lr_scale}
    groups = [{"params": list(parameters.values()), "lr": rates[name], "name": name, "peak_lr": rates[name],
               "names": list(parameters)} for name, parameters in experts.items()]
    rounded = any(p.dtype != torch.float32 for parameters in experts.values() for p in parameters.values())
    return (MasterAdamW if rounded else torch.optim.AdamW)(groups, betas=config.betas, eps=config.eps,
                                                           weight_decay=config.weight_decay)


def schedule_factor(update: int, total: int, config: OptimConfig) -> float:
    """Learning-rate factor of an update (0-based): linear warm-up, then constant or linear decay to 0."""
    factor = min(1.0, (update + 1) / (config.warmup + 1))
    if config.decay == "linear":
        factor *= max(0.0, 1.0 - max(0, update - config.warmup) / max(1, total - config.warmup))
    return factor


def optimizer_step(optimizer: torch.optim.Optimizer, factor: float, max_norm: float, world: World = ALONE, *,
                   skip: bool = False) -> dict[str, float]:
    """Add up over processes, clip per expert, step unless told to skip or a gradient is not finite.

    Returns: gradient norms, and `skipped` 0 or 1.
    """
    norms = {}
    for group in optimizer.param_groups:
        world.sum_gradients(group["params"])
        norms[f"{group['name']}/grad_norm"] = world.clip_gradients(group["params"], max_norm)
        group["lr"] = group["peak_lr"] * factor
    skipped = skip or not all(math.isfinite(v) for v in norms.values())
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**norms, "optim/skipped": float(skipped), "optim/lr_factor": factor}
