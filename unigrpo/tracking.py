"""What happened, for people: one MLflow run per stage execution.

Records go to a journal first (journal.py) and from there to MLflow in batches, so a tracker that is down never stops a stage:
the records wait, and the next stage that finds the tracker up sends them. No step waits for it, and
the end of a stage WAIT seconds at most. A killed stage's key lies in its resume folder; the run that goes on from there reopens
the same MLflow run instead of leaving it RUNNING.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import select
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import Timeout

from unigrpo.courier import ADDRESS, DELIVERED, DOWN, JOURNAL, LEAVE, SEND, SEND_PENDING, Courier, files
from unigrpo.digests import flatten
from unigrpo.gallery import gallery_page
from unigrpo.journal import PATIENCE, Journal, journal_key, open_client, send_pending, shown_uri, store_uri, turn
from unigrpo.links import address_of, input_tags, output_tags, source_tags
from unigrpo.resume import home
from unigrpo.sealed import sync

SEND_EVERY = 30.0      # seconds between batches while a stage runs
RETRY_EVERY = 300.0    # seconds until a server that did not answer is asked again
WAIT = 60.0            # seconds that a stage's end waits for a server
WAIT_FILE = 2 * PATIENCE  # and for the project's own SQLite file, whose writers take turns
WAIT_LEAVING = 5.0     # the same where the stage was asked to leave: who asked may not wait long
TAGS = {"dvc_stage": "dvc.stage", "git_commit": "git.commit", "git_dirty": "git.dirty", "params_sha256": "params.sha256",
        "inputs_sha256": "inputs.sha256", "dvc_lock_sha256": "dvc.lock.sha256 at the start",
        "metaflow_pathspec": "metaflow.pathspec", "dvc_exp": "dvc.exp"}
COURIERS: dict[Path, Courier] = {}  # by root; taken by the next `track`


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
        """Send everything, and what earlier stages could not; wait for a server so long at most, for a file until whoever
        writes to it must have ended."""
        if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL:
            return
        limit = WAIT_FILE if store_uri(self.journal.root).startswith("sqlite:") else seconds
        if not (self.delivered(limit) if self.courier is not None else self.joined(limit)):
            print(f"tracking: MLflow at {shown_uri(self.journal.root)} has not taken everything within {limit:g} s; the rest "
                  f"stays in {self.journal.path} and is sent by the next stage that finds it up", file=sys.stderr, flush=True)

    def delivered(self, limit: float) -> bool:
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

    def joined(self, limit: float) -> bool:
        """Let a thread send everything. Returns False if the time was not enough for it; it stops after its request then."""
        with contextlib.suppress(ImportError):
            import mlflow  # noqa: F401  seconds that are no server's
        end = time.monotonic() + limit
        late = False
        for pending in (False, True):  # what is on its way, and then the rest
            if pending and not late:
                self.send_beside(pending=True)
            if self.thread is not None:
                self.thread.join(max(0.0, end - time.monotonic()))
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
            patience = PATIENCE if pending else 0
            with turn(root, patience):
                with self.journal.sending(patience):
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
    """Let another process send what the next `track` of this root records: the one that stages share, where ADDRESS names it.
    One of its own, called before a stage's imports, has MLflow loaded by the time they are done."""
    if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL:
        return
    try:
        COURIERS[home(root)] = Courier(home(root), os.environ.get(ADDRESS))
    except OSError:
        pass  # no process can be started: this one sends


def carry(root: str) -> None:
    """A courier's own process: load MLflow and open its store while the stage works, then send whenever a line asks for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 = PR_SET_PDEATHSIG: nothing is sent for a stage that is dead
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not answer for us
    deaf()
    open_early(Path(root))
    serve(Path(root), sys.stdin, answers)


def carry_for_all(root: str, door: str) -> None:
    """The process of a courier that stages share, each over a connection of its own, until standard input ends and they have.

    Args:
        root: whose store is opened before the first asks. door: number of the file descriptor of a socket that listens.
    """
    deaf()
    opening = threading.Thread(target=open_early, args=(Path(root),), daemon=True)
    opening.start()
    at_work: dict[socket.socket, threading.Thread] = {}
    with socket.socket(fileno=int(door)) as listening:
        while listening in select.select([listening, sys.stdin], [], [])[0]:  # else standard input has ended, and nobody waits
            connection, _ = listening.accept()
            at_work[connection] = threading.Thread(target=serve_connection, args=(connection, opening), daemon=True)
            at_work[connection].start()
    while any(thread.is_alive() and not hung_up(connection) for connection, thread in at_work.items()):
        time.sleep(0.1)
    end = time.monotonic() + LEAVE  # for requests on their way; a server that never ends one must not keep this process
    for thread in at_work.values():
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in at_work.values()):
        os._exit(1)


def serve_connection(connection: socket.socket, opening: threading.Thread | None = None) -> None:
    """One stage's requests, which begin with its project's root. Nothing more is sent for a stage that is gone. `opening`
    loads MLflow and is waited for: of several threads that import it at once, one can meet it half loaded."""

    class Gone(threading.Event):
        def is_set(self) -> bool:
            """Whether the other side has hung up."""
            return hung_up(connection)

    answers, requests = files(connection)
    with contextlib.suppress(OSError), connection, requests, answers:
        root = Path(requests.readline().rstrip("\n"))
        if opening is not None:
            opening.join()
        serve(root, requests, answers, Gone())


def hung_up(connection: socket.socket) -> bool:
    """Whether the stage at the other side has gone, also where it has left a request that nobody has read."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        happened = poll.poll(0)
        return bool(happened) and (bool(happened[0][1] & select.POLLHUP) or not connection.recv(1, socket.MSG_PEEK))
    return True


def deaf() -> None:
    """Signals are for the stage, whose last records are still to be sent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")


def open_early(root: Path) -> None:
    """Have MLflow loaded and the store made before somebody waits for it."""
    with contextlib.suppress(Exception):  # tried again, and told, when there is something to send
        open_client(root)


def serve(root: Path, requests: Iterable[str], answers: IO[str], gone: threading.Event | None = None) -> None:
    """Send the records that requests name, and answer each; `gone`: no request is to be begun any more."""
    trackers: dict[str, Tracker] = {}
    for line in requests:
        request, key = line.split()
        if key not in trackers:
            trackers[key] = Tracker(Journal(root, key))
            trackers[key].stopping = gone or trackers[key].stopping
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
