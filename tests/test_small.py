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
from whole_graph import FEW as FEW_STEPS
from whole_graph import deep, project, released_graph, small_graph

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
    monkeypatch.setattr("unigrpo.stages.watch.get_reward", lambda name, options: lambda images, prompts, texts: [
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
    """Every stage at the scale's own size with few steps; `python tests/whole_graph.py` shows what each takes."""
    graph = small_graph(project(tmp_path, FEW_STEPS))
    results = graph.results
    assert 0 < results["base"]["autoencoder/rmse"] < 0.25
    for stage in ("base", "sft", "train unigrpo", "train lora"):
        assert all(np.isfinite(value) for value in results[stage].values()), stage
    assert results["train unigrpo"]["mismatch/text"] < 1e-4
    assert results["train unigrpo"]["cost/images"] == 2 * 32
    for name in ("base", "sft", "unigrpo/0", "lora/0"):
        assert 0 <= results[f"evaluate {name}"]["bench/shapes/exact"] <= 1
    assert graph.checkpoint("lora/0").joinpath("adapter", "adapter_model.safetensors").is_file()
    assert (tmp_path / "artifacts" / "small" / "report" / "report.html").stat().st_size > 10_000
    assert len(list((tmp_path / "images").glob("*.png"))) == 4


@pytest.mark.slow
def test_a_release_through_the_whole_graph(tmp_path):
    """BAGEL's layout at the scale's size: imported, trained, exported, imported, and the same pictures from the same seed."""
    root = project(tmp_path, FEW_STEPS)
    graph = released_graph(root)
    assert 0 <= graph.results["evaluate unigrpo/0"]["bench/shapes/exact"] <= 1
    ours, theirs = ({p.name: p.read_bytes() for p in (root / name).glob("*.png")} for name in
                    ("released-images", "again-images"))
    assert len(ours) == 4
    assert ours == theirs
    released, exported = (load_file(root / place / "ema.safetensors") for place in ("checkpoints/release", "exported"))
    assert released.keys() == exported.keys()
    frozen = [name for name in released if name.startswith(("vit_model", "connector"))]
    assert frozen
    assert all(torch.equal(released[name], exported[name]) for name in frozen)
    assert any(not torch.equal(released[name], exported[name]) for name in released)
