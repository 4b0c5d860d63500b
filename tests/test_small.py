"""A few steps of scale small: latents of an autoencoder, an image encoder's weights, adapters and full training, evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small import ROOT

from unigrpo.config import load_config
from unigrpo.stages import base, curate, evaluate, sft, train
from unigrpo.stages.loading import load_policy
from unigrpo.types import Reward

FEW = {
    "curate": {"sft": 16, "train": 8, "validation": 4, "eval": 4},
    "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2},
    "autoencoder": {"training": {"steps": 4, "images_per_step": 4}},
    "base": {"steps": 2, "texts_per_step": 4, "checkpoint_every": 2},
    "sft": {"steps": 2, "texts_per_step": 4, "checkpoint_every": 2, "drift": {"max_image_loss_ratio": 100.0, "scenes": 4}},
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_thinking_tokens": 6, "num_steps": 4,
                "window": {"kind": "subset", "size": 1, "range": [0, 2]}},
    "train": {"num_steps": 2, "micro_batch": 2, "probe_prompts": 2, "checkpoint_every": 1},
    "evaluate": {"prompts": 4, "images_per_prompt": 1, "num_steps": 2},
}
FROZEN = ("embed_tokens", "lm_head", "vit_model", "connector", "vit_pos_embed", "latent_pos_embed", "time_embedder", "vae2llm",
          "llm2vae", "model.norm")


def deep(values: dict, change: dict) -> dict:
    """`change` over `values`, mapping by mapping."""
    return {**values, **{k: deep(values.get(k) or {}, v) if isinstance(v, dict) else v for k, v in change.items()}}


def project(folder: Path, few: dict) -> Path:
    """A project root with the params of this one, `small` reduced, and runs for adapters and precision."""
    shutil.copytree(ROOT / "params", folder / "params")
    path = folder / "params" / "scales" / "small.yaml"
    path.write_text(yaml.safe_dump(deep(yaml.safe_load(path.read_text()), few)))
    runs = {"unigrpo": {}, "lora": {"lora": {"rank": 4, "alpha": 8}},
            "bf16": {"train": {"precision": "bf16", "activation_checkpointing": True,
                               "max_mismatch": {"text": 1.0, "image": 1.0e9}}}}
    (folder / "params" / "runs.yaml").write_text(yaml.safe_dump(runs))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """curate, base and sft of the reduced scale."""
    folder = project(tmp_path_factory.mktemp("small"), FEW)
    curate.run("small", root=folder)
    base.run("small", root=folder)
    sft.run("small", root=folder)
    return folder


def tensors(root: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(root / "artifacts" / "small" / checkpoint / "checkpoint" / "model.safetensors")


def test_the_scale_is_what_it_says():
    config = load_config("small", root=ROOT)
    assert config.autoencoder is not None
    assert config.model.vision is not None
    assert config.model.num_key_value_heads < config.model.num_attention_heads
    assert config.model.prediction == "velocity"


def test_checkpoints_carry_their_autoencoder(root):
    """Base and sft write the same frozen autoencoder, whose latents over scenes have mean 0 and standard deviation 1."""
    files = [root / "artifacts" / "small" / name / "checkpoint" / "autoencoder" / "diffusion_pytorch_model.safetensors"
             for name in ("base", "sft")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = load_config("small", root=root)
    policy = load_policy(root / "artifacts/small/sft/checkpoint", config)
    from unigrpo.stages.pixels import scenes

    latents = policy.autoencoder.encode(scenes(config.autoencoder, "test", 0, 64))
    assert latents.shape == (64, 4, 8, 8)
    assert latents.mean().abs() < 0.1
    assert latents.std() == pytest.approx(1.0, abs=0.1)
    training = json.loads((root / "artifacts/small/base/training.json").read_text())
    assert 0 < training["autoencoder/rmse"] < 0.5


@pytest.mark.parametrize("run", ["unigrpo", "lora", "bf16"])
def test_training_changes_what_it_should(root, run, monkeypatch):
    # A model after four steps draws nothing that a reward of the world would tell apart.
    monkeypatch.setattr("unigrpo.stages.train.get_reward", lambda name: lambda images, prompts, texts: [
        Reward(name, torch.from_numpy(images).mean(dim=(1, 2, 3)))])
    metrics = train.run("small", run=run, seed=0, root=root)
    assert np.isfinite(metrics["reward/mean"])
    assert metrics["mismatch/text"] < (0.2 if run == "bf16" else 1e-4)
    before, after = tensors(root, "sft"), tensors(root, f"{run}/0")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    adapter = root / f"artifacts/small/{run}/0/checkpoint/adapter/adapter_model.safetensors"
    assert adapter.is_file() == (run == "lora")
    if run == "lora":
        assert not changed
        assert any(value.abs().max() > 0 for name, value in load_file(adapter).items() if "lora_B" in name)
    elif run == "unigrpo":
        assert {"_moe_gen" in name for name in changed} == {False, True}
        assert not [name for name in changed if any(part in name for part in FROZEN)]
    else:
        assert {value.dtype for value in after.values()} == {torch.bfloat16}


def test_evaluation_of_an_adapted_checkpoint(root):
    if not (root / "artifacts/small/lora/0/checkpoint").is_dir():
        train.run("small", run="lora", seed=0, root=root)
    metrics = evaluate.run("small", checkpoint="lora/0", root=root)
    assert any(name.startswith("bench/shapes/exact") for name in metrics)


def test_warmup_on_a_folder_of_pictures(root, tmp_path):
    """The documented format; the held-out examples are a keyed tenth."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(12):
        Image.fromarray(np.full((48, 64, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
        rows.append({"prompt": "red circle", "thinking": "draw a red circle top ." if i % 2 else "", "image": f"{i}.png"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(root, tmp_path / "project", ignore=shutil.ignore_patterns(".unigrpo", "unigrpo", "lora", "bf16", "mlruns"))
    path = tmp_path / "project" / "params" / "scales" / "small.yaml"
    path.write_text(yaml.safe_dump(deep(yaml.safe_load(path.read_text()), {"sft": {"data": str(folder / "data.jsonl")}})))
    metrics = sft.run("small", root=tmp_path / "project")
    assert metrics["data/examples"] == 11
    assert metrics["data/heldout"] == 1
    assert metrics["drift/image_loss_after"] > 0


@pytest.mark.slow
def test_the_whole_graph_at_full_size(tmp_path):
    """Every stage at the scale's own size, with a tenth of its steps."""
    few = {"base": {"steps": 20}, "sft": {"steps": 10}, "train": {"num_steps": 2}, "autoencoder": {"training": {"steps": 60}},
           "evaluate": {"prompts": 16}}
    root = project(tmp_path, few)
    curate.run("small", root=root)
    base.run("small", root=root)
    sft.run("small", root=root)
    for run in ("unigrpo", "lora"):
        train.run("small", run=run, seed=0, root=root)
        assert any(name.startswith("bench/") for name in evaluate.run("small", checkpoint=f"{run}/0", root=root))
