"""What days of training bring, injected into whole stages at scale smoke: each fault ends as it should, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from small import ROOT

from unigrpo import checkpoint
from unigrpo.checkpoint import load_training_state
from unigrpo.digests import sha256_path
from unigrpo.preemption import PREEMPTED
from unigrpo.rollout import BagelPolicy
from unigrpo.stages import base, curate, evaluate, sft, train

STEPS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A project in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    shutil.copytree(ROOT / "params", folder / "params")
    scale = yaml.safe_load((folder / "params" / "scales" / "smoke.yaml").read_text())
    scale["train"]["num_steps"] = STEPS
    (folder / "params" / "scales" / "smoke.yaml").write_text(yaml.safe_dump(scale))
    for stage in (curate, base, sft):
        stage.run("smoke", root=folder)
    train.run("smoke", run="unigrpo", seed=0, root=folder)
    evaluate.run("smoke", checkpoint="sft", root=folder)
    return folder


@pytest.fixture
def root(whole, tmp_path) -> Path:
    """The project without the results of train and evaluate."""
    shutil.copytree(whole, tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "artifacts/smoke/unigrpo")
    return tmp_path / "root"


def same(whole: Path, root: Path, output: str, *names: str) -> None:
    """The same bytes under the same names."""
    for name in names:
        wanted, found = (sha256_path(folder / "artifacts/smoke" / output / name) for folder in (whole, root))
        assert wanted == found, name


def same_training(whole: Path, root: Path) -> None:
    """Run the training to its end: every result is the undisturbed one's."""
    train.run("smoke", run="unigrpo", seed=0, root=root)
    same(whole, root, "unigrpo/0", "checkpoint", "gallery", "curves.csv", "training.json")


def at_call(monkeypatch, module, name: str, number: int, act: Callable) -> None:
    """Do something at the n-th call (from 1) of a function, in its place; `act` is given the function and its arguments."""
    original, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        return act(original, *args, **kwargs) if len(calls) == number else original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


def terminate(original, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)


def saved_step(root: Path) -> int:
    folder, = (path for path in (root / ".unigrpo/resume").iterdir() if path.is_dir())
    found = load_training_state(folder)
    return 0 if found is None else found[0]["step"]


@pytest.mark.parametrize("call", [1, 4])
def test_sigterm_finishes_the_step_saves_and_leaves_with_status_75(whole, root, monkeypatch, capsys, call):
    """Between two saves too: a step that is finished is a step that is saved."""
    scale = root / "params/scales/smoke.yaml"
    before = signal.getsignal(signal.SIGTERM)
    at_call(monkeypatch, train, "step_prompts", call, terminate)
    with pytest.raises(SystemExit) as left:
        train.run("smoke", run="unigrpo", seed=0, root=root)
    assert left.value.code == PREEMPTED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"asked to leave (SIGTERM); the state after step {call} is saved" in capsys.readouterr().err
    assert saved_step(root) == call
    assert scale.is_file()
    monkeypatch.undo()
    same_training(whole, root)


def test_sigterm_outside_of_steps_leaves_at_once(whole, root, monkeypatch):
    """An evaluation has no training states: it is drawn again, and its bytes are the same."""
    at_call(monkeypatch, evaluate, "save_samples", 2, terminate)
    with pytest.raises(SystemExit) as left:
        evaluate.run("smoke", checkpoint="sft", root=root)
    assert left.value.code == PREEMPTED
    monkeypatch.undo()
    evaluate.run("smoke", checkpoint="sft", root=root)
    same(whole, root, "sft", "metrics.json", "outcomes.csv", "verdicts.parquet", "samples")


def full(original, tensors, path, **kwargs):
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize(("call", "saved"), [(1, 0), (2, 0), (4, 0), (5, 1), (8, 1), (12, 3)])
def test_a_full_disk_while_saving_is_said_and_nothing_is_lost(whole, root, monkeypatch, call, saved):
    """At any of a state's three files, or of the weights that a probe keeps: the states before it are whole."""
    at_call(monkeypatch, checkpoint, "save_file", call, full)
    with pytest.raises(ValueError, match=r"the disk is full \(.*No space left on device.*goes on from there"):
        train.run("smoke", run="unigrpo", seed=0, root=root)
    assert saved_step(root) == saved
    monkeypatch.undo()
    same_training(whole, root)


def test_a_disk_without_room_for_three_states_trains_with_two(whole, root, monkeypatch, capsys):
    at_call(monkeypatch, checkpoint, "save_file", 10, full)
    same_training(whole, root)
    assert "no room for a third training state; state.old is removed for it" in capsys.readouterr().err


@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_reward_that_dies_stops_the_run_and_nothing_is_lost(whole, root, monkeypatch, call):
    """In a step, or where a probe asks for rewards: no number of the run is missing for it."""
    def dead(original, *args, **kwargs):
        for record in (found := original(*args, **kwargs)):
            record.value.fill_(float("nan"))
        return found

    at_call(monkeypatch, train, "rewards_of", call, dead)
    with pytest.raises(ValueError, match=r"100% of the rewards of .* are missing.*the same command goes on"):
        train.run("smoke", run="unigrpo", seed=0, root=root)
    monkeypatch.undo()
    same_training(whole, root)


def test_a_reward_that_dies_in_a_probe_loses_no_probe(whole, root, monkeypatch):
    original = train.look

    def dead(*args, **kwargs):
        seen = original(*args, **kwargs)
        seen.rewards[:] = float("nan")
        return seen

    monkeypatch.setattr(train, "look", dead)
    with pytest.raises(ValueError, match="100% of the rewards of the probe of step 0 are missing"):
        train.run("smoke", run="unigrpo", seed=0, root=root)
    monkeypatch.undo()
    same_training(whole, root)


def test_a_skipped_update_of_a_probed_step_ends_no_run(root, monkeypatch, capsys):
    """The sentinel compares what is finite."""
    original, calls = BagelPolicy.replay, []

    def poisoned(self, rollouts, *args, **kwargs):
        replay = original(self, rollouts, *args, **kwargs)
        if torch.is_grad_enabled() and rollouts.image.old_means is not None:
            calls.append(1)
            if len(calls) == 2:
                replay.velocities[1] = float("nan")
        return replay

    monkeypatch.setattr(BagelPolicy, "replay", poisoned)
    metrics = train.run("smoke", run="unigrpo", seed=0, root=root)
    assert "step 0, update 2 is skipped" in capsys.readouterr().err
    assert metrics["sentinel/probes"] == 3


def test_a_damaged_picture_of_an_interrupted_run_is_named(root, monkeypatch):
    at_call(monkeypatch, train, "step_prompts", 2, terminate)
    with pytest.raises(SystemExit):
        train.run("smoke", run="unigrpo", seed=0, root=root)
    monkeypatch.undo()
    picture = next((root / ".unigrpo/resume").rglob("00000.png"))
    picture.write_bytes(picture.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"00000\.png is a picture of an interrupted run and is damaged"):
        train.run("smoke", run="unigrpo", seed=0, root=root)


def test_a_model_checkpoint_with_one_other_byte_is_refused(root):
    path = root / "artifacts/smoke/sft/checkpoint/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"model\.safetensors has sha256 .* was written; fetch it again or rerun the stage"):
        train.run("smoke", run="unigrpo", seed=0, root=root)


def test_gradients_of_a_warm_up_that_are_not_finite_reach_no_weight(root, monkeypatch):
    """The state that is saved last is of before."""
    shutil.rmtree(root / "artifacts/smoke/sft/checkpoint")
    at_call(monkeypatch, torch.nn.utils, "clip_grad_norm_", 3, lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="the gradient of step 2 is not finite"):
        sft.run("smoke", root=root)
    assert saved_step(root) == 2
