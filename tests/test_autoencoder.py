"""The autoencoder: names both ways, posterior, scale and shift, folders. Values against the official code: golden tests."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from unigrpo.models.autoencoder import FLUX, Autoencoder, module_names, to_diffusers, to_official

TINY = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny() -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(TINY)


def test_the_released_autoencoder_has_its_tensors_and_parameters():
    """FLUX.1's: 244 tensors, 83,819,683 numbers, each under a name of its own on both sides."""
    with torch.device("meta"):
        model = Autoencoder()
    theirs = model.vae.state_dict()
    official = to_official(theirs)
    assert len(official) == len(theirs) == 244
    assert sum(value.numel() for value in official.values()) == 83_819_683
    assert official["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert official["encoder.down.1.block.0.nin_shortcut.weight"].shape == (256, 128, 1, 1)
    assert official["decoder.up.0.block.2.conv1.weight"].shape == (128, 128, 3, 3)   # the finest level comes first
    assert official["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert model.downsample == 8
    back = to_diffusers(official)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in theirs.items()}


def test_names_are_one_to_one():
    for levels, blocks in ((1, 1), (2, 3), (4, 2)):
        names = module_names(levels, blocks)
        assert len(set(names.values())) == len(names)


def test_tensors_survive_both_ways(tiny):
    theirs = tiny.vae.state_dict()
    official = to_official(theirs)
    assert all(value.is_contiguous() for value in official.values())
    back = to_diffusers(official)
    assert list(back) == list(theirs)
    for name, value in theirs.items():
        assert back[name].shape == value.shape
        assert back[name].contiguous().view(torch.uint8).equal(value.contiguous().view(torch.uint8))


def test_building_from_official_tensors_needs_no_sizes(tiny):
    again = Autoencoder.from_official(to_official(tiny.vae.state_dict()), norm_num_groups=4)
    assert again.config == FLUX | TINY
    latents = draw(1, 4, 2, 2)
    assert torch.equal(again.decode(latents), tiny.decode(latents))


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("decoder.up.2.block.1.conv2.bias"), r"decoder\.up_blocks\.0\.resnets\.1\.conv2\.bias .*\(missing\)"),
    (lambda t: t.update({"encoder.quant_conv.weight": torch.zeros(1)}), r"not tensors of the .*: encoder\.quant_conv"),
    (lambda t: t.update({"decoder.conv_out.bias": torch.zeros(4)}), r"decoder\.conv_out\.bias must .*\(3,\), got \(4,\)"),
    (lambda t: t.clear(), "not an autoencoder's tensors"),
])
def test_tensors_that_do_not_fit_are_named(tiny, change, message):
    tensors = to_official(tiny.vae.state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        Autoencoder.from_official(tensors, norm_num_groups=4)


def test_posterior_mean_and_sample(tiny):
    """The mean without noise; with it mean + std * noise, scaled and shifted: s * (z - shift)."""
    pixels, noise = draw(2, 3, 16, 24).clamp(-1, 1), draw(2, 4, 4, 6, seed=1)
    moments = tiny.vae.encode(pixels).latent_dist.parameters
    mean, log_variance = moments.chunk(2, dim=1)
    assert torch.equal(tiny.encode(pixels), 0.3611 * (mean - 0.1159))
    sample = 0.3611 * (mean + (0.5 * log_variance).exp() * noise - 0.1159)
    torch.testing.assert_close(tiny.encode(pixels, noise=noise), sample)
    assert torch.equal(tiny.encode(pixels, noise=torch.zeros_like(noise)), tiny.encode(pixels))


def test_decoding_inverts_scale_and_shift(tiny):
    latents = draw(1, 4, 3, 2)
    expected = tiny.vae.decode(latents / 0.3611 + 0.1159).sample
    assert torch.equal(tiny.decode(latents), expected)
    assert expected.shape == (1, 3, 12, 8)


def test_a_batch_equals_its_images(tiny):
    pixels = draw(3, 3, 8, 8)
    together = tiny.encode(pixels)
    torch.testing.assert_close(together, torch.cat([tiny.encode(p[None]) for p in pixels]), atol=1e-5, rtol=1e-5)
    decoded = torch.cat([tiny.decode(z[None]) for z in together])
    torch.testing.assert_close(tiny.decode(together), decoded, atol=1e-5, rtol=1e-5)


def test_it_is_frozen_and_gives_float32():
    model = Autoencoder(TINY).to(torch.bfloat16)
    assert not any(p.requires_grad for p in model.parameters())
    latents = model.encode(draw(1, 3, 8, 8))
    assert latents.dtype == model.decode(latents).dtype == torch.float32


def test_folder_in_diffusers_format(tiny, tmp_path):
    from diffusers import AutoencoderKL

    tiny.save(tmp_path)
    ours, theirs = Autoencoder.from_folder(tmp_path), AutoencoderKL.from_pretrained(tmp_path)
    latents = draw(1, 4, 2, 2)
    assert torch.equal(ours.decode(latents), tiny.decode(latents))
    assert torch.equal(theirs.decode(latents / 0.3611 + 0.1159).sample, tiny.decode(latents))
    again = tmp_path / "again"
    ours.save(again)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_folder_that_does_not_fit_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        Autoencoder.from_folder(tmp_path)
    tiny.save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"use_quant_conv": True}))
    with pytest.raises(ValueError, match="use_quant_conv"):
        Autoencoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"latent_channels": 8}))
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight must have shape"):
        Autoencoder.from_folder(tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == tiny.vae.state_dict().keys()


def test_sides_and_settings_are_checked(tiny):
    with pytest.raises(ValueError, match="multiples of 4 pixels for this autoencoder, got 8x10"):
        tiny.encode(torch.zeros(1, 3, 8, 10))
    with pytest.raises(ValueError, match="unknown: \\['in_channels'\\]"):
        Autoencoder({"in_channels": 3})


def test_diffusers_loads_on_demand_and_needs_no_torchvision():
    """Scales that draw pixels never import it; its autoencoder works where torchvision cannot be imported."""
    code = f"""
import sys
import unigrpo.rollout
from unigrpo.models.autoencoder import Autoencoder
assert "diffusers" not in sys.modules
sys.modules["torchvision"] = None
Autoencoder({TINY!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
