"""Process lifetimes, locks, resume folders, digests and the progress line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from flow_scripts import ROOT, load

from unigrpo.digests import sha256_json, sha256_path
from unigrpo.progress import Progress, duration
from unigrpo.resume import hold, resume_folder


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """True as soon as the condition holds, False if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def process():
    return load(ROOT / "flows" / "process.py")


@pytest.mark.parametrize(("codes", "status"), [
    ([75, 75], 75), ([75, -15], 75), ([75, -9], 1), ([1, 75], 1), ([2, 75], 2), ([2, 1], 2), ([130, -15], 130),
    ([-15, -15], 1)])
def test_a_crash_is_no_preemption(codes, status):
    """After the crash of one process the agent asks the others to leave, and they end as if they were preempted."""
    sys.path.insert(0, str(ROOT / "flows"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("METAFLOW_USER", "test")
            patch.setenv("UNIGRPO_SCALE", "smoke")
            assert load(ROOT / "flows" / "common.py").status_of(codes) == status
    finally:
        sys.path.remove(str(ROOT / "flows"))


PARENT = """
import subprocess, sys, time
child = subprocess.Popen({command})
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("through_shell", [False, True])
def test_a_child_ends_with_its_killed_parent(process, tmp_path, through_shell):
    """kill -9 of the parent, also with a shell between (dvc starts stages through one, which would stay and wait)."""
    mark = tmp_path / "pid"
    code = f"import sys, os, time; sys.path.insert(0, {str(ROOT / 'flows')!r}); import process; process.die_with_parent(); " \
           f"open({str(mark)!r} + '.part', 'w').write(str(os.getpid())); os.rename({str(mark)!r} + '.part', {str(mark)!r}); " \
           "time.sleep(60)"
    command = [sys.executable, "-c", code]
    if through_shell:
        script = tmp_path / "child.py"
        script.write_text(code)
        command = ["/bin/sh", "-c", f"{sys.executable} {script}; true"]  # "; true" keeps the shell from exec
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(command=command)], stdout=subprocess.DEVNULL)
    try:
        assert wait_for(mark.exists)
        pid = int(mark.read_text())
        assert process.alive(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_for(lambda: not process.alive(pid), 10), "the child outlived its parent"


def test_a_second_starter_waits_and_names_the_holder(tmp_path):
    lock = tmp_path / "locks" / "train-x.lock"
    code = f"import time; from pathlib import Path; from unigrpo.resume import hold\n" \
           f"with hold(Path({str(lock)!r}), 'train x'):\n    print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said: list[str] = []
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(TimeoutError, match=rf"train x \(process {holder.pid}\) still holds"), \
                hold(lock, "train x again", timeout=0.2, say=said.append):
            pass
        assert said == [f"train x again: waiting for train x (process {holder.pid}), which holds train-x.lock"]
    finally:
        holder.kill()
        holder.wait()
    with hold(lock, "after the kill", timeout=5, say=said.append):  # the kernel has released a killed holder's lock
        pass


def test_a_resume_folder_stays_after_a_failure_and_goes_after_success(tmp_path):
    (tmp_path / "in.txt").write_text("1")
    quiet: list[str] = []

    def enter(params, fail=False, stage="train"):
        with resume_folder(tmp_path, stage, "x", params, ["in.txt"], say=quiet.append) as folder:
            seen = (folder / "state").exists()
            (folder / "state").write_text("half way")
            if fail:
                raise KeyboardInterrupt
        return seen

    with pytest.raises(KeyboardInterrupt):
        enter({"lr": 1}, fail=True)
    assert not enter({"lr": 2})   # other params: another folder
    assert not enter({"lr": 1}, stage="sft")
    (tmp_path / "in.txt").write_text("2")
    assert not enter({"lr": 1})   # another input
    (tmp_path / "in.txt").write_text("1")
    assert enter({"lr": 1})       # back at the old values: found again
    assert not enter({"lr": 1})   # and removed by the success before


def test_digests_see_content_and_names_only(tmp_path):
    for folder, name, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    a, b, c, d = (sha256_path(tmp_path / folder) for folder in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="missing"):
        sha256_path(tmp_path / "none")


def test_a_progress_line_tells_rate_and_eta(capsys):
    with Progress("train x", 10, start=4, every=0.0) as progress:
        progress.step(5, reward=0.71234)
    line = capsys.readouterr().err
    assert re.fullmatch(r"train x: 5/10  0:00  [\d.]+ steps/s  ETA \d+:\d\d  reward 0.712\n", line)
    assert [duration(s) for s in (5, 75, 3723)] == ["0:05", "1:15", "1:02:03"]
