"""Drawing a grid: contexts shared between cells, fewer images in the controls, halved thinking, and the loss on a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import small_config, small_policy, small_prompts

from unigrpo.evaluate import GRID, cell_images, draw_grid, grid_images, halved, text_losses, write_thoughts
from unigrpo.evaluation.outcomes import HEADLINE
from unigrpo.models.bagel import encode_segments


@pytest.fixture(scope="module")
def config():
    return small_config(evaluate={"images_per_prompt": 3, "control_images": 1})


@pytest.fixture(scope="module")
def policy(config):
    return small_policy(config)


def drawn(policy, config, grid, **sizes):
    """(cfg, cell, prompt id, sample) -> (image, text)."""
    batches = draw_grid(policy, small_prompts(3), config, grid, seed=0, **sizes)
    return {(b.cfg, b.cell, record.id, sample): (b.images[i], b.texts[i]) for b in batches
            for i, (record, sample) in enumerate(b.rows)}


def test_cells_of_one_context_are_the_cells_drawn_alone(policy, config):
    together = drawn(policy, config, GRID, samples=2, batch=4)
    assert len(together) == len(GRID) * 3 * 2
    for cell in GRID:
        for key, (image, text) in drawn(policy, config, [cell], samples=2, batch=4).items():
            assert together[key][1] == text
            np.testing.assert_array_equal(together[key][0], image)


def test_controls_draw_the_first_of_the_same_images(policy, config):
    whole = drawn(policy, config, GRID, samples=3, batch=64)
    fewer = drawn(policy, config, GRID, samples=3, batch=64, control_samples=1)
    counts = {cell: sum(key[:2] == cell for key in fewer) for cell in GRID}
    assert counts == {cell: 3 * cell_images(config, cell) for cell in GRID}
    assert sum(counts.values()) == grid_images(config.model_copy(update={
        "evaluate": config.evaluate.model_copy(update={"prompts": 3})}))
    assert counts[HEADLINE] == 9
    for key, (image, text) in fewer.items():
        assert whole[key][1] == text
        np.testing.assert_allclose(whole[key][0], image, atol=2e-5)


def test_a_halved_thinking_is_the_first_half_and_ends(policy, config):
    own = write_thoughts(policy, [(p, 0) for p in small_prompts(6)], config, seed=0, batch=6)
    cut = halved(policy, own)
    for row in range(6):
        words, kept = own.texts[row].split(), cut.texts[row].split()
        assert kept == words[:len(kept)]
        assert len(kept) == max(min(1, len(words)), len(words) // 2)
        assert cut.tokens[row, cut.lengths[row] - 1] == policy.special.eos


def test_the_loss_on_a_text_is_that_of_its_tokens_and_stop(policy, config):
    prompts, texts = small_prompts(5), [p.prompt for p in reversed(small_prompts(5))]
    found = text_losses(policy, prompts, texts, batch=5)
    assert text_losses(policy, prompts, texts, batch=2) == {
        name: (count, pytest.approx(nats, rel=1e-5)) for name, (count, nats) in found.items()}
    for prompt, text in zip(prompts, texts, strict=True):
        context, length = policy.encode([prompt])
        target, _ = encode_segments(policy.tokenizer, [(text,)])
        tokens = torch.cat([context, target], dim=1)
        with torch.no_grad():
            hidden, _ = policy.packed(tokens, torch.tensor([tokens.shape[1]]), None, torch.empty(0))
            log_probs = policy.model.logits(hidden).log_softmax(dim=-1)[0]
        nats = -sum(float(log_probs[i - 1, tokens[0, i]]) for i in range(int(length) + 1, tokens.shape[1]))
        assert found[prompt.id] == (target.shape[1] - 1, pytest.approx(nats, rel=1e-4))
