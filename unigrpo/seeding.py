"""Keyed random numbers: every draw is a pure function of (seed, key), never of how many draws came before it.

That is what lets a resumed, resharded or reordered run see the same noise, and two checkpoints be compared on paired samples.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

import numpy as np


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """An independent generator for a purpose.

        key = sha256(json([seed, *key])), its first 128 bits being the Philox key

    The encoding keeps types and borders apart: (1, "a", "b"), (1, "ab") and ("1", "a", "b") give unrelated streams.

    Args:
        seed: the run's seed.
        key: what the numbers are for, outermost first, e.g. ("rollout", step, prompt id, sample).
    Returns: a generator on the CPU; the same arguments give the same numbers on every machine.
    Raises: TypeError if a part is neither int nor str (a float would hash by its spelling; a bool is a mistake).
    Source: Philox4x64, Salmon et al. 2011 (counter based: distinct keys are distinct streams).
    """
    for part in (seed, *key):
        if isinstance(part, bool) or not isinstance(part, int | str | np.integer):
            raise TypeError(f"parts of a random key must be int or str, got {part!r} ({type(part).__name__}) "
                            f"in {(seed, *key)!r}")
    content = json.dumps([part if isinstance(part, str) else int(part) for part in (seed, *key)], separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def uniforms(seed: int, *key: str | int, shape: tuple[int, ...] = ()) -> np.ndarray:
    """float64 numbers in [0, 1) of the given shape, keyed like `generator`."""
    return np.asarray(generator(seed, *key).random(shape))


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, *key: str | int) -> np.ndarray:
    """One epoch's order."""
    return generator(seed, *key).permutation(size)


def shuffled_index(i: int, size: int, seed: int, *key: str | int) -> int:
    """The i-th draw without replacement from `size` items, reshuffled every epoch: the counter alone is the data cursor."""
    epoch, place = divmod(i, size)
    return int(_permutation(size, seed, *key, epoch)[place])
