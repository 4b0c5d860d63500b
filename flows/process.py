"""Processes that end with their parent: `kill -9` of dvc or of the launcher leaves no second trainer alive."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

LAUNCHER = "UNIGRPO_LAUNCHER_PID"  # in the environment of everything the launcher starts
POLL = 0.5                         # seconds
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}


def parent_of(pid: int) -> tuple[str, int]:
    """(name of `pid`'s program, its parent's pid) on Linux; ("", 0) where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    name, rest = stat[stat.index("(") + 1:stat.rindex(")")], stat[stat.rindex(")") + 2:].split()
    return name, int(rest[1])


def alive(pid: int) -> bool:
    """True if the process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not Path("/proc/self/stat").exists()  # gone, or no /proc at all
    return stat[stat.rindex(")") + 2] != "Z"


def children_of(pid: int) -> list[int]:
    """Processes whose parent `pid` is, on Linux; none where /proc does not tell."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if parent_of(int(path.name))[1] == pid]


def hand_on_sigterm() -> None:
    """From now on SIGTERM goes to this process's children, whose end is awaited; without children it ends this process.

    Metaflow's runtime would end at once, and with it the step, in the middle of its work.
    """
    def hear(_number: int, _frame: object) -> None:
        children = children_of(os.getpid())
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not children:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, hear)


def watched_ancestors() -> list[int]:
    """The parent; where that is a shell (dvc starts stages through one) also the shell's parent; and the launcher."""
    parent = os.getppid()
    watched = [parent]
    name, grandparent = parent_of(parent)
    if name in SHELLS and grandparent > 1:
        watched.append(grandparent)
    if os.environ.get(LAUNCHER, "").isdigit():
        watched.append(int(os.environ[LAUNCHER]))
    return watched


def die_with_parent() -> None:
    """From now on this process is killed when its parent, its parent shell's parent, or the launcher is gone.

    On Linux the kernel does it at once for the parent (PR_SET_PDEATHSIG). A thread watches the others, and is all there is
    on other systems. Work in progress is not lost: every stage can be killed at any moment and goes on where it was.
    """
    watched = watched_ancestors()
    parent = watched[0]
    if parent == 0:  # the first process of a container: what started it is outside
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 = PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent and all(alive(pid) for pid in watched):
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.getppid() != parent or not all(alive(pid) for pid in watched):  # died before we looked
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
    if LAUNCHER in os.environ:  # a flow's runtime; in its steps, the stage listens itself
        hand_on_sigterm()


def end_with_parent() -> None:
    """In a child, before its program starts: SIGTERM comes when the parent is gone, so that nothing is left half way."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
