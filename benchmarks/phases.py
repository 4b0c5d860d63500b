"""Where the time of a training step goes, and what its matrix products alone would take.

`Clock` wraps the functions that unigrpo.train and unigrpo.rollout call and books the time spent in each to a phase: of nested
phases the outer one stands still. `Products` records every matrix product a block of code runs; `floor_seconds` runs the same
products again, alone, on the same shapes and strides.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unigrpo.rollout
import unigrpo.train

read_clock: Callable[[], float] = time.perf_counter
"""What all seconds here are read from. CPU seconds of this process (`use_cpu_seconds`) do not depend on what else runs."""

PHASES = ("think", "denoise", "reward", "anchor", "replay", "backward", "optimiser", "everything else")
ROLLOUT, UPDATE = ("think", "denoise"), ("anchor", "replay", "backward", "optimiser")


def use_cpu_seconds() -> None:
    """Read CPU seconds instead of the wall's from now on: the same on an idle machine with one thread, and on a busy one what
    it would have been there, up to caches and memory that are shared."""
    global read_clock
    read_clock = time.process_time


class Clock:
    """Seconds by phase. Only outermost phases count: a replay inside the anchor is the anchor's.

    Args:
        synchronize: called before every reading, so that work a GPU has only been handed is counted where it belongs.
        read: what is booked; seconds by default, or a counter such as `Products.flops`.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None, read: Callable[[], float] | None = None) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.synchronize, self.read, self.inside = synchronize, read or read_clock, 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside to a phase, unless a phase is open already."""
        self.inside += 1
        if self.inside == 1:
            self.synchronize()
            start = self.read()
        try:
            yield
        finally:
            self.inside -= 1
            if self.inside == 0:
                self.synchronize()
                self.seconds[name] += self.read() - start

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, booked to a phase."""
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)
        return timed

    @contextmanager
    def watching(self, policy: Any) -> Iterator[None]:
        """Inside, a training step's parts are booked to their phases; what none of them takes is `everything else`."""
        places = [(unigrpo.rollout, "prefill", "think"), (unigrpo.rollout, "think", "think"),
                  (unigrpo.rollout, "denoise", "denoise"), (unigrpo.train, "anchor", "anchor"),
                  (unigrpo.train, "objective", "replay"), (unigrpo.train, "move_weights", "optimiser"),
                  (policy, "replay", "replay"), (torch.Tensor, "backward", "backward")]
        kept = [(owner, name, owner.__dict__.get(name), getattr(owner, name)) for owner, name, _ in places]
        try:
            for owner, name, phase in places:
                setattr(owner, name, self.wrap(phase, getattr(owner, name)))
            self.synchronize()
            start = self.read()
            yield
            self.synchronize()
            total = self.read() - start
            self.seconds["everything else"] = total - sum(self.seconds[name] for name in PHASES[:-1])
        finally:
            for owner, name, own, value in kept:
                if own is None and not isinstance(owner, type):  # a method: let the class's show again
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}  # operator -> places of its two matrices


class Products(TorchDispatchMode):
    """Every matrix product that runs inside, forward and backward: how often, of which shapes. Attention counts as its
    products: queries with keys and scores with values, and twice as many and one again in its backward.

    `calls` counts all operators: a number that is the same on every machine, and grows with what Python does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Layout, Layout]] = Counter()
        self.attention: Counter[tuple[str, tuple[int, ...], int, torch.dtype]] = Counter()
        self.calls, self.flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.calls += 1
        if name in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[name])
            self.counts[layout(left), layout(right)] += 1
            self.flops += 2 * left.numel() * right.shape[-1]
        elif "scaled_dot_product" in name:
            backward = name.endswith("backward")
            query, key = args[1:3] if backward else args[:2]
            self.attention["backward" if backward else "forward", tuple(query.shape), key.shape[2], query.dtype] += 1
            self.flops += (10 if backward else 4) * query.numel() * key.shape[2]
        return out


def layout(x: torch.Tensor) -> Layout:
    """What decides how long a product takes."""
    return tuple(x.shape), tuple(x.stride()), x.dtype


def filled(matrix: Layout, device: torch.device) -> torch.Tensor:
    """A matrix of that layout with random values; one may be a view of fewer numbers than it has places (an expanded one)."""
    shape, stride, dtype = matrix
    size = 1 + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    return torch.randn(size, dtype=dtype, device=device).as_strided(shape, stride)


def best(function: Callable[[], object], synchronize: Callable[[], None], *, repeats: int, inner: int) -> float:
    """Seconds of one call: the best of several rounds of some calls each, after a first that is not counted."""
    function()
    found = []
    for _ in range(repeats):
        synchronize()
        start = read_clock()
        for _ in range(inner):
            function()
        synchronize()
        found.append((read_clock() - start) / inner)
    return min(found)


@torch.no_grad()
def floor_seconds(products: Products, device: torch.device, synchronize: Callable[[], None], *, repeats: int = 3,
                  bandwidth: float | None = None) -> float:
    """Seconds of the recorded products alone.

    Args:
        bandwidth: bytes/s where known: no product is then faster than reading its matrices and writing its result, which
            a repeated call finds in a cache.
    """
    total = 0.0
    for (left, right), count in products.counts.items():
        a, b = (filled(matrix, device) for matrix in (left, right))
        seconds = best(lambda a=a, b=b: a @ b, synchronize, repeats=repeats, inner=3)
        moved = (a.numel() + b.numel() + a.numel() // a.shape[-1] * b.shape[-1]) * a.element_size()
        total += count * max(seconds, moved / bandwidth if bandwidth else 0.0)
    for (kind, shape, keys, dtype), count in products.attention.items():
        query = torch.randn(shape, dtype=dtype, device=device)
        key = torch.randn(*shape[:2], keys, shape[3], dtype=dtype, device=device)
        scores = torch.randn(*shape[:3], keys, dtype=dtype, device=device)
        first = best(lambda q=query, k=key: q @ k.transpose(-1, -2), synchronize, repeats=repeats, inner=3)
        second = best(lambda s=scores, k=key: s @ k, synchronize, repeats=repeats, inner=3)
        fused = best(lambda q=query, k=key: torch.nn.functional.scaled_dot_product_attention(q, k, k), synchronize,
                     repeats=repeats, inner=3)
        forward = min(first + second, fused)  # a fused kernel can be faster than its products one after the other
        total += count * (2.5 * forward if kind == "backward" else forward)
    return total


def measured_bandwidth(device: torch.device, synchronize: Callable[[], None]) -> float:
    """Bytes/s of a large copy: every byte is read and written."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source), synchronize, repeats=5, inner=3)
