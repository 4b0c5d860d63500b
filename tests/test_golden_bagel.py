"""The decoder against numbers that the official BAGEL source produced (fp32; tolerances: atol 5e-5, rtol 1e-5)."""

from __future__ import annotations

import functools
import json
import operator
from pathlib import Path

import pytest
import torch
from conftest import golden_files
from safetensors.torch import load_file

from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.bagel import causal_mask, packed_mask
from unigrpo.models.mot import MoTConfig, MoTModel, sincos_table, unpatchify
from unigrpo.rollout import denoise, image_velocity, prefill

CLOSE = {"atol": 5e-5, "rtol": 1e-5}
LATER = ("vit_model.", "vit_pos_embed.", "connector.")  # the understanding encoder


class Golden:
    """One folder of the official format: its model and its tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.manifest = json.loads((folder / "manifest.json").read_text())["files"]
        llm, bagel = self.config["llm_config"], self.config["bagel_config"]
        self.special = self.config["special_token_ids"]
        self.model = MoTModel(MoTConfig(
            **{k: llm[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")},
            max_latent_size=bagel["max_latent_size"], latent_patch_size=bagel["latent_patch_size"],
            timestep_shift=bagel["timestep_shift"])).eval()
        weights = {k: v for k, v in load_file(folder / "weights.safetensors").items() if not k.startswith(LATER)}
        self.model.load_state_dict(weights)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def prompts(self) -> list[list[int]]:
        return self.manifest["velocity.safetensors"]["token_lists"]["prompts"]

    def segment(self, ids) -> list[int]:
        return [self.special["bos_token_id"], *[int(i) for i in ids], self.special["eos_token_id"]]

    @property
    def markers(self) -> torch.Tensor:
        return torch.tensor([self.special["start_of_image"], self.special["end_of_image"]])


def pytest_generate_tests(metafunc):
    if "folder" in metafunc.fixturenames:
        folders = [p.parent for p in golden_files(metafunc.config, "bagel/manifest.json")]
        metafunc.parametrize("folder", folders, ids=[f"{p.parent.name}-{p.name}" for p in folders])


@pytest.fixture
def golden(folder):
    return Golden(folder)


def rows_of(flat: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed tokens to a padded batch."""
    parts = flat.split(lengths)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), torch.tensor(lengths)


def test_position_table(golden):
    stored = golden.model.latent_pos_embed.pos_embed
    table = sincos_table(golden.model.config.max_latent_size, golden.model.config.hidden_size)
    torch.testing.assert_close(table, stored, atol=1e-6, rtol=0)


def test_text_logits_teacher_forced(golden):
    data = golden.tensors("text")
    tokens, lengths = rows_of(data["packed_text_ids"], data["sample_lens"].tolist())
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    hidden, _ = golden.model(golden.model.embed_text(tokens), positions, causal_mask(lengths, tokens.shape[1]))
    flat = torch.cat([h[:n] for h, n in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(flat, data["train_hidden"], **CLOSE)
    torch.testing.assert_close(golden.model.logits(flat), data["train_logits"], **CLOSE)


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


def context_of(golden: Golden, segments: list[list[int]], room: int):
    ids = [token for ids in segments for token in golden.segment(ids)]
    return prefill(golden.model, torch.tensor([ids], dtype=torch.int64), torch.tensor([len(ids)]), room=room)


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


@torch.no_grad()
def test_velocities_batched(golden):
    """All prompts in one padded batch equal the stored batch-of-one velocities."""
    data = golden.tensors("velocity")
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    rows = [torch.tensor(functools.reduce(operator.iadd, (golden.segment(s) for s in (lists["system"], p, lists["think"])), []))
            for p in lists["prompts"]] + [torch.tensor(golden.segment(lists["prompts"][0]))]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(r) for r in rows])
    noise = torch.stack([data[f"t2i_think.{i}.noise"] for i in range(len(lists["prompts"]))] + [data["t2i.0.noise"]])
    places = data["t2i_think.0.latent_position_ids"]
    side = golden.model.config.max_latent_size
    grid = (int(places.max()) // side + 1, int(places.max()) % side + 1)
    context = prefill(golden.model, tokens, lengths, room=noise.shape[1] + 2)
    for t in (1.0, 0.9, 0.5, 0.1):
        out = image_velocity(golden.model, golden.markers, context, noise, torch.tensor(t), grid=grid)
        expected = [data[f"t2i_think.{i}.t{t}.v_cond"] for i in range(len(lists["prompts"]))] + [data[f"t2i.0.t{t}.v_cond"]]
        torch.testing.assert_close(out, torch.stack(expected), **CLOSE)


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
    levels = torch.tensor([[1.0, 0.9, 0.5, 0.1]])
    blocks, tokens = levels.shape[1], len(noise)
    latents = noise.expand(1, blocks, -1, -1)
    und = model.embed_text(torch.cat([torch.tensor([ids]), golden.markers.repeat(blocks)[None]], dim=1))
    positions = torch.cat([torch.arange(len(ids)), torch.full((2 * blocks,), len(ids))])[None]
    gen = model.embed_latents(latents, levels, grid=grid).flatten(1, 2)
    _, out = model(und, positions, packed_mask(torch.tensor([len(ids)]), len(ids), blocks, tokens), gen,
                   torch.full((1, blocks * tokens), len(ids)))
    velocity = model.velocity(out.view(1, blocks, tokens, -1), latents, levels)
    for block, t in enumerate((1.0, 0.9, 0.5, 0.1)):
        torch.testing.assert_close(velocity[0, block], data[f"t2i_think.0.t{t}.v_cond"], **CLOSE)
