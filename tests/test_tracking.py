"""The tracker: down, killed, cut short, cold; no stage stops for it, and it gets everything later."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_servers import WAYS, bad_server
from filelock import FileLock

from unigrpo import tracking
from unigrpo.journal import Journal, open_client, prepare_store, replaced
from unigrpo.tracking import track

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"scale": "smoke", "seed": 3, "optim": {"lr": 0.1}}


def rows(root: Path, query: str) -> list[tuple]:
    with sqlite3.connect(root / "mlflow.db") as connection:
        return connection.execute(query).fetchall()


def test_a_tracker_that_is_down_never_stops_a_stage_and_gets_all_later(tmp_path, monkeypatch, capfd):
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "gallery.json").write_text("[]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    with track("train", "x", CONFIG, {"git_commit": "abc"}, tmp_path) as tracker:
        tracker.log_metrics(0, {"reward/mean": 0.25, "text/entropy": float("nan")})
        tracker.log_metrics(1, {"reward/mean": 0.5})
        tracker.log_artifacts(tmp_path / "gallery")
    said = capfd.readouterr().err
    assert said.count("does not answer") == 1
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with track("evaluate", "y", CONFIG, {}, tmp_path) as tracker:
        tracker.log_metrics(0, {"bench/shapes/exact": 1.0})
    runs = {name: (uuid, status) for uuid, name, status in rows(tmp_path, "select run_uuid, name, status from runs")}
    assert {name: status for name, (_, status) in runs.items()} == {"train/x": "FINISHED", "evaluate/y": "FINISHED"}
    late = runs["train/x"][0]
    metrics = rows(tmp_path, f"select key, step, value from metrics where run_uuid = '{late}' and key not like 'system/%'")
    assert sorted(metrics) == [("reward/mean", 0, 0.25), ("reward/mean", 1, 0.5), ("tracking/not_finite", 0, 1.0)]
    tags = dict(rows(tmp_path, f"select key, value from tags where run_uuid = '{late}'"))
    assert (tags["git.commit"], tags["git.dirty"], tags["seed"]) == ("abc", "unknown", "3")
    assert dict(rows(tmp_path, f"select key, value from params where run_uuid = '{late}'"))["optim.lr"] == "0.1"
    assert list((tmp_path / "mlartifacts" / "smoke" / late).rglob("gallery.json"))
    assert rows(tmp_path, "select name, artifact_location from experiments where name = 'smoke'") == [
        ("smoke", (tmp_path / "mlartifacts").as_uri() + "/smoke")]


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_fails_costs_a_stage_seconds_and_no_metric(tmp_path, monkeypatch, capsys, way):
    """Steps never wait for it, the end waits as long as it says, and the next stage sends every record once."""
    monkeypatch.setattr(tracking, "WAIT", 1.0)
    monkeypatch.setattr(tracking, "SEND_EVERY", 0.0)
    with bad_server(way) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("//", "//user:secret@") + "?token=secret")
        with track("train", "x", CONFIG, {}, tmp_path) as tracker:
            start = time.monotonic()
            for step in range(50):
                tracker.log_metrics(step, {"reward/mean": float(step)})
            steps = time.monotonic() - start
            import mlflow  # noqa: F401  of the end's seconds, those that are the server's
            start = time.monotonic()
        end = time.monotonic() - start
        said = capsys.readouterr().err
    assert steps < 5
    assert end < 15
    assert "records stay in" in said or "the rest stays in" in said
    assert "secret" not in said
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if (tracker.thread is not None) and tracker.thread.is_alive():
        tracker.thread.join(40)
    with track("evaluate", "y", CONFIG, {}, tmp_path):
        pass
    assert rows(tmp_path, "select status from runs where name = 'train/x'") == [("FINISHED",)]
    found = rows(tmp_path, "select step, value from metrics where key = 'reward/mean' order by step")
    assert found == [(step, float(step)) for step in range(50)]


class Counting:
    """An MLflow client that takes so many requests and is then gone."""

    def __init__(self, requests: int) -> None:
        self.left, self.taken = requests, []

    def __getattr__(self, name):
        def request(*args, **kwargs):
            if not self.left:
                raise ConnectionError("gone")
            self.left -= 1
            self.taken.append((name, args[1:], kwargs))
            return SimpleNamespace(info=SimpleNamespace(run_id="r"), experiment_id="0")
        return request


def test_a_server_that_dies_between_requests_gets_everything_once(tmp_path):
    """After each number of requests; galleries file by file."""
    (tmp_path / "gallery").mkdir()
    for i in range(3):
        (tmp_path / "gallery" / f"{i}.png").write_text(str(i))
    for requests in range(14):
        journal = Journal(tmp_path, f"k{requests}")
        journal.append("start", scale="s", name="train/x", tags={}, params={"a": 1})
        journal.append("metrics", step=0, values={"m": 1.0})
        journal.append("artifact", path="gallery", to="gallery")
        journal.append("metrics", step=1, values={"m": 2.0})
        journal.append("tags", tags={"t": "1"})
        journal.append("end", status="FINISHED")
        taken = []
        for client in (Counting(requests), Counting(99)):
            with contextlib.suppress(ConnectionError):
                journal.send(client, abandoned=True)
            taken += client.taken
        kinds = [(name, str(args), str(kwargs)) for name, args, kwargs in taken if name.startswith(("log", "set"))]
        assert len(kinds) == len(set(kinds)) == 9, requests
        assert kinds[-1][0] == "set_terminated"
        assert "FINISHED" in kinds[-1][2]
        assert journal.sent()["closed"]


def test_a_run_that_the_store_no_longer_has_is_told_anew(tmp_path):
    """Somebody removed mlflow.db while a run of it was unfinished: its records go into a new run, and block no other."""
    (tmp_path / "resume").mkdir()
    with track("train", "x", CONFIG, {}, tmp_path, tmp_path / "resume") as tracker:
        tracker.log_metrics(0, {"reward/mean": 0.25})
    note, = (tmp_path / ".unigrpo" / "tracking").glob("*.sent")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"run_id": "0" * 32}))  # an id that this store never gave
    with track("train", "x", CONFIG, {}, tmp_path, tmp_path / "resume") as tracker:
        tracker.log_metrics(1, {"reward/mean": 0.5})
    assert not tracker.down
    new = json.loads(note.read_text())["run_id"]
    told = rows(tmp_path, f"select step, value from metrics where key = 'reward/mean' and run_uuid = '{new}' order by step")
    assert told == [(0, 0.25), (1, 0.5)]


KILLED = """
import os, sys
from pathlib import Path
from unigrpo.tracking import track
root, die = Path(sys.argv[1]), sys.argv[2] == "die"
with track("train", "x", {"scale": "smoke", "seed": 0}, {}, root, root / "resume") as tracker:
    tracker.log_metrics(0 if die else 1, {"reward/mean": 0.5})
    tracker.send()
    if die:
        os._exit(9)
"""


def test_a_killed_stage_reopens_its_run_and_an_abandoned_one_is_closed(tmp_path):
    (tmp_path / "resume").mkdir()
    run = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run([*run, "die"], cwd=ROOT).returncode == 9
    assert rows(tmp_path, "select status from runs") == [("RUNNING",)]
    subprocess.run([*run, "live"], cwd=ROOT, check=True)
    assert rows(tmp_path, "select status from runs") == [("FINISHED",)]
    assert sorted(rows(tmp_path, "select step from metrics where key = 'reward/mean'")) == [(0,), (1,)]
    (tmp_path / "resume" / "tracking.key").unlink()
    assert subprocess.run([*run, "die"], cwd=ROOT).returncode == 9
    with track("sft", "z", CONFIG, {}, tmp_path):
        pass
    assert sorted(rows(tmp_path, "select name, status from runs")) == [
        ("sft/z", "FINISHED"), ("train/x", "FINISHED"), ("train/x", "KILLED")]


def test_a_record_cut_short_by_a_kill_does_not_spoil_the_next(tmp_path):
    journal = Journal(tmp_path, "k")
    journal.append("metrics", step=0, values={"a": 1.0})
    with journal.path.open("a") as file:
        file.write('{"kind": "metr')
    journal.mend()
    journal.append("metrics", step=1, values={"a": 2.0})
    assert [record["kind"] for record in journal.records()] == ["metrics", "torn", "metrics"]
    assert json.loads(journal.path.read_text().splitlines()[-1])["step"] == 1


def test_stages_take_turns_in_writing_to_a_file(tmp_path, capsys):
    """While another writes, a batch waits for the next one and is no failure; the end of a stage waits until it may."""
    (tmp_path / ".unigrpo").mkdir()
    other = FileLock(tmp_path / ".unigrpo" / "mlflow-send.lock", thread_local=False)
    with track("train", "x", CONFIG, {}, tmp_path) as tracker:
        other.acquire()
        tracker.log_metrics(0, {"reward/mean": 0.5})
        tracker.send()
        assert not tracker.down
        assert rows(tmp_path, "select name from runs") == []
        threading.Timer(1.0, other.release).start()
    assert rows(tmp_path, "select name, status from runs") == [("train/x", "FINISHED")]
    assert "does not answer" not in capsys.readouterr().err


def test_four_first_users_of_a_cold_database(tmp_path):
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from unigrpo.tracking import track
        with track("train", sys.argv[2], {"scale": "smoke", "seed": 0}, {}, Path(sys.argv[1])) as tracker:
            tracker.log_metrics(0, {"reward/mean": 1.0})
        sys.exit(tracker.down)
    """)
    users = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"x{i}"], cwd=ROOT) for i in range(4)]
    assert [user.wait() for user in users] == [0, 0, 0, 0]
    assert rows(tmp_path, "select count(*), count(distinct experiment_id) from runs where status = 'FINISHED'") == [(4, 1)]


BESIDE = """
import os, signal, sys
from pathlib import Path
from unigrpo.tracking import COURIERS, start_courier, track
root, what = Path(sys.argv[1]), sys.argv[2]
start_courier(root)
courier, = COURIERS.values()
with track("train", "x", {"scale": "smoke", "seed": 0}, {}, root) as tracker:
    tracker.log_metrics(0, {"reward/mean": 0.5})
    tracker.send_beside()
    if what == "courier dies":
        courier.process.kill()
    if what == "stage dies":
        courier.deliver("send", tracker.journal.key)
        print(courier.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    tracker.log_metrics(1, {"reward/mean": 0.75})
assert courier.process.poll() is not None
print("mlflow" in sys.modules, tracker.down)
"""


@pytest.mark.parametrize(("what", "here"), [("nothing", "False"), ("courier dies", "True")])
def test_another_process_sends_and_where_it_dies_this_one_does(tmp_path, what, here):
    """`here`: whether MLflow was loaded by the stage's own process."""
    done = subprocess.run([sys.executable, "-c", BESIDE, str(tmp_path), what], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout.split()) == (0, [here, "False"]), done.stderr
    assert rows(tmp_path, "select name, status from runs") == [("train/x", "FINISHED")]
    assert sorted(rows(tmp_path, "select step, value from metrics where key = 'reward/mean'")) == [(0, 0.5), (1, 0.75)]


def test_a_killed_stage_leaves_no_courier_behind(tmp_path):
    done = subprocess.run([sys.executable, "-c", BESIDE, str(tmp_path), "stage dies"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)  # communicate() returns when the last holder of the pipe is gone
    assert done.returncode == -9
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while (stat := Path(f"/proc/{pid}/stat")).exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the courier outlived its stage"
        time.sleep(0.05)
    assert rows(tmp_path, "select status from runs") == [("RUNNING",)]


def test_what_one_is_sending_no_other_tells(tmp_path, monkeypatch):
    """A late request of a stage that is gone: its run is told by one of the two, then by whoever comes next."""
    with track("train", "x", CONFIG, {}, tmp_path) as tracker:
        monkeypatch.setattr(tracker, "finish", lambda seconds: None)
    with tracker.journal.sending(0), track("train", "y", CONFIG, {}, tmp_path):
        pass
    assert rows(tmp_path, "select name from runs") == [("train/y",)]
    with track("train", "z", CONFIG, {}, tmp_path):
        pass
    assert rows(tmp_path, "select name, status from runs order by name") == [(f"train/{name}", "FINISHED") for name in "xyz"]


def test_a_database_that_was_half_made_is_made_again(tmp_path, monkeypatch):
    """A kill between MLflow's migrations: what it has left would never become a database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "mlflow.db"

    def half_made() -> None:
        with replaced(path) as fresh:
            with contextlib.closing(sqlite3.connect(fresh)) as half:
                half.execute("create table scorers (x integer)")
                half.commit()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_made()
    assert not path.exists()
    open_client(tmp_path).create_experiment("kept")
    prepare_store(tmp_path)
    assert open_client(tmp_path).get_experiment_by_name("kept") is not None
    assert [found.name for found in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]
