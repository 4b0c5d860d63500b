"""A process beside a stage that talks to the tracker, so that the stage waits neither for MLflow's import nor for its store.

Importing MLflow and opening its database take 2 to 3 seconds: at the end of a stage these were seconds in which nothing else
happened, as long as the work itself for the short ones. The courier does both while the stage works, on another core where
there is one, and then carries what the stage has recorded: one line in asks for it, one line back says how it went. A stage's
own courier ends when its standard input does, so a stage that is killed leaves none behind. Stages that one command runs share
one (`shared_courier`) and reach it through a socket: it has loaded MLflow once for all of them.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ADDRESS = "UNIGRPO_COURIER"                  # where stages find the socket of one that they share
JOURNAL = "journal"                          # as MLFLOW_TRACKING_URI: records stay local, for another machine to send
SEND, SEND_PENDING = "send", "send-pending"  # the requests, followed by a journal's key, a line each
DELIVERED, DOWN = "delivered", "down"        # the answers, a line each
PACKAGE = Path(__file__).resolve().parent.parent
LEAVE = 10.0                                 # seconds that a shared one has to end when nobody is left


def start(function: str, *arguments: str, inherits: Sequence[int] = (), answers: int | None = None) -> subprocess.Popen[str]:
    """A process that runs a function of unigrpo.tracking on strings. `inherits`: file descriptors; `answers`: its output."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); from unigrpo import tracking; tracking.{function}(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, bufsize=1, stdin=subprocess.PIPE,
                            stdout=answers, pass_fds=inherits)


def files(line: socket.socket) -> tuple[IO[str], IO[str]]:
    """What is told and what is heard on a connection; a path that is no UTF-8 passes."""
    return line.makefile("w", encoding="utf-8", errors="surrogateescape"), line.makefile("r", encoding="utf-8",
                                                                                        errors="surrogateescape")


class Courier:
    """The stage's side. Raises OSError where the process cannot start or is gone, which a tracker treats as one that is down.

    Args:
        root: the project's root. address: the socket of a shared one, which serves projects by their root; without it, or where
            nobody answers there, a process of the stage's own is started.
    """

    def __init__(self, root: Path, address: str | None = None) -> None:
        self.waiting = 0
        self.process: subprocess.Popen[str] | None = None
        self.requests: IO[str]
        self.answers: IO[str]
        if address:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as line:
                line.connect(address)
                self.requests, self.answers = files(line)
                self.tell(str(root))
                return
        self.process = start("carry", str(root), answers=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def ask(self, request: str, key: str) -> None:
        """Ask without waiting for the answer. While an earlier request is on its way this does nothing: that one or the next
        carries the new records too."""
        if self.waiting and select.select([self.answers], [], [], 0)[0]:
            self.answer()
        if not self.waiting:
            self.tell(f"{request} {key}")
            self.waiting += 1

    def tell(self, line: str) -> None:
        """One line to the other side."""
        self.requests.write(f"{line}\n")
        self.requests.flush()

    def answer(self, limit: float | None = None) -> bool | None:
        """Wait for the oldest answer, `limit` seconds at most. Returns whether the records were delivered; None: too late."""
        if limit is not None and not select.select([self.answers], [], [], max(0.0, limit))[0]:
            return None
        line = self.answers.readline()
        if not line:
            raise OSError("the process that sends records is gone" if self.process is None else
                          f"the process that sends records ended with status {self.process.wait()}")
        self.waiting -= 1
        return line.strip() == DELIVERED

    def deliver(self, request: str, key: str, limit: float | None = None) -> bool | None:
        """Ask and wait, `limit` seconds at most. Returns whether the records were delivered, None if the answer is late."""
        end = None if limit is None else time.monotonic() + limit
        while self.waiting:
            if self.answer(None if end is None else end - time.monotonic()) is None:
                return None
        self.ask(request, key)
        return self.answer(None if end is None else end - time.monotonic())

    def end(self) -> None:
        """No more requests. One that is late is given up: what MLflow took of it is noted after each of its requests."""
        if self.process is not None and self.waiting:
            self.process.kill()
        for file in (self.requests, self.answers):
            with suppress(OSError):  # it is gone already
                file.close()
        if self.process is not None:
            self.process.wait()


@contextmanager
def shared_courier(root: Path) -> Iterator[str | None]:
    """One courier for all stages that are started inside. Yields its address, for ADDRESS in their environment; None where
    records stay local, or where it cannot start: each of them then has its own.

    It ends when the stages have; records that nobody could take stay in their journals.
    """
    if os.environ.get("MLFLOW_TRACKING_URI") == JOURNAL or not hasattr(socket, "AF_UNIX"):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="unigrpo-") as folder:
        address = os.path.join(folder, "courier")
        process = None
        with suppress(OSError), socket.socket(socket.AF_UNIX) as door:
            door.bind(address)
            door.listen(64)  # stages that come while it starts wait here
            process = start("carry_for_all", str(root), str(door.fileno()), inherits=(door.fileno(),))
        # The door is the courier's alone from here on: held open by this process too, it would let stages in after the
        # courier's death, to wait for ever.
        try:
            yield address if process is not None else None
        finally:
            if process is not None:
                assert process.stdin is not None
                process.stdin.close()
                try:
                    process.wait(LEAVE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
