"""The canary gate of rewards by models: a model that is not itself on this device scores nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = logging.getLogger("unigrpo.rewards")


def gate(scorers: Mapping[str, Any], device: str, canaries: str | None) -> None:
    """Compare models with the record of what they said of the canary pictures on a trusted device.

    Args:
        scorers: kind (of `canary.TOLERANCES`) -> model.
        device: that it was loaded on.
        canaries: the record, written by `unigrpo score canary --record`; None trusts the models unseen, which is logged.
    Raises: ValueError naming model and device if one is not in the record, or not as recorded.
    """
    from unigrpo.evaluation.backends import canary

    if canaries is None:
        LOG.warning("the models %s are trusted unseen on %s: no record of canaries was given",
                    ", ".join(scorer.name for scorer in scorers.values()), canary.device_name(device))
        return
    canary.check(Path(canaries), scorers, canary.device_name(device))
