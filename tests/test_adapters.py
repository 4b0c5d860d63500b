"""LoRA: adapters beside the experts' matrices, never merged; the reference is the model without them."""

from __future__ import annotations

import json

import pytest
import torch
from small import draw, sample, small_config, small_policy, small_prompts

from unigrpo.adapters import (
    AdapterState,
    adapter_parameters,
    adapters_off,
    add_lora,
    detached,
    has_adapters,
    load_adapter,
    save_adapter,
)
from unigrpo.checkpoint import load_training_state, restore_optimizers, save_training_state, weights_digest
from unigrpo.masters import MasterAdamW
from unigrpo.mismatch import MismatchError
from unigrpo.train import train
from unigrpo.types import Reward
from unigrpo.update import expert_parameters, rl_optimizer, trainable_experts

BOTH = ("understanding", "generation")


def adapted_policy(config, *, rank=4, experts=BOTH, targets=("attention", "mlp"), seed=0):
    policy = small_policy(config)
    add_lora(policy.model, rank=rank, alpha=8, targets=targets, experts=experts, seed=seed)
    return policy


def disturb(policy):
    """Adapters as they are after some training: B no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for name, p in adapter_parameters(policy.model).items():
        if ".lora_B." in name:
            p.data.normal_(std=0.3, generator=generator)




def replayed(policy, rollouts):
    with torch.no_grad():
        replay = policy.replay(rollouts)
    return torch.cat([replay.text_log_probs.flatten(), replay.velocities.flatten()])


def test_a_fresh_adapter_changes_nothing_and_only_it_trains():
    config = small_config()
    plain, policy = small_policy(config), adapted_policy(config)
    rollouts = sample(plain, config, small_prompts(2), group_size=2)
    assert torch.equal(replayed(plain, rollouts), replayed(policy, rollouts))
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(policy.model))
    # Two layers, two experts, seven matrices, A and B.
    assert len(trained) == 2 * 2 * 7 * 2


@pytest.mark.parametrize(("experts", "targets", "matrices"), [
    (("generation",), ("attention",), 4), (("understanding",), ("mlp",), 3), (BOTH, ("attention",), 8)])
def test_experts_and_targets_are_chosen(experts, targets, matrices):
    policy = adapted_policy(small_config(), experts=experts, targets=targets)
    names = adapter_parameters(policy.model)
    assert len(names) == 2 * matrices * 2
    assert all(("_moe_gen" in n) == (experts == ("generation",)) for n in names) or experts == BOTH
    for expert in BOTH:
        assert bool(expert_parameters(policy.model, expert)) == (expert in experts)


def test_adapters_by_hand():
    """y = W x + (alpha / rank) B A x with alpha / rank = 2."""
    policy = adapted_policy(small_config())
    disturb(policy)
    layer = policy.model.language_model.model.layers[1].mlp_moe_gen.down_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 2.0 * (x @ a.T) @ b.T, atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_model_without_adapters():
    config = small_config()
    plain, policy = small_policy(config), adapted_policy(config)
    disturb(policy)
    rollouts = sample(policy, config, small_prompts(2), group_size=2)
    assert not torch.allclose(replayed(plain, rollouts), replayed(policy, rollouts), atol=1e-3)
    with policy.reference():
        assert torch.equal(replayed(plain, rollouts), replayed(policy, rollouts))
    assert all(p.requires_grad for p in adapter_parameters(policy.model).values())
    with pytest.raises(RuntimeError, match="stop"), adapters_off(policy.model):
        raise RuntimeError("stop")
    assert not torch.allclose(replayed(plain, rollouts), replayed(policy, rollouts), atol=1e-3)


def test_detached_has_the_official_keys_and_the_base_s_bytes():
    config = small_config()
    plain, policy = small_policy(config), adapted_policy(config)
    disturb(policy)
    with detached(policy.model):
        state = dict(policy.model.state_dict())
    assert list(state) == list(plain.model.state_dict())
    assert weights_digest(state) == weights_digest(dict(plain.model.state_dict()))
    assert has_adapters(policy.model)


def test_round_trip_as_a_peft_folder(tmp_path):
    config = small_config()
    policy, again = adapted_policy(config), small_policy(config)
    disturb(policy)
    save_adapter(tmp_path / "adapter", policy.model)
    load_adapter(again.model, tmp_path / "adapter")
    save_adapter(tmp_path / "again", again.model)
    for path in (tmp_path / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    rollouts = sample(policy, config, small_prompts(2), group_size=2)
    assert torch.equal(replayed(policy, rollouts), replayed(again, rollouts))


# peft 0.21 asks models for a property that transformers 5 has renamed; ours touch neither name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers.modeling_utils")
def test_peft_reads_the_folder(tmp_path):
    """Anyone with peft and the base weights gets the same model."""
    from peft import PeftModel

    config = small_config()
    policy, other = adapted_policy(config), small_policy(config)
    disturb(policy)
    save_adapter(tmp_path, policy.model)
    rollouts = sample(policy, config, small_prompts(2), group_size=2)
    PeftModel.from_pretrained(other.model, tmp_path)
    assert torch.equal(replayed(policy, rollouts), replayed(other, rollouts))


def test_folders_that_do_not_fit_are_refused(tmp_path):
    config = small_config()
    policy = adapted_policy(config)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(policy.model, rank=2, alpha=1, targets=("mlp",), experts=BOTH)
    with pytest.raises(ValueError, match=r"must hold adapter_config\.json"):
        load_adapter(small_policy(config).model, tmp_path)
    save_adapter(tmp_path, policy.model)
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(tmp_path / "none", small_policy(config).model)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"r": 5}))
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight must have shape \(5, 32\), got \(4, 32\)"):
        load_adapter(small_policy(config).model, tmp_path)
    path.write_text(json.dumps(values | {"lora_dropout": 0.1}))
    with pytest.raises(ValueError, match=r"without dropout.*lora_dropout=0\.1"):
        load_adapter(small_policy(config).model, tmp_path)


def brightness(rollouts):
    return [Reward("shapes_graded", rollouts.image.final_latents.mean(dim=(1, 2)) + 0.01 * rollouts.text.lengths)]


def steps(policy, optimizer, config, *, start=0, stop=None, save=lambda step: None, rows=None):
    rows = [] if rows is None else rows
    prompts = small_prompts(8)
    settings = config if stop is None else config.model_copy(update={"train": config.train.model_copy(
        update={"num_steps": stop})})
    train(policy, optimizer, lambda step: [prompts[(step * 4 + i) % 8] for i in range(4)], brightness, settings,
          draw=draw, log=lambda step, metrics, rollouts, rewards: rows.append(metrics), save=save, start_step=start)
    return rows


def lora_config(**train):
    return small_config(train={"num_steps": 3, "micro_batch": 4, **train}, rollout={"max_thinking_tokens": 6},
                        optim={"understanding_lr": 1e-3, "generation_lr": 1e-3})


def test_two_steps_train_the_adapters_and_nothing_else():
    """The base's bytes stay; the first update's ratio is 1 (the loop asserts it); each expert keeps its learning rate."""
    config = lora_config()
    policy = adapted_policy(config)
    with detached(policy.model):
        before = weights_digest(dict(policy.model.state_dict()))
    experts = trainable_experts(policy.model, config.train.experts)
    optimizer = rl_optimizer(experts, config.optim.model_copy(update={"generation_lr": 3e-3}), lr_scale=2.0)
    assert [g["lr"] for g in optimizer.param_groups] == [2e-3, 6e-3]
    policy.model.train()
    rows = steps(policy, optimizer, config)
    assert rows[0]["update_1/image/velocity_mse"] == 0.0  # the reference is the model without adapters
    assert rows[-1]["image/velocity_mse"] > 0
    for expert in BOTH:
        moved = [p.abs().max() > 0 for n, p in experts[expert].items() if ".lora_B." in n]
        assert all(moved), expert
    with detached(policy.model):
        assert weights_digest(dict(policy.model.state_dict())) == before


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    config = lora_config()

    def fresh():
        policy = adapted_policy(config, seed=3)
        policy.model.train()
        optimizer = rl_optimizer(trainable_experts(policy.model, config.train.experts), config.optim)
        return policy, optimizer, AdapterState(policy.model)

    policy, optimizer, state = fresh()
    steps(policy, optimizer, config)
    wanted = weights_digest(state.state_dict())

    policy, optimizer, state = fresh()
    steps(policy, optimizer, config, stop=1, save=lambda step: save_training_state(tmp_path, step + 1, state, [optimizer], {}))
    policy, optimizer, state = fresh()
    for p in adapter_parameters(policy.model).values():
        p.data.fill_(0.5)  # all of it must come from the folder
    found = load_training_state(tmp_path)
    assert found is not None
    state.load_state_dict(found[1]["model"])
    restore_optimizers([optimizer], found[1]["optimizer"])
    steps(policy, optimizer, config, start=found[0]["step"])
    assert weights_digest(state.state_dict()) == wanted
    found[1]["model"].popitem()
    with pytest.raises(ValueError, match="missing tensor"):
        state.load_state_dict(found[1]["model"])


def test_dropout_in_adapters_is_refused_by_the_loop():
    config = lora_config()
    policy = adapted_policy(config)
    layer = policy.model.language_model.model.layers[0].self_attn.q_proj
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)
    policy.model.train()
    optimizer = rl_optimizer(trainable_experts(policy.model, config.train.experts), config.optim)
    with pytest.raises(MismatchError, match="dropout"):
        steps(policy, optimizer, config)


# -- bfloat16 weights with float32 masters --------------------------------------------------------------------------


def test_masters_keep_steps_that_bfloat16_would_lose():
    """A weight of 1 and steps of 1e-4: the bfloat16 neighbour of 1 is 1 - 1/256, forty steps away."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [weight], "lr": 1e-4, "name": "generation"}], betas=(0.0, 0.0), weight_decay=0.0)
    for _ in range(100):
        weight.sum().backward()
        assert weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.masters[0], torch.full((4,), 0.99), atol=1e-5, rtol=0)
    assert torch.equal(weight, optimizer.masters[0].bfloat16())
    assert weight[0] < 1


def test_gradients_of_micro_batches_are_summed_in_float32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [weight], "lr": 1e-4}])
    (256 * weight).sum().backward()
    for _ in range(4):
        weight.sum().backward()  # bfloat16: 256 + 1 = 256
    assert optimizer.masters[0].grad == 260


def test_float32_masters_are_the_plain_optimizer():
    """With weights that bfloat16 holds exactly, both take the same first step."""
    parameters = [torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16().to(d))
                  for d in (torch.float32, torch.bfloat16)]
    optimizers = [torch.optim.AdamW([parameters[0]], lr=1e-2), MasterAdamW([{"params": [parameters[1]]}], lr=1e-2)]
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        (parameter * torch.tensor([1.0, 2, 3, -4, 5])).sum().backward()
        optimizer.step()
    assert torch.equal(parameters[0], optimizers[1].masters[0])


def test_bfloat16_training_with_masters_resumes_to_the_same_bytes(tmp_path):
    config = lora_config(max_mismatch=small_config().train.max_mismatch.model_copy(update={"text": 1.0, "image": 1e9}))

    def fresh():
        policy = small_policy(config)
        policy.model.to(torch.bfloat16).train()
        experts = trainable_experts(policy.model, config.train.experts)
        policy.freeze_reference([n for parameters in experts.values() for n in parameters])
        return policy, rl_optimizer(experts, config.optim)

    policy, optimizer = fresh()
    assert isinstance(optimizer, MasterAdamW)
    rows = steps(policy, optimizer, config)
    assert rows[-1]["optim/skipped"] == 0
    wanted = weights_digest(dict(policy.model.state_dict()))
    assert policy.model.llm2vae.weight.dtype == torch.bfloat16

    policy, optimizer = fresh()
    steps(policy, optimizer, config, stop=2,
          save=lambda step: save_training_state(tmp_path, step + 1, policy.model, [optimizer], {}))
    policy, optimizer = fresh()
    found = load_training_state(tmp_path)
    assert found is not None
    policy.model.load_state_dict(found[1]["model"])
    restore_optimizers([optimizer], found[1]["optimizer"])
    steps(policy, optimizer, config, start=found[0]["step"])
    assert weights_digest(dict(policy.model.state_dict())) == wanted
    plain = {k: v for k, v in found[1]["optimizer"].items() if not k.endswith(".master")}
    with pytest.raises(ValueError, match=r"are missing; it was saved with another train\.precision"):
        restore_optimizers([optimizer], plain)


def test_activation_checkpointing_changes_no_gradient():
    """Layers recomputed in the backward pass give the same gradients, bit for bit."""
    config = lora_config()
    gradients = []
    for checkpointing in (False, True):
        policy = small_policy(config)
        policy.model.train()
        if checkpointing:
            policy.model.activation_checkpointing_enable()
        rollouts = sample(policy, config, small_prompts(2), group_size=2)
        replay = policy.replay(rollouts)
        (replay.velocities.square().mean() + replay.text_log_probs.mean()).backward()
        gradients.append({n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
