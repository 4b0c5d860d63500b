"""Packed training samples: the rules of attention and positions, padding, and agreement with the policy's own layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import small_config, small_policy
from test_vision import images, seeing_model

from unigrpo.models.bagel import SpecialTokens, causal_mask, packed_mask
from unigrpo.models.packing import (
    CAUSAL,
    FULL,
    NOISE,
    Clean,
    Dropped,
    Noised,
    Split,
    Text,
    View,
    pack,
    packed_forward,
    packed_losses,
    split_mask,
)

SPECIAL = SpecialTokens(bos=1, eos=2, image_start=3, image_end=4, pad=0)
MODEL = seeing_model()
CHANNELS = MODEL.config.token_channels


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(*words: int, loss: bool = False) -> Text:
    return Text(torch.tensor([SPECIAL.bos, *words, SPECIAL.eos]), loss=loss)


def noised(rows: int, columns: int, sigma: float, seed: int = 0) -> Noised:
    shape = rows * columns, CHANNELS
    return Noised(draw(*shape, seed=seed), draw(*shape, seed=seed + 1), (rows, columns), sigma)


def clean(rows: int, columns: int, seed: int = 0) -> Clean:
    return Clean(draw(rows * columns, CHANNELS, seed=seed), (rows, columns))


PROMPTED = [text(7, 8), View(images((2, 3))[0]), text(9, 10, 11, loss=True), noised(2, 2, 0.7)]  # look, think, draw
EDIT = [clean(3, 2, seed=5), View(images((4, 2), seed=1)[0]), text(12, 13), noised(3, 2, 0.4, seed=2)]
ANSWER = [View(images((1, 2), seed=2)[0]), text(14), text(15, 16, loss=True)]
WORDS = [text(5, 6, 7, 8, loss=True)]
SAMPLES = [PROMPTED, EDIT, ANSWER, WORDS]


def losses(rows: list[list[Split]]) -> tuple[torch.Tensor, torch.Tensor]:
    return packed_losses(MODEL, pack(rows, SPECIAL, MODEL.config))


@given(st.permutations(range(4)), st.integers(1, 4))
@torch.no_grad()
def test_a_batch_equals_its_samples_one_by_one(order, count):
    rows = [SAMPLES[i] for i in order[:count]]
    singles = [losses([row]) for row in rows]
    for together, apart in zip(losses(rows), zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)


@given(st.lists(st.lists(st.tuples(st.sampled_from([CAUSAL, FULL, NOISE]), st.integers(1, 3)), max_size=5), min_size=1,
                max_size=3))
def test_attention_follows_the_rules(samples):
    """Against the rules spelled out token by token."""
    tokens = [[(number, kind) for number, (kind, length) in enumerate(row) for _ in range(length)] for row in samples]
    longest = max(1, *(len(row) for row in tokens))
    padded = [row + [(-1, CAUSAL)] * (longest - len(row)) for row in tokens]
    splits, kinds = torch.tensor(padded).unbind(dim=2)
    mask = split_mask(splits, kinds)
    for sample, row in enumerate(padded):
        for q, (own, _) in enumerate(row):
            for k, (other, kind) in enumerate(row):
                expected = q == k or (own >= 0 and other >= 0 and (
                    (other < own and kind != NOISE) or (other == own and (kind != CAUSAL or k <= q))))
                assert mask[sample, 0, q, k] == expected


def test_positions():
    """Text one a token, an image one in all, a noised image none, a dropped one as if it were there."""
    batch = pack([[*EDIT, clean(3, 2), text(9)], [Dropped(), Dropped(), *EDIT[2:]]], SPECIAL, MODEL.config)
    assert batch.und_positions[0].tolist() == [0, 0] + [1] * 10 + [2, 3, 4, 5] + [6, 6] + [6, 6] + [7, 8, 9]
    assert batch.gen_positions[0].tolist() == [0] * 6 + [6] * 6 + [6] * 6
    assert batch.und_positions[1, :6].tolist() == [2, 3, 4, 5, 6, 6]
    assert batch.lengths.tolist() == [23, 6]


def test_targets():
    batch = pack(SAMPLES, SPECIAL, MODEL.config)
    assert batch.labels.tolist() == [9, 10, 11, SPECIAL.eos, 15, 16, SPECIAL.eos, 5, 6, 7, 8, SPECIAL.eos]
    inputs = batch.tokens[batch.label_rows, batch.label_columns].tolist()
    assert inputs == [SPECIAL.bos, 9, 10, 11, SPECIAL.bos, 15, 16, SPECIAL.bos, 5, 6, 7, 8]
    assert batch.target.sum(dim=1).tolist() == [4, 6, 0, 0]
    assert batch.sigma[1].tolist() == pytest.approx([0.0] * 6 + [0.4] * 6)


@torch.no_grad()
def test_nothing_sees_a_noised_image():
    """Neither its noise nor its level moves a token outside of it; its clean copy does."""
    def states(first: Split, second: Split) -> torch.Tensor:
        row = [text(5), first, second, text(6, 7), noised(1, 2, 0.5)]
        batch = pack([row], SPECIAL, MODEL.config)
        hidden, velocity = packed_forward(MODEL, batch)
        outside = torch.cat([torch.arange(3), torch.arange(5, batch.tokens.shape[1])])
        return torch.cat([hidden[0, outside].flatten(), velocity[0, -2:].flatten()])

    base = states(noised(2, 2, 0.3), clean(2, 2))
    torch.testing.assert_close(base, states(noised(2, 2, 0.9, seed=7), clean(2, 2)), atol=1e-6, rtol=1e-6)
    assert (base - states(noised(2, 2, 0.3), clean(2, 2, seed=9))).abs().max() > 1e-2


@torch.no_grad()
def test_several_noise_levels_equal_the_replay_layout():
    """Text and W noised copies of its image: the rows that the policy packs for replay and supervised training."""
    policy = small_policy(small_config())
    config, special = policy.model.config, policy.special
    count, channels = config.grid[0] * config.grid[1], config.token_channels
    segments = [torch.tensor([special.bos, *ids, special.eos]) for ids in ([7, 8, 9], [10])]
    clean, noise, sigma = draw(2, 1, count, channels), draw(2, 2, count, channels, seed=1), torch.tensor([0.8, 0.3])
    rows = [[Text(ids), *(Noised(clean[b, 0], noise[b, w], config.grid, float(sigma[w])) for w in range(2))]
            for b, ids in enumerate(segments)]
    hidden, velocity = packed_forward(policy.model, pack(rows, special, config))
    lengths = torch.tensor([len(ids) for ids in segments])
    tokens = torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=special.pad)
    level = sigma[:, None, None]
    expected_hidden, expected = policy.packed(tokens, lengths, (1 - level) * clean + level * noise, sigma)
    torch.testing.assert_close(velocity, expected.flatten(1, 2), atol=1e-5, rtol=1e-5)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(hidden[row, :length], expected_hidden[row, :length], atol=1e-5, rtol=1e-5)


def test_masks_equal_those_of_the_replay_layout():
    """One text, then two noised blocks: the general rules give the special case's mask."""
    lengths, columns, blocks, inside = torch.tensor([3, 2]), 3, 2, 4
    text_splits = torch.where(torch.arange(columns) < lengths[:, None], 0, -1)
    owner = 1 + torch.cat([torch.arange(blocks).repeat_interleave(2), torch.arange(blocks).repeat_interleave(inside)])
    splits = torch.cat([text_splits, owner.expand(2, -1)], dim=1)
    kinds = torch.where(splits > 0, NOISE, CAUSAL)
    real = splits >= 0                                          # what padding sees is nobody's concern
    general, special = split_mask(splits, kinds)[:, 0], packed_mask(lengths, columns, blocks, inside)[:, 0]
    assert torch.equal(general[real], special[real])
    general, special = split_mask(text_splits, torch.zeros_like(text_splits))[:, 0], causal_mask(lengths, columns)[:, 0]
    assert torch.equal(general[text_splits >= 0], special[text_splits >= 0])


def test_gradients_reach_every_part():
    """Look, think, draw: the tower, both expert sets, embeddings and heads learn from one sample; the tables never."""
    model = seeing_model().train()
    with torch.no_grad():
        model.llm2vae.weight.normal_(std=0.3)                   # it starts at zero, which would hide the other gradients
    words, image = packed_losses(model, pack([PROMPTED, EDIT], SPECIAL, model.config))
    (words.mean() + image.mean()).backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {"vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed"}


def test_text_alone_needs_no_latents():
    words, image = losses([WORDS, ANSWER])
    assert words.shape == (8,)
    assert image.shape == (0, CHANNELS)


@pytest.mark.parametrize(("split", "message"), [
    (Clean(draw(4, CHANNELS), (2, 3)), "2x3 tokens must have latents of shape"),
    (Clean(draw(5, CHANNELS), (1, 5)), r"model\.max_latent_size=4, got 1x5"),
    (Noised(draw(4, CHANNELS), draw(1, CHANNELS), (2, 2), 0.5), "noise must have the shape of its latents"),
    (View(torch.zeros(3, 8, 28)), r"model\.vit_max_patches=6"),
])
def test_an_image_that_does_not_fit_is_refused(split, message):
    with pytest.raises(ValueError, match=message):
        losses([[text(5), split]])


def test_a_view_needs_a_vision_tower():
    with pytest.raises(ValueError, match="no vision tower"):
        pack([ANSWER], SPECIAL, seeing_model(vision=None).config)
