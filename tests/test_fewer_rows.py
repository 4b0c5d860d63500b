"""What leaves rows out must not move a bit of the others: thinking that goes on with fewer rows, prompts read once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unigrpo import sampling
from unigrpo.contexts import prefill, put_rows, take_rows
from unigrpo.models.bagel import SpecialTokens, word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.sampling import KEEP_MULTIPLE, still_thinking, think
from unigrpo.worlds.shapes import vocabulary
from unigrpo.worlds.shapes.detect import detect_arrays
from unigrpo.worlds.shapes.scene import BACKGROUND

ROWS, PROMPT, LIMIT = 128, 29, 44  # of a step at scale tiny
MOST = 200                         # images that an evaluation draws at a time


@pytest.fixture(scope="module")
def tiny():
    """A model of scale tiny's shapes, its prompts' tokens, and a stop token that they draw now and then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = word_tokenizer(vocabulary())
    model = MoTModel(MoTConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                               num_attention_heads=4, num_key_value_heads=4, rope_theta=10000.0, initializer_range=0.06,
                               latent_channels=3, latent_patch_size=8, latent_downsample=1, max_latent_size=4,
                               image_size=(32, 32), prediction="clean"))
    tokens = torch.randint(6, len(tokenizer), (MOST, PROMPT))
    special = SpecialTokens.of(tokenizer)
    with torch.no_grad():
        state = sampling.feed(model, prefill(model, tokens, torch.full((MOST,), PROMPT), room=1),
                              torch.full((MOST,), special.bos), torch.ones(MOST, dtype=torch.bool)).mean(dim=0)
        model.language_model.lm_head.weight[special.eos] = 2.2 * state / state.square().sum()
    yield model, special, tokens
    torch.set_num_threads(threads)


@torch.no_grad()
def run(model, special, tokens, **options):
    context = prefill(model, tokens, torch.arange(len(tokens)) % 8 + PROMPT - 7, room=LIMIT + 2)
    uniforms = torch.from_numpy(np.random.default_rng(0).random((len(tokens), LIMIT), dtype=np.float32))
    return think(model, special, context, uniforms, **options), context


@pytest.mark.parametrize(("rows", "options"), [
    (ROWS, {}), (ROWS, {"close": True}), (ROWS, {"greedy": True}), (ROWS, {"top_k": 20, "temperature": 0.7}), (MOST, {}),
    (101, {}), (99, {"close": True})])
def test_rows_that_have_ended_are_left_out_without_a_trace(tiny, monkeypatch, rows, options):
    tiny = (*tiny[:2], tiny[2][:rows])
    fed: list[int] = []
    own = sampling.feed
    monkeypatch.setattr(sampling, "feed", lambda model, context, token, rows: fed.append(len(token)) or own(
        model, context, token, rows))
    segment, context = run(*tiny, **options)
    if not options.get("greedy"):
        assert min(fed) <= rows // 2, fed
    monkeypatch.setattr(sampling, "KEEP_SHARE", 0.0)
    wanted, whole = run(*tiny, **options)
    assert fed[-1] == rows
    for name in ("tokens", "mask", "rollout_log_probs", "entropy"):
        assert torch.equal(getattr(segment, name), getattr(wanted, name)), name
    assert context.used == whole.used
    assert torch.equal(context.mask, whole.mask)
    assert torch.equal(context.positions, whole.positions)
    seen = whole.mask[:, None, :, None]
    for got, full in zip((*context.keys, *context.values), (*whole.keys, *whole.values), strict=True):
        assert torch.equal(got * seen, full * seen)
        assert torch.isfinite(got).all()  # a masked column that is not would spoil the sum all the same


def test_few_rows_stay_together():
    feeding = torch.zeros(64, dtype=torch.bool)
    feeding[[3, 17, 40]] = True
    kept = still_thinking(feeding)
    assert len(kept) == KEEP_MULTIPLE
    assert {3, 17, 40} < set(kept.tolist())
    assert kept.tolist() == sorted(kept.tolist())
    assert still_thinking(torch.ones(64, dtype=torch.bool)) is None
    assert still_thinking(feeding[:KEEP_MULTIPLE]) is None


@torch.no_grad()
def test_a_prompt_that_is_read_once_gives_its_siblings_the_same_bits(tiny):
    model, _, tokens = tiny
    some, lengths = tokens[:16], torch.arange(16) % 5 + PROMPT - 4
    rows = torch.arange(16).repeat_interleave(8)
    once, each = take_rows(prefill(model, some, lengths), rows, 3), prefill(model, some[rows], lengths[rows], room=3)
    seen = each.mask[:, None, :, None]
    for got, wanted in zip((*once.keys, *once.values), (*each.keys, *each.values), strict=True):
        assert torch.equal(got * seen, wanted * seen)
    taken = take_rows(once, torch.tensor([5, 2]), 1)
    sampling.feed(model, taken, torch.tensor([7, 8]), torch.tensor([True, False]))
    put_rows(once, torch.tensor([5, 2]), taken)
    assert once.used == PROMPT + 1
    assert once.mask[:, PROMPT].nonzero().flatten().tolist() == [5]
    assert torch.equal(once.keys[1][5, :, PROMPT], taken.keys[1][0, :, PROMPT])


def test_a_batch_that_was_looked_at_is_remembered_by_its_values():
    images = np.full((2, 32, 32, 3), BACKGROUND, dtype=np.float32)
    first = detect_arrays(images)
    assert detect_arrays(images.copy()) is first
    images[0, 8:16, 8:16] = (1.0, 0.0, 0.0)  # in place: another batch
    second = detect_arrays(images)
    assert (first.image.tolist(), second.image.tolist()) == ([], [0])
    assert detect_arrays(np.full((2, 32, 32, 3), BACKGROUND, dtype=np.float32)).image.tolist() == []
