"""Reading params/: `load_config("tiny", run="unigrpo", seed=0)` merges params/base.yaml, params/scales/tiny.yaml and the
run's entry of params/runs.yaml, checks the result (unigrpo.schema) and names the key, what was wanted, what came and the
file to change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from unigrpo.schema import Config

__all__ = ["Config", "explain", "load_config", "merge", "read_yaml"]


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # safe either way; libyaml's is ten times as fast


def read_yaml(path: Path) -> dict[str, Any]:
    """A yaml mapping, read safely. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: a scale is a file of params/scales/, "
                         f"of which there are {sorted(p.stem for p in path.parent.glob('*.yaml'))}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no UTF-8, a date that is none
        raise ValueError(f"{path} must be valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(content).__name__}")
    return content


def merge(values: dict[str, Any], change: dict[str, Any], origin: dict[tuple[str, ...], Path], path: Path,
          prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """`change` over `values`, mapping by mapping; `origin` remembers which file a key came from."""
    out = dict(values)
    for key, value in change.items():
        place = (*prefix, str(key))
        origin[place] = path
        if isinstance(value, dict):
            old = out.get(key)
            replaces = place == ("reward", "weights")  # another set of rewards, not additions to the old one
            if old is None and not value and key in out:
                continue  # {} under a null section changes nothing
            value = merge(old if isinstance(old, dict) and not replaces else {}, value, origin, path, place)
        elif isinstance(out.get(key), dict) and value is None:
            value = out[key]  # a section left empty changes nothing
        out[key] = value
    return out


def multiply(values: dict[str, Any], factors: dict[str, Any], where: str) -> dict[str, Any]:
    """Numbers of `values` by factors, {"train.num_steps": 0.25}: a run says so what every scale has a number of its own for.

    Whole numbers stay whole, rounded half up, and above 0. Raises ValueError naming the key.
    """
    for key, factor in factors.items():
        *sections, last = key.split(".")
        values = place = dict(values)
        for section in sections:
            if not isinstance(place.get(section), dict):
                raise ValueError(f"{where}: {key} is not a key (unknown, or misspelt)")
            place[section] = place = dict(place[section])
        old = place.get(last)
        if any(isinstance(number, bool) or not isinstance(number, int | float) or number <= 0 for number in (old, factor)):
            raise ValueError(f"{where}: {key} must be a number above 0 and have a factor above 0, got {old!r} and {factor!r}")
        place[last] = max(1, int(old * factor + 0.5)) if isinstance(old, int) else float(f"{old * factor:.12g}")
    return values


def load_config(scale: str, *, run: str | None = None, seed: int = 0, root: Path | str = ".") -> Config:
    """The checked configuration of a scale, and of a run where one is named.

    Args:
        scale: a file of params/scales/. run: an entry of params/runs.yaml. seed: of the RL run; varies RL only.
        root: the project's root folder.
    Raises: ValueError naming key, what was wanted, what came and the file.
    """
    params = Path(root) / "params"
    origin: dict[tuple[str, ...], Path] = {}
    values = merge({}, read_yaml(params / "base.yaml"), origin, params / "base.yaml")
    path = params / "scales" / f"{scale}.yaml"
    values = merge(values, read_yaml(path), origin, path)
    if run is not None:
        path = params / "runs.yaml"
        runs = read_yaml(path)
        if run not in runs:
            raise ValueError(f"run must be one of {sorted(runs)}, the entries of {path}, got {run!r}")
        change = dict(runs[run] or {})
        factors = change.pop("times", None) or {}
        values = multiply(merge(values, change, origin, path), factors, f"{run}.times in {path}")
        origin.update({tuple(key.split(".")): path for key in factors})
    try:
        return Config(scale=scale, run=run, seed=seed, **values)
    except ValidationError as error:
        raise ValueError(explain(error, origin, params / "base.yaml")) from None


def explain(error: ValidationError, origin: dict[tuple[str, ...], Path], default: Path) -> str:
    """One line a problem: key, what was wanted, what came, where to change it."""
    lines = []
    for problem in error.errors():
        place = tuple(str(p) for p in problem["loc"])
        file = next((origin[place[:n]] for n in range(len(place), 0, -1) if place[:n] in origin), default)
        key = ".".join(place) or "params"
        given = problem.get("input")
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key} is not a key (unknown, or misspelt); remove it from {file}")
        elif problem["type"] == "missing":
            lines.append(f"{key} must be set; add it to {file}")
        elif isinstance(given, dict | BaseModel):
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}; change it in {file}")
        else:
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(given, str) and "e" in given else ""
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}, got {given!r}{hint}; change it in {file}")
    return "\n".join(lines)
