"""Any function of the user's as a reward: `module:name`, imported only because the user named it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.types import PromptRecord, Reward

SPECIFICATION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def load_function(specification: str, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The object that `module:name` names; with options it is called with them first and must return the reward.

    A module that is not installed is looked for in the current folder, after everything that is.

    Raises: ValueError for another form, a module or name that is not there, or what cannot be called.
    """
    if not SPECIFICATION.fullmatch(specification):
        raise ValueError(f"a reward of your own is named module:name, as in my_rewards:brightness, got {specification!r}")
    module_name, _, name = specification.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there; what it imports is not
        raise ValueError(f"reward {specification}: there is no module {error.name!r}, installed or in {here}") from error
    if not hasattr(module, name):
        raise ValueError(f"reward {specification}: {module.__file__} has no {name!r}")
    found = getattr(module, name)
    if options and callable(found):
        found = found(**options)
    if not callable(found):
        raise ValueError(f"reward {specification} must be a function (images, prompts, thinking), got {type(found).__name__}"
                         + (f" from its options {sorted(options)}" if options else ""))
    return found


def custom(specification: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """A user's function under the name `module:name`.

    The function may return B numbers, or records. Its first record is the reward; further ones are logged as
    `module:name/<their name>`. `unigrpo doctor reward module:name` says whether it keeps the contract.

    Raises: ValueError as `load_function` does, and, when it is called, for a wrong number of values.
    """
    function = load_function(specification, options)

    def reward(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        return as_records(specification, function(images, prompts, thinking), len(images))

    return reward


def as_records(name: str, result: Any, size: int) -> list[Reward]:
    """What a user's function returned as records (size,) float32 on the CPU without gradient, the first one called `name`.

    Raises: ValueError for a wrong number of values, or infinite ones: a missing value is NaN.
    """
    if not (isinstance(result, (list, tuple)) and result and isinstance(result[0], Reward)):
        result = [Reward(name=name, value=torch.as_tensor(np.asarray(_plain(result), dtype=np.float32)))]
    records = []
    for number, record in enumerate(result):
        value = torch.as_tensor(record.value).detach().to("cpu", torch.float32)
        if value.shape != (size,):
            raise ValueError(f"reward {name} must give one number per image, ({size},), got {tuple(value.shape)}")
        if value.isinf().any():
            raise ValueError(f"reward {name} must be finite, or NaN where it is missing; it is infinite for image "
                             f"{int(value.isinf().nonzero()[0, 0])}")
        records.append(Reward(name if number == 0 else f"{name}/{record.name}", value, record.segment))
    return records


def _plain(result: Any) -> Any:
    """Tensors leave the graph and the device before NumPy reads them."""
    return result.detach().cpu() if isinstance(result, torch.Tensor) else result
