"""What happened, for people: one MLflow run per stage execution. The only module that imports mlflow.

Records go to a local JSONL first (.unigrpo/tracking/<key>.jsonl) and from there to MLflow in batches, so a tracker that is
down never stops a stage: the records wait, and the next stage that finds the tracker up sends them. A killed stage's key
lies in its resume folder; the run that goes on from there reopens the same MLflow run instead of leaving it RUNNING.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unigrpo.courier import DELIVERED, DOWN, SEND, SEND_PENDING, Courier
from unigrpo.digests import flatten
from unigrpo.resume import STATE
from unigrpo.sealed import sync

SEND_EVERY = 30.0      # seconds between batches while a stage runs
BATCH = 1000           # metrics a request; MLflow's limit
JOURNAL = "journal"    # as MLFLOW_TRACKING_URI: records stay local, for another machine to send
TEXT_LIMIT = 6000      # characters of a param; MLflow cuts longer ones
TAGS = {"dvc_stage": "dvc.stage", "git_commit": "git.commit", "git_dirty": "git.dirty", "params_sha256": "params.sha256",
        "inputs_sha256": "inputs.sha256", "dvc_lock_sha256": "dvc.lock.sha256 at the start",
        "metaflow_pathspec": "metaflow.pathspec"}
COURIERS: dict[Path, Courier] = {}  # by root; taken by the next `track`


def store_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the project's own SQLite file; absolute, since DVC runs stages in other folders too."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


def open_client(root: Path) -> Any:
    """An MLflow client whose database exists. First users of a cold database break it for good, so they queue."""
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default waits minutes for a server that is down
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import logging

    for name in ("alembic", "mlflow.store.db.utils"):  # a database's migrations are not the user's business
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    (root / STATE).mkdir(parents=True, exist_ok=True)
    with FileLock(root / STATE / "mlflow.lock", timeout=120):
        client = MlflowClient(tracking_uri=store_uri(root))
        client.search_experiments(max_results=1)  # creates the tables
    return client


def prepare_store(root: Path) -> None:
    """Make the project's database, or bring one of an earlier MLflow to the installed version, before stages share it."""
    uri = store_uri(root)
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and path.is_file():
        with FileLock(root / STATE / "mlflow.lock", timeout=120):
            subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], check=True, capture_output=True)
    else:
        open_client(root)


def experiment_id(client: Any, root: Path, name: str) -> str:
    """The experiment called `name`, made where it is missing. MLflow takes the artifact root from the working folder
    unless it is given when the experiment is made, and never changes it again."""
    with FileLock(root / STATE / "mlflow.lock", timeout=120):
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = store_uri(root).startswith("sqlite:")
        location = (root / "mlartifacts").resolve().as_uri() + f"/{name}" if local else None
        return str(client.create_experiment(name, artifact_location=location))


def run_exists(client: Any, run_id: str) -> bool:
    """Whether the store knows a run. Any other trouble than its absence is the caller's to handle."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return False
        raise
    return True


class Journal:
    """The local records of one run: an append-only JSONL, and beside it how much of it MLflow has (`.sent`)."""

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key = root, key
        self.path = root / STATE / "tracking" / f"{key}.jsonl"
        self.sent_path = self.path.with_suffix(".sent")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path.with_suffix(".lock"))

    def append(self, kind: str, **values: Any) -> None:
        """One record, on disk before this returns."""
        line = json.dumps({"kind": kind, "time": round(time.time() * 1000), **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def mend(self) -> None:
        """End a last line that a kill cut short, so that the next record does not run into it."""
        if self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def sent(self) -> dict[str, Any]:
        """{"lines": how many records MLflow has, "run_id": MLflow's name of the run, "closed": whether it was ended}."""
        try:
            return dict(json.loads(self.sent_path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {"lines": 0, "run_id": None, "closed": False}

    def records(self) -> list[dict[str, Any]]:
        """All records. A line that a kill cut short is left out: its content is logged again by the resumed run."""
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                records.append({"kind": "torn"})
        return records

    def send(self, client: Any, *, abandoned: bool = False) -> None:
        """Send what MLflow does not have yet. `abandoned`: nobody will add records, so a run without an end was killed."""
        state, records = self.sent(), self.records()
        start = next((r for r in records if r["kind"] == "start"), None)
        new = records[state["lines"]:]
        if start is None or (not new and (state["closed"] or not abandoned)):
            return
        if state["run_id"] is not None and not run_exists(client, state["run_id"]):
            state, new = {"lines": 0, "run_id": None, "closed": False}, records  # the store was deleted: tell it all again
        if state["run_id"] is None:
            experiment = experiment_id(client, self.root, start["scale"])
            run = client.create_run(experiment, start_time=start["time"], run_name=start["name"], tags=start["tags"])
            state["run_id"] = run.info.run_id
            self.write_sent(state)
        self.send_records(client, state["run_id"], new)
        ends = [r for r in new if r["kind"] == "end"]
        if ends:
            client.set_terminated(state["run_id"], status=ends[-1]["status"], end_time=ends[-1]["time"])
            state["closed"] = True
        elif abandoned and not state["closed"]:
            client.set_terminated(state["run_id"], status="KILLED")
            state["closed"] = True
        elif new and state["closed"]:
            client.update_run(state["run_id"], status="RUNNING")  # reopened
            state["closed"] = False
        self.write_sent(state | {"lines": len(records)})

    def write_sent(self, state: Mapping[str, Any]) -> None:
        """Replace the note in one step, so that a kill leaves the old or the new one."""
        part = self.sent_path.with_suffix(".part")
        part.write_text(json.dumps(dict(state)), encoding="utf-8")
        part.replace(self.sent_path)

    def send_records(self, client: Any, run_id: str, records: list[dict[str, Any]]) -> None:
        """Params once, metrics in batches, tags and artifacts as they come."""
        from mlflow.entities import Metric, Param, RunTag

        for record in records:
            if record["kind"] == "start":
                params = [Param(key, str(value)[:TEXT_LIMIT]) for key, value in record["params"].items()]
                client.log_batch(run_id, params=params[:100])
                for first in range(100, len(params), 100):  # MLflow takes 100 params a request
                    client.log_batch(run_id, params=params[first:first + 100])
            elif record["kind"] == "tags":
                client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in record["tags"].items()])
            elif record["kind"] == "artifact":
                path = self.root / record["path"]
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), record["to"] or path.name)
                elif path.is_file():
                    client.log_artifact(run_id, str(path), record["to"])
        metrics = [Metric(key, float(value), record["time"], record["step"])
                   for record in records if record["kind"] == "metrics" for key, value in record["values"].items()]
        for first in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics=metrics[first:first + BATCH])


class Tracker:
    """Handed to a stage by `track`; nothing it does can raise because of the tracker."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.client: Any = None
        self.courier: Courier | None = None  # where there is one, it sends; else this process does
        self.down = False
        self.last = time.monotonic()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Flat `part/quantity` metrics of one step; values that are not finite are left out and counted."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value for key, value in numbers.items() if abs(value) < float("inf")}  # False for NaN too
        if len(finite) < len(numbers):
            finite["tracking/not_finite"] = float(len(numbers) - len(finite))
        self.journal.append("metrics", step=step, values=finite)
        if not self.down and time.monotonic() - self.last > SEND_EVERY:
            self.send(wait=False)

    def log_artifacts(self, path: Path | str, to: str | None = None) -> None:
        """A file, or a folder such as a gallery of (prompt, thinking, image); `to` is its place in the run. The path must
        outlive the stage: what a tracker that is down has not taken is read from there later."""
        path = Path(path).resolve()
        root = self.journal.root.resolve()
        shown = path.relative_to(root) if path.is_relative_to(root) else path
        self.journal.append("artifact", path=str(shown), to=to)

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure as PNG, `name` without suffix."""
        path = self.journal.path.with_suffix("") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
        self.log_artifacts(path, "figures")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """More tags, known only while the stage runs."""
        self.journal.append("tags", tags=dict(tags))

    def sync(self) -> None:
        """Have all records on the disk: what a training state holds was told before it."""
        if self.journal.path.is_file():
            sync(self.journal.path)

    def send(self, *, pending: bool = False, wait: bool = True) -> None:
        """Send to MLflow; if it does not answer, say so once and leave the records where they are. `wait=False`: a courier is
        asked and nobody waits for it."""
        self.last = time.monotonic()
        if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL:
            return
        try:
            if self.courier is not None and self.hand_over(SEND_PENDING if pending else SEND, wait):
                return
            if self.client is None:
                self.client = open_client(self.journal.root)
            self.journal.send(self.client)
            if pending:
                send_pending(self.journal.root, self.client, without=self.journal.key)
            self.down = False
        except Exception as error:  # whatever a tracker does, the stage goes on
            if not self.down:
                first = (str(error).splitlines() or [""])[0][:200]
                print(f"tracking: MLflow at {store_uri(self.journal.root)} does not answer ({type(error).__name__}: {first}); "
                      f"records stay in {self.journal.path} and are sent by the next stage that finds it up",
                      file=sys.stderr, flush=True)
            self.down = True

    def hand_over(self, request: str, wait: bool) -> bool:
        """Let the courier send; it says itself what goes wrong. Returns False if it is gone: this process sends from now on."""
        assert self.courier is not None
        try:
            if wait:
                self.down = not self.courier.deliver(request, self.journal.key)
            else:
                self.courier.ask(request, self.journal.key)
        except OSError:
            self.courier.end()
            self.courier = None
            return False
        return True


def start_courier(root: Path) -> None:
    """Let another process send what the next `track` of this root records. Called before a stage's imports, it has MLflow
    loaded by the time they are done."""
    if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL:
        return
    try:
        COURIERS[root.resolve()] = Courier(root)
    except OSError:
        pass  # no process can be started: this one sends


def carry(root: str) -> None:
    """A courier's own process: load MLflow and open its store while the stage works, then send whenever a line asks for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage, whose last records are still to be sent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 = PR_SET_PDEATHSIG: nothing is sent for a stage that is dead
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not answer for us
    warnings.simplefilter("ignore")
    try:
        client = open_client(Path(root))
    except Exception:  # tried again, and told, when there is something to send
        client = None
    trackers: dict[str, Tracker] = {}
    for line in sys.stdin:
        request, key = line.split()
        if key not in trackers:
            trackers[key] = Tracker(Journal(Path(root), key))
            trackers[key].client = client
        trackers[key].send(pending=request == SEND_PENDING)
        print(DOWN if trackers[key].down else DELIVERED, file=answers, flush=True)


class SilentTracker(Tracker):
    """The tracker of a process that does not speak: the stage's main process tells for all."""

    def __init__(self) -> None:
        """Nothing to keep."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Told by the main process."""

    def log_artifacts(self, path: Path | str, to: str | None = None) -> None:
        """Told by the main process."""

    def log_figure(self, figure: Any, name: str) -> None:
        """Told by the main process."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Told by the main process."""

    def sync(self) -> None:
        """Told by the main process."""

    def send(self, *, pending: bool = False, wait: bool = True) -> None:
        """Told by the main process."""


def send_pending(root: Path, client: Any, *, without: str) -> None:
    """Send what earlier stages could not. Runs that another process is writing are its own business."""
    for path in sorted((root / STATE / "tracking").glob("*.jsonl")):
        journal = Journal(root, path.stem)
        state = journal.sent()
        if path.stem == without or (state["closed"] and state["lines"] >= len(journal.records())):
            continue
        try:
            with journal.lock.acquire(timeout=0):
                journal.send(client, abandoned=True)
        except Timeout:
            continue


def journal_key(stage: str, name: str, folder: Path | None) -> str:
    """A fresh key, or the one an interrupted run left in its resume folder."""
    note = folder / "tracking.key" if folder is not None else None
    if note is not None and note.is_file():
        return note.read_text(encoding="utf-8").strip()
    key = f"{stage}-{name}-{uuid.uuid4().hex[:12]}"
    if note is not None:
        note.write_text(key, encoding="utf-8")
    return key


def machine_tags() -> dict[str, str]:
    """Hardware and interpreter: facts about seconds, which therefore stay out of DVC's outputs."""
    return {"host.cpus": str(os.cpu_count()), "host.machine": platform.machine(), "host.system": platform.system(),
            "host.python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS", "unknown")}


@contextmanager
def track(stage: str, name: str, config: Mapping[str, Any], provenance: Mapping[str, str] | None = None,
          root: Path = Path("."), folder: Path | None = None) -> Iterator[Tracker]:
    """One stage execution as one MLflow run, in the experiment named for the scale.

    Args:
        stage, name: as in dvc.yaml; together they name the run. config: the resolved config as nested mappings.
        provenance: what the launcher knows (see TAGS); what it does not know is recorded as "unknown", never guessed.
        root: the project's root. folder: the stage's resume folder, so that a killed run is reopened.
    Yields: a Tracker.
    """
    journal = Journal(root, journal_key(stage, name, folder))
    provenance = dict(provenance or {})
    tags = {tag: provenance.get(field) or "unknown" for field, tag in TAGS.items()} | machine_tags()
    params = flatten(config)
    tags |= {"stage": stage, "seed": str(params.get("seed", "unknown"))}
    began = time.monotonic()
    with journal.lock:
        if not journal.path.is_file():
            journal.append("start", scale=str(params.get("scale") or name), name=f"{stage}/{name}", tags=tags, params=params)
        else:
            journal.mend()
            journal.append("tags", tags=tags | {"resumed": "true"})
        tracker = Tracker(journal)
        tracker.courier = COURIERS.pop(root.resolve(), None)
        status = "FAILED"
        try:
            yield tracker
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
            tracker.log_metrics(0, {"system/seconds": time.monotonic() - began, "system/peak_memory_kb"
                                    if sys.platform == "darwin" else "system/peak_memory_mb": peak})
            journal.append("end", status=status)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tracker.send(pending=True)
            if tracker.courier is not None:
                tracker.courier.end()
