"""A checkpoint that was not made here, trained for two steps: what is saved draws what the trainer would have drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import ROOT, draw, small_config, small_policy, small_prompts

from unigrpo.adapters import add_lora
from unigrpo.checkpoint import SOURCE_FILE, save_checkpoint
from unigrpo.config import load_config
from unigrpo.generate import UnifiedPipeline
from unigrpo.interchange import export_release, import_release
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.schema_model import VisionConfig
from unigrpo.stages.loading import load_policy, save_policy
from unigrpo.stages.train import rl_policy, rl_start
from unigrpo.train import train
from unigrpo.types import Reward
from unigrpo.update import trainable_experts


def brightness(rollouts):
    return [Reward("shapes_graded", rollouts.image.final_latents.mean(dim=(1, 2)) + 0.01 * rollouts.text.lengths)]


def trained_from(start, end, config):
    """The policy of two training steps from one checkpoint folder, saved into another, and its trained names."""
    policy, optimizer = rl_start(start, config)
    trained = {name for expert in trainable_experts(policy.model, config.train.experts).values() for name in expert}
    policy.model.train()
    train(policy, optimizer, lambda step: small_prompts(4), brightness, config, draw=draw, log=lambda *_: None,
          save=lambda step: None)
    policy.model.eval()
    save_policy(end, policy, origin=start)
    return policy, trained


def pictures(pipe: UnifiedPipeline) -> tuple[list[np.ndarray], list[str]]:
    out = pipe(["red circle", "a blue square"], think=True, guidance_scale=2.0, num_inference_steps=4, seed=7,
               max_thinking_tokens=6)
    return [np.asarray(image) for image in out.images], out.thinking


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_two_steps_then_the_same_images_from_the_folder(tmp_path, rank, precision):
    """Full and adapters, float32 and bfloat16: byte-equal pictures and texts, byte-equal frozen tensors."""
    loose = {"text": 1.0, "image": 1.0e9} if precision == "bf16" else {}
    base = small_config()
    config = small_config(
        train={"num_steps": 2, "micro_batch": 4, "precision": precision,
               "max_mismatch": base.train.max_mismatch.model_copy(update=loose)},
        rollout={"max_thinking_tokens": 6}, lora={"rank": rank, "alpha": 8.0},
        optim={"understanding_lr": 1e-2, "generation_lr": 1e-2})
    imported = small_policy(config)
    if precision == "bf16":
        imported.model.to(torch.bfloat16)
    save_checkpoint(tmp_path / "imported", imported.model, imported.tokenizer)

    policy, trained = trained_from(tmp_path / "imported", tmp_path / "trained", config)

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("imported", "trained"))
    assert list(before) == list(after)
    for name, value in before.items():
        if rank or name not in trained:
            assert value.dtype == after[name].dtype
            assert torch.equal(value, after[name]), name
    assert rank or any(not torch.equal(before[name], after[name]) for name in trained)
    if rank:
        assert (tmp_path / "imported" / "model.safetensors").read_bytes() == (
            tmp_path / "trained" / "model.safetensors").read_bytes()

    wanted, texts = pictures(UnifiedPipeline(policy, system_prompt=config.rollout.system_prompt))
    got, read = pictures(UnifiedPipeline.from_pretrained(tmp_path / "trained", system_prompt=config.rollout.system_prompt))
    again, _ = pictures(UnifiedPipeline(load_policy(tmp_path / "trained", config), system_prompt=config.rollout.system_prompt))
    first, _ = pictures(UnifiedPipeline.from_pretrained(tmp_path / "imported", system_prompt=config.rollout.system_prompt))
    assert texts == read
    assert all(np.array_equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(wanted, first, strict=True))


def test_a_checkpoint_with_adapters_is_not_adapted_again(tmp_path):
    config = small_config(lora={"rank": 4})
    policy = small_policy(config)
    add_lora(policy.model, rank=4, alpha=8, targets=("mlp",), experts=("generation",))
    save_policy(tmp_path, policy)
    with pytest.raises(ValueError, match="adapters already"):
        rl_policy(tmp_path, config)


def released_shape(tmp_path):
    """A checkpoint that the official layout can hold: image encoder, autoencoder of four levels, velocity prediction."""
    vision = VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
                          image_size=980, num_channels=3, layer_norm_eps=1e-6)
    config = small_config(
        model={"latent_channels": 16, "latent_patch_size": 2, "latent_downsample": 8, "max_latent_size": 64, "vision": vision,
               "prediction": "velocity", "rope_theta": 1e6},
        train={"num_steps": 2, "micro_batch": 4}, rollout={"max_thinking_tokens": 6},
        optim={"understanding_lr": 1e-2, "generation_lr": 1e-2})
    section = load_config("bagel_7b", root=ROOT).autoencoder.model_copy(update={"block_out_channels": (32, 64, 128, 128)})
    config = config.model_copy(update={"autoencoder": section})
    imported = small_policy(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        imported.autoencoder = Autoencoder(section.model_dump(exclude={"posterior", "training"}) | {"sample_size": 1024})
    save_policy(tmp_path / "made", imported)
    return config


@pytest.mark.parametrize("rank", [0, 4])
def test_import_train_export_import(tmp_path, rank):
    """The official layout and back: the trainer's picture for the same seed; frozen tensors byte for byte."""
    config = released_shape(tmp_path)
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": rank, "alpha": 8.0})})
    quiet = {"report": lambda line: None}
    export_release(tmp_path / "made", tmp_path / "released", **quiet)
    import_release(tmp_path / "released", tmp_path / "imported", origin={"repository": "someone/BAGEL"}, **quiet)
    path = tmp_path / "imported" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": [32, 32]}))  # as the base stage does

    policy, trained = trained_from(tmp_path / "imported", tmp_path / "trained", config)
    assert (tmp_path / "trained" / SOURCE_FILE).read_bytes() == (tmp_path / "imported" / SOURCE_FILE).read_bytes()
    export_release(tmp_path / "trained", tmp_path / "exported", **quiet)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "`someone/BAGEL`" in card
    assert "Not trained further" not in card
    if rank:  # the released weights are unchanged; the adapters travel beside them
        assert (tmp_path / "exported" / "adapter").is_dir()
    import_release(tmp_path / "exported", tmp_path / "again", **quiet)
    assert (tmp_path / "again" / "adapter").is_dir() == bool(rank)

    first, last = (load_file(tmp_path / name / "ema.safetensors") for name in ("released", "exported"))
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in first.items() if rank or name not in trained)
    assert (tmp_path / "released" / "ae.safetensors").read_bytes() == (tmp_path / "exported" / "ae.safetensors").read_bytes()

    def drawn(pipe):
        out = pipe("red circle", think=True, guidance_scale=2.0, num_inference_steps=4, seed=7, max_thinking_tokens=6,
                   height=32, width=32)
        return np.asarray(out.images[0])

    prompt = config.rollout.system_prompt
    wanted = drawn(UnifiedPipeline(policy, system_prompt=prompt))
    assert np.array_equal(wanted, drawn(UnifiedPipeline.from_pretrained(tmp_path / "again", system_prompt=prompt)))
    assert not np.array_equal(wanted, drawn(UnifiedPipeline.from_pretrained(tmp_path / "imported", system_prompt=prompt)))
