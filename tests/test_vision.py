"""The vision tower: sizes in one batch, refusals, and what a model without it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unigrpo.models.mot import MoTConfig, MoTModel

PATCH, SIDE = 4, 6
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH,
          "image_size": PATCH * SIDE}


def seeing_model(dtype: torch.dtype = torch.float32, **changes) -> MoTModel:
    """A random model whose tower is far from linear, so that attention across images would show."""
    config = MoTConfig(**({"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "num_key_value_heads": 1, "max_latent_size": 4, "latent_channels": 2,
                           "vit_max_patches": SIDE, "vision": VISION, "initializer_range": 0.4} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MoTModel(config).to(dtype).eval()


def images(*grids: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(3, rows * PATCH, columns * PATCH, generator=rng) * 2 - 1 for rows, columns in grids]


MODEL = seeing_model()
grids = st.lists(st.tuples(st.integers(1, SIDE), st.integers(1, SIDE)), min_size=1, max_size=4)


@given(grids, st.integers(0, 99))
@torch.no_grad()
def test_images_of_any_sizes_in_one_batch_equal_one_at_a_time(sizes, seed):
    inputs = images(*sizes, seed=seed)
    together = MODEL.embed_image(inputs)
    for image, (rows, columns), embedded in zip(inputs, sizes, together, strict=True):
        assert embedded.shape == (rows * columns, MODEL.config.hidden_size)
        torch.testing.assert_close(embedded, MODEL.embed_image([image])[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_does_not_see_another():
    """Bit for bit: padding and neighbours have no weight at all."""
    first, second, third = images((2, 3), (5, 4), (5, 4))
    assert torch.equal(MODEL.embed_image([first, second])[0], MODEL.embed_image([first, third])[0])
    assert not torch.equal(MODEL.embed_image([first, second])[1], MODEL.embed_image([first, third])[1])


@torch.no_grad()
def test_every_patch_sees_every_patch_of_its_image():
    image = images((3, 4))[0]
    changed = image.clone()
    changed[:, -1, -1] += 1
    moved = MODEL.vit_model([image], side=SIDE)[0][0] - MODEL.vit_model([changed], side=SIDE)[0][0]
    assert (moved.abs().amax(dim=-1) > 1e-6).all()


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_images():
    model, inputs = seeing_model(), images((2, 3), (4, 4))
    def gradients(*batches):
        model.zero_grad()
        for batch in batches:
            torch.cat(model.embed_image(batch)).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    together, apart = gradients(inputs), gradients(inputs[:1], inputs[1:])
    assert together.keys() == apart.keys() == {n for n, p in model.named_parameters()
                                               if n.startswith(("vit_model.", "connector."))}
    for name, value in together.items():
        torch.testing.assert_close(value, apart[name], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_weights():
    """Pixels come in float32 and go through in the weights' dtype."""
    model = seeing_model(torch.bfloat16)
    inputs = images((2, 3), (4, 4))
    for ours, exact in zip(model.embed_image(inputs), MODEL.embed_image(inputs), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(("shape", "message"), [
    ((3, 8, 7 * PATCH), "sides from 1 to model.vit_max_patches=6, got 2x7"),
    ((3, 7 * PATCH, 8), "sides from 1 to model.vit_max_patches=6, got 7x2"),
    ((3, 0, 8), "got 0x2"),
    ((3, 8, 9), "multiples of model.vision.patch_size=4"),
    ((1, 8, 8), r"must be \(3, H, W\)"),
    ((2, 3, 8, 8), r"must be \(3, H, W\)"),
])
def test_an_image_that_does_not_fit_is_refused(shape, message):
    """A grid wider than the table would silently read the next row's positions."""
    with pytest.raises(ValueError, match=message):
        MODEL.embed_image([torch.zeros(shape)])


def test_a_learned_table_smaller_than_the_frozen_one_is_respected():
    model = seeing_model(vit_max_patches=SIDE + 1)
    assert len(model.embed_image(images((2, 3)))[0]) == 6
    with pytest.raises(ValueError, match="learned position table of 36 patches"):
        model.embed_image(images((6, 6)))


def test_no_images_are_no_embeddings():
    assert MODEL.embed_image([]) == []


def test_a_model_without_vision_has_no_trace_of_it():
    model = seeing_model(vision=None)
    assert not any(name.startswith(("vit_", "connector.")) for name in model.state_dict())
    assert "vision" not in model.config.to_dict()
    with pytest.raises(ValueError, match="reads no images"):
        model.embed_image(images((2, 2)))


@pytest.mark.parametrize("vision", [{k: v for k, v in VISION.items() if k != "patch_size"}, VISION | {"rope": False}])
def test_settings_of_the_tower_are_checked(vision):
    with pytest.raises(ValueError, match=r"model\.vision must have the keys"):
        MoTConfig(vision=vision)


def test_config_survives_its_own_dictionary():
    """What is saved in config.json builds the same model again."""
    saved = {k: v for k, v in MODEL.config.to_dict().items() if k in ("vision", "vit_max_patches")}
    again = MoTConfig(**saved)
    assert (again.vision, again.vit_max_patches) == (MODEL.config.vision, SIDE)
    assert again.vision["layer_norm_eps"] == 1e-6
