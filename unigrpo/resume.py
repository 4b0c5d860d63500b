"""Where an interrupted stage goes on: a folder outside DVC's outputs, held by a lock while somebody works in it.

DVC deletes a stage's outputs before it runs the stage, so nothing that a restart needs may lie there. The folder's name is
a digest of everything that decides the result: a changed key, input or line of code starts from scratch, and going back
to the old values finds the old folder again. Where a stage runs is not among it: any number of processes goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unigrpo.digests import sha256_code, sha256_inputs, sha256_json
from unigrpo.sealed import disk_full

# Sections and keys of params that say where a stage runs: they move its numbers by rounding alone. `compute.threads` and
# `compute.instructions` stay, because every result of a machine depends on them.
LAYOUT = (("compute", ("processes", "sharding", "slots", "patience_minutes", "resources", "remote", "device")),
          ("train", ("processes",)), ("evaluate", ("processes",)))
STATE = Path(".unigrpo")  # every bit of pipeline state that is not a result, relative to the project's root


def home(root: Path) -> Path:
    """Where a project's state lives: its root. An experiment that DVC runs in a copy (<project>/.dvc/tmp/exps/...) keeps its
    state in the project, because DVC removes the copy when the experiment ends."""
    root = root.resolve()
    return next((parent.parent for parent in root.parents if parent.name == ".dvc" and (parent.parent / "dvc.yaml").is_file()
                 and root.is_relative_to(parent / "tmp" / "exps")), root)


def say_to_stderr(message: str) -> None:
    """The default voice of a wait."""
    print(message, file=sys.stderr, flush=True)


def holder_of(path: Path) -> str:
    """Who holds a lock, as its holder wrote it, or "another process"."""
    try:
        holder = json.loads(path.with_suffix(".holder").read_text(encoding="utf-8"))
        return f"{holder['what']} (process {holder['pid']})"
    except (OSError, ValueError, KeyError):
        return "another process"


@contextmanager
def hold(path: Path, what: str, *, timeout: float = -1, say: Callable[[str], None] = say_to_stderr) -> Iterator[None]:
    """Hold a file lock; a second holder says whom it waits for, and waits.

    The lock is the kernel's (flock), so a killed holder has released it. The name of the holder is a file beside it.

    Args:
        path: the lock file; its folder is made. what: the holder's name for others, "train tiny-unigrpo-0".
        timeout: seconds to wait; negative waits for ever.
    Raises: TimeoutError naming the holder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = holder_of(path)
        say(f"{what}: waiting for {holder}, which holds {path.name}")
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise TimeoutError(f"{what}: {holder} still holds {path} after {timeout:g} s; "
                               "wait for it, or end that process") from None
    try:
        path.with_suffix(".holder").write_text(json.dumps({"pid": os.getpid(), "what": what}), encoding="utf-8")
        yield
    finally:
        path.with_suffix(".holder").unlink(missing_ok=True)
        lock.release()


def deciding(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params that decide a result: all but those of LAYOUT."""
    out = dict(params)
    for section, keys in LAYOUT:
        if isinstance(out.get(section), Mapping):
            out[section] = {key: value for key, value in out[section].items() if key not in keys}
    return out


def resume_key(root: Path, stage: str, name: str, params: Mapping[str, Any], inputs: Iterable[str]) -> str:
    """Digest of all that decides a stage's result: its name, params, input bytes and code."""
    return sha256_json({"stage": stage, "name": name, "params": deciding(params), "inputs": sha256_inputs(root, inputs),
                        "code": sha256_code()})[:24]


def resume_path(root: Path, stage: str, name: str, params: Mapping[str, Any], inputs: Iterable[str] = ()) -> Path:
    """Where `resume_folder` keeps a stage's progress."""
    return home(root) / STATE / "resume" / resume_key(root, stage, name, params, inputs)


@contextmanager
def resume_folder(root: Path, stage: str, name: str, params: Mapping[str, Any], inputs: Iterable[str] = (), *,
                  say: Callable[[str], None] = say_to_stderr) -> Iterator[Path]:
    """The folder a stage keeps its progress in; removed when the block ends well, kept when it does not.

    Args:
        root: the project's root. stage, name: as in dvc.yaml. params: the resolved config, a JSON value.
        inputs: files and folders the stage reads, relative to `root`.
    Yields: an existing folder that this process alone works in; empty unless an earlier run was interrupted.
    Raises: ValueError where the block finds a disk full.
    """
    folder = resume_path(root, stage, name, params, inputs)
    with hold(folder.with_suffix(".lock"), f"{stage} {name}", say=say):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            say(f"{stage} {name}: going on from {folder.relative_to(home(root))}")
        try:
            yield folder
        except Exception as error:
            if not disk_full(error):
                raise
            raise ValueError(f"the disk is full ({error}); free some room where {folder} and the stage's outputs lie. What was "
                             "saved before is whole, and the same command goes on from there") from error
        shutil.rmtree(folder)
