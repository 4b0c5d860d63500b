"""Numbers do not depend on how many processes share a stage, nor on the size of micro-batches, beyond rounding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from data_parallel import run, steps_config
from safetensors.torch import load_file
from small import ROOT, small_config, small_prompts

from unigrpo.distributed import ALONE, Deserted, Place, World, join
from unigrpo.schema import Config
from unigrpo.stages import SHARED
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


def test_a_stage_s_own_number_of_processes_counts_before_that_of_all() -> None:
    values = small_config().model_dump()
    values["compute"]["processes"] = 2
    assert [Config(**values).processes(stage) for stage in SHARED] == [2, 2, 2, 2]
    values["train"]["processes"], values["evaluate"]["processes"] = 1, 4
    config = Config(**values)
    assert [config.processes(stage) for stage in SHARED] == [2, 2, 1, 4]
    assert [config.processes_key(stage) for stage in SHARED] == ["compute.processes", "compute.processes", "train.processes",
                                                                 "evaluate.processes"]


def test_another_number_of_processes_than_params_ask_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"compute\.processes=2 and 4 were started"):
        join(2, "cpu")


def test_gradients_that_are_missing_count_as_zero_only_among_several() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None


TWO = """
import os, signal, sys, time
from unigrpo.distributed import Deserted, Place, join, leave

world = join(2, "cpu", patience=3, place=Place("train x", 5))
world.wait()
try:
    if not world.main and sys.argv[1] == "hangs":
        time.sleep(60)
    if not world.main and sys.argv[1] == "dies":
        os._exit(0)
    if world.main and sys.argv[1] == "main works":
        time.sleep(8)
    if world.main and sys.argv[1] == "main stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if world.main and sys.argv[1] == "main dies":
        os._exit(0)
    if sys.argv[1].startswith("main"):
        world.wait()
    world.sum({"a": 1.0})
    print("together again", flush=True)
except Deserted as error:
    print(error, flush=True)
os._exit(0)
"""


def said_by(rank: int, what: str) -> str:
    """Two processes run TWO; what one of them says. Their store is here, as it is the agent's under torch.distributed.run."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
           "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    started = [subprocess.Popen([sys.executable, "-c", TWO, what], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    try:
        said, log = started[rank].communicate(timeout=120)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert said, log[-2000:]
    return said


@pytest.mark.parametrize(("other", "words"), [
    ("hangs", r"process 0 of 2 waited [34] s for the others, and one of them hangs \(compute\.patience_minutes=0\.05 says "),
    ("dies", r"process 0 of 2 waited \d s for the others, and one of them has ended, and has said why or was killed"),
])
def test_who_waits_in_vain_names_stage_and_step(other: str, words: str) -> None:
    said = said_by(0, other)
    assert re.match(r"train x: step 5, adding up numbers: " + words, said), said
    assert "nothing is saved yet, and the same command begins again" in said


def test_a_main_process_that_works_alone_is_waited_for_as_long_as_it_lives() -> None:
    """For longer than patience, which is 3 s; not where it shows no sign of life, nor where it is gone."""
    assert said_by(1, "main works") == "together again\n"
    stopped = said_by(1, "main stops")
    assert re.match(r"train x: step 5, waiting for the main process: process 1 of 2 waited \d s for the others, and one of "
                    r"them hangs", stopped), stopped
    gone = said_by(1, "main dies")
    assert "waiting for the main process: process 1 of 2 waited" in gone


def test_what_is_said_of_others_tells_where_the_stage_goes_on(tmp_path: Path) -> None:
    world = World(1, 2, patience=90, place=Place("train x", 5, tmp_path))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.json").write_text('{"step": 4}')
    said = world.sentence("adding up gradients", 90.4, "Timed out waiting\nfor 90000ms")
    assert said == ("train x: step 5, adding up gradients: process 1 of 2 waited 90 s for the others, and one of them hangs "
                    "(compute.patience_minutes=1.5 says how long to wait); the same command goes on after step 4, which is "
                    "saved (Timed out waiting for 90000ms)")
    with pytest.raises(ValueError, match="my own"), world.waiting("adding up numbers"):
        raise ValueError("my own")
    with pytest.raises(RuntimeError, match=r"^out of memory$"), world.waiting("adding up numbers"):
        raise RuntimeError("out of memory")
    with pytest.raises(Deserted, match="step 5, adding up numbers"), world.waiting("adding up numbers"):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_on_a_gpu_a_timer_speaks_and_ends_the_process(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """No error comes from a collective that hangs there: its main thread waits for the device."""
    ended = threading.Event()
    statuses = []
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), ended.set()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: ended.wait(20))
    world = World(0, 2, "cuda:0", patience=0.2, place=Place("train x", 7))
    with world.waiting("adding up gradients"):
        pass
    assert statuses == [1]
    assert "train x: step 7, adding up gradients: process 0 of 2 waited 0 s for the others, and one of them hangs" in \
        capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with world.waiting("adding up gradients"):
        pass
    time.sleep(0.5)
    assert statuses == [1]
