"""Does a reward keep the contract that training relies on? Each clause is tried and told in words.

A reward that breaks one trains something else than it says, mostly without any error: a value that depends on the batch
makes group advantages noise, a gradient leaks the policy, a constant teaches nothing.
"""

from __future__ import annotations

import copy
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unigrpo.rewards.custom import as_records
from unigrpo.rewards.pictures import Picture
from unigrpo.rewards.shapes import Images
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord, Reward
from unigrpo.worlds.shapes.prompts import sample_record, sample_scene
from unigrpo.worlds.shapes.render import render
from unigrpo.worlds.shapes.thinking import plan_text

RawReward = Callable[[Images, Sequence[PromptRecord], Sequence[str]], Any]
CLAUSES = {
    "runs": "takes (images, prompts, thinking) without an error",
    "records": "returns a list of Reward with different names, or B numbers",
    "shape": "gives every image one number, (B,)",
    "float": "gives floating-point numbers on the CPU",
    "finite": "gives finite numbers, and NaN where a value is missing",
    "gradient": "gives numbers without a gradient",
    "inputs": "leaves images, prompts and thinking as they were",
    "deterministic": "gives the same number for the same image again",
    "global": "leaves random generators, gradient mode and default precision of the process as they were",
    "order": "gives every image its own number in any order",
    "batch": "gives an image the same number alone and in a batch",
    "constant": "tells some of the images apart",
    "thinking": "takes an empty thinking",
    "bad_image": "takes an image that is not finite without an error",
}


@dataclass(frozen=True)
class Finding:
    """What one clause's trial found. `broken` says what was wanted and what came, None if nothing is wrong."""

    clause: str
    broken: str | None = None


@dataclass(frozen=True)
class Report:
    """Findings in the order of trial, notes on what is allowed but odd, and the speed."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    images_per_second: float | None

    @property
    def broken(self) -> list[Finding]:
        """The clauses that are broken."""
        return [finding for finding in self.findings if finding.broken is not None]

    def lines(self) -> list[str]:
        """One line a clause; what could not be tried is named."""
        tried = {finding.clause: finding for finding in self.findings}
        out = []
        for clause, text in CLAUSES.items():
            if clause not in tried:
                out.append(f"not tried  {clause}: {text}")
            elif tried[clause].broken is not None:
                out.append(f"BROKEN     {clause}: {text}; {tried[clause].broken}")
            else:
                out.append(f"ok         {clause}: {text}")
        out += [f"note       {note}" for note in self.notes]
        if self.images_per_second is not None:
            out.append(f"speed      {self.images_per_second:.3g} images a second, {1000 / self.images_per_second:.3g} ms each")
        return out


@dataclass
class Batch:
    """The inputs of one call."""

    images: Images
    prompts: list[PromptRecord]
    thinking: list[str]

    def rows(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, copied."""
        return Batch(self.images[list(rows)].copy(), [self.prompts[row] for row in rows], [self.thinking[row] for row in rows])

    def digest(self) -> str:
        """Of everything a reward could change."""
        content = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        content.update(repr((self.images.dtype, self.images.shape, self.prompts, self.thinking)).encode())
        return content.hexdigest()


class Broken(Exception):
    """A clause is broken so that the following ones cannot be tried."""

    def __init__(self, clause: str, message: str) -> None:
        super().__init__(message)
        self.clause = clause


def example_batch(*, size: int = 32, prompts: Sequence[PromptRecord] = (), pictures: Sequence[Picture] = ()) -> Batch:
    """Eight images: the shapes world's pictures of its own prompts, half of them of another prompt, enlarged to `size`;
    or the given pictures (of one size) and prompts.

    Raises: ValueError for fewer than four pictures, different sizes, or another number of prompts.
    """
    if pictures:
        if len(pictures) < 4 or len({picture.shape for picture in pictures}) > 1 or len(prompts) != len(pictures):
            raise ValueError("at least four pictures of one size and a prompt for each wanted, got sizes "
                             f"{sorted({picture.shape[:2] for picture in pictures})} and {len(prompts)} prompts")
        return Batch(np.stack(pictures).astype(np.float32) / np.float32(255), list(prompts), ["a plan ."] * len(prompts))
    rng = generator(0, "conformance")
    records = [sample_record(rng) for _ in range(8)]
    scenes = [sample_scene(record, rng) for record in records]
    images = render(scenes, rng)
    images[1::2] = images[1::2][::-1]  # so that a reward with a sense of right and wrong finds both
    if size != images.shape[1]:
        rows = np.arange(size) * images.shape[1] // size
        images = images[:, rows][:, :, rows]
    return Batch(np.ascontiguousarray(images), records, [plan_text(scene, rng) for scene in scenes])


def check_reward(reward: RawReward, batch: Batch | None = None, *, tolerance: float = 1e-4) -> Report:
    """Try every clause on a batch.

    Args:
        reward: the function as the user wrote it.
        batch: what it is tried on; `example_batch()` by default.
        tolerance: how far numbers of one image in different batches may differ, as a share of the largest magnitude (kernels
            round differently for other batch sizes). Repeating the same call must give the same bits.
    """
    batch = batch or example_batch()
    findings: list[Finding] = []
    notes: list[str] = []
    speed: float | None = None

    def settle(clause: str, message: str | None) -> None:
        findings.append(Finding(clause, message))

    try:
        before, state = batch.digest(), global_state()
        result = call(reward, batch)
        settle("runs", None)
        after, state_after = batch.digest(), global_state()
        first = read_result(result, len(batch.prompts))
        for clause in ("records", "shape", "float", "finite", "gradient"):
            settle(clause, None)
        settle("inputs", None if before == after else "it changed its arguments in place; copy before you write")
        settle("global", None if state == state_after else
               f"it changed {', '.join(name for name in state if state[name] != state_after[name])}; draw from a generator of "
               "your own, and put modes back")
        # Other streams for the second call: a value drawn from a global one then differs.
        seed_all(1)
        start = time.perf_counter()
        second = values_of(reward, batch)
        speed = len(batch.prompts) / max(time.perf_counter() - start, 1e-9)
        settle("deterministic", None if np.array_equal(first, second, equal_nan=True) else
               describe_gap("the second call", first, second))
        if np.array_equal(first, second, equal_nan=True):  # otherwise every comparison below fails for that reason
            try_batches(reward, batch, first, tolerance, settle)
        settle("constant", constant(first))
        try_odd_inputs(reward, batch, settle, notes)
    except Broken as error:
        findings[:] = [finding for finding in findings if finding.clause != error.clause]
        settle(error.clause, str(error))
    return Report(tuple(findings), tuple(notes), speed)


def try_batches(reward: RawReward, batch: Batch, expected: np.ndarray, tolerance: float,
                settle: Callable[[str, str | None], None]) -> None:
    """The clauses `order` and `batch`: reversed, alone, and in two unequal parts."""
    size = len(batch.prompts)
    reverse = list(range(size))[::-1]
    found = values_of(reward, batch.rows(reverse))[reverse]
    settle("order", None if close(expected, found, tolerance) else describe_gap("the reversed batch", expected, found))
    alone = np.concatenate([values_of(reward, batch.rows([row])) for row in range(size)])
    parts = np.concatenate([values_of(reward, batch.rows(range(start, stop))) for start, stop in ((0, 3), (3, size))])
    gap = next((describe_gap(name, expected, other) for name, other in (("a batch of one", alone), ("a smaller batch", parts))
                if not close(expected, other, tolerance)), None)
    settle("batch", gap)


def try_odd_inputs(reward: RawReward, batch: Batch, settle: Callable[[str, str | None], None], notes: list[str]) -> None:
    """The clauses `thinking` and `bad_image`."""
    for clause, changed, what in (
            ("thinking", Batch(batch.images.copy(), batch.prompts, [""] * len(batch.prompts)), "an empty thinking"),
            ("bad_image", Batch(with_bad_image(batch.images), batch.prompts, batch.thinking), "an image with NaN")):
        try:
            found = values_of(reward, changed)
        except Broken as error:
            settle(clause, f"{what}: {error}")
            continue
        settle(clause, None)
        if clause == "bad_image" and not np.isnan(found[0]):
            notes.append(f"an image that is not finite got the value {found[0]:.6g}; NaN would say that it is missing")


def call(reward: RawReward, batch: Batch) -> Any:
    """The reward's result. Raises Broken with the error in words."""
    try:
        return reward(batch.images, batch.prompts, batch.thinking)
    except Exception as error:
        raise Broken("runs", f"it raised {type(error).__name__}: {str(error)[:300]}") from error


def values_of(reward: RawReward, batch: Batch) -> np.ndarray:
    """(B,) float64 of the reward's first record, its form checked."""
    return read_result(call(reward, batch), len(batch.prompts))


def read_result(result: Any, size: int) -> np.ndarray:
    """(B,) float64 of what a reward returned. Raises Broken naming the clause."""
    if isinstance(result, Reward):
        raise Broken("records", "it returned one Reward; put it in a list")
    if isinstance(result, (list, tuple)) and any(isinstance(item, Reward) for item in result):
        if not all(isinstance(item, Reward) for item in result):
            raise Broken("records", "it mixed Reward with something else")
        names = [item.name for item in result]
        if len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
            raise Broken("records", f"its records must have different names, got {names}")
        if any(not isinstance(item.value, torch.Tensor) for item in result):
            raise Broken("records", "the value of a Reward must be a tensor")
        values = [item.value for item in result]
    else:
        try:
            values = [result if isinstance(result, torch.Tensor) else torch.as_tensor(np.asarray(result))]
        except (TypeError, ValueError, RuntimeError):
            raise Broken("records", f"it returned {type(result).__name__}") from None
    for value in values:
        if value.shape != (size,):
            raise Broken("shape", f"({size},) wanted for {size} images, got {tuple(value.shape)}")
        if not value.is_floating_point() or value.device.type != "cpu":
            raise Broken("float", f"got {str(value.dtype).removeprefix('torch.')} on {value.device.type}")
        if value.isinf().any():
            raise Broken("finite", f"it gave {float(value[value.isinf()][0])} to image {int(value.isinf().nonzero()[0, 0])}")
        if value.requires_grad:
            raise Broken("gradient", "its numbers carry one; detach them, or compute under torch.no_grad()")
    # The trainer reads it the same way.
    records = as_records("reward", list(result) if isinstance(result, (list, tuple)) else result, size)
    return records[0].value.double().numpy()


def close(expected: np.ndarray, found: np.ndarray, tolerance: float) -> bool:
    """Equal up to the tolerance times the largest magnitude; NaN only where NaN is."""
    scale = float(np.nanmax(np.abs(expected))) if not np.isnan(expected).all() else 0.0
    return bool(np.allclose(expected, found, rtol=0, atol=tolerance * scale, equal_nan=True))


def describe_gap(where: str, expected: np.ndarray, found: np.ndarray) -> str:
    """The first image whose number differs most."""
    gap = np.where(np.isnan(expected) != np.isnan(found), np.inf, np.nan_to_num(np.abs(expected - found)))
    row = int(np.argmax(gap))
    return f"in {where} image {row} got {found[row]:.9g} instead of {expected[row]:.9g}"


def constant(values: np.ndarray) -> str | None:
    """What is wrong if the values tell nothing apart."""
    if np.isnan(values).all():
        return f"all {len(values)} values are missing (NaN)"
    if np.nanmax(values) == np.nanmin(values):
        return f"all {len(values)} images got {np.nanmin(values):.9g}; if they are no images for it, give it some with --images"
    return None


def with_bad_image(images: Images) -> Images:
    """A copy whose first image holds a NaN."""
    changed = images.copy()
    changed[0, 0, 0, 0] = np.nan
    return changed


def global_state() -> dict[str, Any]:
    """What a reward must not touch, comparable."""
    return {"torch's random generator": torch.random.get_rng_state().numpy().tobytes(),
            "NumPy's random generator": repr(np.random.get_state(legacy=True)),  # noqa: NPY002
            "Python's random generator": copy.copy(random.getstate()),
            "the gradient mode": torch.is_grad_enabled(), "the default precision": torch.get_default_dtype()}


def seed_all(seed: int) -> None:
    """Other global streams."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
