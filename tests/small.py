"""A small random policy and its config, for tests that need one in milliseconds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from unigrpo.config import Config, load_config
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord, Rollouts
from unigrpo.worlds.shapes import sample_record, vocabulary

ROOT = Path(__file__).parents[1]


def small_config(**sections) -> Config:
    """Scale smoke with changes: small_config(train={"micro_batch": 4})."""
    config = load_config("smoke", run="unigrpo", root=ROOT)
    return config.model_copy(update={name: getattr(config, name).model_copy(update=change)
                                     for name, change in sections.items()})


def small_policy(config: Config, seed: int = 0, **kwargs) -> BagelPolicy:
    """A random model whose outputs are far from zero, so that a wrong context shows."""
    tokenizer = word_tokenizer(vocabulary())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MoTModel(MoTConfig(vocab_size=len(tokenizer), **config.model.model_dump()))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else parameter.shape[1] ** -0.5)
    # Random logits would almost never stop: make the stop token likely enough that lengths vary.
    with torch.no_grad():
        model.language_model.lm_head.weight[1:6] *= 0.3
    return BagelPolicy(model, tokenizer, system_prompt=config.rollout.system_prompt, **kwargs)


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
          "image_size": 32}


def reading_policy(words: list[str], **latents: Any) -> BagelPolicy:
    """A random model that reads images, over a few words, with weights far from zero; `latents`: what it draws."""
    tokenizer = word_tokenizer(words)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MoTModel(MoTConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_latent_size=8, vision=VISION, vit_max_patches=8, **latents)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return BagelPolicy(model, tokenizer, system_prompt="plan first")


def small_prompts(count: int) -> list[PromptRecord]:
    """Different prompts of different lengths."""
    return [sample_record(generator(0, "test-prompts", i)) for i in range(count)]


def sample(policy: BagelPolicy, config: Config, prompts: list[PromptRecord], *, step: int = 0, group_size: int | None = None,
           seed: int = 0) -> Rollouts:
    """Rollouts of one step, with the trainer's keys."""
    return policy.generate(prompts, group_size=group_size or config.rollout.group_size, sampling=config.rollout,
                           generators=lambda purpose, *key: generator(seed, purpose, step, *key))


draw = partial(generator, 0)
