"""Weights spread over processes: the numbers, files and samples of whole ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_parallel import reinforce, run, steps_config
from safetensors.torch import load_file
from small import small_config
from test_distributed import compare, launch

from unigrpo.checkpoint import load_training_state
from unigrpo.distributed import ALONE, World, is_sharded, local
from unigrpo.schema import Config


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run, with its training state after two steps."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, steps_config(8, sft={"optimizer": "adamw"}), ALONE, keep=folder / "resume")
    return folder


@pytest.fixture(scope="module")
def two(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes do with their rows of the weights, see data_parallel.spread_out."""
    folder = tmp_path_factory.mktemp("two")
    launch(2, str(folder), "8", str(alone))
    return folder


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], prefix: str, limit: float = 1e-5) -> None:
    """Tensors of a prefix agree within `limit` of their norms."""
    names = sorted(name for name in first if name.startswith(prefix))
    assert names
    assert names == sorted(name for name in second if name.startswith(prefix))
    for name in names:
        gap = (first[name].float() - second[name].float()).norm()
        assert gap <= limit * first[name].float().norm().clamp(min=1e-12), name


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor."""
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


def test_two_processes_with_their_rows_are_one_with_all(alone: Path, two: Path) -> None:
    """Samples, first gradients, weights after five steps, metrics; layers recomputed in the backward pass besides."""
    compare(alone, two)


def test_a_state_of_spread_weights_is_one_of_whole_weights(alone: Path, two: Path) -> None:
    (state, tensors), (other, more) = (load_training_state(folder / "resume") for folder in (alone, two))
    assert other["step"] == state["step"] == 2
    assert other["reference"] == state["reference"]
    for kind, values in tensors.items():
        assert described(more[kind]) == described(values)
    close(tensors["model"], more["model"], "")
    assert all(torch.equal(value, more["extra"][name]) for name, value in tensors["extra"].items())


def test_one_process_goes_on_where_two_were(alone: Path, two: Path) -> None:
    config = steps_config(8)
    resumed, _, _ = reinforce(ALONE, config, begin=two / "resume")
    close(load_file(alone / "tensors.safetensors"), resumed, "weight/")


def test_two_processes_go_on_where_one_was(alone: Path, two: Path) -> None:
    close(load_file(alone / "tensors.safetensors"), load_file(two / "resumed" / "tensors.safetensors"), "weight/")


def test_bfloat16_is_that_of_float32_masters(two: Path) -> None:
    """Two processes with their rows, against two with whole weights and MasterAdamW; the state holds the same masters."""
    ours, wanted = (load_file(two / name / "tensors.safetensors") for name in ("half", "half_replicated"))
    close(wanted, ours, "gradient/")
    rows, others = (json.loads((two / name / "rows.json").read_text())["sampled"] for name in ("half", "half_replicated"))
    assert rows == others
    (state, tensors), (other, more) = (load_training_state(two / name / "resume") for name in ("half_replicated", "half"))
    assert state["reference"] == other["reference"]
    for kind, values in tensors.items():
        assert described(more[kind]) == described(values)
    masters = {name: value for name, value in tensors["optimizer"].items() if name.endswith(".master")}
    close(masters, {name: more["optimizer"][name] for name in masters}, "")


def test_thinkings_of_other_lengths_wait_for_nobody(two: Path) -> None:
    """The first process decodes one token, the second up to sixty; `launch` has a time limit."""
    first, second = load_file(two / "uneven" / "tensors.safetensors")["lengths"].tolist()
    assert first == 1
    assert second > 20


def test_a_gradient_that_is_not_finite_in_one_process_stops_all(two: Path) -> None:
    assert load_file(two / "uneven" / "tensors.safetensors")["skipped"].tolist() == [1.0, 1.0]


def test_what_cannot_be_spread_is_refused() -> None:
    def refused(message: str, **sections: dict) -> None:
        values = small_config().model_dump()
        values["compute"] |= {"processes": 2, "sharding": "full"}
        values["base"]["optimizer"] = values["sft"]["optimizer"] = "adamw"
        for name, change in sections.items():
            values[name] |= change
        with pytest.raises(ValueError, match=message):
            Config(**values)

    with pytest.raises(pytest.fail.Exception):
        refused("nothing")  # as it is, it is accepted
    refused(r"sharding=full needs more than one process, got compute\.processes=1", compute={"processes": 1})
    refused(r"sharding=full needs more than one process, got train\.processes=1", train={"processes": 1})
    refused(r"needs base\.optimizer=adamw, got muon", base={"optimizer": "muon"})
    refused(r"needs sft\.optimizer=adamw, got muon", sft={"optimizer": "muon"})
    refused(r"lora\.rank=4 trains adapters, which are small and lie on every process", lora={"rank": 4})


def test_gradients_of_whole_weights_are_clipped_as_torch_does() -> None:
    parameter, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    parameter.grad = other.grad = None
    parameter.grad, other.grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.0, 0.0])
    assert not is_sharded(parameter)
    assert local(parameter) is parameter
    norm = World().clip_gradients([parameter], 1.0)
    assert norm == float(torch.nn.utils.clip_grad_norm_([other], 1.0)) == 5.0
    assert torch.equal(parameter.grad, other.grad)
