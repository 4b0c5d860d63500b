"""The pipeline and its command, on checkpoints made here: pixels without extras, and latents with a vision tower."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from small import reading_policy, small_config, small_policy

from unigrpo.adapters import add_lora
from unigrpo.checkpoint import save_checkpoint
from unigrpo.cli import main
from unigrpo.contexts import build_contexts, take_rows
from unigrpo.generate import UnifiedPipeline
from unigrpo.images import SizeRule, rgb, to_image, to_pixels
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.mot import MoTConfig, patchify
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
    policy = reading_policy(WORDS, latent_channels=4, latent_patch_size=2, latent_downsample=2, image_size=(16, 16))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.autoencoder = Autoencoder({"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1,
                                          "norm_num_groups": 4, "sample_size": 16})
    save_policy(path, policy)
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


def test_an_edit_reads_the_mean_or_a_sample_keyed_by_seed(reader):
    """Samples differ from the mean and between seeds, and an image drawn alone reads the same sample as in a batch."""
    quick = {"num_inference_steps": 3, "think": False}
    mean = arrays(reader("make it blue", picture(), **quick).images)
    both = arrays(reader("make it blue", picture(), posterior="sample", num_images_per_prompt=2, seed=0, **quick).images)
    assert abs(both[0] - mean[0]).max() > 2
    alone = arrays(reader("make it blue", picture(), posterior="sample", seed=1, **quick).images)
    assert abs(both[1] - alone[0]).max() <= 1
    read = [reader._parts("make it blue", picture(), False, seed=seed)[0].latents for seed in (None, 0, 0, 1)]
    assert torch.equal(read[1], read[2])
    assert not torch.equal(read[1], read[3])
    assert torch.equal(read[0], reader._parts("make it blue", picture(), False)[0].latents)
    with pytest.raises(ValueError, match="unknown posterior 'mode'; choose one of mean, sample"):
        reader("red", picture(), posterior="mode", **quick)


def test_a_sample_of_the_posterior_has_its_mean_and_spread(reader):
    """Over many seeds, latents are the posterior's: mean and standard deviation as the encoder gives them, scaled."""
    image, vae = picture(), reader.policy.autoencoder
    with torch.no_grad():
        posterior = vae.vae.encode(to_pixels(image)[None]).latent_dist
        drawn = torch.stack([reader._parts("red", image, False, seed=seed)[0].latents[0] for seed in range(400)])
    scale = vae.config["scaling_factor"]
    std = patchify(scale * posterior.std, reader.model.config.latent_patch_size)[0]
    mean = patchify(scale * (posterior.mean - vae.config["shift_factor"]), reader.model.config.latent_patch_size)[0]
    assert ((drawn.mean(0) - mean) / std * 20).abs().max() < 5                                 # 5 standard errors
    torch.testing.assert_close(drawn.std(0) / std, torch.ones_like(std), atol=0.2, rtol=0)


def test_a_budget_bounds_all_that_is_cached(reader, monkeypatch):
    """Contexts as they were read and every image's copy of them, with guidance by text and image, thinking and room."""
    cached = []

    def read(*args, **kwargs):
        contexts = build_contexts(*args, **kwargs)
        cached.append([contexts.columns() * len(contexts.conditional.mask)])
        return contexts

    def copied(*args, **kwargs):
        context = take_rows(*args, **kwargs)
        cached[-1].append(context.mask.numel())
        return context

    monkeypatch.setattr("unigrpo.generate.build_contexts", read)
    monkeypatch.setattr("unigrpo.generate.take_rows", copied)
    quick = {"num_inference_steps": 1, "max_thinking_tokens": 4, "num_images_per_prompt": 3}
    for posterior in ("mean", "sample"):
        cached.clear()
        reader(["make it blue", "red"], picture(), token_budget=900, posterior=posterior, **quick)
        sums = [sum(chunk) for chunk in cached]
        assert len(sums) > 1
        assert 450 < max(sums) <= 900, sums
    cached.clear()
    reader("red", picture(), token_budget=1, **quick)
    assert len(cached) == 3                                                                    # never less than one image


def test_the_official_prompts_are_read_for_drawing_and_for_answering(reader, tmp_path):
    file = tmp_path / "inferencer.py"
    file.write_text("GEN_THINK_SYSTEM_PROMPT = 'plan first'\nVLM_THINK_SYSTEM_PROMPT = 'first plan'\n")
    assert UnifiedPipeline(reader.policy, system_prompt=f"@{file}").system_prompt == "plan first"
    asked = [reader.understand("what is it", picture(), system_prompt=prompt, max_tokens=12)
             for prompt in (f"@{file}", "first plan")]
    assert asked[0] == asked[1]


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
    with pytest.raises(ValueError, match="must be a folder, and there is none at"):
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
    assert main(command(checkpoint, tmp_path / "sampled", "--prompt", "make it blue", "--image", str(image), "--posterior",
                        "sample")) == 0
    assert (tmp_path / "sampled" / "00000-0.png").read_bytes() != (tmp_path / "edit" / "00000-0.png").read_bytes()


def test_a_batch_bounds_the_images_at_a_time(folder, tmp_path, monkeypatch):
    """Five images of one prompt two at a time are the five of one call, and the prompt is finished with the last."""
    sizes, call = [], UnifiedPipeline.__call__

    def spied(self, prompt, *args, **kwargs):
        sizes.append(len(prompt) * kwargs["num_images_per_prompt"])
        return call(self, prompt, *args, **kwargs)

    monkeypatch.setattr(UnifiedPipeline, "__call__", spied)
    more = ["--prompt", PROMPTS[0], "--num-images", "5", "--seed", "3"]
    assert main(command(folder, tmp_path / "few", *more, "--batch", "2")) == 0
    assert sizes == [2, 2, 1]
    assert main(command(folder, tmp_path / "all", *more, "--batch", "5")) == 0
    records = [json.loads((tmp_path / name / "00000.json").read_text())["images"] for name in ("few", "all")]
    assert records[0] == records[1]
    assert [image["seed"] for image in records[0]] == [3, 4, 5, 6, 7]
    for image in records[0]:
        few, whole = (arrays([Image.open(tmp_path / name / image["file"])]) for name in ("few", "all"))
        assert abs(few - whole).max() <= 1


def test_another_adapter_is_another_run(tmp_path, capsys):
    """The weights beside an adapter keep their bytes: the run is known by every file of the checkpoint."""
    policy = small_policy(small_config())
    add_lora(policy.model, rank=2, alpha=2, targets=("mlp",), experts=("generation",))
    save_policy(tmp_path / "checkpoint", policy)
    arguments = command(tmp_path / "checkpoint", tmp_path / "out", "--prompt", PROMPTS[0])
    assert main(arguments) == 0
    path = tmp_path / "checkpoint" / "adapter" / "adapter_model.safetensors"
    os.utime(path, ns=(1, 1))
    assert main(arguments) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_run_killed_before_its_first_file_is_begun_again(folder, tmp_path):
    (tmp_path / "generate.partial").write_text("{")
    assert main(command(folder, tmp_path, "--prompt", PROMPTS[0])) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000-0.png", "00000.json", "generate.json"]


@pytest.mark.parametrize(("more", "message"), [
    (["--prompt", "one red teapot"], "teapot"), ([], "give a prompt"), (["--prompts", "nowhere.txt"], "must be a file"),
    (["--prompt", PROMPTS[0], "--image", "nowhere.png"], "readable image"),
    (["--prompt", PROMPTS[0], "--understand"], "give --image"), (["--prompt", PROMPTS[0], "--height", "30"], "nearest is 32"),
    (["--prompt", PROMPTS[0], "--think"], "system_prompt"),
    (["--prompt", PROMPTS[0], "--system-prompt", "plan"], "no effect without --think"),
    (["--prompt", PROMPTS[0], "--num-images", "0"], "at least 1")])
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
