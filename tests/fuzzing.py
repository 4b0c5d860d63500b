"""Coverage-guided fuzzing in a page: inputs that reach new lines of the package are kept and changed further.

Everything is keyed, so that a finding is found again. An input may be accepted, or refused by an error that a person can read
(ValueError or OSError with a message that names the file); anything else is a failure, and so is taking longer than LIMIT.
"""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = str(Path(__file__).resolve().parent.parent / "unigrpo")
LIMIT = 10.0  # seconds an input
NUMBERS = (b"0", b"-1", b"1", b"1e999", b"NaN", b"99999999999999999999", b"4294967296", b"0.5", b"null", b"true", b'""', b"[]",
           b"{}")
BYTES = (b"\x00", b"\xff", b"\xff\xfe", b"\n", b"\r\n", b'"', b"\\", b"\xed\xa0\x80", b"\xe2\x80\xae", b"{", b"}", b"[", b"]",
         b":", b",", b"../", b"!!python/object", b"&a *a", b"- ", b"  ", b"[" * 2000)


class Hang(BaseException):
    """An input took longer than LIMIT."""


@dataclass
class Found:
    """What a fuzzing run saw: its inputs, how they ended, lines of the package reached, seconds of the slowest, failures."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    lines: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def mutate(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One to four edits of an input."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 32, 256)))
        kind = rng.randrange(8)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
        elif kind == 1:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 8))) + data[to:]
        elif kind == 2:
            data = data[:at] + data[to:]
        elif kind == 3:
            data = data[:to] + data[at:]
        elif kind == 4:
            data = data[:at] + rng.choice(BYTES) + data[at:]
        elif kind == 5 and (spans := [m.span() for m in re.finditer(rb"-?\d+(\.\d+)?|true|false|null", data[:4000])]):
            start, end = rng.choice(spans)
            data = data[:start] + rng.choice(NUMBERS) + data[end:]
        elif kind == 6:
            data = data[:at]
        else:
            other = rng.choice(corpus)
            cut = rng.randrange(len(other) + 1)
            data = data[:at] + other[cut:cut + rng.choice((4, 16, 64, 1024))] + data[to:]
    return data


def _lines(call: Callable[[], Any], seen: set[tuple[str, int]]) -> None:
    """Run a call, adding the lines of the package that it executes."""
    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(None)


def attempt(call: Callable[[], Any], names: Sequence[str], found: Found, shown: bytes | str) -> None:
    """Run a call on one input and count how it ended; `names`: words of which a refusal must have one."""
    def alarm(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    start = time.monotonic()
    found.inputs += 1
    try:
        call()
        found.accepted += 1
    except (ValueError, OSError) as error:
        if names and not any(name in str(error) for name in names):
            found.failures.append(f"{type(error).__name__} without its place: {str(error)[:200]!r} for {shown[:200]!r}")
        found.refused += 1
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        found.failures.append(f"{type(error).__name__}: {str(error)[:200]!r} for {shown[:200]!r}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        found.slowest = max(found.slowest, time.monotonic() - start)


def fuzz(call: Callable[[bytes], Any], seeds: Sequence[bytes], count: int, *, names: Sequence[str] = (),
         key: str = "0") -> Found:
    """Give `call` that many changed inputs; those that reach new lines are changed further.

    Args:
        seeds: whole inputs. names: words of which every refusal must have one (a file, "line").
    """
    rng, found = random.Random(key), Found()
    corpus, reached = list(seeds), set[tuple[str, int]]()
    for seed in seeds:
        _lines(lambda seed=seed: call(seed), reached)
    for _ in range(count):
        data = mutate(rng.choice(corpus), rng, corpus)
        before = len(reached)
        attempt(lambda data=data: _lines(lambda: call(data), reached), names, found, data)
        if len(reached) > before and len(data) < 1 << 20:
            corpus.append(data)
    found.lines = len(reached)
    return found
