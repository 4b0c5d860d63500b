"""The local records of MLflow runs, and how they reach MLflow's store.

A record is on disk before its stage goes on (.unigrpo/tracking/<key>.jsonl). `.sent` beside it says how much of it the store
has, so that whoever finds the store up (the stage, its courier, a later stage, `unigrpo store`) sends the rest once.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from unigrpo.links import note
from unigrpo.resume import STATE, home
from unigrpo.sealed import sync

PATIENCE = 600.0       # seconds that the end of a stage waits for others who are writing to the same file
BATCH = 1000           # metrics a request; MLflow's limit
TEXT_LIMIT = 6000      # characters of a param; MLflow cuts longer ones
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages for training, not those for prompts and agents


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
        path = database(root)
        if path is not None and not path.exists():
            with replaced(path) as fresh:
                MlflowClient(tracking_uri=f"sqlite:///{fresh}").search_experiments(max_results=1)  # creates the tables
        client = MlflowClient(tracking_uri=store_uri(root))
        client.search_experiments(max_results=1)
    return client


def database(root: Path) -> Path | None:
    """The file of a store that is one, and whose address asks for nothing else."""
    uri = store_uri(root)
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") and "?" not in uri else None


def schema_version(path: Path) -> str | None:
    """The version of a database's tables; None where it has none."""
    with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.OperationalError):
        return str(connection.execute("select version_num from alembic_version").fetchone())
    return None


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write a database to, which takes its name in one step when the block ends well. MLflow's migrations are many
    transactions, and none gets over what a kill in the middle of them has left."""
    fresh = path.with_name(f"{path.name}.new")
    for left in path.parent.glob(f"{fresh.name}*"):
        left.unlink()
    yield fresh
    if not fresh.exists():  # the block has found that there is no need
        return
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


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

    def sending(self, patience: float) -> FileLock:
        """Held by whoever sends: a request of a stage that is gone can still be on its way when another wants to tell its run.
        Raises Timeout after `patience` seconds."""
        return FileLock(self.path.with_suffix(".sending"), timeout=patience)

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
            with journal.lock.acquire(timeout=0), journal.sending(0):
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


def prepare_store(root: Path) -> None:
    """Make the project's database, or bring one of an earlier MLflow to the installed version, before stages share it, and
    send it what stages could not."""
    path = database(root)
    if path is not None and path.is_file():
        with turn(root, PATIENCE), FileLock(root / STATE / "mlflow.lock", timeout=PATIENCE), replaced(path) as fresh:
            with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(fresh)) as new:
                old.backup(new)
            subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{fresh}"], check=True,
                           capture_output=True)
            if schema_version(fresh) == schema_version(path):
                fresh.unlink()  # programs that have the database open go on with it
            elif path.with_name(f"{path.name}-wal").exists():
                raise ValueError(f"{path} is open in another program, and its tables are an earlier MLflow's: end that program "
                                 "(stages, `make ui`), then run this again")
    client = open_client(root)
    with turn(root, PATIENCE):
        send_pending(root, client)


def recorded_run(root: Path, pathspec: str) -> str | None:
    """MLflow's id of the run that a Metaflow task recorded, from this machine's journals; None where they do not know."""
    journals = (home(root) / STATE / "tracking").glob("*.jsonl")
    for path in sorted(journals, key=lambda path: path.stat().st_mtime, reverse=True):
        if f'"metaflow.pathspec": "{pathspec}"' in path.read_text(encoding="utf-8"):
            return Journal(home(root), path.stem).sent()["run_id"]
    return None
