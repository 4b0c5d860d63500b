"""The loop as a whole: it learns what can be learned, and a killed run ends with the bytes of one never killed."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from small import small_config, small_policy, small_prompts

from unigrpo.checkpoint import load_training_state, restore_optimizers, save_training_state, weights_digest
from unigrpo.mismatch import MismatchError
from unigrpo.seeding import generator
from unigrpo.train import train
from unigrpo.types import Reward
from unigrpo.update import rl_optimizer, trainable_experts


def setup(config, seed=0):
    policy = small_policy(config, seed)
    experts = trainable_experts(policy.model, config.train.experts)
    policy.freeze_reference([n for parameters in experts.values() for n in parameters])
    return policy, rl_optimizer(experts, config.optim)


def run(policy, optimizer, config, reward, *, start=0, stop_after=None, save=lambda step: None, rows=None, skipped=0):
    prompts = small_prompts(8)
    logged = [] if rows is None else rows
    settings = config if stop_after is None else config.model_copy(
        update={"train": config.train.model_copy(update={"num_steps": stop_after})})
    train(policy, optimizer, lambda step: [prompts[(step * 4 + i) % 8] for i in range(config.rollout.prompts_per_step)], reward,
          settings, draw=partial(generator, config.seed), start_step=start, save=save, skipped=skipped,
          log=lambda step, metrics, rollouts, rewards: logged.append(metrics))
    return logged


def brightness(rollouts):
    """A reward with a known optimum: the mean of the final latents, as large as it will go."""
    return [Reward("shapes_graded", rollouts.image.final_latents.mean(dim=(1, 2)).clamp(-3, 3))]


def word_reward(token):
    """Share of one token among the sampled ones."""
    def reward(rollouts):
        hits = ((rollouts.text.tokens == token) & rollouts.text.mask).sum(dim=1) / rollouts.text.lengths
        return [Reward("shapes_graded", hits.float())]
    return reward


def learning_config(**train):
    """Few latent elements (192): a gradient estimated from 32 rollouts has to find one direction among them."""
    return small_config(
        model={"image_size": (8, 8), "latent_patch_size": 4},
        rollout={"max_thinking_tokens": 6, "group_size": 8}, optim={"understanding_lr": 2e-3, "generation_lr": 2e-3},
        train={"num_steps": 24, "micro_batch": 16, "monitor_every": 8, **train})


def test_the_image_branch_raises_a_reward_of_the_image():
    """Every step stochastic and hardly any thinking, so that the reward's variance is the image branch's own."""
    config = learning_config(experts=("generation",), updates_per_rollout=1)
    window = config.rollout.window.model_copy(update={"kind": "all", "range": (0, config.rollout.num_steps)})
    config = config.model_copy(update={
        "optim": config.optim.model_copy(update={"generation_lr": 4e-3}),
        "rollout": config.rollout.model_copy(update={"max_thinking_tokens": 1, "group_size": 16, "window": window})})
    policy, optimizer = setup(config)
    rows = run(policy, optimizer, config, brightness)
    first, last = (sum(r["reward/mean"] for r in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last > first + 0.15


def test_the_text_branch_raises_a_reward_of_the_thinking():
    config = learning_config(experts=("understanding",))
    policy, optimizer = setup(config)
    rows = run(policy, optimizer, config, word_reward(20))
    first, last = (sum(r["reward/mean"] for r in part) / 4 for part in (rows[:4], rows[-4:]))
    assert last > first + 0.05


def test_metrics_tell_the_updates_apart():
    config = learning_config(num_steps=2)
    policy, optimizer = setup(config)
    row = run(policy, optimizer, config, brightness)[0]
    assert row["update_1/text/ratio_variation"] == 0.0
    assert row["update_2/image/ratio_variation"] > 0.0
    for name in ("reward/mean", "reward/zero_std_groups", "text/ratio_mean", "text/clip_fraction", "image/ratio_mean",
                 "image/clip_fraction", "image/velocity_mse", "image/latent_kl", "mismatch/text", "mismatch/image",
                 "text/entropy", "thinking/length", "thinking/truncated", "understanding/grad_norm", "generation/grad_norm",
                 "image/penalty_gradient_ratio", "cost/model_calls", "optim/skipped"):
        assert name in row, name
    assert any(name.startswith("image/clip_fraction/step_") for name in row)


@pytest.mark.parametrize("kill_at", [1, 3])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, kill_at):
    config = learning_config(num_steps=5)
    policy, optimizer = setup(config)
    whole = run(policy, optimizer, config, brightness)
    digest = weights_digest(dict(policy.model.state_dict()))

    policy, optimizer = setup(config)

    def save(step):
        save_training_state(tmp_path, step + 1, policy.model, [optimizer], {}, extra=policy.reference_weights)
        if step == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(policy, optimizer, config, brightness, save=save)
    policy, optimizer = setup(config, seed=9)                       # other weights: everything must come from the state
    state, tensors = load_training_state(tmp_path)
    assert state["step"] == kill_at + 1
    policy.model.load_state_dict(tensors["model"])
    policy.reference_weights = tensors["extra"]
    restore_optimizers([optimizer], tensors["optimizer"])
    rest = run(policy, optimizer, config, brightness, start=state["step"])
    assert weights_digest(dict(policy.model.state_dict())) == digest
    assert [r["reward/mean"] for r in rest] == [r["reward/mean"] for r in whole[kill_at + 1:]]


def test_missing_rewards_stop_the_run():
    config = learning_config()
    policy, optimizer = setup(config)

    def broken(rollouts):
        value = torch.rand(len(rollouts))
        value[::2] = float("nan")
        return [Reward("shapes_graded", value)]

    with pytest.raises(ValueError, match=r"50% of the rewards of step 0 are missing.*max_missing"):
        run(policy, optimizer, config, broken)


def test_a_non_finite_reward_gradient_is_skipped_until_there_are_too_many(monkeypatch, capsys):
    """A NaN that reaches the loss costs an update, is counted, and stops the run past train.max_skipped."""
    config = learning_config(num_steps=4, max_skipped=3)
    policy, optimizer = setup(config)
    original = policy.replay

    def poisoned(rollouts, **kwargs):
        replay = original(rollouts, **kwargs)
        if torch.is_grad_enabled() and rollouts.image.old_means is not None:
            replay.velocities.register_hook(lambda gradient: gradient * float("nan"))
        return replay

    monkeypatch.setattr(policy, "replay", poisoned)
    before = weights_digest(dict(policy.model.state_dict()))
    with pytest.raises(ValueError, match="4 updates had a loss or gradients that are not finite"):
        run(policy, optimizer, config, brightness)
    assert weights_digest(dict(policy.model.state_dict())) == before
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert re.match(r"step 0, update 1 is skipped, the 1. of train.max_skipped=3: not finite is the gradient of language_mod",
                    said[0])


def test_a_loss_that_is_not_finite_is_skipped_with_its_prompts_named(monkeypatch, capsys):
    """The second update of the second step goes wrong in one rollout: it moves nothing, and the run goes on."""
    config = learning_config(num_steps=3, max_skipped=1)
    policy, optimizer = setup(config)
    original, calls, weights = policy.replay, [], []

    def poisoned(rollouts, **kwargs):
        replay = original(rollouts, **kwargs)
        if torch.is_grad_enabled() and rollouts.image.old_means is not None:
            calls.append(rollouts)
            if len(calls) == 4:
                weights.append(weights_digest(dict(policy.model.state_dict())))
                replay.velocities[3] = float("inf")
        return replay

    monkeypatch.setattr(policy, "replay", poisoned)
    rows = run(policy, optimizer, config, brightness,
               save=lambda step: weights.append(weights_digest(dict(policy.model.state_dict()))))
    said = capsys.readouterr().err
    assert f"step 1, update 2 is skipped, the 1. of train.max_skipped=1: not finite is the image's velocity of prompts " \
           f"{calls[3].prompts[3].id}\n" in said
    assert weights[1] == weights[2] != weights[3]  # before the update, after its step, after the next
    assert [row["optim/skipped"] for row in rows] == [0, 1, 0]
    del calls[3:]
    with pytest.raises(ValueError, match="2 updates"):  # a resumed run counts on
        run(policy, optimizer, config, brightness, skipped=1)


def test_a_reward_that_is_infinite_is_missing():
    config = learning_config(num_steps=1)
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"max_missing": 0.5})})
    policy, optimizer = setup(config)

    def sometimes(rollouts):
        value = torch.arange(float(len(rollouts)))
        value[5] = float("inf")
        return [Reward("shapes_graded", value)]

    row, = run(policy, optimizer, config, sometimes)
    assert row["reward/missing"] == row["reward/infinite"] == 1 / 32
    assert row["optim/skipped"] == 0


def test_a_mismatch_stops_the_run_before_any_update():
    config = learning_config()
    policy, optimizer = setup(config)
    policy.model.language_model.model.layers[0].extra = torch.nn.Dropout(0.5)
    before = weights_digest(dict(policy.model.state_dict()))
    with pytest.raises(MismatchError, match="dropout"):
        run(policy, optimizer, config, brightness)
    assert weights_digest(dict(policy.model.state_dict())) == before
