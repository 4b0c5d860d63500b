"""SIGTERM to a stage started by its launcher, as schedulers send it: through Metaflow to the step, and back as status 75."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipeline_copy import copy_environment, make_copy, run_in
from test_pipeline import edit

from unigrpo.digests import sha256_path

TRAINING = ("train", "smoke-unigrpo-0")


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_ends_with_75(tmp_path: Path) -> None:
    whole, left = tmp_path / "whole", tmp_path / "left"
    for folder in (whole, left):
        make_copy(folder)
        edit(folder / "params" / "scales" / "smoke.yaml", lambda c: c["train"].update(num_steps=40, checkpoint_every=100))
        for stage in ("curate", "base", "sft"):
            run_in(folder, sys.executable, "-m", "unigrpo", "stage", stage, "smoke")
    run_in(whole, sys.executable, "flows/launch.py", *TRAINING)
    log = (left / "log").open("w")
    started = subprocess.Popen([sys.executable, "flows/launch.py", *TRAINING], cwd=left, stdin=subprocess.DEVNULL, stdout=log,
                               stderr=subprocess.STDOUT, env=copy_environment(PYTHONPATH=str(left)))
    deadline = time.monotonic() + 240
    while not list((left / ".unigrpo" / "resume").glob("*/gallery/00003.png")):  # the first step is over
        assert started.poll() is None, (left / "log").read_text()
        assert time.monotonic() < deadline, (left / "log").read_text()
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(120) == 75, (left / "log").read_text()
    said = (left / "log").read_text()
    assert "asked to leave (SIGTERM); the state after step" in said
    assert "Traceback" not in said
    done = run_in(left, sys.executable, "flows/launch.py", *TRAINING)
    assert "going on from" in done.stdout
    for name in ("checkpoint", "gallery", "curves.csv", "training.json"):
        output = Path("artifacts/smoke/unigrpo/0") / name
        assert sha256_path(left / output) == sha256_path(whole / output), name
