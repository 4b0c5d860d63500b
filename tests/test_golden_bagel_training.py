"""Training forwards, losses and gradients against those of the official BAGEL source."""

from __future__ import annotations

import itertools

import torch
from bagel_golden import CLOSE, Golden, golden, needs, pytest_generate_tests, splits_of

from unigrpo.models.packing import pack, packed_losses

__all__ = ["golden", "pytest_generate_tests"]  # pytest finds the fixture and the hook by name


@needs("train")
def test_training_losses_and_gradients(golden):
    """Official training forward: text CE and image MSE of a packed batch, and every gradient norm."""
    data, info = golden.tensors("train"), golden.manifest["train.safetensors"]
    model = golden.model.train()
    lengths = data["in.sample_lens"].tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    text_at, vae_at = data["in.packed_text_indexes"], data["in.packed_vae_token_indexes"]
    sigma = torch.sigmoid(data["in.packed_timesteps"])
    shift = golden.config["bagel_config"]["timestep_shift"]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    torch.testing.assert_close(sigma, data["effective_timesteps"], atol=1e-6, rtol=0)
    patch = model.config.latent_patch_size
    ce, mse = [], []
    image = 0
    for sample, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        in_text, in_vae = (text_at >= start) & (text_at < stop), (vae_at >= start) & (vae_at < stop)
        order = torch.cat([text_at[in_text], vae_at[in_vae]])
        allowed = data[f"in.allowed_mask.{sample}"].bool()[order - start][:, order - start]
        rows, columns = data["in.patchified_vae_latent_shapes"][image].tolist()
        latent = data["in.padded_latent"][image][:, :rows * patch, :columns * patch]
        clean = latent.reshape(-1, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(1, rows * columns, -1)
        image += 1
        noise, t = data["in.noise"][in_vae][None], sigma[in_vae][:1]
        latents = ((1 - t) * clean + t * noise)[:, None]
        gen = model.embed_latents(latents, t[:, None], grid=(rows, columns))
        positions = data["in.packed_position_ids"]
        und, out = model(model.embed_text(data["in.packed_text_ids"][in_text][None]), positions[text_at[in_text]][None],
                         allowed[None, None], gen[:, 0], positions[vae_at[in_vae]][None])
        velocity = model.velocity(out[:, None], latents, t[:, None])[0, 0]
        mse.append((velocity - (noise - clean)[0]).square())
        wanted = (data["in.ce_loss_indexes"] >= start) & (data["in.ce_loss_indexes"] < stop)
        places = {int(p): i for i, p in enumerate(text_at[in_text])}
        index = torch.tensor([places[int(p)] for p in data["in.ce_loss_indexes"][wanted]])
        ce.append(torch.nn.functional.cross_entropy(model.logits(und[0, index]), data["in.packed_label_ids"][wanted],
                                                    reduction="none"))
    torch.testing.assert_close(torch.cat(ce), data["out.ce_per_token"], **CLOSE)
    torch.testing.assert_close(torch.cat(mse), data["out.mse_per_element"], **CLOSE)
    loss = torch.cat(ce).mean() + torch.cat(mse).mean()
    torch.testing.assert_close(loss, data["out.loss"], **CLOSE)
    loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        norm = info["grad_norms_of_total_loss"].get(name)
        if norm is not None:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad.norm().item(), norm, rtol=2e-5, atol=1e-6,
                                       msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
        if f"grad.{name}" in data:
            torch.testing.assert_close(parameter.grad, data[f"grad.{name}"], **CLOSE)
    assert compared >= 20 * model.config.num_hidden_layers


@needs("train")
def test_packed_training(golden):
    """Packing gives the official layout, and its forward the official losses and gradients, all samples in one batch."""
    compare_packed_training(golden, "train")


@needs("train_mixed")
def test_packed_training_with_image_inputs(golden):
    """The same with edits, questions about images, and a drawn image that later splits see as a clean copy and a view."""
    compare_packed_training(golden, "train_mixed")


def compare_packed_training(golden: Golden, name: str) -> None:
    data, info, model = golden.tensors(name), golden.manifest[f"{name}.safetensors"], golden.model.train()
    batch = pack(splits_of(golden, data), golden.tokens, model.config)
    starts = torch.tensor([0, *data["in.sample_lens"].tolist()]).cumsum(0).tolist()
    text_like = torch.cat([data["in.packed_text_indexes"], data.get("in.packed_vit_token_indexes", torch.zeros(0)).long()])
    for row, (start, stop) in enumerate(itertools.pairwise(starts)):
        und = text_like[(text_like >= start) & (text_like < stop)].sort().values
        vae = data["in.packed_vae_token_indexes"]
        gen = vae[(vae >= start) & (vae < stop)]
        assert batch.lengths[row] == len(und)
        assert torch.equal(batch.und_positions[row, :len(und)], data["in.packed_position_ids"][und])
        assert torch.equal(batch.gen_positions[row, :len(gen)], data["in.packed_position_ids"][gen])
        assert torch.equal(batch.places[row, :len(gen)], data["in.packed_latent_position_ids"][torch.isin(vae, gen)])
        torch.testing.assert_close(batch.sigma[row, :len(gen)], data["effective_timesteps"][torch.isin(vae, gen)],
                                   atol=1e-6, rtol=0)
        ours = torch.cat([torch.arange(len(und)), batch.tokens.shape[1] + torch.arange(len(gen))])
        official = torch.cat([und, gen]) - start
        assert torch.equal(batch.mask[row, 0][ours][:, ours], data[f"in.allowed_mask.{row}"].bool()[official][:, official])
    assert torch.equal(batch.labels, data["in.packed_label_ids"])
    ce, mse = packed_losses(model, batch)
    torch.testing.assert_close(ce, data["out.ce_per_token"], **CLOSE)
    torch.testing.assert_close(mse, data["out.mse_per_element"], **CLOSE)
    loss = ce.mean() + mse.mean()
    torch.testing.assert_close(loss, data["out.loss"], **CLOSE)
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    expected = {key: norm for key, norm in info["grad_norms_of_total_loss"].items() if norm is not None}
    assert len(expected) >= 20 * model.config.num_hidden_layers
    for key, norm in expected.items():
        if key.startswith("vit_model.") and key.endswith("self_attn.k_proj.bias"):
            continue                                              # its true gradient is 0: softmax is shift invariant
        torch.testing.assert_close(gradients[key].norm().item(), norm, rtol=2e-5, atol=1e-6,
                                   msg=lambda m, k=key: f"{k}: {m}")
    for key, value in data.items():
        if key.startswith("grad."):
            torch.testing.assert_close(gradients[key.removeprefix("grad.")], value, **CLOSE)
    assert {k for k, g in gradients.items() if g.any()} <= expected.keys()
