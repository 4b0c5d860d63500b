"""Processes that work on one stage together. Every process runs the same code on its share of the rows; sums join them.

Draws are keyed by what they are for and normalisers count all rows, so the number of processes moves no draw and numbers by
rounding alone. All weights are on every process, and gradients are added up before the optimizer steps; or weights are spread
over the processes (unigrpo.sharding), and their gradients arrive as sums.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
BUCKET = 64 * 1024 * 1024  # gradient elements that are added up at a time, which bounds the memory of their copy
PULSE, MAIN = "unigrpo/pulse", "unigrpo/main"  # keys of what processes share: signs of life of the main one, and where it runs
LOOK = 0.02    # seconds between looks for the main process
ENDED = threading.Event()  # this process has left the others


class Deserted(RuntimeError):
    """Another process of the stage hangs or has died. The message is a sentence for the user."""


@dataclass
class Place:
    """Where a process is in its stage, for what it says when the others do not answer.

    Attributes: name: the stage and its item. step: the one it works on, from 0; None outside of steps. folder: where the
        stage's training states lie.
    """

    name: str = "a stage"
    step: int | None = None
    folder: Path | None = None
    meetings: int = 0

    def saved(self) -> str:
        """From where the stage goes on."""
        try:
            assert self.folder is not None
            step = json.loads((self.folder / "state" / "state.json").read_text(encoding="utf-8"))["step"]
            return f"the same command goes on after step {step}, which is saved"
        except (AssertionError, OSError, ValueError, KeyError, TypeError):
            return "nothing is saved yet, and the same command begins again"


@dataclass(frozen=True)
class World:
    """A process among the processes of its stage.

    Args:
        rank: in [0, size). size: how many there are. device: where values travel. patience: seconds it waits for the others.
        place: where it is in its stage.
    Raises: Deserted, from everything that waits for the others, where they do not come.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    patience: float = 1800.0
    place: Place = field(default_factory=Place, compare=False)

    @property
    def main(self) -> bool:
        """True in the process that writes files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's contiguous part: the parts in the order of ranks are all items, and differ by one in length."""
        edges = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[edges[0]:edges[1]]

    def share_rows(self, rows: Tensor) -> Tensor:
        """This process's part of what `gather_rows` put together."""
        return rows.chunk(self.size)[self.rank]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the processes; all of them give the same names."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's maximum over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(B, ...) of every process, concatenated in the order of ranks: (size * B, ...)."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows, device=self.device) for _ in range(self.size)]
        with self.waiting("gathering rows"):
            dist.all_gather(parts, rows.to(self.device).contiguous())
        return torch.cat(parts).to(rows.device)

    def on_shares(self, work: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
        """`work` (N, ...) -> (N, ...), item by item, each process on its share; the whole result everywhere."""
        if self.size == 1 or len(items) < self.size:
            return work(items)
        each = -(-len(items) // self.size)
        own = work(items[self.rank * each:(self.rank + 1) * each])
        return self.gather_rows(torch.cat([own, own.new_zeros(each - len(own), *own.shape[1:])]))[:len(items)]

    def gather(self, value: T) -> list[T]:
        """Any value of every process, in the order of ranks. It travels between processes of this stage only."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.waiting("gathering what each has made"):
            dist.all_gather_object(found, value)
        return found

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by the sum over the processes; one that is missing counts as 0. Sharded ones are sums."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        with self.waiting("adding up gradients"):
            for parameter in parameters:
                if is_sharded(parameter):
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                full = sum(g.numel() for g in bucket) + parameter.numel() > BUCKET
                if bucket and (full or bucket[0].dtype != parameter.grad.dtype):
                    _sum_bucket(bucket)
                    bucket = []
                bucket.append(parameter.grad)
            if bucket:
                _sum_bucket(bucket)

    def clip_gradients(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
        """Scale gradients so that their common norm is at most `max_norm`, as torch's clip_grad_norm_. Returns the norm.

        Of sharded parameters every process has its rows, and the norm is that of all of them.
        """
        if not any(is_sharded(p) for p in parameters):
            return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        squares = torch.stack([g.double().square().sum() for g in gradients]).sum() if gradients else torch.zeros(())
        norm = math.sqrt(self.sum({"squares": float(squares)})["squares"])
        for gradient in gradients:
            gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))
        return norm

    def wait(self) -> None:
        """Until every process is here. The main one may come late: what it does alone (a large state to write, a benchmark to
        score, a lock that another run holds) may take longer than anyone's patience, as long as it shows signs of life."""
        if self.size == 1:
            return
        store, key = _store(), f"unigrpo/meeting/{self.place.meetings}"
        self.place.meetings += 1
        if self.main:
            store.set(key, "here")
        else:
            self._watch(store, key)
        with self.waiting("meeting the others"):
            dist.barrier()

    def _watch(self, store: Any, key: str) -> None:
        """Until the main process has set a key. Raises Deserted where its pulse stops for longer than `patience`."""
        what, pulse, since = "waiting for the main process", -1, time.monotonic()
        try:
            host, pid = store.get(MAIN).decode().split()
            while not store.check([key]):
                beat, now = store.add(PULSE, 0), time.monotonic()
                if host == socket.gethostname() and not _runs(int(pid)) and not store.check([key]):
                    raise Deserted(self.sentence(what, now - since, "closed by peer: it has ended"))
                if beat != pulse:
                    pulse, since = beat, now
                elif now - since > self.patience:
                    raise Deserted(self.sentence(what, now - since, "timeout: no sign of life"))
                time.sleep(LOOK)
        except RuntimeError as error:
            if isinstance(error, Deserted) or not of_others(error):
                raise
            raise Deserted(self.sentence(what, time.monotonic() - since, str(error))) from error

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, others are waited for: what fails for their sake raises Deserted.

        A GPU's collective gives no error that could be caught, NCCL's watchdog ends the process without a word about the
        stage: there a timer speaks and ends it first.
        """
        began = time.monotonic()
        timer = threading.Timer(self.patience, self.give_up, [what]) if self.device.startswith("cuda") else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
            if timer is not None:  # what was started is not done before this
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            if not of_others(error):
                raise
            raise Deserted(self.sentence(what, time.monotonic() - began, str(error))) from error
        finally:
            if timer is not None:
                timer.cancel()

    def give_up(self, what: str) -> None:
        """Say that the others do not come, and end this process: its main thread cannot be woken."""
        print(self.sentence(what, self.patience, "a timeout"), file=sys.stderr, flush=True)
        os._exit(1)

    def sentence(self, what: str, seconds: float | None, cause: str) -> str:
        """What a process says of others that do not answer, with the library's own reason in brackets.

        Args:
            seconds: that it has waited, where somebody kept the time.
        """
        gone = any(word in cause for word in ("closed by peer", "reset by peer", "Broken pipe", "refused"))
        late = (seconds or 0.0) > 0.9 * self.patience or any(word in cause.lower() for word in ("timed out", "timeout"))
        where = "" if self.place.step is None else f"step {self.place.step}, "
        advice = "one of them has ended, and has said why or was killed" if gone else (
            f"one of them hangs (compute.patience_minutes={self.patience / 60:g} says how long to wait)" if late else
            "what connects them has failed")
        waited = "waited" if seconds is None else f"waited {seconds:.0f} s"
        return (f"{self.place.name}: {where}{what}: process {self.rank} of {self.size} {waited} for the others, and {advice}; "
                f"{self.place.saved()} ({' '.join(cause.split())[:160]})")

    def _reduce(self, values: Mapping[str, float], how: Any) -> dict[str, float]:
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        flat = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=self.device)
        with self.waiting("adding up numbers"):
            dist.all_reduce(flat, op=how)
        return dict(zip(names, flat.tolist(), strict=True))


ALONE = World()


def _store() -> Any:
    """What the processes have in common beside their collectives: keys and counts."""
    return dist.distributed_c10d._get_default_store()


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _beat(store: Any, seconds: float) -> None:
    """Count up for the others as long as this process lives; a stopped one does not, nor one whose connection has ended."""
    with suppress(RuntimeError):
        while not ENDED.wait(seconds):
            store.add(PULSE, 1)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds some rows of a tensor only. A DTensor's attribute: its module is slow to import."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The rows that are here, sharing memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _sum_bucket(gradients: Sequence[Tensor]) -> None:
    """Add up some gradients of one type in one message."""
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def of_others(error: BaseException) -> bool:
    """Whether an error comes of other processes: gloo's have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def join(processes: int, device: str, *, key: str = "compute.processes", patience: float = World.patience,
         place: Place | None = None) -> World:
    """This process's place among those that torch.distributed.run started, or alone.

    Args:
        processes: what params ask for, under `key`. device: compute.device. patience: seconds to wait for the others.
        place: where the process is in its stage.
    Raises: ValueError where another number was started; Deserted where the others do not come.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise ValueError(f"{key}={processes} and {started} were started; the number is part of exactness: start "
                         f"{processes} (python -m torch.distributed.run --nproc-per-node), or change the key in params")
    if processes == 1:
        return ALONE
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.cuda.is_available()
    waits, place = timedelta(seconds=patience if cpu else 1.2 * patience), place or Place()  # on GPUs our timer comes first
    began = time.monotonic()
    try:
        state = PartialState(cpu=cpu, timeout=waits)
    except RuntimeError as error:
        if not of_others(error):
            raise
        alone = World(int(os.environ.get("RANK", "0")), started, patience=patience, place=place)
        raise Deserted(alone.sentence("before the first step", time.monotonic() - began, str(error))) from error
    if state.process_index == 0:
        ENDED.clear()
        _store().set(MAIN, f"{socket.gethostname()} {os.getpid()}")
        threading.Thread(target=_beat, args=[_store(), min(5.0, patience / 10)], daemon=True).start()
    return World(state.process_index, state.num_processes, str(state.device), patience, place)


def leave() -> None:
    """End what `join` began."""
    ENDED.set()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
