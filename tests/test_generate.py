"""The pipeline and its command, on checkpoints made here: pixels without extras, and latents with a vision tower."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_config, small_policy

from unigrpo.checkpoint import save_checkpoint
from unigrpo.cli import main
from unigrpo.generate import UnifiedPipeline
from unigrpo.images import SizeRule, rgb, to_image, to_pixels
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.stages.loading import save_policy

PROMPTS = ["one red circle", "two blue squares"]
QUICK = {"num_inference_steps": 3, "max_thinking_tokens": 6, "think": True}
WORDS = ["plan", "first", "red", "circle", "make", "it", "blue", "what", "is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint: pixel patches, no autoencoder, no vision tower."""
    path = tmp_path_factory.mktemp("generate") / "checkpoint"
    policy = small_policy(small_config())
    save_policy(path, policy)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return UnifiedPipeline.from_pretrained(folder, system_prompt="plan first then draw")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A checkpoint with everything: latents of an autoencoder, and a vision tower."""
    path = tmp_path_factory.mktemp("reader") / "checkpoint"
    tokenizer = word_tokenizer(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MoTModel(MoTConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, latent_channels=4, latent_patch_size=2, latent_downsample=2, max_latent_size=8,
            image_size=(16, 16), vit_max_patches=8, vision={
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
                "image_size": 32})).eval()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        autoencoder = Autoencoder({"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1,
                                   "norm_num_groups": 4, "sample_size": 16})
    save_checkpoint(path, model, tokenizer)
    autoencoder.save(path / "autoencoder")
    return UnifiedPipeline.from_pretrained(path, system_prompt="plan first")


def arrays(images):
    return np.stack([np.asarray(i, dtype=np.int16) for i in images])


def picture(width=24, height=16):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------------ pipeline


def test_shape_of_a_call(pipe):
    out = pipe(PROMPTS, num_images_per_prompt=2, **QUICK)
    assert len(out.images) == len(out.thinking) == 4
    assert out.seeds == [0, 1, 0, 1]
    assert all(image.size == (32, 32) and image.mode == "RGB" for image in out.images)
    assert any(out.thinking)
    quiet = pipe(PROMPTS[0], num_inference_steps=2, think=False)
    assert quiet.thinking == [""]
    assert len(quiet.images) == 1


def test_one_image_whatever_the_batch(pipe):
    """Alone by its seed, in a batch, and in chunks of a budget: same thinking, same image up to a step of 8 bits."""
    together = pipe(PROMPTS, num_images_per_prompt=3, seed=5, temperature=1.0, **QUICK)
    chunks = pipe(PROMPTS, num_images_per_prompt=3, seed=5, temperature=1.0, token_budget=200, **QUICK)
    assert chunks.thinking == together.thinking
    assert chunks.seeds == together.seeds
    assert abs(arrays(chunks.images) - arrays(together.images)).max() <= 1
    alone = pipe(PROMPTS[1], seed=7, temperature=1.0, **QUICK)
    assert alone.thinking == together.thinking[5:]
    assert abs(arrays(alone.images)[0] - arrays(together.images)[5]).max() <= 1
    assert abs(arrays(together.images)[3] - arrays(together.images)[4]).max() > 20
    assert len(set(together.thinking)) > 2


def test_a_budget_is_kept_and_progress_is_told(pipe):
    seen = []
    pipe(PROMPTS, num_images_per_prompt=3, token_budget=130, progress=seen.append, **QUICK)
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == 6


def test_guidance_and_thinking_matter(pipe):
    base = arrays(pipe(PROMPTS[0], guidance_scale=1.0, **QUICK).images)
    for change in ({"guidance_scale": 4.0, "interval": (0.0, 1.0)},
                   {"guidance_scale": 4.0, "image_guidance_scale": 3.0, "interval": (0.0, 1.0)},
                   {"guidance_scale": 1.0, "think": False}):
        other = arrays(pipe(PROMPTS[0], **{**QUICK, **change}).images)
        assert abs(other - base).max() > 2
        base = other


def test_editing_sees_the_image_and_takes_its_size(reader):
    quick = {"num_inference_steps": 3, "max_thinking_tokens": 4}
    wide = reader("make it blue", picture(), **quick)
    assert wide.images[0].size == (24, 16)
    other = reader("make it blue", Image.new("RGB", (24, 16), "green"), **quick)
    assert abs(arrays(wide.images) - arrays(other.images)).max() > 2
    asked = reader("make it blue", picture(), height=16, width=16, think=False, num_inference_steps=2)
    assert asked.images[0].size == (16, 16)
    mixed = reader(["make it blue", "red"], [picture(), picture(16, 32)], num_images_per_prompt=2, **quick)
    assert [i.size for i in mixed.images] == [(24, 16)] * 2 + [(16, 32)] * 2
    assert abs(arrays(mixed.images[:1]) - arrays(wide.images)).max() <= 1


def test_understanding_depends_on_the_image(reader):
    answers = {reader.understand("what is it", picture(), max_tokens=12),
               reader.understand("what is it", Image.new("RGB", (32, 32), "red"), max_tokens=12),
               reader.understand("red", picture(), max_tokens=12)}
    assert len(answers) > 1
    assert all(set(a.split()) <= {*WORDS, "<|unknown|>"} for a in answers)


def test_errors_name_what_is_wrong(pipe, reader, folder):
    for arguments, message in (((["one red teapot"],), r"teapot.*vocabulary|vocabulary.*teapot"),
                               (([""],), "must not be empty"), (([],), "at least one")):
        with pytest.raises(ValueError, match=message):
            pipe(*arguments, **QUICK)
    with pytest.raises(ValueError, match=r"height must be a multiple of 8.*got 30; the nearest is 32"):
        pipe(PROMPTS, height=30, **QUICK)
    with pytest.raises(ValueError, match=r"from 8 to 32 pixels, got 64; the nearest is 32"):
        pipe(PROMPTS, width=64, **QUICK)
    with pytest.raises(ValueError, match="no vision section"):
        pipe(PROMPTS[0], picture(), **QUICK)
    with pytest.raises(ValueError, match="one for each of the 2"):
        reader(["red", "blue"], [picture()] * 3)
    with pytest.raises(ValueError, match="thinking needs the system prompt"):
        UnifiedPipeline.from_pretrained(folder)(PROMPTS[0])
    with pytest.raises(ValueError, match="must hold config"):
        UnifiedPipeline.from_pretrained(folder / "nowhere")


def test_latents_need_their_autoencoder(reader, tmp_path):
    save_checkpoint(tmp_path / "bare", reader.model, reader.policy.tokenizer)
    with pytest.raises(ValueError, match="holds no autoencoder/ folder"):
        UnifiedPipeline.from_pretrained(tmp_path / "bare")


# --------------------------------------------------------------------------------------------------------- image inputs


def test_sizes_of_image_inputs_by_hand():
    """BAGEL's two rules: longest at most, shortest at least, strides, and the area's bound that shrinks twice."""
    vae, vit = SizeRule(1024, 512, 16), SizeRule(980, 224, 14)
    assert vae.size(1024, 768) == (1024, 768)
    assert vae.size(2048, 1536) == (1024, 768)
    assert vae.size(256, 256) == (512, 512)
    assert vae.size(100, 50) == (1024, 512)
    assert vae.size(1000, 700) == (992, 704)                                     # 62.5 and 43.75 strides, half to even
    assert vae.size(4096, 512) == (1024, 128)             # 4096 x 512 is too much area, 3520 x 448 too long
    assert vit.size(1024, 1024) == (980, 980)
    assert vit.size(100, 100) == (224, 224)
    assert SizeRule(2000, 512, 16).size(1600, 1600) == (1136, 1136)       # 1600 * 0.7056 = 1129; its root would be 1344


def test_rules_follow_the_model():
    config = MoTConfig(vision={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                               "patch_size": 14, "image_size": 980})
    assert SizeRule.autoencoder(config) == SizeRule(1024, 512, 16)
    assert SizeRule.vision(config) == SizeRule(980, 224, 14)


def test_pixels_there_and_back():
    image = picture()
    pixels = to_pixels(image)
    assert pixels.shape == (3, 16, 24)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert abs(arrays([to_image(pixels.permute(1, 2, 0).numpy() * 0.5 + 0.5)]) - arrays([image])).max() <= 1
    glass = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(rgb(glass)).min() == 255
    assert rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


# -------------------------------------------------------------------------------------------------------------- command


def command(folder, output, *more):
    return ["generate", "--checkpoint", str(folder), "--output", str(output), "--steps", "2", "--device", "cpu", *more]


def test_command_writes_images_and_thinking_and_goes_on(folder, tmp_path, capsys):
    """Files of a run; a finished prompt is not drawn again, a missing one is, to the same bytes; other runs are refused."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[0]}\n\n" + json.dumps({"prompt": PROMPTS[1]}) + "\n")
    output = tmp_path / "out"
    arguments = command(folder, output, "--prompts", str(prompts), "--num-images", "2", "--think", "--batch", "2",
                        "--system-prompt", "plan first then draw", "--max-thinking-tokens", "5")
    assert main(arguments) == 0
    names = sorted(p.name for p in output.iterdir())
    assert names == ["00000-0.png", "00000-1.png", "00000.json", "00001-0.png", "00001-1.png", "00001.json", "generate.json"]
    record = json.loads((output / "00001.json").read_text())
    assert record["prompt"] == PROMPTS[1]
    assert [i["seed"] for i in record["images"]] == [0, 1]
    assert all("thinking" in i and Image.open(output / i["file"]).size == (32, 32) for i in record["images"])
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    untouched = (output / "00000-0.png").stat().st_mtime_ns
    (output / "00001.json").unlink()
    (output / "00001-0.png").unlink()
    assert main(arguments) == 0
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert (output / "00000-0.png").stat().st_mtime_ns == untouched
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--seed", "3"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main([*arguments, "--seed", "3", "--overwrite"]) == 0
    assert json.loads((output / "00000.json").read_text())["images"][0]["seed"] == 3


def test_command_edits_and_answers(reader, tmp_path, capsys):
    checkpoint, image = tmp_path / "checkpoint", tmp_path / "in.png"
    save_policy(checkpoint, reader.policy)
    picture().save(image)
    assert main(command(checkpoint, tmp_path / "edit", "--prompt", "make it blue", "--image", str(image))) == 0
    assert Image.open(tmp_path / "edit" / "00000-0.png").size == (24, 16)
    assert main(command(checkpoint, tmp_path / "answer", "--prompt", "what is it", "--image", str(image), "--understand",
                        "--max-thinking-tokens", "6")) == 0
    assert "answer" in json.loads((tmp_path / "answer" / "00000.json").read_text())


@pytest.mark.parametrize(("more", "message"), [
    (["--prompt", "one red teapot"], "teapot"), ([], "give a prompt"), (["--prompts", "nowhere.txt"], "must be a file"),
    (["--prompt", PROMPTS[0], "--image", "nowhere.png"], "readable image"),
    (["--prompt", PROMPTS[0], "--understand"], "give --image"), (["--prompt", PROMPTS[0], "--height", "30"], "nearest is 32"),
    (["--prompt", PROMPTS[0], "--think"], "system_prompt"), (["--prompt", PROMPTS[0], "--num-images", "0"], "at least 1")])
def test_command_errors(folder, tmp_path, capsys, more, message):
    assert main(command(folder, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


def test_command_never_writes_into_a_foreign_folder(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    for more in ([], ["--overwrite"]):
        assert main(command(folder, tmp_path, "--prompt", PROMPTS[0], *more)) == 2
        assert "did not write" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    assert main(command(tmp_path / "none", tmp_path / "out", "--prompt", PROMPTS[0])) == 2
    assert "must be a checkpoint folder" in capsys.readouterr().err
