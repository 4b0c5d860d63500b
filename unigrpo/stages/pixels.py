"""A fresh autoencoder for scales without a released one: trained on rendered scenes, then frozen."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from unigrpo.models.autoencoder import Autoencoder
from unigrpo.schema import AutoencoderConfig
from unigrpo.seeding import generator
from unigrpo.worlds.shapes import random_scene, render

STATISTICS = 64  # scenes from which scale, shift and reconstruction error are measured


def scenes(settings: AutoencoderConfig, purpose: str, step: int, count: int) -> torch.Tensor:
    """(count, 3, H, W) rendered scenes in [-1, 1], keyed by purpose and step."""
    assert settings.training is not None
    rng = generator(settings.training.seed, purpose, step)
    images = render([random_scene(rng) for _ in range(count)], rng)
    return torch.from_numpy(images.astype("float32")).permute(0, 3, 1, 2) * 2 - 1


def train_autoencoder(settings: AutoencoderConfig, *, size: int, device: torch.device | str = "cpu") -> Autoencoder:
    """Minimise mean squared error + kl_weight * KL to a standard normal; keyed initial weights, images and noise.

    Scale and shift are then set so that latents have mean 0 and standard deviation 1 over rendered scenes, as flow matching
    to unit noise wants them.

    Args:
        size: side of an image, pixels (stored, for people and diffusers).
    """
    training = settings.training
    assert training is not None
    values = settings.model_dump(include={"latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups"})
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(training.seed, "autoencoder").integers(2**63)))
        plain = Autoencoder({**values, "scaling_factor": 1.0, "shift_factor": 0.0, "sample_size": size}).to(device)
    plain.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(training.steps):
        pixels = scenes(settings, "autoencoder-images", step, training.images_per_step).to(device)
        posterior = plain.vae.encode(pixels).latent_dist
        noise = generator(training.seed, "autoencoder-noise", step).standard_normal(tuple(posterior.mean.shape), "float32")
        image = plain.vae.decode(posterior.mean + posterior.std * torch.from_numpy(noise).to(device)).sample
        loss = F.mse_loss(image, pixels) + training.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        latents = plain.eval().encode(scenes(settings, "autoencoder-statistics", 0, STATISTICS).to(device))
    final = Autoencoder({**plain.config, "scaling_factor": round(1 / latents.std().item(), 4),
                         "shift_factor": round(latents.mean().item(), 4)}).to(device)
    final.vae.load_state_dict(plain.vae.state_dict())
    return final.requires_grad_(False).eval()


def autoencoder_of(settings: AutoencoderConfig, folder: Path, *, size: int, device: torch.device | str) -> Autoencoder:
    """The trained autoencoder, from the resume folder where an interrupted stage has finished it."""
    path = folder / "autoencoder"
    if not (path / "config.json").is_file():
        trained = train_autoencoder(settings, size=size, device=device)
        trained.save(folder / "autoencoder.partial")
        (folder / "autoencoder.partial").rename(path)
    return Autoencoder.from_folder(path).to(device)


@torch.no_grad()
def reconstruction_error(autoencoder: Autoencoder, settings: AutoencoderConfig) -> float:
    """Root of the mean squared error of decoded means on scenes no step saw; pixels in [0, 1]."""
    pixels = scenes(settings, "autoencoder-heldout", 0, STATISTICS)
    out = autoencoder.decode(autoencoder.encode(pixels)).cpu()
    return float((out - pixels).square().mean().sqrt()) / 2
