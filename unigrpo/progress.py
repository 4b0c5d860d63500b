"""A progress line: a bar with rate and ETA on a terminal, a timed line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


def duration(seconds: float) -> str:
    """Seconds as 75 s -> '1:15', an hour and more as '1:02:03'."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Counts steps towards a known total.

    Args:
        name: what is counted, shown first. total: steps. start: steps done before, by a run that was interrupted.
        unit: what a step is. every: seconds between lines where the output is not a terminal.
    """

    def __init__(self, name: str, total: int, *, start: int = 0, unit: str = "steps", every: float = 10.0,
                 stream: TextIO | None = None) -> None:
        self.name, self.total, self.start, self.unit, self.every = name, total, start, unit, every
        self.stream = stream or sys.stderr
        self.done = start
        self.began = self.last = time.monotonic()
        self.bar: Any = None
        if self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, desc=name, unit=f" {unit}", file=self.stream, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, done: int, **values: float | str) -> None:
        """`done` steps of the total are done; `values` are shown beside, `reward=0.71`."""
        shown = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in values.items()}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(done - self.done)
            self.done = done
            return
        self.done = done
        now = time.monotonic()
        if done < self.total and now - self.last < self.every:
            return
        self.last = now
        seconds = now - self.began
        rate = (done - self.start) / seconds if seconds > 0 else 0.0
        eta = duration((self.total - done) / rate) if rate > 0 else "?"
        extras = "".join(f"  {key} {value}" for key, value in shown.items())
        print(f"{self.name}: {done}/{self.total}  {duration(seconds)}  {rate:.2f} {self.unit}/s  ETA {eta}{extras}",
              file=self.stream, flush=True)
