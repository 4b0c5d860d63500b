"""The optimizer step: anchors, global normalisers, regularisers, and the gate against planted faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import sample, small_config, small_policy, small_prompts

from unigrpo.flow.schedule import sigma_schedule
from unigrpo.mismatch import MismatchError, check_rollouts, mismatch_metrics
from unigrpo.update import (
    anchor,
    expert_parameters,
    image_clip,
    minibatches,
    objective,
    optimizer_step,
    rl_optimizer,
    schedule_factor,
    trainable_experts,
    update_rows,
)


@pytest.fixture(scope="module")
def config():
    return small_config(rollout={"max_thinking_tokens": 10})


def prepared(config, policy=None, *, reference=True, seed=0):
    """A policy, anchored rollouts, update rows and random advantages."""
    policy = policy or small_policy(config)
    trainable_experts(policy.model, ["understanding", "generation"])
    policy.freeze_reference([n for n, p in policy.model.named_parameters() if p.requires_grad])
    rollouts = sample(policy, config, small_prompts(4), seed=seed)
    rows = update_rows(rollouts, config.train.updates_per_rollout)
    rollouts = anchor(policy, rollouts, rows, config, reference=reference)
    advantage = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(seed))
    return policy, rollouts, rows, (advantage, advantage)


def gradients(policy, rollouts, advantages, config, rows):
    policy.model.zero_grad()
    sums: dict[str, float] = {}
    minibatch = next(iter(minibatches(rollouts, advantages, config, rows)))
    for batch in minibatch.micro_batches():
        loss, parts = objective(policy.replay(batch.rollouts), batch, config)
        loss.backward()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}, sums


def test_updates_are_disjoint_halves_of_whole_groups(config):
    _, rollouts, rows, _ = prepared(config)
    assert sorted(torch.cat(rows).tolist()) == list(range(len(rollouts)))
    for part in rows:
        assert all(sorted(g.tolist()) == list(range(g.min(), g.min() + rollouts.group_size))
                   for g in part.view(-1, rollouts.group_size))


def test_first_update_has_ratio_one_exactly(config):
    policy, rollouts, rows, advantages = prepared(config)
    _, sums = gradients(policy, rollouts, advantages, config, rows)
    assert sums["text/ratio_variation"] == 0.0
    assert sums["image/ratio_variation"] == 0.0
    assert sums["image/velocity_mse"] == 0.0


def test_gradients_do_not_depend_on_micro_batches(config):
    policy, rollouts, rows, advantages = prepared(config)
    results = []
    for size in (8, 4, 2):
        changed = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})
        results.append(gradients(policy, rollouts, advantages, changed, rows))
    for other, sums in results[1:]:
        for name, gradient in results[0][0].items():
            assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
        for name, value in results[0][1].items():
            assert sums[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_gradient_is_the_policy_gradient_at_ratio_one(config):
    """At ratio 1 the loss's gradient is -sum w A grad log pi, for the text; checked through autograd on its own."""
    changed = config.model_copy(update={"objective": config.objective.model_copy(update={
        "image": config.objective.image.model_copy(update={"weight": 0.0, "regularizer": "none"})})})
    policy, rollouts, rows, advantages = prepared(changed)
    found, _ = gradients(policy, rollouts, advantages, changed, rows)
    policy.model.zero_grad()
    part = rollouts.select(rows[0])
    lengths = part.text.lengths[:, None]
    weights = part.text.mask / (lengths * len(part))
    (-(policy.replay(part).text_log_probs * weights * advantages[0][rows[0]][:, None]).sum()).backward()
    for name, parameter in policy.model.named_parameters():
        if name in found and parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["velocity_mse", "latent_kl", "latent_kl_published"])
def test_regularizer_pulls_towards_the_reference(config, kind):
    """Off the reference its gradient is not zero, and a step along it brings the policy nearer."""
    image = config.objective.image.model_copy(update={"regularizer": kind, "regularizer_weight": 1.0, "weight": 0.0})
    changed = config.model_copy(update={"objective": config.objective.model_copy(update={
        "image": image, "text": config.objective.text.model_copy(update={"weight": 0.0})})})
    policy = small_policy(changed)
    trainable_experts(policy.model, ["generation"])
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    policy.freeze_reference(names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if name in names:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean())
    rollouts = sample(policy, changed, small_prompts(4))
    rows = update_rows(rollouts, 2)
    rollouts = anchor(policy, rollouts, rows, changed, reference=True)
    advantages = (torch.zeros(len(rollouts)),) * 2
    found, before = gradients(policy, rollouts, advantages, changed, rows)
    assert before[f"image/{kind}"] > 0
    norm = torch.stack([g.norm() for g in found.values()]).norm()
    assert norm > 0
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if name in found:
                parameter.sub_(1e-3 * found[name] / norm)
    _, after = gradients(policy, rollouts, advantages, changed, rows)
    assert after[f"image/{kind}"] < before[f"image/{kind}"]


def test_reference_is_the_frozen_weights_with_their_own_context(config):
    policy, rollouts, _, _ = prepared(config)
    before = policy.replay(rollouts)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    changed = policy.replay(rollouts)
    with policy.reference(), torch.no_grad():
        inside = policy.replay(rollouts)
    assert torch.equal(inside.velocities, before.velocities)
    assert torch.equal(inside.text_log_probs, before.text_log_probs)
    assert torch.equal(policy.replay(rollouts).velocities, changed.velocities)


def test_second_update_is_clipped_somewhere(config):
    """After a large step the ratios of the other half leave 1, the clip binds, and both are reported."""
    policy, rollouts, rows, advantages = prepared(config)
    optimizer = rl_optimizer(trainable_experts(policy.model, ["understanding", "generation"]),
                             config.optim.model_copy(update={"understanding_lr": 0.03, "generation_lr": 0.03}))
    parts = list(minibatches(rollouts, advantages, config, rows))
    for batch in parts[0].micro_batches():
        objective(policy.replay(batch.rollouts), batch, config)[0].backward()
    optimizer_step(optimizer, 1.0, 1.0)
    _, sums = gradients(policy, rollouts, advantages, config, rows[1:])
    assert sums["text/clip_fraction"] > 0
    assert sums["image/clip_fraction"] > 0
    assert sums["text/ratio_variation"] > 0


def test_image_clip_scales_with_the_number_of_elements(config):
    _, rollouts, _, _ = prepared(config)
    elements = rollouts.image.latents[0, 0].numel()
    assert image_clip(1e-6, rollouts.image) == pytest.approx(1e-6 * (65_536 / elements) ** 0.5)


def test_frozen_parts_get_no_gradient(config):
    policy = small_policy(config)
    for expert in ("understanding", "generation"):
        chosen = trainable_experts(policy.model, [expert])[expert]
        assert chosen.keys() == expert_parameters(policy.model, expert).keys()
        free = {n for n, p in policy.model.named_parameters() if p.requires_grad}
        assert free == set(chosen)
        frozen = ("embed", "lm_head", ".norm.", "time_embedder", "vae2llm", "llm2vae")
        assert not any(word in n for n in free for word in frozen)


def test_schedule_warms_up_and_decays_to_zero(config):
    optim = config.optim.model_copy(update={"warmup": 4, "decay": "linear"})
    factors = [schedule_factor(u, 20, optim) for u in range(21)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == factors[4] == 1.0
    assert factors[20] == 0.0


def test_non_finite_gradients_are_skipped_and_counted(config):
    policy, *_ = prepared(config)
    experts = trainable_experts(policy.model, ["generation"])
    optimizer = rl_optimizer(experts, config.optim)
    parameter = next(iter(experts["generation"].values()))
    before = parameter.detach().clone()
    parameter.grad = torch.full_like(parameter, float("nan"))
    assert optimizer_step(optimizer, 1.0, 1.0)["optim/skipped"] == 1.0
    assert torch.equal(parameter, before)


class TestGate:
    """Each fault is refused by name before the first update."""

    def test_an_honest_run_passes(self, config):
        policy, rollouts, _, _ = prepared(config)
        check_rollouts(rollouts, config, policy)
        metrics = mismatch_metrics(rollouts, config)
        assert metrics["mismatch/text"] < config.train.max_mismatch.text
        assert metrics["mismatch/image"] < config.train.max_mismatch.image

    def planted(self, policy, rollouts, rows, config):
        return anchor(policy, rollouts, rows, config, reference=False)

    def test_shifted_schedule(self, config):
        policy, rollouts, rows, _ = prepared(config)
        wrong = replace(rollouts.image, sigmas=sigma_schedule(config.rollout.num_steps + 1, 3.0))
        rollouts = self.planted(policy, rollouts.with_segments([rollouts.text, wrong]), rows, config)
        with pytest.raises(MismatchError, match="schedule differs"):
            check_rollouts(rollouts, config, policy)

    def test_stop_token_overwritten_by_padding(self, config):
        policy, rollouts, rows, _ = prepared(config)
        tokens = torch.where(rollouts.text.tokens == rollouts.stop_token, policy.special.pad, rollouts.text.tokens)
        wrong = replace(rollouts.text, tokens=tokens)
        rollouts = self.planted(policy, rollouts.with_segments([wrong, rollouts.image]), rows, config)
        with pytest.raises(MismatchError, match="stop token is missing"):
            check_rollouts(rollouts, config, policy)

    def test_thinking_decoded_and_re_encoded(self, config):
        """Markers sampled inside the thinking vanish in the text, so the ids shift: the first differing token is named."""
        policy, rollouts, rows, _ = prepared(config)
        text, tokens = rollouts.text, rollouts.text.tokens.clone()
        for row, content in enumerate(policy.texts(text)):
            ids = policy.tokenizer(content, add_special_tokens=False)["input_ids"][::-1] + [rollouts.stop_token]
            count = int(text.lengths[row])
            ids = (ids + [policy.special.pad] * count)[:count]
            tokens[row, :count] = torch.tensor(ids)
        wrong = replace(text, tokens=tokens)
        rollouts = self.planted(policy, rollouts.with_segments([wrong, rollouts.image]), rows, config)
        with pytest.raises(MismatchError, match=r"first at rollout \d+, thinking token \d+"):
            check_rollouts(rollouts, config, policy)

    def test_guidance_in_the_rollout_only(self, config):
        guided = small_policy(config, guidance=(3.0, "global", (0.0, 1.0)))
        rollouts = sample(guided, config, small_prompts(4))
        policy = small_policy(config)
        rows = update_rows(rollouts, 2)
        with pytest.raises(MismatchError, match="CFG differs"):
            check_rollouts(self.planted(policy, rollouts, rows, config), config, policy)

    def test_dropout(self, config):
        policy, rollouts, _, _ = prepared(config)
        policy.model.language_model.model.layers[0].extra = torch.nn.Dropout(0.1)
        with pytest.raises(MismatchError, match="dropout is on"):
            check_rollouts(rollouts, config, policy)

    def test_other_weights(self, config):
        """A rollout engine with stale weights: both modalities differ, and the message says where first."""
        policy, rollouts, rows, _ = prepared(config)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.05)
        with pytest.raises(MismatchError, match="text log-probs of rollout and replay differ"):
            check_rollouts(self.planted(policy, rollouts, rows, config), config, policy)
