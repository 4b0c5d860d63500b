"""Rewards of a user's own, for tests of whole stages: named planted_rewards:<function> in params."""

from __future__ import annotations

import itertools

import numpy as np

CALLS = itertools.count()


def ever_better(images, prompts, thinking):
    """Rises with every call and differs within a group: whatever the policy does, the reward went up."""
    return next(CALLS) + np.arange(len(images)) % 3


def brightness(share: float):
    """A factory with an option: a share of the mean pixel."""
    return lambda images, prompts, thinking: share * images.mean(axis=(1, 2, 3))


def missing(images, prompts, thinking):
    """No reward for any image, as of a server that died."""
    return np.full(len(images), np.nan)
