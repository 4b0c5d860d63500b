"""What happened, for people: one MLflow run per stage execution. The only module that imports mlflow.

Records go to a local JSONL first (.unigrpo/tracking/<key>.jsonl) and from there to MLflow in batches, so a tracker that is
down never stops a stage: the records wait, and the next stage that finds the tracker up sends them. No step waits for it, and
the end of a stage WAIT seconds at most. A killed stage's key lies in its resume folder; the run that goes on from there reopens
the same MLflow run instead of leaving it RUNNING.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from unigrpo.courier import DELIVERED, DOWN, SEND, SEND_PENDING, Courier
from unigrpo.digests import flatten
from unigrpo.gallery import gallery_page
from unigrpo.links import address_of, input_tags, note, output_tags, source_tags
from unigrpo.resume import STATE, home
from unigrpo.sealed import sync

SEND_EVERY = 30.0      # seconds between batches while a stage runs
PATIENCE = 600.0       # seconds that the end of a stage waits for others who are writing to the same file
RETRY_EVERY = 300.0    # seconds until a server that did not answer is asked again
WAIT = 60.0            # seconds that a stage's end waits for a server; for the project's own SQLite file it waits till the end
WAIT_LEAVING = 5.0     # the same where the stage was asked to leave: who asked may not wait long
BATCH = 1000           # metrics a request; MLflow's limit
JOURNAL = "journal"    # as MLFLOW_TRACKING_URI: records stay local, for another machine to send
TEXT_LIMIT = 6000      # characters of a param; MLflow cuts longer ones
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages for training, not those for prompts and agents
TAGS = {"dvc_stage": "dvc.stage", "git_commit": "git.commit", "git_dirty": "git.dirty", "params_sha256": "params.sha256",
        "inputs_sha256": "inputs.sha256", "dvc_lock_sha256": "dvc.lock.sha256 at the start",
        "metaflow_pathspec": "metaflow.pathspec", "dvc_exp": "dvc.exp"}
COURIERS: dict[Path, Courier] = {}  # by root; taken by the next `track`


def store_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the project's own SQLite file; absolute, since DVC runs stages in other folders too."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


@contextmanager
def turn(root: Path, timeout: float) -> Iterator[None]:
    """The right to write to a store that is one file. SQLite lets one process write at a time and turns others away after a
    while, so twelve stages that end together take turns here. Raises filelock.Timeout."""
    if not store_uri(root).startswith("sqlite:"):
        yield
        return
    (root / STATE).mkdir(parents=True, exist_ok=True)
    with FileLock(root / STATE / "mlflow-send.lock", timeout=timeout):
        yield


def shown_uri(root: Path) -> str:
    """`store_uri` for people and logs: without the user, password and query that it may hold."""
    parts = urlsplit(store_uri(root))
    if parts.scheme not in ("http", "https"):
        return store_uri(root)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


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
    with FileLock(root / STATE / "mlflow.lock", timeout=PATIENCE):
        client = MlflowClient(tracking_uri=store_uri(root))
        client.search_experiments(max_results=1)  # creates the tables
    return client


def prepare_store(root: Path) -> None:
    """Make the project's database, or bring one of an earlier MLflow to the installed version, before stages share it, and
    send it what stages could not."""
    uri = store_uri(root)
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and path.is_file():
        with FileLock(root / STATE / "mlflow.lock", timeout=PATIENCE):
            subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], check=True, capture_output=True)
    client = open_client(root)
    with turn(root, PATIENCE):
        send_pending(root, client)


def experiment_id(client: Any, root: Path, name: str) -> str:
    """The experiment called `name`, made where it is missing. MLflow takes the artifact root from the working folder
    unless it is given when the experiment is made, and never changes it again."""
    with FileLock(root / STATE / "mlflow.lock", timeout=PATIENCE):
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = store_uri(root).startswith("sqlite:")
        location = (root / "mlartifacts").resolve().as_uri() + f"/{name}" if local else None
        return str(client.create_experiment(name, artifact_location=location, tags=KIND))


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
        """All records. A line that a kill cut short is left out: its content is logged again by the resumed run. So is one
        without its end: it is being written."""
        records = []
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        for line in text[:text.rfind("\n") + 1].splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                records.append({"kind": "torn"})
        return records

    def send(self, client: Any, *, abandoned: bool = False, stop: Callable[[], bool] = lambda: False) -> None:
        """Send what MLflow does not have yet.

        Args:
            abandoned: nobody will add records, so a run without an end was killed.
            stop: asked before each request; once it is true the rest waits.
        """
        state, records = self.sent(), self.records()
        start = next((r for r in records if r["kind"] == "start"), None)
        new = records[state["lines"]:]
        if start is None or (not new and (state["closed"] or not abandoned)):
            return
        if state["run_id"] is not None and not run_exists(client, state["run_id"]):
            state = {"lines": 0, "run_id": None, "closed": False}  # the store was deleted: tell it all again
        if state["run_id"] is None:
            experiment = experiment_id(client, self.root, start["scale"])
            run = client.create_run(experiment, start_time=start["time"], run_name=start["name"], tags=start["tags"])
            state["run_id"] = run.info.run_id
            self.write_sent(state)
        if not state.get("noted"):  # again where the server died before it
            stage, _, name = start["name"].partition("/")
            client.set_tag(state["run_id"], "mlflow.note.content", note(str(state["run_id"]), stage, name, start["tags"]))
            state["noted"] = True
            self.write_sent(state)
        state = {"files": 0, **state}
        if not self.send_records(client, records, state, stop):
            return
        if records[-1]["kind"] == "end":  # a run that goes on writes tags after it
            client.set_terminated(state["run_id"], status=records[-1]["status"], end_time=records[-1]["time"])
            state["closed"] = True
        elif abandoned and not state["closed"]:
            client.set_terminated(state["run_id"], status="KILLED")
            state["closed"] = True
        elif state["closed"]:
            client.update_run(state["run_id"], status="RUNNING")  # reopened
            state["closed"] = False
        self.write_sent(state)

    def write_sent(self, state: Mapping[str, Any]) -> None:
        """Replace the note in one step, so that a kill leaves the old or the new one."""
        part = self.sent_path.with_suffix(".part")
        part.write_text(json.dumps(dict(state)), encoding="utf-8")
        part.replace(self.sent_path)

    def send_records(self, client: Any, records: list[dict[str, Any]], state: dict[str, Any], stop: Callable[[], bool]) -> bool:
        """Params once, metrics in batches, tags and artifacts as they come. `.sent` follows each request, so that a slow
        server gets everything once. Returns whether all is sent."""
        while state["lines"] < len(records):
            if stop():
                return False
            metrics, end = self.metrics_from(records, state["lines"])
            for first in range(0, len(metrics), BATCH):
                client.log_batch(state["run_id"], metrics=metrics[first:first + BATCH])
            if end == state["lines"]:
                if not self.send_other(client, records[end], state, stop):
                    return False
                end += 1
            state |= {"lines": end, "files": 0}
            self.write_sent(state)
        return True

    def metrics_from(self, records: list[dict[str, Any]], start: int) -> tuple[list[Any], int]:
        """MLflow's metrics of the records from `start` on, as many as make a batch; the index of the record after them."""
        from mlflow.entities import Metric

        metrics: list[Any] = []
        while start < len(records) and records[start]["kind"] == "metrics" and len(metrics) < BATCH:
            record = records[start]
            metrics += [Metric(key, float(value), record["time"], record["step"]) for key, value in record["values"].items()]
            start += 1
        return metrics, start

    def send_other(self, client: Any, record: dict[str, Any], state: dict[str, Any], stop: Callable[[], bool]) -> bool:
        """A record that holds no metrics. Returns whether all of it is sent."""
        from mlflow.entities import Param, RunTag

        run_id = state["run_id"]
        if record["kind"] == "start":
            params = [Param(key, str(value)[:TEXT_LIMIT]) for key, value in record["params"].items()]
            for first in range(0, len(params), 100):  # MLflow takes 100 params a request
                client.log_batch(run_id, params=params[first:first + 100])
        elif record["kind"] == "tags":
            client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in record["tags"].items()])
        elif record["kind"] == "artifact":
            path = self.root / record["path"]
            whole = path.is_dir()
            files = sorted(p for p in path.rglob("*") if p.is_file()) if whole else [path] if path.is_file() else []
            for file in files[state["files"]:]:
                if stop():
                    return False
                place = Path(record["to"] or path.name) / file.parent.relative_to(path) if whole else record["to"]
                client.log_artifact(run_id, str(file), str(place) if place else None)
                state["files"] += 1
                self.write_sent(state)
        return True


class Tracker:
    """Handed to a stage by `track`; nothing it does can raise because of the tracker."""

    def __init__(self, journal: Journal, copies: bool = False) -> None:
        self.journal = journal
        self.copies = copies  # artifacts are copied as they are logged, because their place will be gone
        self.client: Any = None
        self.courier: Courier | None = None  # where there is one, it sends; else this process does
        self.down = False
        self.last = time.monotonic()
        self.stopping = threading.Event()  # no further request is to be sent
        self.thread: threading.Thread | None = None  # sends where there is no courier

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Flat `part/quantity` metrics of one step; values that are not finite are left out and counted."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value for key, value in numbers.items() if abs(value) < float("inf")}  # False for NaN too
        if len(finite) < len(numbers):
            finite["tracking/not_finite"] = float(len(numbers) - len(finite))
        self.journal.append("metrics", step=step, values=finite)
        if time.monotonic() - self.last > (RETRY_EVERY if self.down else SEND_EVERY):
            self.send_beside()

    def log_artifacts(self, path: Path | str, to: str | None = None) -> None:
        """A file, or a folder such as a gallery of (prompt, thinking, image); `to` is its place in the run. The path must
        outlive the stage: what a tracker that is down has not taken is read from there later."""
        path = Path(path).resolve()
        if path.is_dir() and (page := self.gallery(path)):
            self.append_artifact(page, None)
        if self.copies and path.exists():
            kept = self.journal.path.with_suffix("") / path.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, kept, dirs_exist_ok=True)
            else:
                shutil.copy2(path, kept)
            path = kept
        self.append_artifact(path, to)

    def append_artifact(self, path: Path, to: str | None) -> None:
        """Its record, by its place in the project where it lies there."""
        root = self.journal.root.resolve()
        self.journal.append("artifact", path=str(path.relative_to(root) if path.is_relative_to(root) else path), to=to)

    def gallery(self, folder: Path) -> Path | None:
        """The page of a gallery's folder, beside the journal; None where it is no gallery, or one that cannot be read."""
        try:
            text = gallery_page(folder)
        except (OSError, ValueError) as error:
            print(f"tracking: {folder} makes no page ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
            return None
        if text is None:
            return None
        path = self.journal.path.with_suffix("") / f"{folder.name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

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

    def send_beside(self, *, pending: bool = False) -> None:
        """Send without waiting: the courier does it, or a thread, which ends with the process if it has to."""
        self.last = time.monotonic()
        if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL:
            return
        if self.courier is not None:
            try:
                return self.courier.ask(SEND_PENDING if pending else SEND, self.journal.key)
            except OSError:
                self.dismiss()
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.send, kwargs={"pending": pending}, name="tracking", daemon=True)
            self.thread.start()

    def finish(self, seconds: float) -> None:
        """Send everything, and what earlier stages could not; wait for a server so long at most, for a file till the end."""
        if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL:
            return
        limit = None if store_uri(self.journal.root).startswith("sqlite:") else seconds
        if not (self.delivered(limit) if self.courier is not None else self.joined(limit)):
            print(f"tracking: MLflow at {shown_uri(self.journal.root)} has not taken everything within {seconds:g} s; the rest "
                  f"stays in {self.journal.path} and is sent by the next stage that finds it up", file=sys.stderr, flush=True)

    def delivered(self, limit: float | None) -> bool:
        """Let the courier send everything. Returns False if the time was not enough for it; a courier that is gone is
        replaced by a thread."""
        assert self.courier is not None
        try:
            answer = self.courier.deliver(SEND_PENDING, self.journal.key, limit)
        except OSError:
            self.dismiss()
            return self.joined(limit)
        self.down = answer is False
        self.dismiss()
        return answer is not None

    def joined(self, limit: float | None) -> bool:
        """Let a thread send everything. Returns False if the time was not enough for it; it stops after its request then."""
        with contextlib.suppress(ImportError):
            import mlflow  # noqa: F401  seconds that are no server's
        end = None if limit is None else time.monotonic() + limit
        late = False
        for pending in (False, True):  # what is on its way, and then the rest
            if pending and not late:
                self.send_beside(pending=True)
            if self.thread is not None:
                self.thread.join(None if end is None else max(0.0, end - time.monotonic()))
                late = self.thread.is_alive()
        if late:
            self.stopping.set()
        return not late

    def dismiss(self) -> None:
        """End the courier."""
        if self.courier is not None:
            self.courier.end()
        self.courier = None

    def send(self, *, pending: bool = False) -> None:
        """Send to MLflow from this process; if it does not answer, say so once and leave the records where they are.

        `pending`: the stage has ended. Its last records wait for their turn; others that wait go with them.
        """
        self.last = time.monotonic()
        root = self.journal.root
        try:
            if self.client is None:
                self.client = open_client(root)
            with turn(root, PATIENCE if pending else 0):
                self.journal.send(self.client, stop=self.stopping.is_set)
                if pending:
                    send_pending(root, self.client, without=self.journal.key, stop=self.stopping.is_set)
            self.down = False
        except Exception as error:  # whatever a tracker does, the stage goes on
            if isinstance(error, Timeout) and not pending:
                return  # somebody else is writing: the next batch takes these records along
            if not self.down:
                first = (str(error).splitlines() or [""])[0][:200].replace(store_uri(root), "it")
                print(f"tracking: MLflow at {shown_uri(root)} does not answer ({type(error).__name__}: {first}); records stay "
                      f"in {self.journal.path}; the next stage that finds it up, or `unigrpo store`, sends them",
                      file=sys.stderr, flush=True)
            self.down = True


def start_courier(root: Path) -> None:
    """Let another process send what the next `track` of this root records. Called before a stage's imports, it has MLflow
    loaded by the time they are done."""
    if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL:
        return
    try:
        COURIERS[home(root)] = Courier(home(root))
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

    def send(self, *, pending: bool = False) -> None:
        """Told by the main process."""


def send_pending(root: Path, client: Any, *, without: str = "", stop: Callable[[], bool] = lambda: False) -> None:
    """Send what earlier stages could not, until `stop` is true. Runs that another process is writing are its own business."""
    for path in sorted((root / STATE / "tracking").glob("*.jsonl")):
        if stop():
            return
        journal = Journal(root, path.stem)
        state = journal.sent()
        if path.stem == without or (state["closed"] and state["lines"] >= len(journal.records())):
            continue
        try:
            with journal.lock.acquire(timeout=0):
                journal.send(client, abandoned=True, stop=stop)
        except Timeout:
            continue


def journal_key(stage: str, name: str, folder: Path | None) -> str:
    """A fresh key, or the one an interrupted run left in its resume folder."""
    note = folder / "tracking.key" if folder is not None else None
    if note is not None and note.is_file():
        return note.read_text(encoding="utf-8").strip()
    key = f"{stage}-{name}-{uuid.uuid4().hex[:12]}"
    if note is not None:  # in one step: a kill must not leave an empty key
        note.with_suffix(".part").write_text(key, encoding="utf-8")
        note.with_suffix(".part").replace(note)
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
    place = home(root)
    journal = Journal(place, journal_key(stage, name, folder))
    provenance = dict(provenance or {})
    tags = {tag: provenance.get(field) or "unknown" for field, tag in TAGS.items()} | machine_tags()
    params = flatten(config)
    tags |= {"stage": stage, "seed": str(params.get("seed", "unknown"))} | source_tags(stage, name, tags)
    tags |= quietly(lambda: input_tags(root, stage, name))
    began = time.monotonic()
    with journal.lock:
        if not journal.path.is_file():
            journal.append("start", scale=str(params.get("scale") or name), name=f"{stage}/{name}", tags=tags, params=params)
        else:
            journal.mend()
            journal.append("tags", tags=tags | {"resumed": "true"})
        tracker = Tracker(journal, copies=place != root.resolve())
        tracker.courier = COURIERS.pop(place, None)
        status = "FAILED"
        try:
            yield tracker
            status = "FINISHED"
            tracker.set_tags(quietly(lambda: output_tags(root, address_of(tags, stage, name))))
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
                tracker.finish(WAIT_LEAVING if status == "KILLED" else WAIT)


def quietly(tags: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Tags that need the project's files; none where these do not say: they are not worth a stage."""
    try:
        return tags()
    except Exception:
        return {}


def recorded_run(root: Path, pathspec: str) -> str | None:
    """MLflow's id of the run that a Metaflow task recorded, from this machine's journals; None where they do not know."""
    journals = (home(root) / STATE / "tracking").glob("*.jsonl")
    for path in sorted(journals, key=lambda path: path.stat().st_mtime, reverse=True):
        if f'"metaflow.pathspec": "{pathspec}"' in path.read_text(encoding="utf-8"):
            return Journal(home(root), path.stem).sent()["run_id"]
    return None
