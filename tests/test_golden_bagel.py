"""The decoder against numbers that the official BAGEL source produced (fp32; tolerances: atol 5e-5, rtol 1e-5)."""

from __future__ import annotations

import functools
import itertools
import operator
import re

import pytest
import torch
from bagel_golden import CLOSE, Golden, editing_row, golden, image_grid, needs, pytest_generate_tests, rows_of, splits_of
from safetensors.torch import load_file

from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.autoencoder import Autoencoder, to_official
from unigrpo.models.bagel import causal_mask, packed_mask
from unigrpo.models.embeddings import grid_places, patchify
from unigrpo.models.mot import sincos_table, unpatchify
from unigrpo.models.packing import Noised, Text, pack, packed_forward, packed_losses
from unigrpo.rollout import denoise, image_velocity, prefill

__all__ = ["golden", "pytest_generate_tests"]  # pytest finds the fixture and the hook by name


def test_position_table(golden):
    stored = golden.model.latent_pos_embed.pos_embed
    table = sincos_table(golden.model.config.max_latent_size, golden.model.config.hidden_size)
    torch.testing.assert_close(table, stored, atol=1e-6, rtol=0)


@needs("text")
def test_text_logits_teacher_forced(golden):
    data = golden.tensors("text")
    tokens, lengths = rows_of(data["packed_text_ids"], data["sample_lens"].tolist())
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    hidden, _ = golden.model(golden.model.embed_text(tokens), positions, causal_mask(lengths, tokens.shape[1]))
    flat = torch.cat([h[:n] for h, n in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(flat, data["train_hidden"], **CLOSE)
    torch.testing.assert_close(golden.model.logits(flat), data["train_logits"], **CLOSE)


@needs("text")
@torch.no_grad()
def test_text_decode_with_cache(golden):
    """Prefill, then greedy decoding over the KV cache; all prompts in one batch."""
    data = golden.tensors("text")
    model = golden.model
    tokens, lengths = rows_of(data["packed_text_ids"], data["sample_lens"].tolist())
    steps = len(data["decode_tokens"])
    context = prefill(model, tokens, lengths, room=steps)
    for layer in range(model.config.num_hidden_layers):
        for name, cache in (("key", context.keys[layer]), ("value", context.values[layer])):
            flat = torch.cat([c.transpose(0, 1)[:n] for c, n in zip(cache, lengths, strict=True)])
            torch.testing.assert_close(flat, data[f"prefill_{name}_cache.{layer}"], **CLOSE)
    token = data["decode_start_ids"]
    for step in range(steps):
        assert torch.equal(token, data["decode_tokens"][step])
        assert torch.equal(context.positions, data["decode_positions"][step])
        context.mask[:, context.used] = True
        hidden, _ = model(model.embed_text(token[:, None]), context.positions[:, None],
                          context.mask[:, None, None, :context.used + 1], context=context)
        context.used += 1
        context.positions += 1
        logits = model.logits(hidden[:, 0])
        torch.testing.assert_close(logits, data["decode_logits"][step], **CLOSE)
        token = logits.argmax(dim=-1)


def stored_levels(data: dict[str, torch.Tensor], prefix: str) -> list[str]:
    """Noise levels at which a scenario's conditional velocity is stored, as its names spell them."""
    return [key[len(prefix) + 2:-len(".v_cond")] for key in data
            if key.startswith(f"{prefix}.t") and key.endswith(".v_cond")]


def context_of(golden: Golden, segments: list[list[int]], room: int):
    ids = [token for ids in segments for token in golden.segment(ids)]
    return prefill(golden.model, torch.tensor([ids], dtype=torch.int64), torch.tensor([len(ids)]), room=room)


@needs("velocity")
@torch.no_grad()
def test_velocities(golden):
    """Every stored velocity of the text-conditioned scenarios, each branch of the CFG contexts included."""
    data = golden.tensors("velocity")
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    seen = 0
    for index, prompt in enumerate(lists["prompts"]):
        system, think = lists["system"], lists["think"]
        branches = {"t2i_think": {"cond": [system, prompt, think], "text_dropped": [system], "img_dropped": [system, prompt]},
                    "t2i": {"cond": [prompt], "text_dropped": [], "img_dropped": [prompt]}}
        for scenario, contexts in branches.items():
            prefix = f"{scenario}.{index}"
            if f"{prefix}.noise" not in data:
                continue
            noise = data[f"{prefix}.noise"]
            places = data[f"{prefix}.latent_position_ids"]
            side = golden.model.config.max_latent_size
            grid = (int(places.max()) // side + 1, int(places.max()) % side + 1)
            for number, (branch, segments) in enumerate(contexts.items()):
                context = context_of(golden, segments, room=len(noise) + 2)
                assert context.used == data[f"{prefix}.kv_len_cond_text_img"][number]
                assert context.positions[0] == data[f"{prefix}.rope_cond_text_img"][number]
                for key, expected in data.items():
                    if key.startswith(f"{prefix}.t") and key.endswith(f".v_{branch}"):
                        t = torch.tensor(float(key[len(prefix) + 2:-len(f".v_{branch}")]))
                        out = image_velocity(golden.model, golden.markers, context, noise[None], t, grid=grid)
                        torch.testing.assert_close(out[0], expected, **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
                        seen += 1
    assert seen >= 6


@needs("velocity")
@torch.no_grad()
def test_velocities_batched(golden):
    """All prompts, with and without thinking, in one padded batch equal the stored batch-of-one velocities."""
    data = golden.tensors("velocity")
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    found = {f"{scenario}.{i}": [lists["system"], prompt, lists["think"]] if scenario == "t2i_think" else [prompt]
             for scenario in ("t2i_think", "t2i") for i, prompt in enumerate(lists["prompts"])
             if f"{scenario}.{i}.noise" in data}
    rows = [torch.tensor(functools.reduce(operator.iadd, map(golden.segment, segments), [])) for segments in found.values()]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(r) for r in rows])
    noise = torch.stack([data[f"{prefix}.noise"] for prefix in found])
    grids = {image_grid(data[f"{prefix}.latent_position_ids"], golden.model.config.max_latent_size) for prefix in found}
    assert len(found) >= 2
    assert len(grids) == 1
    context = prefill(golden.model, tokens, lengths, room=noise.shape[1] + 2)
    levels = set.intersection(*(set(stored_levels(data, prefix)) for prefix in found))
    assert levels
    for t in levels:
        out = image_velocity(golden.model, golden.markers, context, noise, torch.tensor(float(t)), grid=next(iter(grids)))
        torch.testing.assert_close(out, torch.stack([data[f"{prefix}.t{t}.v_cond"] for prefix in found]), **CLOSE)


@needs("trajectory", "velocity")
@torch.no_grad()
def test_trajectories(golden):
    """The official Euler sampler without CFG: n points are n - 1 model calls."""
    data = golden.tensors("trajectory")
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    places = golden.tensors("velocity")
    side = golden.model.config.max_latent_size
    seen = 0
    for key in [k for k in data if k.endswith(".nocfg.x") and k.startswith(("t2i_think.", "t2i."))]:
        scenario, index, points = key.split(".")[:3]
        prompt = lists["prompts"][int(index)]
        segments = [lists["system"], prompt, lists["think"]] if scenario == "t2i_think" else [prompt]
        states = data[key]
        sigmas = sigma_schedule(int(points[1:]) - 1, 3.0)
        prefix = key[:-len(".x")]
        torch.testing.assert_close(sigmas[:-1], data[f"{prefix}.t"][:len(sigmas) - 1], atol=1e-6, rtol=0)
        last = int(places[f"{scenario}.{index}.latent_position_ids"].max())
        grid = (last // side + 1, last % side + 1)
        context = context_of(golden, segments, room=states.shape[1] + 2)
        trace: list[torch.Tensor] = []
        final = denoise(golden.model, golden.markers, context, states[:1], sigmas, grid=grid, trace=trace).final_latents
        torch.testing.assert_close(torch.cat([*trace, final]), states, **CLOSE)
        torch.testing.assert_close(unpatchify(final, golden.model.config.latent_patch_size, grid)[0],
                                   data[f"{prefix}.latent_chw"], **CLOSE)
        seen += 1
    assert seen >= 2


@needs("e2e")
@torch.no_grad()
def test_thinking_then_image(golden):
    """End to end: system, prompt, greedy thinking, its own segment, and the image's rotary position."""
    data = golden.tensors("e2e")
    think = data["think_ids"]
    model = golden.model
    ids = golden.segment(data["system_ids"]) + golden.segment(data["prompt_ids"])
    context = prefill(model, torch.tensor([ids]), torch.tensor([len(ids)]), room=len(think) + 2)
    token = torch.tensor([golden.special["bos_token_id"]])
    for step in range(len(think) + 1):
        context.mask[:, context.used] = True
        hidden, _ = model(model.embed_text(token[:, None]), context.positions[:, None],
                          context.mask[:, None, None, :context.used + 1], context=context)
        context.used, context.positions = context.used + 1, context.positions + 1
        if step < len(think):
            token = model.logits(hidden[:, 0]).argmax(dim=-1)
            assert token.item() == think[step].item()
    context.mask[:, context.used] = True                      # the segment's end, as the official inferencer re-encodes it
    model(model.embed_text(torch.tensor([[golden.special["eos_token_id"]]])), context.positions[:, None],
          context.mask[:, None, None, :context.used + 1], context=context)
    assert context.positions.item() + 1 == data["image_rope_position"].item()


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


@needs("velocity")
@torch.no_grad()
def test_packed_blocks_equal_single_blocks(golden):
    """One packed forward over several noise levels equals one cached forward per level."""
    data = golden.tensors("velocity")
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    model, side = golden.model, golden.model.config.max_latent_size
    ids = golden.segment(lists["system"]) + golden.segment(lists["prompts"][0]) + golden.segment(lists["think"])
    noise = data["t2i_think.0.noise"]
    last = int(data["t2i_think.0.latent_position_ids"].max())
    grid = (last // side + 1, last % side + 1)
    stored = stored_levels(data, "t2i_think.0")
    levels = torch.tensor([[float(t) for t in stored]])
    blocks, tokens = levels.shape[1], len(noise)
    latents = noise.expand(1, blocks, -1, -1)
    und = model.embed_text(torch.cat([torch.tensor([ids]), golden.markers.repeat(blocks)[None]], dim=1))
    positions = torch.cat([torch.arange(len(ids)), torch.full((2 * blocks,), len(ids))])[None]
    gen = model.embed_latents(latents, levels, grid=grid).flatten(1, 2)
    _, out = model(und, positions, packed_mask(torch.tensor([len(ids)]), len(ids), blocks, tokens), gen,
                   torch.full((1, blocks * tokens), len(ids)))
    velocity = model.velocity(out.view(1, blocks, tokens, -1), latents, levels)
    for block, t in enumerate(stored):
        torch.testing.assert_close(velocity[0, block], data[f"t2i_think.0.t{t}.v_cond"], **CLOSE)


# ------------------------------------------------------------------------------------------------- reading images


@needs("understanding")
@torch.no_grad()
def test_vision_tower(golden):
    """Patches, embeddings, tower, connector and what enters the decoder."""
    data, model = golden.tensors("understanding"), golden.model
    images = [data[f"image.{i}"] for i in range(len(data["vit_seqlens"]))]
    patch = model.config.vision["patch_size"]
    torch.testing.assert_close(torch.cat([patchify(i[None], patch)[0] for i in images]), data["vit_tokens"], atol=0, rtol=0)
    features, places = model.vit_model(images, side=model.config.vit_max_patches)
    assert [len(f) for f in features] == data["vit_seqlens"].tolist()
    assert torch.equal(torch.cat(places), data["vit_position_ids"])
    embeddings = model.vit_model.vision_model.embeddings
    embedded = embeddings.patch_embedding(data["vit_tokens"]) + embeddings.position_embedding(torch.cat(places))
    torch.testing.assert_close(embedded, data["vit_embeddings"], **CLOSE)
    torch.testing.assert_close(torch.cat(features), data["vit_features"], **CLOSE)
    torch.testing.assert_close(model.connector(torch.cat(features)), data["connector_features"], **CLOSE)
    torch.testing.assert_close(torch.cat(model.embed_image(images)), data["connector_plus_pos"], **CLOSE)
    for key, expected in data.items():
        if key.startswith("pos_ids_extrapolate."):
            rows, columns = key.split(".")[1].split("x")
            assert torch.equal(grid_places((int(rows), int(columns)), 70, key="side"), expected)


@needs("understanding")
@torch.no_grad()
def test_image_to_text(golden):
    """Image block, prompt, greedy answer: states, logits, positions and ids."""
    data, model = golden.tensors("understanding"), golden.model
    embeds = model.embed_image([data[f"image.{i}"] for i in range(len(data["vit_seqlens"]))])
    first = (data["prompt_ids"] == golden.special["bos_token_id"]).nonzero()[:, 0].tolist()
    prompts = data["prompt_ids"].tensor_split(first[1:])
    assert len(prompts) == len(embeds)
    done_image = done_prompt = 0
    for row, (image, prompt) in enumerate(zip(embeds, prompts, strict=True)):
        start, end = model.embed_text(golden.markers)
        block = torch.cat([start[None], image, end[None]])[None]
        count = block.shape[1]
        context = model.empty_context(1, count + len(prompt) + len(data["decode_tokens"]))

        def feed(embeds, positions, mask, context=context):
            hidden, _ = model(embeds, positions, mask, context=context)
            context.used += embeds.shape[1]
            return hidden[0]

        hidden = feed(block, torch.zeros(1, count, dtype=torch.int64), torch.ones(1, 1, count, count, dtype=torch.bool))
        assert not data["llm_position_ids"].any()
        torch.testing.assert_close(hidden, data["llm_image_hidden"][done_image:done_image + count], **CLOSE)
        positions = 1 + torch.arange(len(prompt))
        assert torch.equal(positions, data["prompt_position_ids"][done_prompt:done_prompt + len(prompt)])
        mask = torch.ones(len(prompt), count + len(prompt), dtype=torch.bool).tril(count)
        hidden = feed(model.embed_text(prompt[None]), positions[None], mask[None, None])
        expected = data["prompt_logits"][done_prompt:done_prompt + len(prompt)]
        torch.testing.assert_close(model.logits(hidden), expected, **CLOSE)
        done_image, done_prompt = done_image + count, done_prompt + len(prompt)
        token = torch.tensor([golden.special["bos_token_id"]])
        for step, expected in enumerate(data["decode_tokens"][:, row]):
            assert token.item() == expected
            hidden = feed(model.embed_text(token[None]), torch.tensor([[len(prompt) + 1 + step]]),
                          torch.ones(1, 1, 1, context.used + 1, dtype=torch.bool))
            logits = model.logits(hidden)
            torch.testing.assert_close(logits[0], data["decode_logits"][step, row], **CLOSE)
            token = logits.argmax(dim=-1)


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


@needs("velocity")
@torch.no_grad()
def test_editing_velocities_packed(golden):
    """The packed forward of an edit gives what the official sampler computes on cached contexts, all levels in a batch."""
    data = golden.tensors("velocity")
    levels = stored_levels(data, "edit.0")
    rows = [editing_row(golden, data, 0, float(t)) for t in levels]
    batch = pack(rows, golden.tokens, golden.model.config)
    _, velocity = packed_forward(golden.model, batch)
    for row, t in enumerate(levels):
        torch.testing.assert_close(velocity[row][batch.target[row]], data[f"edit.0.t{t}.v_cond"], **CLOSE)


PLANTED = {
    "exact GELU in the tower": lambda m: [setattr(layer.mlp, "activation_fn", torch.nn.GELU())
                                          for layer in m.vit_model.vision_model.encoder.layers],
    "exact GELU in the connector": lambda m: setattr(
        m.connector, "forward", lambda x: m.connector.fc2(torch.nn.functional.gelu(m.connector.fc1(x)))),
    "no norm behind the last layer": lambda m: setattr(m.vit_model.vision_model, "post_layernorm", torch.nn.Identity()),
    "one layer fewer": lambda m: m.vit_model.vision_model.encoder.layers.pop(-1),
    "no 2-D positions": lambda m: m.vit_pos_embed.pos_embed.zero_(),
    "positions in a narrower table": lambda m: setattr(m.config, "vit_max_patches", m.config.vit_max_patches - 1),
}


@needs("understanding")
@pytest.mark.parametrize("mistake", PLANTED)
@torch.no_grad()
def test_a_planted_mistake_in_the_tower_is_caught(golden, mistake):
    data, model = golden.tensors("understanding"), golden.model
    PLANTED[mistake](model)
    images = [data[f"image.{i}"] for i in range(len(data["vit_seqlens"]))]
    difference = (torch.cat(model.embed_image(images)) - data["connector_plus_pos"]).abs().max()
    assert difference > 2 * CLOSE["atol"]


# ------------------------------------------------------------------------------------------ autoencoder and precision


@needs("vae", "vae_weights")
@torch.no_grad()
def test_autoencoder(folder):
    """Moments, posterior mean and decoder under official weights; names there and back without a changed byte."""
    data, weights = (load_file(folder / f"{name}.safetensors") for name in ("vae", "vae_weights"))
    autoencoder = Autoencoder.from_official(weights)
    torch.testing.assert_close(autoencoder.vae.encode(data["image"]).latent_dist.parameters, data["moments"], **CLOSE)
    torch.testing.assert_close(autoencoder.encode(data["image"]), data["latent_mean"], **CLOSE)
    torch.testing.assert_close(autoencoder.decode(data["latent_mean"]), data["decoded"], **CLOSE)
    back = to_official(autoencoder.vae.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


@needs("precision", "text", "velocity")
@torch.no_grad()
def test_bfloat16(golden):
    """bf16 weights stray from fp32 as far as the released code does in bf16, about 1 %, and greedy decoding is the same."""
    stored, text, data = (golden.tensors(name) for name in ("precision", "text", "velocity"))
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    model = golden.model.to(torch.bfloat16)

    def same_band(ours: torch.Tensor, official: torch.Tensor, exact: torch.Tensor) -> None:
        assert ours.dtype == torch.float32                       # log-probs and velocities are computed from fp32
        distance, band = (((x - exact).square().mean() / exact.square().mean()).sqrt() for x in (ours, official))
        assert 0.5 * band < distance < 1.25 * band

    tokens, lengths = rows_of(text["packed_text_ids"], text["sample_lens"].tolist())
    rows = [torch.cat([row[:n], decoded]) for row, n, decoded in zip(tokens, lengths, text["decode_tokens"].T, strict=True)]
    tokens, longer = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in rows])
    hidden, _ = model(model.embed_text(tokens), torch.arange(tokens.shape[1]).expand(tokens.shape),
                      causal_mask(longer, tokens.shape[1]))
    assert hidden.dtype == torch.bfloat16
    logits = [row[:n] for row, n in zip(model.logits(hidden), longer, strict=True)]
    prompt = torch.cat([row[:n] for row, n in zip(logits, lengths, strict=True)])
    same_band(prompt, stored["bf16_as_released.text.train_logits"], text["train_logits"])
    decoded = torch.stack([row[n:] for row, n in zip(logits, lengths, strict=True)], dim=1)
    same_band(decoded, stored["bf16_as_released.text.decode_logits"], text["decode_logits"])
    assert torch.equal(decoded.argmax(dim=-1)[:-1], text["decode_tokens"][1:])
    seen = 0
    for match in (re.fullmatch(r"bf16_as_released\.velocity\.((\w+)\.(\d+)\.t([\d.]+)\.v_cond)", k) for k in stored):
        if match is None:
            continue
        key, scenario, index, t = match[1], match[2], match[3], float(match[4])
        row = editing_row(golden, data, int(index), t)
        if scenario != "edit":
            segments = [lists["prompts"][int(index)]]
            if scenario == "t2i_think":
                segments = [lists["system"], *segments, lists["think"]]
            places, x = data[f"{scenario}.{index}.latent_position_ids"], data[f"{scenario}.{index}.noise"]
            row = [*(Text(torch.tensor(golden.segment(s))) for s in segments),
                   Noised(x, x, image_grid(places, model.config.max_latent_size), t)]
        batch = pack([row], golden.tokens, model.config)
        velocity = packed_forward(model, batch)[1][batch.target]
        same_band(velocity, stored[f"bf16_as_released.velocity.{key}"], data[key])
        seen += 1
    assert seen >= 4
