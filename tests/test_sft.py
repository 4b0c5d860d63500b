"""Supervised batches, losses and the drift gate."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from small import small_config, small_policy

from unigrpo.seeding import generator
from unigrpo.sft import Example, accumulate, collate, micro_batches, supervised_factor, supervised_losses
from unigrpo.stages import sft as sft_stage
from unigrpo.stages.base import caption_batch
from unigrpo.stages.sft import heldout_image_loss, warmup_batch
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes import parse_plan, sample_record, sft_thinking

IMAGES = np.zeros((3, 32, 32, 3), np.float32)


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def policy(config):
    return small_policy(config)


def test_only_the_target_segment_is_predicted_and_its_end_token_too(policy):
    examples = [Example(("plan first",), "draw a red circle top ."), Example(("red circle",), None), Example((), None)]
    batch = collate(policy, examples, IMAGES, generator(0, "x"), images_per_text=2)
    # [start plan first end] [start draw a red circle top . end]: 7 predicted tokens, the last of them the end token.
    assert batch.lengths.tolist() == [12, 4, 0]
    assert batch.targets[0].nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert batch.tokens[0, 11] == policy.special.eos
    assert not batch.targets[1:].any()
    assert batch.noise.shape == (3, 2, 16, 192)
    assert ((batch.sigma > 0) & (batch.sigma < 1)).all()


def test_parts_of_a_batch_add_up_to_it(policy):
    """Losses, gradients and metrics of micro-batches, weighted by their shares, are those of the whole batch."""
    examples = [Example(("plan first",), "draw a red circle top ."), Example((), None), Example(("red circle",), "blue square"),
                Example((), "blue square"), Example((), None)]
    images = generator(0, "pixels").random((5, 32, 32, 3), dtype=np.float32)
    batch = collate(policy, examples, images, generator(0, "x"), images_per_text=2)
    summed: dict[int | None, tuple[float, dict[str, float], torch.Tensor]] = {}
    for size in (None, 1, 2):
        policy.model.zero_grad()
        metrics: dict[str, float] = defaultdict(float)
        total = 0.0
        for part, text_share, image_share in micro_batches(batch, size):
            text, image, measured = supervised_losses(policy, part)
            loss = text_share * text + image_share * image
            loss.backward()
            total += loss.item()
            accumulate(metrics, measured, text_share, image_share)
        gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        summed[size] = total, dict(metrics), gradient
    policy.model.zero_grad()
    for size in (1, 2):
        assert summed[size][0] == pytest.approx(summed[None][0], rel=1e-5)
        assert summed[size][1] == pytest.approx(summed[None][1], rel=1e-5)
        torch.testing.assert_close(summed[size][2], summed[None][2], atol=1e-6, rtol=1e-4)


def test_losses_by_hand(policy):
    """Cross-entropy and squared error recomputed from the model's outputs, one sample at a time, without padding."""
    examples = [Example(("plan first",), "draw a red circle top ."), Example((), "blue square")]
    images = generator(0, "pixels").random((2, 32, 32, 3), dtype=np.float32)
    batch = collate(policy, examples, images, generator(0, "x"), images_per_text=2)
    text, image, _ = supervised_losses(policy, batch)
    losses, errors = [], []
    for row in range(2):
        count = int(batch.lengths[row])
        sigma = batch.sigma[row][:, None, None]
        latents = (1 - sigma) * batch.clean[row] + sigma * batch.noise[row]
        hidden, velocity = policy.packed(batch.tokens[row:row + 1, :count], batch.lengths[row:row + 1], latents[None],
                                         batch.sigma[row:row + 1])
        logits = policy.model.logits(hidden[0])
        for column in range(1, count):
            if batch.targets[row, column]:
                losses.append(-logits[column - 1].log_softmax(-1)[batch.tokens[row, column]])
        errors.append((velocity[0] - (batch.noise[row] - batch.clean[row])).square())
    torch.testing.assert_close(text, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(image, torch.stack(errors).mean(), atol=1e-4, rtol=1e-4)


def test_dropped_condition_sees_no_text(policy):
    """A sample without text gives the same velocity whatever stands in its padding."""
    examples = [Example((), None), Example((), "red circle top .")]
    batch = collate(policy, examples, IMAGES[:2], generator(0, "x"), images_per_text=1)
    latents = batch.noise
    _, first = policy.packed(batch.tokens, batch.lengths, latents, batch.sigma)
    other = batch.tokens.clone()
    other[0] = 9
    _, second = policy.packed(other, batch.lengths, latents, batch.sigma)
    torch.testing.assert_close(first[0], second[0], atol=1e-5, rtol=1e-5)


def records(count: int) -> list[PromptRecord]:
    out = []
    for i in range(count):
        rng = generator(0, "records", i)
        record = sample_record(rng)
        out.append(PromptRecord(**{**vars(record), "thinking": sft_thinking(record, rng, 0.5, 0.5)[0], "split": "sft"}))
    return out


def test_warmup_mixture(policy, config):
    """Shares of direct and dropped samples are those of params; thinking is the record's."""
    settings = config.sft.model_copy(update={"texts_per_step": 400, "direct_share": 0.25, "condition_dropout": 0.1})
    changed = config.model_copy(update={"sft": settings})
    data = records(40)
    assert all(parse_plan(r.thinking) for r in data)
    batch = warmup_batch(policy, data, changed, 0)
    trained = batch.targets.any(dim=1).float().mean().item()
    assert trained == pytest.approx(0.75 * 0.9, abs=0.07)
    assert torch.equal(warmup_batch(policy, data, changed, 3).tokens, warmup_batch(policy, data, changed, 3).tokens)
    assert not torch.equal(warmup_batch(policy, data, changed, 3).noise, warmup_batch(policy, data, changed, 4).noise)


def test_base_batches_are_keyed_by_step(policy, config):
    first, again, other = (caption_batch(policy, config, step) for step in (1, 1, 2))
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.clean, other.clean)


def test_learning_rate_rises_and_falls(config):
    settings = config.base.model_copy(update={"steps": 101, "warmup": 10, "final_lr_share": 0.1})
    factors = [supervised_factor(step, settings) for step in range(101)]
    assert factors[0] < 0.1
    assert max(factors) == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.1)


def test_drift_gate_refuses_a_worse_checkpoint(policy, config, tmp_path, monkeypatch):
    """A warm-up that draws worse than its base leaves no checkpoint and says what to change."""
    losses = iter([0.1, 0.2])
    monkeypatch.setattr(sft_stage, "heldout_image_loss", lambda *_: next(losses))
    monkeypatch.setattr(sft_stage, "load_policy", lambda *_, **__: policy)
    monkeypatch.setattr(sft_stage, "read_records", lambda _: records(8))
    import shutil

    from small import ROOT

    shutil.copytree(ROOT / "params", tmp_path / "params")
    path = tmp_path / "params" / "scales" / "smoke.yaml"
    path.write_text(path.read_text().replace("max_image_loss_ratio: 10.0", "max_image_loss_ratio: 1.15"))
    for name in ("prompts", "base/checkpoint"):
        (tmp_path / "artifacts" / "smoke" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"draws worse than its base.*max_image_loss_ratio=1\.15.*smoke\.yaml"):
        sft_stage.run("smoke", root=tmp_path)
    assert not (tmp_path / "artifacts" / "smoke" / "sft" / "checkpoint").exists()


def test_heldout_loss_is_the_same_every_time(policy, config):
    assert heldout_image_loss(policy, config) == heldout_image_loss(policy, config)
