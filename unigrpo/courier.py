"""A process beside a stage that talks to the tracker, so that the stage waits neither for MLflow's import nor for its store.

Importing MLflow and opening its database take 2 to 3 seconds: at the end of a stage these were seconds in which nothing else
happened, as long as the work itself for the short ones. The courier does both while the stage works, on another core where
there is one, and then carries what the stage has recorded: one line in asks for it, one line back says how it went. It ends
when its standard input does, so a stage that is killed leaves none behind.
"""

from __future__ import annotations

import select
import subprocess
import sys
import time
from pathlib import Path

SEND, SEND_PENDING = "send", "send-pending"  # the requests, followed by a journal's key, a line each
DELIVERED, DOWN = "delivered", "down"        # the answers, a line each
PACKAGE = Path(__file__).resolve().parent.parent


class Courier:
    """The stage's side. Raises OSError where the process cannot start or is gone, which a tracker treats as one that is down.

    Args:
        root: the project's root.
    """

    def __init__(self, root: Path) -> None:
        self.waiting = 0
        code = f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); from unigrpo.tracking import carry; carry(*sys.argv[1:])"
        self.process = subprocess.Popen([sys.executable, "-c", code, str(root)], text=True, bufsize=1,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, request: str, key: str) -> None:
        """Ask without waiting for the answer. While an earlier request is on its way this does nothing: that one or the next
        carries the new records too."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.waiting and select.select([self.process.stdout], [], [], 0)[0]:
            self.answer()
        if not self.waiting:
            self.process.stdin.write(f"{request} {key}\n")
            self.waiting += 1

    def answer(self, limit: float | None = None) -> bool | None:
        """Wait for the oldest answer, `limit` seconds at most. Returns whether the records were delivered; None: too late."""
        assert self.process.stdout is not None
        if limit is not None and not select.select([self.process.stdout], [], [], max(0.0, limit))[0]:
            return None
        line = self.process.stdout.readline()
        if not line:
            raise OSError(f"the process that sends records ended with status {self.process.wait()}")
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
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.waiting:
            self.process.kill()
        try:
            self.process.stdin.close()
        except OSError:  # it is gone already
            pass
        self.process.stdout.close()
        self.process.wait()
