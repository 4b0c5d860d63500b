"""Contexts of text and images: positions, masks and columns by hand, the table of guidance, chunks within a token budget."""

from __future__ import annotations

import pytest
import torch
from small import reading_policy, sample, small_config, small_policy, small_prompts

from unigrpo.contexts import (
    ImagePart,
    TextPart,
    build_contexts,
    extend_image,
    extend_latents,
    extend_text,
    prefill,
    read_system_prompt,
    take_rows,
)
from unigrpo.models.packing import Clean, Noised, Text, View, pack, packed_forward
from unigrpo.rollout import BagelPolicy
from unigrpo.sampling import Guidance, denoise, image_velocity, think

WORDS = ["plan", "first", "a", "red", "circle", "make", "it", "blue", "please"]


@pytest.fixture(scope="module")
def policy():
    """A model that reads images, with weights far from zero."""
    return reading_policy(WORDS, latent_channels=3, latent_patch_size=4, latent_downsample=1, image_size=(8, 12))


def text(policy, *rows) -> TextPart:
    tokens = [torch.tensor([policy.special.bos, *policy.tokenizer(row)["input_ids"], policy.special.eos]) for row in rows]
    return TextPart(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), torch.tensor([len(t) for t in tokens]))


def views(*sizes):
    rng = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=rng) * 2 - 1 for size in sizes]


def clean(rows):
    return torch.randn(rows, 6, 48, generator=torch.Generator().manual_seed(2))


def test_positions_and_columns_by_hand(policy):
    """Text +1 a token, an image +1 as a whole; columns and positions are counted apart, and padding holds neither."""
    context = prefill(policy.model, *vars(text(policy, "plan", "plan first a")).values(), room=30)
    assert context.positions.tolist() == [3, 5]
    assert context.used == 5
    assert context.mask[:, :5].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    extend_latents(policy.model, context, policy.markers, clean(2), (2, 3))
    assert context.positions.tolist() == [4, 6]
    assert context.used == 5 + 8
    extend_image(policy.model, context, policy.markers, policy.model.embed_image(views((8, 8), (4, 8))))
    assert context.positions.tolist() == [5, 7]
    assert context.used == 13 + 6
    assert context.mask[:, 13:19].int().tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    part = text(policy, "it", "red circle")
    extend_text(policy.model, context, part.tokens, part.lengths)
    assert context.positions.tolist() == [8, 11]
    assert context.used == 19 + 4
    assert not context.mask[:, context.used:].any()


@torch.no_grad()
def test_appended_blocks_equal_one_packed_forward(policy):
    """Editing context, row by row of different lengths, against the forward that training uses."""
    pictures, prompts, sigma = views((8, 8), (8, 12)), ["make it blue", "red"], 0.7
    noise = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(3))
    parts = [ImagePart(clean(2), (2, 3), pictures), text(policy, *prompts)]
    contexts = build_contexts(policy.model, policy.markers, parts)
    context = take_rows(contexts.conditional, torch.arange(2), 8)
    cached = image_velocity(policy.model, policy.markers, context, noise, torch.tensor(sigma), grid=(2, 3))
    rows = [[Clean(clean(2)[i], (2, 3)), View(pictures[i]), Text(parts[1].tokens[i, :parts[1].lengths[i]]),
             Noised(torch.zeros(6, 48), noise[i] / sigma, (2, 3), sigma)] for i in range(2)]
    batch = pack(rows, policy.special, policy.model.config)
    _, packed = packed_forward(policy.model, batch)
    for row in range(2):
        torch.testing.assert_close(packed[row][batch.target[row]], cached[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_in_two_parts_equals_text_at_once(policy):
    """Causal over the cache: appending a segment gives the keys of one prefill, whatever padding lies between."""
    first, second = text(policy, "plan", "plan first a"), text(policy, "red circle it", "blue")
    context = prefill(policy.model, first.tokens, first.lengths, room=second.tokens.shape[1])
    states = extend_text(policy.model, context, second.tokens, second.lengths)
    for row in range(2):
        ids = torch.cat([first.tokens[row, :first.lengths[row]], second.tokens[row, :second.lengths[row]]])[None]
        alone = policy.model.empty_context(1, ids.shape[1])
        expected = extend_text(policy.model, alone, ids, torch.tensor([ids.shape[1]]))
        torch.testing.assert_close(states[row, :second.lengths[row]], expected[0, first.lengths[row]:], atol=1e-5, rtol=1e-4)
        for mine, theirs in zip(context.keys + context.values, alone.keys + alone.values, strict=True):
            torch.testing.assert_close(mine[row][:, context.mask[row]], theirs[0], atol=1e-5, rtol=1e-4)


def test_contexts_of_guidance_by_the_table(policy):
    """Which tokens each branch holds, with and without image, with and without thinking."""
    system, prompt = text(policy, "plan first"), text(policy, "make it blue")
    image = ImagePart(clean(1), (2, 3), views((8, 8)))
    sizes = {"system": 4, "image": (6 + 2) + (4 + 2), "prompt": 5}

    def used(parts, thinking):
        found = build_contexts(policy.model, policy.markers, parts, thinking=thinking)
        return [c if c is None else c.used for c in (found.conditional, found.text_dropped, found.image_dropped)]

    s, i, p = sizes.values()
    assert used([prompt], False) == [p, 0, None]
    assert used([system, prompt], True) == [s + p, s, s + p]
    assert used([image, prompt], False) == [i + p, i, p]
    assert used([system, image, prompt], True) == [s + i + p, s + i, s + p]
    assert used([prompt, image], False) == [p + i, p + i, p]                # retaken behind a later image
    rope = build_contexts(policy.model, policy.markers, [image, prompt])
    assert [int(c.positions) for c in (rope.conditional, rope.text_dropped, rope.image_dropped)] == [2 + p, 2, p]


def test_an_image_that_is_only_looked_at_has_one_block(policy):
    contexts = build_contexts(policy.model, policy.markers, [ImagePart(views=views((8, 8))), text(policy, "red")], guided=False)
    assert (contexts.conditional.used, int(contexts.conditional.positions)) == (6 + 3, 1 + 3)
    assert contexts.text_dropped is None
    assert contexts.image_dropped is None
    with pytest.raises(ValueError, match="needs latents, views"):
        build_contexts(policy.model, policy.markers, [ImagePart(views=None), text(policy, "red")])


@torch.no_grad()
def test_a_missing_image_branch_costs_no_forward_and_changes_nothing(policy):
    """Without image and thinking the image-dropped context is the conditional one: its velocity stands in."""
    contexts = build_contexts(policy.model, policy.markers, [text(policy, "red circle")])
    noise = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(5))
    sigmas = torch.tensor([1.0, 0.8, 0.3, 0.0])
    one, calls = torch.zeros(1, dtype=torch.int64), []
    hook = policy.model.language_model.model.norm_moe_gen.register_forward_hook(lambda *_: calls.append(1))

    def final(image_context):
        calls.clear()
        guidance = Guidance(take_rows(contexts.text_dropped, one, 8), 3.0, "channel", (0.5, 1.0), image_context, 1.5)
        drawn = denoise(policy.model, policy.markers, take_rows(contexts.conditional, one, 8), noise, sigmas,
                        guidance=guidance).final_latents
        return drawn

    spent = final(take_rows(contexts.conditional, one, 8))
    assert len(calls) == 3 + 2 * 2
    torch.testing.assert_close(final(None), spent, atol=1e-6, rtol=0)
    assert len(calls) == 3 + 2
    hook.remove()


@torch.no_grad()
def test_norms_are_per_sample(policy):
    """A sample's guided image does not depend on its neighbours in the batch, under every norm."""
    contexts = build_contexts(policy.model, policy.markers, [text(policy, "red circle", "blue")])
    noise = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 3.0])[:, None, None]
    sigmas = torch.tensor([1.0, 0.8, 0.3, 0.0])

    def final(rows, renorm):
        rows = torch.tensor(rows)
        guidance = Guidance(take_rows(contexts.text_dropped, rows, 8), 3.0, renorm, (0.0, 1.0))
        return denoise(policy.model, policy.markers, take_rows(contexts.conditional, rows, 8), noise[rows], sigmas,
                       guidance=guidance).final_latents

    for renorm in ("global", "channel", "text_channel"):
        both = final([0, 1], renorm)
        for row in (0, 1):
            torch.testing.assert_close(final([row], renorm)[0], both[row], atol=1e-5, rtol=1e-5)


def test_a_thinking_cut_short_is_closed_where_asked(policy):
    """Positions and columns: start token, the limit's tokens, and the stop token fed behind them."""
    part, never = text(policy, "red", "red circle"), torch.zeros(2, 3)
    with torch.no_grad():
        for close, extra in ((False, 0), (True, 1)):
            context = prefill(policy.model, part.tokens, part.lengths, room=5)
            head = policy.model.language_model.lm_head.weight
            kept = head[policy.special.eos].clone()
            head[policy.special.eos] = 0
            segment = think(policy.model, policy.special, context, never, greedy=True, close=close)
            head[policy.special.eos] = kept
            assert not (segment.tokens == policy.special.eos).any()
            assert segment.lengths.tolist() == [3, 3]
            assert context.positions.tolist() == [3 + 4 + extra, 4 + 4 + extra]


# ------------------------------------------------------------------------------------------------------- token budget


@pytest.mark.parametrize("guidance", [None, (3.0, "global", (0.0, 1.0))])
def test_a_token_budget_moves_no_result(guidance):
    """Chunks of one row, of a few that split groups, and of all: noise exactly, log-probs to rounding."""
    config = small_config(rollout={"max_thinking_tokens": 10})
    policy = small_policy(config, guidance=guidance)
    whole = sample(policy, config, small_prompts(3), group_size=4)
    counts = []
    for budget in (1, 200, 330, 100_000):
        changed = config.model_copy(update={"rollout": config.rollout.model_copy(update={"token_budget": budget})})
        prefix = whole.prompt_tokens.shape[1]
        counts.append(len(policy.budgeted(12, prefix, changed.rollout)))
        parts = sample(policy, changed, small_prompts(3), group_size=4)
        assert torch.equal(parts.text.tokens, whole.text.tokens)
        assert torch.equal(parts.text.mask, whole.text.mask)
        torch.testing.assert_close(parts.text.rollout_log_probs, whole.text.rollout_log_probs, atol=1e-5, rtol=0)
        torch.testing.assert_close(parts.image.rollout_log_probs, whole.image.rollout_log_probs, atol=1e-5, rtol=0)
        torch.testing.assert_close(parts.image.final_latents, whole.image.final_latents, atol=1e-4, rtol=1e-4)
        if 0 in whole.image.steps.tolist():
            assert torch.equal(parts.image.latents[:, 0], whole.image.latents[:, 0])
        assert parts.cost == whole.cost
        assert parts.image.sigmas.shape == whole.image.sigmas.shape
        replay = policy.replay(parts)
        torch.testing.assert_close(replay.text_log_probs[parts.text.mask], parts.text.rollout_log_probs[parts.text.mask],
                                   atol=1e-5, rtol=0)
    assert counts[0] == 12
    assert counts[-1] == 1
    assert 1 < counts[2] <= counts[1] < 12


def test_a_token_budget_bounds_the_cache(monkeypatch):
    """All columns that a chunk's contexts reserve, over all its rows, are within the budget."""
    config = small_config(rollout={"max_thinking_tokens": 10, "token_budget": 330})
    policy = small_policy(config, guidance=(3.0, "global", (0.0, 1.0)))
    reserved = []

    def spy(function):
        def spied(*args, **kwargs):
            context = function(*args, **kwargs)
            reserved.append(context.mask.numel())
            return context

        return spied

    monkeypatch.setattr("unigrpo.rollout.take_rows", spy(take_rows))
    monkeypatch.setattr(policy, "dropped_context", spy(policy.dropped_context))
    sample(policy, config, small_prompts(3), group_size=4)
    chunks = [a + b for a, b in zip(reserved[::2], reserved[1::2], strict=True)]
    assert len(chunks) > 1
    assert 165 < max(chunks) <= 330


def test_bfloat16_weights_keep_a_float32_trajectory():
    """States, actions and log-probs are float32, and rollout and replay agree to the weights' precision."""
    config = small_config(rollout={"max_thinking_tokens": 10})
    policy = small_policy(config)
    policy.model.to(torch.bfloat16)
    rollouts = sample(policy, config, small_prompts(2), group_size=4)
    text, image = rollouts.text, rollouts.image
    for value in (text.rollout_log_probs, text.entropy, image.latents, image.next_latents, image.final_latents,
                  image.rollout_log_probs, image.sigmas):
        assert value.dtype == torch.float32
    replay = policy.replay(rollouts)
    assert replay.velocities.dtype == replay.text_log_probs.dtype == torch.float32
    gap = (replay.text_log_probs - text.rollout_log_probs)[text.mask].abs()
    assert gap.max() < 0.2


# -------------------------------------------------------------------------------------------------- the system prompt


def test_the_system_prompt_is_read_as_data(tmp_path):
    """Never executed; concatenated literals are one constant; what is missing is named."""
    file = tmp_path / "inferencer.py"
    file.write_text("raise SystemExit('executed')\nimport nowhere\nGEN_THINK_SYSTEM_PROMPT = '''Plan \n'''  'first'\n")
    assert read_system_prompt(file) == "Plan \nfirst"
    with pytest.raises(ValueError, match="must assign OTHER"):
        read_system_prompt(file, "OTHER")
    with pytest.raises(ValueError, match="must be a file"):
        read_system_prompt(tmp_path / "none.py")
    file.write_text("GEN_THINK_SYSTEM_PROMPT = open('x').read()\n")
    with pytest.raises(ValueError, match="plain string"):
        read_system_prompt(file)
    file.write_text("GEN_THINK_SYSTEM_PROMPT = 'plan first then draw'\n")
    config = small_config()
    policy = BagelPolicy(*(lambda p: (p.model, p.tokenizer))(small_policy(config)), system_prompt=f"@{file}")
    assert policy.system_prompt == "plan first then draw"
