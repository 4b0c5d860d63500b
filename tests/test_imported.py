"""The base stage with a released checkpoint, and supervised examples from a folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from small import ROOT, small_config, small_policy

from unigrpo.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from unigrpo.config import load_config
from unigrpo.models.autoencoder import FLUX
from unigrpo.models.mot import MoTConfig
from unigrpo.prompts.examples import ImageExample, load_image, read_examples
from unigrpo.seeding import generator
from unigrpo.sft import supervised_optimizers
from unigrpo.stages import base
from unigrpo.stages.imported import autoencoder_differences, model_differences
from unigrpo.stages.loading import compute_device
from unigrpo.stages.sft import folder_batch, heldout_example_loss, split_examples


def scale(root, **sections):
    """The params of this project below `root`, with sections of smoke changed."""
    shutil.copytree(ROOT / "params", root / "params", dirs_exist_ok=True)
    path = root / "params" / "scales" / "smoke.yaml"
    content = yaml.safe_load(path.read_text())
    for name, change in sections.items():
        content[name] = {**(content[name] or {}), **change}
    path.write_text(yaml.safe_dump(content))


@pytest.fixture
def released(tmp_path):
    """A checkpoint of smoke's shape that somebody else made, its image size another."""
    policy = small_policy(small_config())
    save_checkpoint(tmp_path / "released", policy.model, policy.tokenizer)
    path = tmp_path / "released" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": [16, 16]}))
    scale(tmp_path, base={"source": "imported", "checkpoint": "released"})
    return tmp_path, policy


def test_a_released_checkpoint_becomes_the_base(released):
    """Same weights; what a run chooses comes from params; the source keeps its own config."""
    root, policy = released
    metrics = base.run("smoke", root=root)
    folder = root / "artifacts" / "smoke" / "base" / "checkpoint"
    model, tokenizer = load_checkpoint(folder)
    assert weights_digest(dict(model.state_dict())) == weights_digest(dict(policy.model.state_dict()))
    assert tokenizer("red circle")["input_ids"] == policy.tokenizer("red circle")["input_ids"]
    assert model.config.image_size == (32, 32)
    assert json.loads((root / "released" / "config.json").read_text())["image_size"] == [16, 16]
    assert metrics["model/bytes"] > (folder / "model.safetensors").stat().st_size
    assert (root / "artifacts" / "smoke" / "base" / "curves.csv").read_text().startswith("step,")
    base.run("smoke", root=root)  # again over what is there


def test_another_model_than_params_describe_is_refused(released):
    root, _ = released
    scale(root, base={"source": "imported", "checkpoint": "released"}, model={"hidden_size": 64, "rope_theta": 5.0})
    with pytest.raises(ValueError, match=r"(?s)another model than .*smoke\.yaml.*model\.hidden_size is 64 in params and 32"
                                         r".*model\.rope_theta is 5\.0"):
        base.run("smoke", root=root)


def test_the_7b_s_params_are_the_released_configs():
    """What import-bagel makes of the released config files is what params/scales/bagel_7b.yaml describes."""
    from unigrpo.models.official import released_configs, settings

    config = load_config("bagel_7b", root=ROOT)
    given = settings(*released_configs(MoTConfig(vocab_size=152_064, **config.model.model_dump()), "bfloat16"))
    assert not model_differences(json.loads(json.dumps(given.to_dict(), default=str)), config)
    flux = {**FLUX, "block_out_channels": list(FLUX["block_out_channels"])}
    assert not autoencoder_differences(flux, config)
    assert autoencoder_differences({**flux, "shift_factor": 0.0}, config) == [
        "autoencoder.shift_factor is 0.1159 in params and 0.0 in autoencoder/config.json"]


def test_a_missing_checkpoint_names_the_command(released):
    root, _ = released
    shutil.rmtree(root / "released")
    (root / "released").mkdir()
    with pytest.raises(ValueError, match=r"base\.checkpoint must be a folder that `unigrpo import-bagel` wrote"):
        base.run("smoke", root=root)


def test_an_autoencoder_too_many_is_refused(released):
    root, _ = released
    (root / "released" / "autoencoder").mkdir()
    (root / "released" / "autoencoder" / "config.json").write_text("{\"latent_channels\": 16}")
    with pytest.raises(ValueError, match=r"autoencoder is null in params and the checkpoint has an autoencoder/"):
        base.run("smoke", root=root)


@pytest.mark.parametrize(("sections", "message"), [
    ({"base": {"source": "imported"}}, r"source=imported needs checkpoint, got checkpoint=None"),
    ({"base": {"checkpoint": "there"}}, r"source=scratch takes no checkpoint, got checkpoint='there'"),
    ({"lora": {"dropout": 0.1}}, r"lora: dropout must be 0, got 0\.1: RL replays"),
    ({"train": {"precision": "bf16"}, "optim": {"master_weights": "bf16"}},
     r"optim\.master_weights must be fp32 with train\.precision=bf16, got bf16.*understanding_lr=0\.0001"),
    ({"model": {"latent_channels": 4}}, r"without an autoencoder .*latent_channels must be 3 .*got 4 and 1"),
    ({"model": {"image_size": [24, 24]}}, r"image_size=\(24, 24\) needs base\.source imported and sft\.data"),
])
def test_rules_across_sections(tmp_path, sections, message):
    scale(tmp_path, **sections)
    with pytest.raises(ValueError, match=message):
        load_config("smoke", root=tmp_path)


VAE = {"latent_channels": 4, "block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "posterior": "mean",
       "scaling_factor": None, "shift_factor": None,
       "training": {"seed": 0, "steps": 1, "images_per_step": 1, "lr": 1.0e-3, "kl_weight": 0.0}}
LATENTS = {"latent_channels": 4, "latent_downsample": 4, "latent_patch_size": 2}


@pytest.mark.parametrize(("change", "model", "message"), [
    ({}, {"latent_channels": 8}, r"autoencoder\.latent_channels=4 must equal model\.latent_channels=8"),
    ({}, {"latent_downsample": 2, "max_latent_size": 8}, r"has 3 levels, which downsample by 4; model\.latent_downsample is 2"),
    ({"norm_num_groups": 3}, {}, r"block_out_channels must be multiples of norm_num_groups=3, got \[8, 8, 8\]"),
    ({"training": None}, {}, r"scaling_factor must be null where .* got None with training null"),
    ({"training": None, "scaling_factor": 1.0, "shift_factor": 0.0}, {}, r"autoencoder\.training must be set with"),
])
def test_rules_of_the_autoencoder(tmp_path, change, model, message):
    scale(tmp_path, autoencoder=VAE, model=LATENTS)
    load_config("smoke", root=tmp_path)
    scale(tmp_path, autoencoder=VAE | change, model=LATENTS | model)
    with pytest.raises(ValueError, match=message):
        load_config("smoke", root=tmp_path)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compute_device("auto").type == compute_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"compute\.device=cuda.*no GPU"):
        compute_device("cuda")


def test_one_optimizer_for_fine_tuning():
    config = small_config(base={"optimizer": "adamw", "adam_lr": 1e-5})
    policy = small_policy(config)
    optimizers = supervised_optimizers(policy.model, config.base)
    assert [type(o).__name__ for o in optimizers] == ["AdamW"]
    assert sum(len(g["params"]) for g in optimizers[0].param_groups) == sum(p.requires_grad for p in policy.model.parameters())


# -- examples --------------------------------------------------------------------------------------------------------


def write(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def picture(folder, name, size, value=0):
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(folder / name)


def test_bad_rows_are_named(tmp_path):
    picture(tmp_path, "a.png", (8, 8))
    good = {"prompt": "red circle", "image": "a.png"}
    path = write(tmp_path, [good, "{", [1], good | {"caption": "x"}, good | {"prompt": " "}, good | {"image": "b.png"},
                            good | {"thinking": 3}, ""])
    with pytest.raises(ValueError, match=r"(?s)has 6 bad rows:.*row 2 is not JSON.*row 3: wanted an object.*row 4: "
                                         r"unknown keys \['caption'\].*row 5: prompt.*row 6: image b\.png.*row 7: thinking"):
        read_examples(path)
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(write(tmp_path, [""]))
    with pytest.raises(ValueError, match=r"none\.jsonl is missing"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "c.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"c\.png must be a picture"):
        load_image(tmp_path / "c.png", (8, 8))


def test_pictures_are_cut_round_the_middle(tmp_path):
    """A wide picture, left third black, middle grey, right third white: of a square only the grey is left."""
    wide = np.concatenate([np.zeros((30, 30, 3)), np.full((30, 30, 3), 100), np.full((30, 30, 3), 255)], axis=1)
    Image.fromarray(wide.astype(np.uint8)).save(tmp_path / "wide.png")
    out = load_image(tmp_path / "wide.png", (16, 16))
    assert out.shape == (16, 16, 3)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, 100 / 255, atol=0.05)
    picture(tmp_path, "same.png", (16, 16), 51)
    np.testing.assert_array_equal(load_image(tmp_path / "same.png", (16, 16)), np.full((16, 16, 3), np.float32(0.2)))


def test_examples_become_batches(tmp_path):
    """Thinking is predicted where there is one; the held-out examples are never trained on; steps are keyed."""
    config = small_config(sft={"texts_per_step": 6, "direct_share": 0.0, "condition_dropout": 0.0})
    policy = small_policy(config)
    examples = []
    for i in range(20):
        picture(tmp_path, f"{i}.png", (32, 32), 10 * i)
        examples.append(ImageExample("red circle", "draw a red circle top ." if i % 2 else "", tmp_path / f"{i}.png"))
    train, held = split_examples(examples, config)
    assert (len(train), len(held)) == (18, 2)
    assert not {e.image for e in train} & {e.image for e in held}
    assert split_examples(examples, config)[1] == held
    first, again, other = (folder_batch(policy, train, config, step) for step in (0, 0, 1))
    assert first.clean.shape == (6, 16, 192)
    assert (first.tokens == again.tokens).all()
    assert (first.noise == again.noise).all()
    assert not (first.noise == other.noise).all()
    thinking = [bool(e.thinking) for e in train]
    seen = [folder_batch(policy, train, config, step).targets.any(dim=1) for step in range(3)]  # an epoch
    assert sum(int(s.sum()) for s in seen) == sum(thinking)
    assert heldout_example_loss(policy, config, examples=held) == heldout_example_loss(policy, config, examples=held)
    with pytest.raises(ValueError, match="at least 2 examples"):
        split_examples(examples[:1], config)


def test_latents_of_a_posterior_are_its_mean_or_drawn_by_key(tmp_path):
    """`posterior: sample` draws its noise from the batch's generator, so that a step is the same again."""
    from unigrpo.models.autoencoder import Autoencoder
    from unigrpo.sft import encode_images

    vae = Autoencoder({**{k: VAE[k] for k in ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")},
                       "sample_size": 32})
    import torch

    pixels = torch.from_numpy(generator(0, "pixels").random((2, 3, 32, 32), dtype=np.float32)) * 2 - 1
    mean = encode_images(vae, pixels, None)
    first, again, other = (encode_images(vae, pixels, generator(0, "x", i)) for i in (1, 1, 2))
    assert mean.shape == (2, 4, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, mean)
