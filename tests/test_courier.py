"""A courier that stages share: it serves all, dies, stops, hangs and is left, and no stage waits for it without end."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from bad_servers import bad_server

from unigrpo import tracking
from unigrpo.courier import ADDRESS, Courier, shared_courier
from unigrpo.courier import start as start_process
from unigrpo.journal import experiment_id
from unigrpo.tracking import track

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"scale": "smoke", "seed": 3, "optim": {"lr": 0.1}}


def rows(root: Path, query: str) -> list[tuple]:
    with sqlite3.connect(root / "mlflow.db") as connection:
        return connection.execute(query).fetchall()


SHARING = """
import os, signal, sys
from pathlib import Path
from unigrpo.tracking import COURIERS, start_courier, track
root, name, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
start_courier(root)
courier, = COURIERS.values()
assert courier.process is None
with track("train", name, {"scale": "smoke", "seed": 0}, {}, root) as tracker:
    tracker.log_metrics(0, {"reward/mean": 0.5})
    if what == "stage dies":
        courier.deliver("send", tracker.journal.key)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "courier dies":
        print("now", flush=True)
        sys.stdin.readline()
print("mlflow" in sys.modules, tracker.down)
"""


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen[str]]:
    """The processes that send, in the order of their start."""
    found: list[subprocess.Popen[str]] = []

    def noted(*arguments, **options):
        found.append(start_process(*arguments, **options))
        return found[-1]

    monkeypatch.setattr("unigrpo.courier.start", noted)
    return found


def sharing(root: Path, name: str, what: str, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SHARING, str(root), name, what], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env={**os.environ, ADDRESS: address})


def test_stages_share_one_that_sends(tmp_path):
    """Six at once, of two projects; the seventh is killed, and the next one tells that."""
    other = tmp_path / "other"
    other.mkdir()
    with shared_courier(tmp_path) as address:
        stages = [sharing(root, f"x{i}", "nothing", address) for i in range(3) for root in (tmp_path, other)]
        assert [stage.communicate()[0].split() for stage in stages] == [["False", "False"]] * 6
        killed = sharing(tmp_path, "y", "stage dies", address)
        killed.communicate()
        assert killed.returncode == -9
        assert rows(tmp_path, "select status from runs where name = 'train/y'") == [("RUNNING",)]
        sharing(tmp_path, "z", "nothing", address).communicate()
    assert not Path(address).exists()
    finished = [("train/x0", "FINISHED"), ("train/x1", "FINISHED"), ("train/x2", "FINISHED")]
    assert rows(other, "select name, status from runs order by name") == finished
    assert rows(tmp_path, "select name, status from runs order by name") == [
        *finished, ("train/y", "KILLED"), ("train/z", "FINISHED")]


def test_where_the_shared_one_dies_a_stage_sends_itself_and_the_next_starts_its_own(tmp_path, monkeypatch, started):
    with shared_courier(tmp_path) as address:
        stage = sharing(tmp_path, "x", "courier dies", address)
        assert stage.stdout.readline() == "now\n"
        started[0].kill()
        assert stage.communicate("\n")[0].split() == ["True", "False"]
        assert rows(tmp_path, "select name, status from runs") == [("train/x", "FINISHED")]
        monkeypatch.setenv(ADDRESS, address)
        tracking.start_courier(tmp_path)
        with track("train", "z", CONFIG, {}, tmp_path) as tracker:
            assert tracker.courier.process.poll() is None
    assert rows(tmp_path, "select count(*) from runs where status = 'FINISHED'") == [(2,)]


def test_who_waits_at_the_door_of_the_shared_one_hears_of_its_death(tmp_path, started):
    """It dies before it lets anyone in: a stage that is at the door does not wait for ever, one that comes later neither."""
    with shared_courier(tmp_path) as address:
        started[0].send_signal(signal.SIGSTOP)
        waiting = Courier(tmp_path, address)
        waiting.ask("send", "x")
        assert waiting.process is None
        assert waiting.answer(0.2) is None
        started[0].kill()
        with pytest.raises(OSError):
            waiting.answer(60.0)
        waiting.end()
        late = Courier(tmp_path, address)
        assert late.process is started[1]
        started[1].kill()
        late.end()


def test_no_request_is_begun_for_a_stage_that_has_gone(tmp_path, monkeypatch):
    """It hangs up while the first of its requests is on its way: the rest waits for whoever sends next."""
    here, there = socket.socketpair()
    monkeypatch.setattr("unigrpo.journal.experiment_id", lambda *given: here.close() or experiment_id(*given))
    with track("train", "x", CONFIG, {}, tmp_path) as tracker:
        there.settimeout(60)
        here.sendall(f"{tmp_path}\nsend {tracker.journal.key}\n".encode())
        tracking.serve_connection(there)
        assert rows(tmp_path, "select status from runs") == [("RUNNING",)]
        assert rows(tmp_path, "select count(*) from params") == [(0,)]
        assert tracker.journal.sent()["lines"] == 0
    assert rows(tmp_path, "select count(*) from params") == [(3,)]


def test_a_stage_that_left_a_request_unread_has_hung_up():
    here, there = socket.socketpair()
    with there:
        assert not tracking.hung_up(there)
        here.sendall(b"send x\n")
        assert not tracking.hung_up(there)
        here.close()
        assert tracking.hung_up(there)
    assert tracking.hung_up(there)


def test_a_shared_courier_does_not_outlive_its_stages_for_a_server_that_never_ends(tmp_path, monkeypatch, started):
    """It is loading the store when its stage and then its runner go."""
    monkeypatch.setattr("unigrpo.courier.LEAVE", 60.0)  # the runner's patience is not what ends it
    with bad_server("drips") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with shared_courier(tmp_path) as door:
            stage = Courier(tmp_path, door)
            stage.ask("send", "x")
            stage.requests.close()
            stage.answers.close()
        assert started[0].returncode in (0, 1)


def test_a_project_whose_path_is_no_utf8(tmp_path):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pr\xe9j"))
    root.mkdir()
    with shared_courier(root) as address:
        stage = Courier(root, address)
        assert stage.process is None
        assert stage.deliver("send", "x", 60.0) is not None
        stage.end()


def test_one_that_is_stopped_does_not_hold_a_stage_for_ever(tmp_path, monkeypatch, capfd, started):
    monkeypatch.setattr(tracking, "WAIT_FILE", 0.5)
    with shared_courier(tmp_path) as address:
        started[0].send_signal(signal.SIGSTOP)
        monkeypatch.setenv(ADDRESS, address)
        tracking.start_courier(tmp_path)
        with track("train", "x", CONFIG, {}, tmp_path) as tracker:
            assert tracker.courier.process is None
        started[0].kill()
    assert "has not taken everything within 0.5 s; the rest stays in" in capfd.readouterr().err
    assert tracker.journal.sent()["lines"] == 0
    monkeypatch.setattr(tracking, "WAIT_FILE", 600.0)
    monkeypatch.delenv(ADDRESS)
    with track("train", "y", CONFIG, {}, tmp_path):
        pass
    assert rows(tmp_path, "select name, status from runs order by name") == [("train/x", "FINISHED"), ("train/y", "FINISHED")]
