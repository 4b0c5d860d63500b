"""Numbers do not depend on how many processes share a stage, nor on the size of micro-batches, beyond rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_parallel import run, steps_config
from safetensors.torch import load_file
from small import ROOT, small_config, small_prompts

from unigrpo.distributed import ALONE, World, join
from unigrpo.schema import Config
from unigrpo.update import own_prompts


def launch(processes: int, *arguments: str, script: str = "data_parallel.py", root: Path = ROOT, ends_well: bool = True) -> str:
    """A script of this folder under torch.distributed.run, in `root`. Returns what it said."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost",
                           "--nproc-per-node", str(processes), str(ROOT / "tests" / script), *arguments],
                          env=env, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode == 0) == ends_well, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, steps_config(8), ALONE)
    return folder


def compare(first: Path, second: Path) -> None:
    """The same samples exactly; gradients and weights within 1e-5 of their norm; metrics within rounding."""
    rows, others = (json.loads((folder / "rows.json").read_text()) for folder in (first, second))
    for row, other in zip(rows["sampled"], others["sampled"], strict=True):
        assert row[:-1] == other[:-1]  # step, prompt, sibling and every token
        assert row[-1] == pytest.approx(other[-1], rel=1e-5)  # of the image, drawn from equal noise
    assert len(rows["sampled"]) == 5 * 16
    tensors, more = (load_file(folder / "tensors.safetensors") for folder in (first, second))
    assert set(tensors) == set(more)
    assert {name.split("/")[0] for name in tensors} == {"gradient", "weight", "supervised"}
    for name, value in tensors.items():
        assert (value - more[name]).norm() <= 1e-5 * value.norm().clamp(min=1e-12), name
    for kind in ("rl", "supervised"):
        for row, other in zip(rows[kind], others[kind], strict=True):
            assert set(row) == set(other)
            for name, value in row.items():
                if not name.startswith("mismatch/"):  # rounding is all that these are
                    assert value == pytest.approx(other[name], rel=2e-3, abs=1e-6), (kind, name)


def test_two_processes_are_one(alone: Path, tmp_path: Path) -> None:
    launch(2, str(tmp_path / "two"), "8")
    compare(alone, tmp_path / "two")


def test_micro_batches_are_one_batch(alone: Path, tmp_path: Path) -> None:
    run(tmp_path / "micro", steps_config(4), ALONE)
    compare(alone, tmp_path / "micro")


def test_every_prompt_is_one_process_s_and_every_update_takes_equally_many() -> None:
    import numpy as np

    prompts = small_prompts(12)
    parts = [own_prompts(prompts, 2, np.random.default_rng(0), World(rank, 3)) for rank in range(3)]
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in prompts)
    whole = own_prompts(prompts, 2, np.random.default_rng(0))
    for update in range(2):
        shared = {p.id for part in parts for p in part[2 * update:2 * update + 2]}
        assert shared == {p.id for p in whole[6 * update:6 * update + 6]}
    with pytest.raises(ValueError, match="a multiple of 2 updates x 5 processes"):
        own_prompts(prompts, 2, np.random.default_rng(0), World(0, 5))


def test_shares_are_contiguous_and_complete() -> None:
    for count in (1, 5, 12):
        parts = [World(rank, 3).share(range(count)) for rank in range(3)]
        assert [i for part in parts for i in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert list(ALONE.share([1, 2])) == [1, 2]


def test_sizes_that_cannot_be_shared_are_refused_with_the_nearest_valid_ones() -> None:
    values = small_config().model_dump()
    values["compute"]["processes"] = 3
    with pytest.raises(ValueError, match=r"rollout.prompts_per_step=4 .* compute.processes=3.*nearest valid values are \[6\]"):
        Config(**values)
    values["rollout"]["prompts_per_step"], values["train"]["micro_batch"] = 6, 2
    with pytest.raises(ValueError, match=r"base.texts_per_step=8 must be a multiple of compute.processes=3.*\[6, 9\]"):
        Config(**values)


def test_another_number_of_processes_than_params_ask_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"compute\.processes=2 and 4 were started"):
        join(2, "cpu")


def test_gradients_that_are_missing_count_as_zero_only_among_several() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None
