"""The decoder against numbers that the official BAGEL source produced (fp32; tolerances: atol 5e-5, rtol 1e-5)."""

from __future__ import annotations

import functools
import operator
import re

import torch
from bagel_golden import CLOSE, Golden, editing_row, golden, image_grid, needs, pytest_generate_tests, rows_of

from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.bagel import causal_mask, packed_mask
from unigrpo.models.mot import sincos_table, unpatchify
from unigrpo.models.packing import Noised, Text, pack, packed_forward
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
            grid = image_grid(data[f"{prefix}.latent_position_ids"], golden.model.config.max_latent_size)
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
    seen = 0
    for key in [k for k in data if k.endswith(".nocfg.x") and k.startswith(("t2i_think.", "t2i."))]:
        scenario, index, points = key.split(".")[:3]
        prompt = lists["prompts"][int(index)]
        segments = [lists["system"], prompt, lists["think"]] if scenario == "t2i_think" else [prompt]
        states = data[key]
        sigmas = sigma_schedule(int(points[1:]) - 1, 3.0)
        prefix = key[:-len(".x")]
        torch.testing.assert_close(sigmas[:-1], data[f"{prefix}.t"][:len(sigmas) - 1], atol=1e-6, rtol=0)
        grid = image_grid(places[f"{scenario}.{index}.latent_position_ids"], golden.model.config.max_latent_size)
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


@needs("velocity")
@torch.no_grad()
def test_packed_blocks_equal_single_blocks(golden):
    """One packed forward over several noise levels equals one cached forward per level."""
    data = golden.tensors("velocity")
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    model = golden.model
    ids = golden.segment(lists["system"]) + golden.segment(lists["prompts"][0]) + golden.segment(lists["think"])
    noise = data["t2i_think.0.noise"]
    grid = image_grid(data["t2i_think.0.latent_position_ids"], model.config.max_latent_size)
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
