"""The roofline against counts of the released model (by hand, and by the official classes on the meta device)."""

from __future__ import annotations

import pytest
from small import ROOT

from unigrpo.config import load_config
from unigrpo.flow.guidance import model_calls
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.mot import MoTConfig
from unigrpo.roofline import (
    GPUS,
    Loads,
    Work,
    attention_flops,
    autoencoder_flops,
    cache_bytes,
    decode_step,
    drawn_sets,
    evaluation_work,
    expert_weights,
    image_forward,
    packed_forward,
    passes,
    rollout_phases,
    training_phases,
)

BAGEL = MoTConfig()
TERA = 1e12


def test_weights_and_caches():
    assert expert_weights(BAGEL) == 6_525_288_448
    assert cache_bytes(BAGEL) == 57_344
    assert 4096 * cache_bytes(BAGEL) == pytest.approx(235e6, rel=0.01)  # a 1024-pixel image block


def test_decoding_a_token():
    """14.14 GFLOP and 0.000401 GFLOP a context token; 14.14 GB of weights; the floor at the full bandwidth."""
    work = decode_step(BAGEL, 0)
    assert work.flops == pytest.approx(14.14e9, rel=1e-3)
    assert decode_step(BAGEL, 1000).flops - work.flops == pytest.approx(1000 * 0.000401e9, rel=2e-3)
    assert work.bytes == pytest.approx(14.14e9, rel=1e-3)
    floors = {"h200": 2.9e-3, "h100": 4.2e-3, "a100-80": 6.9e-3}
    for name, floor in floors.items():
        assert work.seconds(GPUS[name], compute=1, bandwidth=1) == pytest.approx(floor, rel=0.02)
    assert decode_step(BAGEL, 100, rows=64).bytes < 1.1 * work.bytes  # the weights are read once for all rows


@pytest.mark.parametrize(("grid", "tera"), [((32, 32), 13.9), ((64, 64), 60.4)])
def test_an_image_forward(grid, tera):
    """512 and 1024 pixels against 100 tokens of context; 26.1 GB of weights, understanding's too."""
    work = image_forward(BAGEL, 100, grid=grid)
    assert work.flops == pytest.approx(tera * TERA, rel=0.01)
    assert work.bytes == pytest.approx(26.1e9, rel=0.01)
    seconds = work.seconds(GPUS["h200"], compute=1, bandwidth=1)
    assert seconds == pytest.approx({13.9: 14.0e-3, 60.4: 61.1e-3}[tera], rel=0.01)


def test_editing_context():
    """75.2 TFLOP with the image's own latents and view in the cache."""
    assert image_forward(BAGEL, 4098 + 4902).flops == pytest.approx(75.2 * TERA, rel=0.01)


def test_guided_images():
    """49 calls, 41 of them guided: 90 forwards, 1.25 and 5.43 PFLOP."""
    calls = model_calls(sigma_schedule(49, 3.0), (0.4, 1.0))
    assert calls == 90
    assert calls * image_forward(BAGEL, 100, grid=(32, 32)).flops == pytest.approx(1.25e15, rel=0.01)
    assert calls * image_forward(BAGEL, 100).flops == pytest.approx(5.43e15, rel=0.01)


def test_training():
    """39.2 GFLOP a token, attention apart: six per weight of an expert set."""
    text = 1000
    work = packed_forward(BAGEL, text, 0, 0) * passes(checkpointing=False, adapters=False)
    attention = 3 * attention_flops(BAGEL, text, text / 2)
    assert (work.flops - attention) / text == pytest.approx(39.2e9, rel=0.002)
    assert passes(checkpointing=True, adapters=False) == 4
    assert passes(checkpointing=True, adapters=True) == 3


def test_autoencoder_is_counted():
    """2.5 / 1.1 TFLOP to decode / encode 512 pixels, 10.5 / 4.9 at 1024."""
    settings = (("latent_channels", 16), ("block_out_channels", (128, 256, 512, 512)), ("layers_per_block", 2),
                ("norm_num_groups", 32))
    for size, wanted in ((512, (1.1, 2.5)), (1024, (4.9, 10.5))):
        encode, decode = autoencoder_flops(settings, (size, size))
        assert encode == pytest.approx(wanted[0] * TERA, rel=0.05)
        assert decode == pytest.approx(wanted[1] * TERA, rel=0.05)


def test_work_is_bound_by_the_slower_side():
    gpu = GPUS["h100"]
    assert Work(989e12, 0).seconds(gpu, compute=0.5) == pytest.approx(2.0)
    assert Work(0, 3.35e12).seconds(gpu, bandwidth=0.5) == pytest.approx(2.0)
    assert Work(989e12, 3.35e12).seconds(gpu, compute=1, bandwidth=0.5) == pytest.approx(2.0)
    assert (Work(1, 2) + Work(3, 4) * 2) == Work(7, 10)


def test_phases_of_a_step_by_hand():
    """32 rollouts a GPU, 8 side by side: 4 turns of 100 tokens and 25 calls, then 32 micro-batches of one."""
    config = load_config("bagel_7b", run="unigrpo", root=ROOT)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"benchmarks": ("shapes",)})})
    loads = Loads(prompt=64, thinking=100, rows=32, batch=8)
    phases = rollout_phases(config, BAGEL, loads)
    assert phases["thinking"] == (decode_step(BAGEL, 114, 8), 400)
    assert phases["denoising"] == (image_forward(BAGEL, 166, 8), 100)
    assert phases["decoding images"][1] == 32
    updates = training_phases(config, BAGEL, loads)
    assert updates["updates"][0].flops == 4 * updates["old log-probs"][0].flops
    assert updates["updates"][1] == updates["reference"][1] == 32
    evaluation = evaluation_work(config, BAGEL, loads)  # 32 side by side (evaluate.batch), whatever the rollouts take
    assert evaluation["denoising"] == (image_forward(BAGEL, 166, 32), 70 * (5 * 49 + 3 * 90))
    assert evaluation["thinking"][1] == (70 + 18) * 100  # 2212 images, and one greedy thinking for each of 553 prompts


def test_an_evaluation_on_the_official_sets_by_hand():
    """GenEval: 553 prompts x 4 images in 70 turns of 32; T2I-CompBench: 8 x 300 prompts x 10 images in 750; two cells each."""
    config = load_config("bagel_7b", root=ROOT)
    assert {name: drawn.total for name, drawn in drawn_sets(config).items()} == {"geneval": 4424, "t2i_compbench": 48_000}
    phases = evaluation_work(config, BAGEL, Loads(prompt=64, thinking=100, rows=32, batch=8))
    assert phases["geneval, denoising"] == (image_forward(BAGEL, 166, 32), 70 * (49 + 90))
    assert phases["t2i_compbench, denoising"] == (image_forward(BAGEL, 166, 32), 750 * (49 + 90))
    assert phases["t2i_compbench, thinking"][1] == 750 * 100
    assert phases["geneval, decoding images"][1] == 4424
    limited = config.evaluate.geneval.model_copy(update={"limit": 10, "allow_partial": True})
    few = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"geneval": limited})})
    assert drawn_sets(few)["geneval"].prompts == 60
