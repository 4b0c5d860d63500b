"""SIGTERM, which schedulers and clouds send before they take a machine away: finish the step, save, leave with status 75.

A stage that has training states finishes its step and saves; anything else leaves at once, since it can be killed at any
moment. Either way the same command goes on where it was.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class Preempted(SystemExit):
    """The stage was asked to leave and did; the process ends with status PREEMPTED."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


@dataclass
class Notice:
    """What a process knows of its end.

    Attributes: given: it has been asked to leave. stepwise: a loop runs that looks at `given` after each of its steps.
    """

    given: bool = False
    stepwise: bool = False


@contextmanager
def notice_of_sigterm() -> Iterator[Notice]:
    """Inside, SIGTERM is noted where `stepwise` is set, and raises Preempted otherwise; a second one changes nothing.

    Only a process's main thread can listen; in another one the signal keeps its meaning.
    """
    notice = Notice()

    def hear(_number: int, _frame: Any) -> None:
        again, notice.given = notice.given, True
        if not notice.stepwise and not again:
            raise Preempted

    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
