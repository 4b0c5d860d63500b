"""Reading images and the autoencoder against numbers that the official BAGEL source produced."""

from __future__ import annotations

import pytest
import torch
from bagel_golden import CLOSE, golden, needs, pytest_generate_tests
from safetensors.torch import load_file

from unigrpo.models.autoencoder import Autoencoder, to_official
from unigrpo.models.embeddings import grid_places, patchify

__all__ = ["golden", "pytest_generate_tests"]  # pytest finds the fixture and the hook by name


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
