"""Whole stages at scale smoke on other numbers of processes, and going on where another number was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small import ROOT
from test_distributed import launch

from unigrpo.config import load_config
from unigrpo.resume import resume_key
from unigrpo.stages import base, curate, sft, train
from unigrpo.stages.loading import load_policy

OUTPUT = Path("artifacts/smoke/unigrpo/0")


def lay_out(root: Path, **compute) -> Path:
    """Where the project's stages run from now on."""
    path = root / "params" / "scales" / "smoke.yaml"
    values = yaml.safe_load(path.read_text())
    values["compute"] |= compute
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with curate, base and sft, made by one process with AdamW."""
    root = tmp_path_factory.mktemp("start")
    shutil.copytree(ROOT / "params", root / "params")
    path = root / "params" / "scales" / "smoke.yaml"
    values = yaml.safe_load(path.read_text())
    for section in ("base", "sft"):
        values[section]["optimizer"] = "adamw"
    values["optim"]["eps"] = 1.0e-5  # else rounding decides the sign of steps whose gradient is nothing but rounding
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    for stage in (curate, base, sft):
        stage.run("smoke", root=root)
    return root


@pytest.fixture(scope="module")
def undisturbed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after a training by one process."""
    root = shutil.copytree(start, tmp_path_factory.mktemp("whole") / "project")
    train.run("smoke", run="unigrpo", seed=0, root=root)
    return load_file(root / OUTPUT / "checkpoint" / "model.safetensors")


def close(wanted: dict[str, torch.Tensor], path: Path) -> None:
    """A checkpoint's tensors agree within 1e-5 of their norms."""
    found = load_file(path / "model.safetensors")
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= 1e-5 * value.norm().clamp(min=1e-12), name


def test_a_training_with_spread_weights_writes_what_whole_ones_do(start, undisturbed, tmp_path) -> None:
    root = lay_out(shutil.copytree(start, tmp_path / "project"), processes=2, sharding="full")
    launch(2, "train", script="stage_process.py", root=root)
    close(undisturbed, root / OUTPUT / "checkpoint")
    assert load_policy(root / OUTPUT / "checkpoint", load_config("smoke", root=root)).model is not None


@pytest.mark.parametrize("stage", ["sft", pytest.param("base", marks=pytest.mark.slow)])
def test_supervised_training_with_spread_weights_writes_what_whole_ones_do(start, tmp_path, stage) -> None:
    root = lay_out(shutil.copytree(start, tmp_path / "project"), processes=2, sharding="full")
    output = root / "artifacts" / "smoke" / stage
    wanted = load_file(output / "checkpoint" / "model.safetensors")
    shutil.rmtree(output)
    launch(2, stage, script="stage_process.py", root=root)
    close(wanted, output / "checkpoint")


def test_one_process_goes_on_where_two_were_interrupted(start, undisturbed, tmp_path, capsys) -> None:
    root = lay_out(shutil.copytree(start, tmp_path / "project"), processes=2)
    launch(2, "train", "1", script="stage_process.py", root=root, ends_well=False)
    lay_out(root, processes=1)
    train.run("smoke", run="unigrpo", seed=0, root=root)
    said = capsys.readouterr().err
    assert "the state was written with 2 processes, sharding none, and the run goes on with 1 process, sharding none" in said
    assert "train smoke-unigrpo-0: 1/3" not in said  # the first step is not taken again
    close(undisturbed, root / OUTPUT / "checkpoint")


def test_where_a_stage_runs_is_no_part_of_its_resume_folder_s_name(start: Path) -> None:
    values = load_config("smoke", run="unigrpo", root=start).model_dump(mode="json")

    def key(**sections) -> str:
        return resume_key(start, "train", "x", {name: {**values[name], **sections.get(name, {})} if name in sections else value
                                                for name, value in values.items()}, [])

    assert key(compute={"processes": 8, "sharding": "full", "slots": 1, "device": "cuda", "resources": {}, "remote": {}},
               train={"processes": 8}, evaluate={"processes": 8}) == key()
    assert key(compute={"threads": 2}) != key()
    assert key(train={"micro_batch": 1}) != key()
