"""Where steps run and what they ask for, from UNIGRPO_BACKEND and the section compute of params.

| UNIGRPO_BACKEND | a step of a stage runs |
|---|---|
| local (default) | here, in the workspace |
| rehearsal | here, in an empty folder: code, inputs and outputs move as on a cluster |
| kubernetes, batch | in a container there |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaflow import batch, environment, kubernetes, resources, retry, secrets, timeout

from unigrpo.stages import SHARED

BACKENDS = ("local", "rehearsal", "kubernetes", "batch")
STAGE = os.environ.get("UNIGRPO_STAGE", "train")   # of a flow of any stage
# To steps elsewhere, where set.
PASSED = ("UNIGRPO_BACKEND", "UNIGRPO_SCALE", "UNIGRPO_STAGE", "UNIGRPO_TRACEBACK", "MLFLOW_TRACKING_URI")


def find_root() -> Path:
    """The project: where the launcher says, or the checkout, or on another machine the unpacked code package."""
    here = Path(__file__).resolve().parent
    if "UNIGRPO_LAUNCHER_PID" in os.environ and os.environ.get("UNIGRPO_ROOT"):
        return Path(os.environ["UNIGRPO_ROOT"])
    return here.parent if (here.parent / "params").is_dir() else here


ROOT = find_root()


def backend() -> str:
    """Where stages run."""
    return os.environ.get("UNIGRPO_BACKEND") or "local"


def section(name: str) -> dict[str, Any]:
    """A section of params of the scale being launched, not checked: the launcher has done that."""
    import yaml

    def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return old | {key: merge(old.get(key) or {}, value) if isinstance(value, dict) else value for key, value in new.items()}

    found: dict[str, Any] = {}
    for path in (ROOT / "params" / "base.yaml", ROOT / "params" / "scales" / f"{os.environ.get('UNIGRPO_SCALE')}.yaml"):
        if path.is_file():
            found = merge(found, (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(name) or {})
    return found


def wants_gpus(stage: str) -> bool:
    """Whether a stage computes on GPUs; a base that is imported is only checked and linked."""
    return stage in SHARED and not (stage == "base" and section("base").get("source") == "imported")


def wanted(stage: str) -> dict[str, int]:
    """Arguments of @resources for a step of a stage: compute.resources, or compute.remote.small where it needs no GPU."""
    compute = section("compute")
    if not wants_gpus(stage):
        small = compute["remote"]["small"]
        return {"cpu": int(small["cpu"]), "memory": int(small["memory_mb"])}
    names = {"gpu": "gpu", "cpu": "cpu", "memory_mb": "memory", "shared_memory_mb": "shared_memory"}
    return {names[key]: int(value) for key, value in compute["resources"].items()}


def decorators(stage: str) -> list[Callable[[Any], Any]]:
    """What a step of a stage wears."""
    if backend() == "local":
        return [resources(**wanted(stage))] if wants_gpus(stage) else []
    remote, gpus = section("compute")["remote"], wants_gpus(stage)
    passed = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    if not passed.get("MLFLOW_TRACKING_URI", "http").startswith("http"):
        del passed["MLFLOW_TRACKING_URI"]  # a file of this machine
    found = [resources(**wanted(stage)), environment(vars=passed), timeout(hours=remote["timeout_hours"]),
             retry(times=remote["retries"], minutes_between_retries=remote["retry_minutes"])]
    if backend() == "kubernetes":
        pinned = {"node_selector": remote["node_selector"], "tolerations": remote["tolerations"]} if gpus else {}
        options = {name: remote[name] for name in ("image", "namespace", "service_account", "secrets", "labels")} | pinned
        options |= {"disk": remote["disk_mb"] if gpus else None}
        found.append(kubernetes(**{key: value for key, value in options.items() if value}))
    if backend() == "batch":
        options = {"image": remote["image"], "queue": remote["queue"] if gpus else remote["small_queue"]}
        found.append(batch(**{key: value for key, value in options.items() if value}))
        if remote["secrets"]:
            found.append(secrets(sources=remote["secrets"]))
    return found


def where(stage: str) -> Callable[[Any], Any]:
    """The decorator of a step that calls a stage, or of one ("small") that only hands on: resources, and on a cluster its
    image, queue, secrets, retries and time limit."""
    def decorate(function: Any) -> Any:
        for decorator in decorators(stage):
            function = decorator(function)
        return function

    return decorate


def nodes() -> int:
    """How many machines sft, train and evaluate take; one where they run here."""
    return 1 if backend() == "local" else int(section("compute")["remote"]["nodes"])
