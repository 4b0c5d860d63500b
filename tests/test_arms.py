"""The paper's arms: each of params/runs.yaml trains exactly what its name says, and replays no more than it needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import pytest
import torch
from small import ROOT, small_config, small_policy, small_prompts

from unigrpo.config import load_config, multiply, read_yaml
from unigrpo.cost import supervised_cost
from unigrpo.digests import sha256_path
from unigrpo.flow.guidance import model_calls
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.prompts.records import write_records
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator
from unigrpo.stages.loading import save_policy, save_progress
from unigrpo.stages.longer import equal_steps, longer, warmup_tokens
from unigrpo.stages.sft import warmup_batch
from unigrpo.stages.train import rl_start
from unigrpo.stages.train import run as train_run
from unigrpo.train import train
from unigrpo.types import Reward
from unigrpo.update import expert_parameters
from unigrpo.worlds.shapes import sample_record
from unigrpo.worlds.shapes.thinking import sft_thinking

RUNS = read_yaml(ROOT / "params" / "runs.yaml")
TRAINED = {"text_only": {"understanding"}, "image_only": {"generation"}}
UNREACHED = ("q_proj", "q_norm", "o_proj", "mlp", "post_attention_layernorm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint whose outputs are far from zero."""
    folder = tmp_path_factory.mktemp("arms") / "checkpoint"
    save_policy(folder, small_policy(small_config()))
    return folder


def noisy_reward(rollouts):
    """Different for siblings, so that every group has a gradient."""
    return [Reward("shapes_graded", rollouts.image.final_latents.mean(dim=(1, 2)) + 0.1 * rollouts.text.lengths)]


def two_steps(checkpoint, run):
    """(names of the parameters that two steps changed, the policy, logged metrics)."""
    config = load_config("smoke", run=run, root=ROOT)
    config = config.model_copy(update={"train": config.train.model_copy(update={"num_steps": 2})})
    policy, optimizer = rl_start(checkpoint, config)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    policy.model.train()
    prompts, logged = small_prompts(config.rollout.prompts_per_step), []
    train(policy, optimizer, lambda step: prompts, noisy_reward, config, draw=partial(generator, 0),
          log=lambda step, metrics, *_: logged.append(metrics), save=lambda step: None)
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    return changed, policy, logged


@pytest.mark.parametrize("run", ["unigrpo", "text_only", "image_only", "image_context", "cfg_rollout", "no_regularizer",
                                 "latent_kl", "latent_kl_published", "context_stop", "window_all", "one_update"])
def test_an_arm_changes_exactly_what_it_trains(checkpoint, run):
    changed, policy, _ = two_steps(checkpoint, run)
    expected = {name for expert in TRAINED.get(run, {"understanding", "generation"})
                for name in expert_parameters(policy.model, expert)}
    if run == "image_context":  # images read the context's keys and values: nothing after the last layer's reaches them
        last = f".layers.{policy.model.config.num_hidden_layers - 1}."
        expected -= {name for name in expert_parameters(policy.model, "understanding")
                     if last in name and any(part in name for part in UNREACHED)}
    assert changed == expected


def test_frozen_understanding_means_the_same_thinking(checkpoint):
    """image_only samples the warm-up's thinking: with the same draws it writes the same tokens after training."""
    _, policy, _ = two_steps(checkpoint, "image_only")
    config = load_config("smoke", run="image_only", root=ROOT)
    start, _ = rl_start(checkpoint, config)
    sampled = [p.generate(small_prompts(4), group_size=4, sampling=config.rollout, generators=partial(generator, 5))
               for p in (start, policy)]
    assert torch.equal(sampled[0].text.tokens, sampled[1].text.tokens)
    assert not torch.equal(sampled[0].image.final_latents, sampled[1].image.final_latents)


def forwards_of(checkpoint, run, monkeypatch):
    """(packed forwards, those with image blocks) of two steps, the first of which measures the penalties."""
    seen = []
    packed = BagelPolicy.packed

    def counted(policy, tokens, lengths, latents, sigma):
        seen.append(latents is not None)
        return packed(policy, tokens, lengths, latents, sigma)

    with monkeypatch.context() as context:
        context.setattr(BagelPolicy, "packed", counted)
        _, policy, logged = two_steps(checkpoint, run)
    return len(seen), sum(seen), policy, logged


def test_an_arm_wastes_no_forward(checkpoint, monkeypatch):
    """Two updates of one micro-batch each. The first step measures: 2 anchors, 2 of the reference, 2 updates; the second has
    the anchor of the second update, 2 updates, and the reference where the loss compares with it."""
    total, images, _, logged = forwards_of(checkpoint, "text_only", monkeypatch)
    assert (total, images) == (6 + 3, 6)
    assert "image/velocity_mse" in logged[0]
    assert not [name for name in logged[1] if name.startswith(("image/", "mismatch/image"))]
    assert [row["cost/image_replays"] for row in logged] == [1.0, 0.0]
    total, images, policy, _ = forwards_of(checkpoint, "image_only", monkeypatch)
    assert (total, images) == (6 + 5, 6 + 5)  # one packed forward: no gradient can reach the context
    assert policy.context_gradient
    assert forwards_of(checkpoint, "no_regularizer", monkeypatch)[:2] == (6 + 3, 6 + 3)


def test_guidance_is_the_policy_in_rollout_and_replay(checkpoint):
    config = load_config("smoke", run="cfg_rollout", root=ROOT)
    _, policy, logged = two_steps(checkpoint, "cfg_rollout")
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    calls = model_calls(sigma_schedule(config.rollout.num_steps, config.rollout.shift), config.rollout.guidance_interval)
    assert calls > config.rollout.num_steps
    assert policy.guidance_scale == 2.0
    assert logged[0]["cost/model_calls"] == calls * rollouts
    assert logged[0]["mismatch/image"] < config.train.max_mismatch.image


# --------------------------------------------------------------------------------------------------------------- params

@pytest.mark.parametrize("scale", ["smoke", "tiny", "small", "bagel_7b"])
def test_every_run_is_valid_at_every_scale(scale):
    steps = load_config(scale, root=ROOT).train.num_steps
    for run, entry in RUNS.items():
        config = load_config(scale, run=run, root=ROOT)
        assert config.train.num_steps == (max(1, int(steps / 4 + 0.5)) if "times" in entry and
                                          "train.num_steps" in entry["times"] else steps), run
        assert run.replace("_", "").isalnum()


def test_factors_of_a_run():
    values = {"a": {"b": 3, "c": 0.1}, "d": 8}
    assert multiply(values, {"a.b": 0.25, "a.c": 10, "d": 0.5}, "x") == {"a": {"b": 1, "c": 1.0}, "d": 4}
    assert values == {"a": {"b": 3, "c": 0.1}, "d": 8}
    for key, factor, wanted in (("a.e", 2, "above 0"), ("e.b", 2, "not a key"), ("a", 2, "above 0"), ("d", "2", "above 0"),
                                ("d", 0, "above 0"), ("d", True, "above 0")):
        with pytest.raises(ValueError, match=f"x: {key} .*{wanted}"):
            multiply(values, {key: factor}, "x")


def test_nothing_to_train_is_refused(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    with (tmp_path / "params" / "runs.yaml").open("a") as file:
        file.write("idle: {objective: {text: {weight: 0.0}, image: {weight: 0.0}}}\n")
    with pytest.raises(ValueError, match="nothing would be trained"):
        load_config("smoke", run="idle", root=tmp_path)


# ----------------------------------------------------------------------------------------------------------- sft_longer

def warmup_records(count, config):
    """Prompts with the thinking that curate gives the warm-up."""
    records = []
    for i in range(count):
        record = sample_record(generator(0, "test-warmup", i))
        shares = (config.sft.thinking_error, config.sft.systematic_share)
        records.append(dataclasses.replace(record, thinking=sft_thinking(record, generator(1, "test-warmup", i), *shares)[0]))
    return records


def test_supervised_training_takes_the_flops_of_rl():
    """Against what the committed runs counted, and against the batches that are trained on: each within 3 %."""
    config = load_config("tiny", run="sft_longer", root=ROOT)
    policy = small_policy(config)
    records = warmup_records(1000, config)
    pairs = [(record.prompt, record.thinking) for record in records]
    wanted, steps = equal_steps(policy, config, prompts=[record.prompt for record in records], pairs=pairs)
    counted = [json.loads((ROOT / f"artifacts/tiny/unigrpo/{seed}/training.json").read_text()) for seed in (0, 1, 2)]
    each = sum(metrics["cost/flops"] / metrics["cost/prompts"] for metrics in counted) / 3  # of a prompt, whatever the steps
    assert wanted == pytest.approx(each * config.train.num_steps * config.rollout.prompts_per_step, rel=0.03)
    assert equal_steps(policy, config, prompts=[record.prompt for record in records], pairs=pairs) == (wanted, steps)
    settings = longer(config, steps)
    tokens = [int(warmup_batch(policy, records, settings, step).lengths.sum()) for step in range(4)]
    assert sum(tokens) / 4 == pytest.approx(config.sft.texts_per_step * warmup_tokens(policy, config, pairs), rel=0.03)
    taken = supervised_cost(policy.model.config, settings.sft, sum(tokens) / 4)["cost/flops"]
    assert taken == pytest.approx(wanted, rel=0.03)


def test_seeds_move_the_data_and_never_repeat_the_warmup():
    base = load_config("smoke", root=ROOT)
    seeds = [longer(load_config("smoke", run="sft_longer", seed=seed, root=ROOT), 7).sft for seed in (0, 1, 2)]
    assert [section.steps for section in seeds] == [7, 7, 7]
    assert len({base.sft.seed, *(section.seed for section in seeds)}) == 4


@pytest.fixture
def project(tmp_path, checkpoint):
    """A folder with params, prompts and the checkpoint of a warm-up."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    config = load_config("smoke", run="sft_longer", root=ROOT)
    folder = tmp_path / "artifacts" / "smoke"
    shutil.copytree(checkpoint, folder / "sft" / "checkpoint")
    (folder / "prompts").mkdir()
    for name in ("sft", "train", "validation"):
        write_records(folder / "prompts" / f"{name}.jsonl", warmup_records(16, config))
    return tmp_path


def test_supervised_training_is_a_training_like_any_other(project, monkeypatch):
    """The same files, and killed after a saved step the same bytes."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    metrics = train_run("smoke", run="sft_longer", seed=0, root=project)
    output = project / "artifacts" / "smoke" / "sft_longer" / "0"
    assert json.loads((output / "gallery" / "gallery.json").read_text()) == []
    assert json.loads((output / "training.json").read_text()) == metrics
    assert metrics["cost/flops"] == pytest.approx(metrics["cost/flops_wanted"], rel=0.5 / metrics["cost/updates"] + 0.1)
    weights = sha256_path(output / "checkpoint")
    assert weights != sha256_path(project / "artifacts" / "smoke" / "sft" / "checkpoint")
    kept = {path.name: path.read_bytes() for path in output.glob("*.*")}
    shutil.rmtree(output)

    calls = []

    def dies(*arguments, **keywords):
        save_progress(*arguments, **keywords)
        calls.append(arguments[1])
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("unigrpo.stages.base.save_progress", dies)
        with pytest.raises(KeyboardInterrupt):
            train_run("smoke", run="sft_longer", seed=0, root=project)
    assert calls == [load_config("smoke", root=ROOT).sft.checkpoint_every]
    train_run("smoke", run="sft_longer", seed=0, root=project)
    assert sha256_path(output / "checkpoint") == weights
    assert {path.name: path.read_bytes() for path in output.glob("*.*")} == kept
    train_run("smoke", run="sft_longer", seed=1, root=project)
    assert sha256_path(output.parent / "1" / "checkpoint") != weights
