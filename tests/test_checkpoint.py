"""Checkpoints: exact round trips, damage refused by name, training state that survives a kill at any moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError
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
from unigrpo.sealed import disk_full
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
    shutil.rmtree(tmp_path / "state.old")
    (tmp_path / "state").rename(tmp_path / "state.old")
    assert load_training_state(tmp_path)[0]["step"] == 2


def flip(path, at=-3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("damage", "words"), [
    (lambda state: flip(state / "model.safetensors"), "model.safetensors has sha256"),
    (lambda state: flip(state / "state.json", 5), "state.json has sha256"),
    (lambda state: flip(state / "manifest.json", 1), "manifest.json cannot be read"),
    (lambda state: (state / "optimizer.safetensors").write_bytes(b"short"), "optimizer.safetensors has 5 bytes"),
    (lambda state: (state / "extra.safetensors").unlink(), "extra.safetensors is missing"),
    (lambda state: (state / "more.safetensors").touch(), "more.safetensors is not in manifest.json")])
def test_a_damaged_state_is_refused_by_name_and_the_one_before_it_is_used(tmp_path, capsys, damage, words):
    policy, optimizers, _ = trained()
    save_training_state(tmp_path, 1, policy.model, optimizers, {})
    save_training_state(tmp_path, 2, policy.model, optimizers, {})
    damage(tmp_path / "state")
    assert load_training_state(tmp_path)[0]["step"] == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'state'} is damaged and not used: " in said
    assert words in said
    assert "going on after step 1" in said
    save_training_state(tmp_path, 2, policy.model, optimizers, {})  # must not put the damaged one in the place of the good one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "state.damaged", "state.old"]
    shutil.rmtree(tmp_path / "state")
    assert load_training_state(tmp_path)[0]["step"] == 1
    flip(tmp_path / "state.old" / "model.safetensors")
    assert load_training_state(tmp_path) is None
    assert "holds no whole state: starting from the beginning" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs the right to mount a small disk")
def test_a_disk_that_fills_up_while_saving_keeps_the_state_before(tmp_path, capsys):
    """A real disk of 2 MB: the third state has no room, then a file takes the rest."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        policy, optimizers, _ = trained()
        save_training_state(tmp_path, 1, policy.model, optimizers, {})
        size = sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
        (tmp_path / "filler").write_bytes(bytes(int((2 << 20) - 2.6 * size)))
        for step in (2, 3, 4):
            save_training_state(tmp_path, step, policy.model, optimizers, {})
        assert "no room for a third training state" in capsys.readouterr().err
        assert load_training_state(tmp_path)[0]["step"] == 4
        with (tmp_path / "filler").open("ab") as file:
            file.write(bytes(int(0.4 * size)))
        shutil.rmtree(tmp_path / "state.old", ignore_errors=True)
        with (tmp_path / "filler").open("ab") as file:
            file.write(bytes(int(0.6 * size)))
        with pytest.raises((OSError, SafetensorError)) as raised:
            save_training_state(tmp_path, 5, policy.model, optimizers, {})
        assert disk_full(raised.value)
        assert load_training_state(tmp_path)[0]["step"] == 4
        assert not (tmp_path / "state.partial").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_state_holds_no_pickle(tmp_path):
    policy, optimizers, _ = trained()
    save_training_state(tmp_path, 1, policy.model, optimizers, {})
    assert {p.suffix for p in (tmp_path / "state").iterdir()} == {".json", ".safetensors"}
    json.loads((tmp_path / "state" / "state.json").read_text())
