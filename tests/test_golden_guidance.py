"""Guidance against numbers of the official BAGEL source: contexts with images, the three branches, trajectories, end to end.

The official "global" norm runs over a whole packed batch, ours over each sample. The two agree for batches of one, which is
what all files but a packed batch hold; there the official number is checked through the same formula over the batch as one
sample, and the batch's other norms, which are per token, directly.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from bagel_golden import CLOSE, Golden, needs, pytest_generate_tests  # noqa: F401  (parametrises this module too)

from unigrpo.contexts import Contexts, ImagePart, TextPart, build_contexts, extend_text, take_rows
from unigrpo.flow.guidance import combine_guidance
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.embeddings import patchify, unpatchify
from unigrpo.sampling import Guidance, denoise, image_velocity, think

GUIDED = re.compile(r"t(?P<t>[\d.]+)\.v_cfg\.(?P<renorm>\w+)\.text(?P<text>[\d.]+)\.img(?P<img>[\d.]+)\.rmin(?P<rmin>[\d.]+)")
BRANCHES = ("v_cond", "v_text_dropped", "v_img_dropped")


@pytest.fixture
def golden(folder):
    return Golden(folder)


def text_part(golden: Golden, rows: list[list[int]]) -> TextPart:
    rows = [torch.tensor(golden.segment(ids)) for ids in rows]
    return TextPart(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in rows]))


def scenario_contexts(golden: Golden, scenario: str, index: str | None) -> tuple[Contexts, int]:
    """The three contexts of a stored scenario, with room for its image, and its number of samples (2 for packed batches)."""
    lists = golden.manifest["velocity.safetensors"]["token_lists"]
    prompts = lists["prompts"] if index is None else [lists["prompts"][int(index)]]
    rows, parts = len(prompts), []
    thinking = scenario.startswith("t2i_think")
    if thinking:
        parts.append(text_part(golden, [lists["system"]] * rows))
    if scenario.startswith("edit"):
        data = golden.tensors("velocity")
        latent = data["edit.cond_latent"]
        patch = golden.model.config.latent_patch_size
        parts.append(ImagePart(patchify(latent, patch).expand(rows, -1, -1),
                               (latent.shape[2] // patch, latent.shape[3] // patch), [data["edit.cond_vit_image"]] * rows))
    contexts = build_contexts(golden.model, golden.markers, [*parts, text_part(golden, prompts)], thinking=thinking)
    room = golden.model.config.max_latent_size**2 + 2
    every = torch.arange(rows)
    conditional = take_rows(contexts.conditional, every, room + len(lists["think"]) + 2)
    if thinking:
        segment = text_part(golden, [lists["think"]] * rows)
        extend_text(golden.model, conditional, segment.tokens, segment.lengths)
    assert contexts.text_dropped is not None
    image_dropped = contexts.image_dropped and take_rows(contexts.image_dropped, every, room)
    return Contexts(conditional, take_rows(contexts.text_dropped, every, room), image_dropped), rows


def scenarios(keys) -> list[tuple[str, str, str | None]]:
    """(prefix, scenario, index) of the scenarios that a file holds; a packed batch has no index."""
    prefixes = sorted({m[1] for key in keys if (m := re.match(r"(.+?)\.(?:t[\d.]+\.v_|n\d+\.)", key))})
    return [(p, *((p.rsplit(".", 1)) if re.fullmatch(r".+\.\d+", p) else (p, None))) for p in prefixes]


def grid_of(golden: Golden, places: torch.Tensor) -> tuple[int, int]:
    side = golden.model.config.max_latent_size
    return int(places.max()) // side + 1, int(places.max()) % side + 1


def packed(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Stored tokens of a batch, one behind the other, to (rows, N, C)."""
    return value.unflatten(0, (rows, -1))


@needs("velocity")
@torch.no_grad()
def test_every_velocity(golden):
    """Lengths and positions of all contexts, the conditional cache, each branch, and every guided velocity of the file."""
    data = golden.tensors("velocity")
    tested = set()
    for prefix, scenario, index in scenarios(data):
        contexts, rows = scenario_contexts(golden, scenario, index)
        image_dropped = contexts.image_dropped or contexts.conditional
        three = (contexts.conditional, contexts.text_dropped, image_dropped)
        if index is not None:
            assert [c.used for c in three] == data[f"{prefix}.kv_len_cond_text_img"].tolist()
            assert [int(c.positions) for c in three] == data[f"{prefix}.rope_cond_text_img"].tolist()
        compare_cache(golden, contexts, prefix, data)
        noise = packed(data[f"{prefix}.noise"], rows)
        grid = grid_of(golden, data[f"{prefix}.latent_position_ids"])
        velocities = {}
        for key in (k for k in data if k.startswith(f"{prefix}.t") and k.endswith(BRANCHES)):
            t, branch = key[len(prefix) + 2:].split(".v_")
            context = three[BRANCHES.index(f"v_{branch}")]
            out = image_velocity(golden.model, golden.markers, context, noise, torch.tensor(float(t)), grid=grid)
            torch.testing.assert_close(out, packed(data[key], rows), **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
            velocities.setdefault(t, {})[branch] = out
            tested.add(key)
        for key, match in ((k, GUIDED.fullmatch(k[len(prefix) + 1:])) for k in data if k.startswith(f"{prefix}.t")):
            if match is None:
                continue
            v, u, w = (velocities[match["t"]][name] for name in ("cond", "text_dropped", "img_dropped"))
            if rows > 1 and match["renorm"] == "global":
                v, u, w = (x.flatten(0, 1) for x in (v, u, w))               # one norm over everything, as the official code
            guided = combine_guidance(v, u, w, text_scale=float(match["text"]), image_scale=float(match["img"]),
                                      renorm=match["renorm"], renorm_min=float(match["rmin"]))
            torch.testing.assert_close(guided.reshape(data[key].shape), data[key], **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
            tested.add(key)
    assert tested == {key for key in data if ".v_" in key}
    assert {"global", "channel", "text_channel"} <= {m["renorm"] for key in tested if (m := GUIDED.search(key))}


def compare_cache(golden: Golden, contexts: Contexts, prefix: str, data: dict[str, torch.Tensor]) -> None:
    """Keys and values of the conditional context where the file has them; ours holds both markers before the latents."""
    order = torch.arange(contexts.conditional.used)
    if prefix.startswith("edit"):
        count = 2 + data["edit.cond_latent"].shape[-2:].numel() // golden.model.config.latent_patch_size**2
        order[:count] = torch.tensor([0, *range(2, count), 1])
    for layer in range(golden.model.config.num_hidden_layers):
        for name, caches in (("key", contexts.conditional.keys), ("value", contexts.conditional.values)):
            if (key := f"{prefix}.cond_{name}_cache.{layer}") in data:
                rows = [cache.transpose(0, 1)[order][mask[order]] for cache, mask in
                        zip(caches[layer], contexts.conditional.mask, strict=True)]
                torch.testing.assert_close(torch.cat(rows), data[key], **CLOSE)


def stored_guidance(key: str, scales: torch.Tensor, info: dict, contexts: Contexts) -> Guidance:
    """The guidance of a stored trajectory: its renorm by name, its scales as stored, its interval in words."""
    low = float(re.search(r"cfg_interval \(([\d.]+), ?1(?:\.0)?\]", info[key]["how"])[1])
    text, image = scales.max(dim=0).values.tolist()
    renorm = key.split(".cfg_")[1].removesuffix(".x")
    return Guidance(contexts.text_dropped, text, renorm, (low, 1.0), contexts.image_dropped, image)


@needs("trajectory", "velocity")
@torch.no_grad()
def test_every_trajectory(golden):
    """The official Euler sampler with and without guidance: states, velocities and the steps that guidance acts on."""
    data, info = golden.tensors("trajectory"), golden.manifest["trajectory.safetensors"]["tensors"]
    places = golden.tensors("velocity")
    modes = set()
    for prefix, scenario, index in scenarios(k for k in data if not k.startswith("schedule.")):
        contexts, rows = scenario_contexts(golden, scenario, index)
        grid = grid_of(golden, places[f"{prefix}.latent_position_ids"])
        for key in (k for k in data if k.startswith(f"{prefix}.n") and k.endswith(".x")):
            points, mode = key[len(prefix) + 1:-2].split(".")
            if rows > 1 and mode == "cfg_global":
                continue                                    # its norm mixes the samples of the batch: see the velocities
            states, scales = data[key].unflatten(1, (rows, -1)), data[f"{key[:-2]}.cfg_scales"]
            sigmas = sigma_schedule(int(points[1:]) - 1, 3.0)
            guidance = None
            if mode != "nocfg":
                guidance = stored_guidance(key, scales, info, contexts)
                assert [guidance.active(s) for s in sigmas[:-1]] == (scales[:, 0] > 1).tolist()
            trace: list[torch.Tensor] = []
            final = denoise(golden.model, golden.markers, contexts.conditional, states[0], sigmas, guidance=guidance,
                            grid=grid, trace=trace).final_latents
            found = torch.stack([*trace, final])
            torch.testing.assert_close(found, states, **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
            torch.testing.assert_close(unpatchify(final, golden.model.config.latent_patch_size, grid)[0],
                                       data[f"{key[:-2]}.latent_chw"], **CLOSE)
            modes.add((scenario, mode))
    assert {("t2i_think", f"cfg_{r}") for r in ("global", "channel", "text_channel")} <= modes


@needs("e2e")
@torch.no_grad()
def test_end_to_end_with_guidance(golden):
    """System, prompt, greedy thinking that conditions as sampled, closed by a stop token, and the guided image."""
    data, settings = golden.tensors("e2e"), golden.manifest["e2e.safetensors"]["tensors"]["traj.x"]["how"]
    system, prompt = (text_part(golden, [data[name].tolist()]) for name in ("system_ids", "prompt_ids"))
    contexts = build_contexts(golden.model, golden.markers, [system, prompt], thinking=True)
    states, limit = data["traj.x"], len(data["think_ids"])
    count, one = states.shape[1], torch.zeros(1, dtype=torch.int64)
    conditional = take_rows(contexts.conditional, one, limit + 2 + count + 2)
    text = think(golden.model, golden.tokens, conditional, torch.zeros(1, limit), greedy=True, close=True)
    assert text.tokens[0].tolist() == data["think_ids"].tolist()
    assert int(conditional.positions) == int(data["image_rope_position"])
    low = float(re.search(r"interval \(([\d.]+),1\]", settings)[1])
    scale = float(re.search(r"cfg_text ([\d.]+)", settings)[1].rstrip("."))
    guidance = Guidance(take_rows(contexts.text_dropped, one, count + 2), scale, "global", (low, 1.0))
    trace: list[torch.Tensor] = []
    final = denoise(golden.model, golden.markers, conditional, states[:1], sigma_schedule(len(states) - 1, 3.0),
                    guidance=guidance, trace=trace, grid=grid_of_e2e(golden, data)).final_latents
    torch.testing.assert_close(torch.cat([*trace, final]), states, **CLOSE)


def grid_of_e2e(golden: Golden, data: dict[str, torch.Tensor]) -> tuple[int, int]:
    rows, columns = data["traj.latent_chw"].shape[1:]
    patch = golden.model.config.latent_patch_size
    return rows // patch, columns // patch


@needs("understanding")
@torch.no_grad()
def test_answers_about_images(golden):
    """All images and prompts in one padded batch: positions, the prompt's logits, and greedy answers."""
    data = golden.tensors("understanding")
    first = (data["prompt_ids"] == golden.special["bos_token_id"]).nonzero()[:, 0].tolist()
    prompts = data["prompt_ids"].tensor_split(first[1:])
    images = [data[f"image.{i}"] for i in range(len(data["vit_seqlens"]))]
    contexts = build_contexts(golden.model, golden.markers, [ImagePart(views=images)], guided=False)
    answer = len(data["decode_tokens"]) - 1
    context = take_rows(contexts.conditional, torch.arange(len(images)), max(map(len, prompts)) + answer + 1)
    part = text_part(golden, [p[1:-1].tolist() for p in prompts])
    states = extend_text(golden.model, context, part.tokens, part.lengths)
    flat = torch.cat([row[:n] for row, n in zip(states, part.lengths, strict=True)])
    torch.testing.assert_close(golden.model.logits(flat), data["prompt_logits"], **CLOSE)
    text = think(golden.model, golden.tokens, context, torch.zeros(len(images), answer), greedy=True)
    for row, expected in enumerate(data["decode_tokens"][1:].T):
        count = int(text.lengths[row])                                # the official run was given no token to stop at
        assert text.tokens[row, :count].tolist() == expected[:count].tolist()
        assert count == answer or text.tokens[row, count - 1] == golden.special["eos_token_id"]


PLANTED = {
    "thinking kept in the image-dropped context": lambda c: setattr(c, "image_dropped", c.conditional),
    "text-dropped context without the system segment": lambda c: setattr(c, "text_dropped", None),
    "guidance on every step": None,
}


@needs("trajectory", "velocity")
@pytest.mark.parametrize("mistake", PLANTED)
@torch.no_grad()
def test_a_planted_mistake_is_caught(golden, mistake):
    data, info = golden.tensors("trajectory"), golden.manifest["trajectory.safetensors"]["tensors"]
    key = next(k for k in data if re.fullmatch(r"t2i_think\.0\.n\d+\.cfg_channel\.x", k))
    states, scales = data[key][:, None], data[f"{key[:-2]}.cfg_scales"]
    contexts, _ = scenario_contexts(golden, "t2i_think", "0")
    guidance = stored_guidance(key, scales, info, contexts)
    if PLANTED[mistake] is not None:
        PLANTED[mistake](contexts)
    empty = golden.model.empty_context(1, states.shape[2] + 2)
    interval = (0.0, 1.0) if mistake == "guidance on every step" else guidance.interval
    guidance = replace(guidance, context=contexts.text_dropped or empty, image_context=contexts.image_dropped,
                       interval=interval)
    grid = grid_of(golden, golden.tensors("velocity")["t2i_think.0.latent_position_ids"])
    final = denoise(golden.model, golden.markers, contexts.conditional, states[0], sigma_schedule(len(states) - 1, 3.0),
                    guidance=guidance, grid=grid).final_latents
    assert (final - states[-1]).abs().max() > 100 * CLOSE["atol"]
