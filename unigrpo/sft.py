"""Supervised training of both branches: next-token loss on text, flow matching on images. Used by base and sft.

One packed forward a batch: [text | image at noise level 1 | image at noise level 2 | ...], the layout of RL's replay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigrpo.distributed import ALONE, World
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.bagel import concatenate_rows, encode_segments
from unigrpo.models.mot import patchify
from unigrpo.muon import Muon
from unigrpo.rollout import DECODED_PIXELS, BagelPolicy
from unigrpo.schema import SupervisedConfig


@dataclass(frozen=True)
class Example:
    """One supervised sample.

    Args:
        context: text segments without loss (system, prompt); empty where the condition is dropped.
        target: the text segment with loss (thinking, caption), or None.
    """

    context: tuple[str, ...]
    target: str | None


@dataclass(frozen=True)
class SupervisedBatch:
    """Padded text and noised images.

    Args:
        tokens: (B, L) int64, lengths: (B,), targets: (B, L) bool, True on tokens to be predicted (end token included).
        clean: (B, N, C) float32 in [-1, 1], sigma: (B, W), noise: (B, W, N, C).
    """

    tokens: Tensor
    lengths: Tensor
    targets: Tensor
    clean: Tensor
    sigma: Tensor
    noise: Tensor


def collate(policy: BagelPolicy, examples: Sequence[Example], images: np.ndarray, rng: np.random.Generator, *,
            images_per_text: int, posterior: str = "mean") -> SupervisedBatch:
    """Encode texts, patchify images (B, H, W, 3) in [0, 1] or their latents, draw noise levels and noise.

    With an autoencoder its posterior's mean is trained on, or a sample of it (`posterior`: mean | sample).

    Noise levels: sigmoid of a standard normal, then the schedule's shift, as BAGEL trains (arXiv:2505.14683).
    """
    context, context_lengths = encode_segments(policy.tokenizer, [e.context for e in examples])
    target, target_lengths = encode_segments(policy.tokenizer, [() if e.target is None else (e.target,) for e in examples])
    tokens, lengths = concatenate_rows(context, context_lengths, target, target_lengths, policy.special.pad)
    columns = torch.arange(tokens.shape[1])
    # The segment's start token is context: it is fed, never predicted.
    targets = (columns > context_lengths[:, None]) & (columns < lengths[:, None])
    config = policy.model.config
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).permute(0, 3, 1, 2) * 2 - 1
    device = policy.model.device
    if policy.autoencoder is not None:
        pixels = encode_images(policy.autoencoder, pixels, rng if posterior == "sample" else None)
    clean = patchify(pixels, config.latent_patch_size)
    raw = torch.sigmoid(torch.from_numpy(rng.standard_normal((len(examples), images_per_text), np.float32)))
    sigma = config.timestep_shift * raw / (1 + (config.timestep_shift - 1) * raw)
    noise = torch.from_numpy(rng.standard_normal((len(examples), images_per_text, *clean.shape[1:]), np.float32))
    return SupervisedBatch(*(part.to(device) for part in (tokens, lengths, targets, clean, sigma, noise)))


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, pixels: Tensor, rng: np.random.Generator | None) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32 latents on the CPU: the posterior's mean, or drawn with `rng`.

    A few images at a time, to bound memory.
    """
    noise = None
    if rng is not None:
        shape = (len(pixels), autoencoder.config["latent_channels"], *(s // autoencoder.downsample for s in pixels.shape[2:]))
        noise = torch.from_numpy(rng.standard_normal(shape, np.float32))
    together = max(1, DECODED_PIXELS // (pixels.shape[2] * pixels.shape[3]))
    return torch.cat([autoencoder.encode(part, noise=None if noise is None else noise[at:at + together]).float().cpu()
                      for at, part in zip(range(0, len(pixels), together), pixels.split(together), strict=True)])


def supervised_losses(policy: BagelPolicy, batch: SupervisedBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Mean cross-entropy over target tokens (nats) and mean squared velocity error over image elements."""
    sigma = batch.sigma[..., None, None]
    latents = (1 - sigma) * batch.clean[:, None] + sigma * batch.noise
    hidden, velocity = policy.packed(batch.tokens, batch.lengths, latents, batch.sigma)
    assert velocity is not None
    image_loss = F.mse_loss(velocity, batch.noise - batch.clean[:, None])
    wanted = batch.targets[:, 1:]
    logits = policy.model.logits(hidden[:, :-1][wanted])
    labels = batch.tokens[:, 1:][wanted]
    text_loss = F.cross_entropy(logits, labels) if len(labels) else logits.sum()
    right = (logits.argmax(dim=-1) == labels).float().mean().item() if len(labels) else float("nan")
    return text_loss, image_loss, {"text/loss": text_loss.item(), "image/loss": image_loss.item(), "text/accuracy": right,
                                    "text/tokens": float(batch.lengths.sum())}


def supervised_optimizers(model: nn.Module, config: SupervisedConfig, world: World = ALONE) -> list[torch.optim.Optimizer]:
    """Muon on the layers' matrices (about 1.7x fewer steps than AdamW alone), AdamW on everything else, or on all.

    Fine-tuning a model that was trained with AdamW goes on with AdamW (config.optimizer).
    """
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    if config.optimizer == "adamw":
        matrices = []
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_lr, world=world))
    optimizers.append(torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def supervised_factor(step: int, config: SupervisedConfig) -> float:
    """Learning-rate factor: linear warm-up, then linear decay to final_lr_share at the last step."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    fall = max(0, step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return rise * (1 - (1 - config.final_lr_share) * fall)


def micro_batches(batch: SupervisedBatch, size: int | None,
                  world: World = ALONE) -> Iterator[tuple[SupervisedBatch, float, float]]:
    """Parts of at most `size` of this process's rows (None: all), each with its share of the target tokens and the images.

    Losses are means, so the parts' losses times these shares add up to the batch's. A part is cut to its longest row.
    """
    rows = len(batch.lengths)
    predicted = max(1, int(batch.targets[:, 1:].sum()))
    own = torch.as_tensor(world.share(range(rows)))
    for part in own.split(size or len(own)):
        columns = int(batch.lengths[part].max())
        yield (SupervisedBatch(batch.tokens[part, :columns], batch.lengths[part], batch.targets[part, :columns],
                               batch.clean[part], batch.sigma[part], batch.noise[part]),
               int(batch.targets[part, 1:].sum()) / predicted, len(part) / rows)


def accumulate(metrics: dict[str, float], part: dict[str, float], text_share: float, image_share: float) -> None:
    """Add a micro-batch's metrics: means by their share of the batch, counts as they are. Without text there is no accuracy."""
    shares = {"text/loss": text_share, "text/accuracy": text_share, "image/loss": image_share, "text/tokens": 1.0}
    for name, value in part.items():
        if text_share or name != "text/accuracy":
            metrics[name] += shares[name] * value


def train_supervised(policy: BagelPolicy, optimizers: Sequence[torch.optim.Optimizer],
                     batches: Callable[[int], SupervisedBatch], config: SupervisedConfig, *,
                     log: Callable[[int, dict[str, float]], None], save: Callable[[int], None], start_step: int = 0,
                     world: World = ALONE) -> None:
    """Minimise text_weight * CE + image_weight * MSE for config.steps steps.

    Args:
        batches: step -> batch, the same in every process; the step is the data cursor. log, save: called after every step.
        world: the processes that share a batch.
    Raises: ValueError where the loss or its gradient is not finite, naming the step; the weights are those before it.
    """
    for step in range(start_step, config.steps):
        metrics: dict[str, float] = defaultdict(float)
        for part, text_share, image_share in micro_batches(batches(step), config.micro_batch, world):
            # The cache would keep a rounded copy of every layer that is gathered.
            with torch.autocast(policy.model.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16",
                                cache_enabled=not policy.sharded):
                text_loss, image_loss, measured = supervised_losses(policy, part)
            loss = config.text_weight * text_share * text_loss + config.image_weight * image_share * image_loss
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of step {step} is not finite (text {text_loss.item()}, image "
                                 f"{image_loss.item()}); lower muon_lr or adam_lr in params")
            loss.backward()
            accumulate(metrics, measured, text_share, image_share)
        metrics = world.sum({"text/accuracy": 0.0, **metrics} if world.size > 1 else metrics)  # the same names everywhere
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        world.sum_gradients(parameters)
        metrics["grad_norm"] = world.clip_gradients(parameters, config.grad_clip)
        if not math.isfinite(metrics["grad_norm"]):  # before it reaches the weights, and with them a saved state
            raise ValueError(f"the gradient of step {step} is not finite; lower muon_lr or adam_lr in params")
        factor = supervised_factor(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log(step, {**metrics, "lr_factor": factor})
        save(step)
