"""The model as a module: activation checkpointing, devices and dtypes, attention on an accelerator."""

from __future__ import annotations

import pytest
import torch
from test_packing import EDIT, PROMPTED, SPECIAL
from test_vision import images, seeing_model

from unigrpo.models.bagel import causal_mask, concatenate_rows, packed_mask
from unigrpo.models.layers import attend_grouped
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.models.packing import pack, packed_losses


def test_the_defaults_are_the_released_model():
    """BAGEL-7B-MoT: 1,223 tensors and 14,607,260,128 numbers, as its checkpoint holds."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 980}
    with torch.device("meta"):
        state = MoTModel(MoTConfig(vision=vision)).state_dict()
    assert len(state) == 1223
    assert sum(value.numel() for value in state.values()) == 14_607_260_128
    assert state["vit_model.vision_model.embeddings.patch_embedding.weight"].shape == (1152, 588)
    assert state["vit_model.vision_model.encoder.layers.25.mlp.fc1.weight"].shape == (4304, 1152)
    assert state["vit_pos_embed.pos_embed"].shape == (4900, 3584)
    assert state["connector.fc1.weight"].shape == (3584, 1152)
    assert state["latent_pos_embed.pos_embed"].shape == (4096, 3584)


def gradients(model: MoTModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    words, image = packed_losses(model, pack([PROMPTED, EDIT], SPECIAL, model.config))
    (words.mean() + image.mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_runs(model: MoTModel) -> list[str]:
    """Names of the layers whose attention runs, in order."""
    runs: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    return runs


def test_checkpointing_changes_no_gradient():
    """Every layer of the decoder and of the tower runs twice in training, once otherwise, and no bit of a gradient moves."""
    model = seeing_model().train()
    plain = gradients(model)
    runs = count_runs(model)
    gradients(model)
    layers = len(runs)
    assert layers == model.config.num_hidden_layers + model.config.vision["num_hidden_layers"]
    model.activation_checkpointing_enable()
    runs.clear()
    recomputed = gradients(model)
    assert len(runs) == 2 * layers
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    runs.clear()
    gradients(model.eval())
    assert len(runs) == layers


def test_checkpointing_with_a_cached_context():
    """Layers write their cache a second time when recomputed: the same values, so gradients stay the same."""
    model = seeing_model().train()
    tokens, lengths = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]), torch.tensor([4, 3])

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        context = model.empty_context(2, 5)
        with torch.no_grad():
            model(model.embed_text(tokens), torch.arange(4).expand(2, 4), causal_mask(lengths, 4), context=context)
        context.mask[:, :4], context.used = torch.arange(4) < lengths[:, None], 4
        context.mask[:, 4] = True
        hidden, _ = model(model.embed_text(torch.tensor([[8], [9]])), lengths[:, None], context.mask[:, None, None],
                          context=context)
        model.logits(hidden).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = run()
    model.activation_checkpointing_enable()
    recomputed = run()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def everything(model: MoTModel, device: str) -> list[torch.Tensor]:
    """Each public computation of the model once, on small tensors of a device; pixels and noise levels come from the CPU."""
    tokens, lengths = torch.ones(2, 3, dtype=torch.int64, device=device), torch.tensor([3, 2], device=device)
    columns, _ = concatenate_rows(tokens, lengths, tokens, lengths, pad=0) if device != "meta" else (tokens, lengths)
    levels, latents = torch.tensor([0.2, 0.9]), torch.zeros(2, 2, 4, model.config.token_channels, device=device)
    gen = model.embed_latents(latents, levels, grid=(2, 2)).flatten(1, 2)
    und = model.embed_text(torch.cat([tokens, tokens.new_ones(2, 4)], dim=1))
    positions = torch.zeros(2, 15, dtype=torch.int64, device=device)
    hidden, out = model(und, positions[:, :7], packed_mask(lengths, 3, 2, 4), gen, positions[:, 7:])
    context = model.empty_context(2, 3)
    model(model.embed_text(tokens), positions[:, :3], causal_mask(lengths, 3), context=context)
    placed = model.embed_placed_latents(latents[:, 0], torch.zeros(2, 4, device=device), positions[:, :4])
    return [columns, hidden, model.logits(hidden), model.velocity(out.unflatten(1, (2, 4)), latents, levels), placed,
            context.keys[0], context.repeat(2, room=1).values[0], *model.embed_image(images((2, 3), (1, 2)))]


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_tensor_is_made_on_another_device(dtype, prediction):
    """The meta device refuses to compute with tensors of the CPU, as a GPU does."""
    results = everything(seeing_model(dtype, prediction=prediction).to("meta"), "meta")
    assert all(value.device.type == "meta" for value in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_on_a_gpu_as_on_a_cpu():
    model = seeing_model()
    expected = everything(model, "cpu")
    for ours, wanted in zip(everything(model.to("cuda"), "cuda"), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_bfloat16_weights_give_float32_results():
    """The cache and the states are in the weights' dtype; logits and velocities, which log-probs come from, in float32."""
    _, hidden, logits, velocity, placed, keys, _, *images = everything(seeing_model(torch.bfloat16), "cpu")
    assert {x.dtype for x in (hidden, placed, keys, *images)} == {torch.bfloat16}
    assert logits.dtype == velocity.dtype == torch.float32


@torch.no_grad()
def test_rotary_angles_of_far_positions_are_exact_in_bfloat16():
    """Angles of position 1000 in bfloat16 would be off by radians; only their cosine is rounded."""
    model, positions = seeing_model(torch.bfloat16), torch.tensor([[1001]])
    exact = [x.to(torch.bfloat16) for x in model.rotary(positions, torch.float32)]
    assert all(torch.equal(a, b) for a, b in zip(model.rotary(positions, torch.bfloat16), exact, strict=True))


@torch.no_grad()
def test_norms_are_computed_in_float32():
    norm = seeing_model(torch.bfloat16).language_model.model.norm
    x = torch.randn(64, norm.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 1000
    exact = (x.double() / (x.double().square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()).to(torch.bfloat16)
    assert (norm(x) == exact).float().mean() > 0.99


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("masked", [True, False])
def test_grouped_attention(rows, masked):
    """Both ways around the slow kernel equal PyTorch's grouped attention."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 4, generator=rng) for heads, length in ((6, rows), (2, 7), (2, 7)))
    mask = (torch.rand(2, 1, rows, 7, generator=rng) > 0.4).index_fill(3, torch.tensor([0]), True) if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend_grouped(query, key, value, mask), expected)


@torch.no_grad()
def test_no_mask_means_that_all_attend_to_all():
    model = seeing_model()
    embeds, positions = model.embed_text(torch.tensor([[1, 5, 6]])), torch.tensor([[0, 1, 2]])
    open_mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    torch.testing.assert_close(model(embeds, positions, None)[0], model(embeds, positions, open_mask)[0])
