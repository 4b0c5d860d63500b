"""Checkpoints: exact round trips, damage refused by name, training state that survives a kill at any moment."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_config, small_policy

from unigrpo.checkpoint import (
    load_checkpoint,
    load_training_state,
    optimizer_tensors,
    restore_optimizers,
    save_checkpoint,
    save_training_state,
)
from unigrpo.sft import supervised_optimizers


@pytest.fixture
def saved(tmp_path):
    policy = small_policy(small_config())
    save_checkpoint(tmp_path / "checkpoint", policy.model, policy.tokenizer)
    return tmp_path / "checkpoint", policy


def test_round_trip_is_exact_and_writing_is_deterministic(saved, tmp_path):
    folder, policy = saved
    model, tokenizer = load_checkpoint(folder)
    for (name, a), b in zip(policy.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    text = "plan first then draw a red circle"
    assert tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
    save_checkpoint(tmp_path / "again", model, tokenizer)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert str(tmp_path) not in (folder / "config.json").read_text()


@pytest.mark.parametrize(("damage", "message"), [
    (lambda t: t.pop("vae2llm.weight"), r"missing tensor vae2llm\.weight \(32, 192\)"),
    (lambda t: t.update({"surplus.weight": torch.zeros(2)}), r"extra tensor surplus\.weight \(2,\)"),
    (lambda t: t.update({"llm2vae.bias": torch.zeros(5)}), r"llm2vae\.bias must have shape \(192,\), got \(5,\)"),
])
def test_wrong_tensors_are_named(saved, damage, message):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_truncated_and_missing_files_are_named(saved):
    folder, _ = saved
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a readable safetensors file"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model\.safetensors"):
        load_checkpoint(folder)


def trained():
    config = small_config()
    policy = small_policy(config)
    optimizers = supervised_optimizers(policy.model, config.sft)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return policy, optimizers, config


def test_optimizer_state_round_trip(tmp_path):
    policy, optimizers, config = trained()
    save_training_state(tmp_path, 2, policy.model, optimizers, {"note": 1})
    state, tensors = load_training_state(tmp_path)
    assert state["step"] == 2
    assert state["note"] == 1
    fresh = supervised_optimizers(policy.model, config.sft)
    restore_optimizers(fresh, tensors["optimizer"])
    before, after = optimizer_tensors(optimizers), optimizer_tensors(fresh)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_kill_while_saving_leaves_the_previous_state(tmp_path):
    policy, optimizers, _ = trained()
    save_training_state(tmp_path, 1, policy.model, optimizers, {})
    (tmp_path / "state.partial").mkdir()
    (tmp_path / "state.partial" / "model.safetensors").write_bytes(b"half")
    assert load_training_state(tmp_path)[0]["step"] == 1
    save_training_state(tmp_path, 2, policy.model, optimizers, {})
    assert load_training_state(tmp_path)[0]["step"] == 2
    # Killed between the two renames: the old state has moved away, the new one has no name yet.
    (tmp_path / "state").rename(tmp_path / "state.old")
    assert load_training_state(tmp_path)[0]["step"] == 2


def test_a_damaged_state_is_not_used(tmp_path, capsys):
    policy, optimizers, _ = trained()
    save_training_state(tmp_path, 1, policy.model, optimizers, {})
    path = tmp_path / "state" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert load_training_state(tmp_path) is None
    assert "damaged" in capsys.readouterr().out


def test_state_holds_no_pickle(tmp_path):
    policy, optimizers, _ = trained()
    save_training_state(tmp_path, 1, policy.model, optimizers, {})
    assert sorted(p.suffix for p in (tmp_path / "state").iterdir()) == [".json", ".safetensors", ".safetensors", ".safetensors"]
    json.loads((tmp_path / "state" / "state.json").read_text())
