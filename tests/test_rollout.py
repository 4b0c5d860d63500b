"""Sampling and replay: one trajectory whatever the batch, and replay sees what sampling saw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import draw, sample, small_config, small_policy, small_prompts

from unigrpo.evaluate import shuffled_rows
from unigrpo.flow.guidance import model_calls
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.bagel import concatenate_rows, encode_segments, packed_mask, word_tokenizer
from unigrpo.models.mot import patchify, unpatchify
from unigrpo.rollout import prefill, think
from unigrpo.update import score


@pytest.fixture(scope="module")
def config():
    return small_config(rollout={"max_thinking_tokens": 10})


@pytest.fixture(scope="module")
def policy(config):
    return small_policy(config)


@pytest.fixture(scope="module")
def rollouts(policy, config):
    return sample(policy, config, small_prompts(4))


def test_lengths_vary_and_some_rows_stop(rollouts, config):
    """The fixture exercises what the tests below are about: ended, running and truncated rows in one batch."""
    lengths = rollouts.text.lengths
    assert lengths.min() < lengths.max() == config.rollout.max_thinking_tokens
    stopped = rollouts.text.tokens.gather(1, (lengths - 1)[:, None])[:, 0] == rollouts.stop_token
    assert 0 < stopped.sum() < len(rollouts)


def test_one_trajectory_whatever_the_batch(policy, config, rollouts):
    """Draws are keyed: alone, or reversed among others, a rollout is the same to rounding and its noise exactly."""
    prompts = small_prompts(4)
    backwards = sample(policy, config, prompts[::-1])
    group = config.rollout.group_size
    for i, prompt in enumerate(prompts):
        rows = torch.arange(i * group, (i + 1) * group)
        alone = sample(policy, config, [prompt])
        for other, at in ((alone, torch.arange(group)), (backwards, (3 - i) * group + torch.arange(group))):
            for row, there in zip(rows, at, strict=True):
                keep = rollouts.text.mask[row]
                assert torch.equal(rollouts.text.tokens[row][keep], other.text.tokens[there][other.text.mask[there]])
                torch.testing.assert_close(rollouts.text.rollout_log_probs[row][keep],
                                           other.text.rollout_log_probs[there][other.text.mask[there]], atol=1e-5, rtol=0)
            torch.testing.assert_close(rollouts.image.final_latents[rows], other.image.final_latents[at], atol=1e-4, rtol=1e-4)


def test_noise_is_exactly_the_same_at_batch_1_and_64(config):
    """The first state is the keyed initial noise itself, and siblings share it only where the config says so."""
    prompts = small_prompts(16)
    settings = config.rollout.model_copy(update={"window": config.rollout.window.model_copy(
        update={"kind": "all", "range": (0, 2)})})
    changed = config.model_copy(update={"rollout": settings})
    policy = small_policy(changed)
    many = sample(policy, changed, prompts, group_size=4)
    assert len(many) == 64
    one = sample(policy, changed, prompts[5:6], group_size=4)
    assert torch.equal(many.image.latents[20:24, 0], one.image.latents[:, 0])
    assert torch.equal(many.image.latents[20, 0], many.image.latents[21, 0])
    apart = changed.model_copy(update={"rollout": settings.model_copy(update={"shared_noise": False})})
    separate = sample(policy, apart, prompts[5:6], group_size=4)
    assert not torch.equal(separate.image.latents[0, 0], separate.image.latents[1, 0])


def test_replay_equals_rollout(policy, config, rollouts):
    """Unchanged weights: replayed log-probs are the recorded ones, text and image; the best single test here."""
    replay = policy.replay(rollouts)
    torch.testing.assert_close(replay.text_log_probs[rollouts.text.mask],
                               rollouts.text.rollout_log_probs[rollouts.text.mask], atol=1e-5, rtol=0)
    move = score(rollouts.image, replay.velocities, config)
    torch.testing.assert_close(move.log_prob, rollouts.image.rollout_log_probs, atol=1e-6, rtol=1e-6)


def test_replay_equals_rollout_with_guidance(config):
    guided = small_policy(config, guidance=(3.0, "global", (0.0, 1.0)))
    rollouts = sample(guided, config, small_prompts(2))
    assert rollouts.guidance_scale == 3.0
    move = score(rollouts.image, guided.replay(rollouts).velocities, config)
    torch.testing.assert_close(move.log_prob, rollouts.image.rollout_log_probs, atol=1e-6, rtol=1e-6)
    plain = sample(small_policy(config), config, small_prompts(2))
    assert not torch.allclose(plain.image.final_latents, rollouts.image.final_latents, atol=1e-3)
    assert rollouts.cost["model_calls"] == 2 * plain.cost["model_calls"]


def test_the_cost_counts_the_second_call_only_where_guidance_acts(config):
    """An interval of noise levels leaves steps unguided."""
    interval, sampling = (0.4, 0.9), config.rollout
    rollouts = sample(small_policy(config, guidance=(3.0, "global", interval)), config, small_prompts(2))
    calls = model_calls(sigma_schedule(sampling.num_steps, sampling.shift), interval)
    assert sampling.num_steps < calls < 2 * sampling.num_steps
    assert rollouts.cost["model_calls"] == calls * len(rollouts.prompts)


def test_decoded_ids_equal_teacher_forced_ids(policy, config, rollouts):
    """Greedy decoding over the cache picks what a full forward over the decoded ids would pick, the stop token included."""
    tokens, lengths = policy.encode(small_prompts(4))
    context = prefill(policy.model, tokens, lengths, room=11)
    segment = think(policy.model, policy.special, context, torch.zeros(4, 10), greedy=True)
    ids, total = concatenate_rows(tokens, lengths, torch.cat([torch.full((4, 1), policy.special.bos), segment.tokens], dim=1),
                                  segment.lengths + 1, policy.special.pad)
    hidden, _ = policy.packed(ids, total, None, torch.zeros(0))
    for row in range(4):
        start, count = int(lengths[row]), int(segment.lengths[row])
        greedy = policy.model.logits(hidden[row, start:start + count]).argmax(dim=-1)
        assert torch.equal(greedy, segment.tokens[row, :count])


def test_thinking_context_holds_the_stop_token(policy, config, rollouts):
    """After decoding, the cache equals a fresh prefill of prompt and sampled ids: the stop token is in the context."""
    prompts = small_prompts(4)
    tokens, lengths = policy.encode(prompts)
    context = prefill(policy.model, tokens, lengths, room=11)
    segment = think(policy.model, policy.special, context, torch.rand(4, 10, generator=torch.Generator().manual_seed(1)))
    ids, total = concatenate_rows(tokens, lengths, torch.cat([torch.full((4, 1), policy.special.bos), segment.tokens], dim=1),
                                  segment.lengths + 1, policy.special.pad)
    fresh = prefill(policy.model, ids, total)
    assert torch.equal(context.positions, fresh.positions)
    for layer in range(policy.model.config.num_hidden_layers):
        for row in range(4):
            decoded = context.keys[layer][row][:, context.mask[row]]
            torch.testing.assert_close(decoded, fresh.keys[layer][row][:, :int(total[row])], atol=1e-5, rtol=1e-4)


def test_padding_never_matters(policy, rollouts):
    """Other ids where the mask is off, and more padding, leave every log-prob and velocity as it was."""
    text = rollouts.text
    junk = torch.where(text.mask, text.tokens, 7)
    wider = replace(text, tokens=torch.nn.functional.pad(junk, (0, 3), value=9),
                    mask=torch.nn.functional.pad(text.mask, (0, 3)),
                    rollout_log_probs=torch.nn.functional.pad(text.rollout_log_probs, (0, 3)))
    first = policy.replay(rollouts)
    second = policy.replay(rollouts.with_segments([wider, rollouts.image]))
    torch.testing.assert_close(second.text_log_probs[:, :-3], first.text_log_probs, atol=1e-6, rtol=0)
    torch.testing.assert_close(second.velocities, first.velocities, atol=1e-5, rtol=1e-5)


def test_gradient_of_the_image_reaches_the_context_only_if_asked(config):
    prompts = small_prompts(2)
    for full in (True, False):
        policy = small_policy(config, context_gradient=full)
        rollouts = sample(policy, config, prompts)
        replay = policy.replay(rollouts)
        replay.velocities.square().sum().backward()
        weight = policy.model.language_model.model.layers[0].mlp.down_proj.weight.grad
        reference = small_policy(config)
        torch.testing.assert_close(replay.velocities, reference.replay(rollouts).velocities, atol=1e-5, rtol=1e-4)
        # Markers use the understanding experts too, so the gradient is smaller, not zero, where it stops at the context.
        norm = weight.norm()
        if full:
            with_context = norm
        else:
            assert 0 < norm < with_context
    key = "language_model.model.layers.0.self_attn.k_proj.weight"
    assert dict(policy.model.named_parameters())[key].grad is not None


def test_masks_by_hand():
    """Two text tokens (one real in row 1), two blocks of one latent: what each may see."""
    mask = packed_mask(torch.tensor([2, 1]), 2, 2, 1)[:, 0].int()
    #        t0 t1 | m0 m0 m1 m1 | z0 z1
    assert mask[0].tolist() == [[1, 0, 0, 0, 0, 0, 0, 0],
                                [1, 1, 0, 0, 0, 0, 0, 0],
                                [1, 1, 1, 1, 0, 0, 1, 0],
                                [1, 1, 1, 1, 0, 0, 1, 0],
                                [1, 1, 0, 0, 1, 1, 0, 1],
                                [1, 1, 0, 0, 1, 1, 0, 1],
                                [1, 1, 1, 1, 0, 0, 1, 0],
                                [1, 1, 0, 0, 1, 1, 0, 1]]
    assert mask[1, 2].tolist() == [1, 0, 1, 1, 0, 0, 1, 0]


def test_patches_round_trip_in_official_order():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    tokens = patchify(images, 2)
    assert tokens[0, 1].tolist() == [images[0, c, r, k].item() for r in (0, 1) for k in (2, 3) for c in range(3)]
    assert torch.equal(unpatchify(tokens, 2, (2, 2)), images)


def test_words_outside_the_vocabulary_are_named():
    tokenizer = word_tokenizer(["red", "circle"])
    with pytest.raises(ValueError, match=r"teapot.*vocabulary|vocabulary.*teapot"):
        encode_segments(tokenizer, [["red teapot"]])


def test_concatenation_by_hand():
    tokens, lengths = concatenate_rows(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]),
                                       torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([3, 2]), 0)
    assert tokens.tolist() == [[1, 2, 4, 5, 6], [3, 7, 8, 0, 0]]
    assert lengths.tolist() == [5, 3]


def test_shuffled_thinking_is_always_another_prompts():
    rows = np.array(shuffled_rows(7, 3, 0)).reshape(7, 3)
    assert sorted(rows.flatten().tolist()) == list(range(21))
    assert (rows // 3 != np.arange(7)[:, None]).all()
    assert (rows % 3 == np.arange(3)).all()


def test_a_sliding_window_moves_with_the_training_step(config):
    """Place by place, one training step each, and round again; siblings share it."""
    window = config.rollout.window.model_copy(update={"kind": "sliding", "size": 2, "range": (0, 3)})
    sliding = config.model_copy(update={"rollout": config.rollout.model_copy(update={"window": window})})
    policy = small_policy(sliding)
    steps = [policy.generate(small_prompts(1), group_size=2, sampling=sliding.rollout, step=step,
                             generators=lambda purpose, *key: draw(purpose, 0, *key)).image.steps.tolist() for step in range(3)]
    assert steps == [[0, 1], [1, 2], [0, 1]]
