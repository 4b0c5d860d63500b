"""The plan's arithmetic agrees with what a run then does."""

from __future__ import annotations

from small import ROOT, sample, small_config, small_policy, small_prompts

from unigrpo.config import load_config
from unigrpo.plan import make_plan, plan_run
from unigrpo.update import trainable_experts


def test_counts_agree_with_a_rollout():
    config = small_config()
    policy = small_policy(config)
    plan = make_plan(config, vocabulary=policy.model.config.vocab_size, probe=False)
    rollouts = sample(policy, config, small_prompts(config.rollout.prompts_per_step))
    assert plan.counts["images a step"] == rollouts.cost["images"]
    assert plan.counts["model calls an image"] * plan.counts["images a step"] == rollouts.cost["model_calls"]
    assert plan.counts["trained denoising steps an image"] == rollouts.image.mask.shape[1]
    assert plan.counts["parameters"] == sum(p.numel() for p in policy.model.parameters())
    trained = trainable_experts(policy.model, config.train.experts)
    assert plan.counts["parameters trained by RL"] == sum(p.numel() for ps in trained.values() for p in ps.values())


def test_the_paper_s_arithmetic_by_hand():
    """tiny: 8 prompts x 16 rollouts = 128 images a step, two updates of 64."""
    config = load_config("tiny", run="unigrpo", root=ROOT)
    counts = make_plan(config, vocabulary=118, probe=False).counts
    assert counts["images a step"] == 128
    assert counts["rollouts an update"] == 64
    assert counts["images in all"] == 128 * config.train.num_steps


def test_probe_measures_every_stage():
    text = plan_run("smoke", "unigrpo", ROOT)
    assert "seconds on this machine" in text
    for stage in ("base", "sft", "train", "evaluate"):
        assert f"  {stage}" in text
