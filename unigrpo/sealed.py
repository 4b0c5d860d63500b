"""Folders whose every byte is known: a manifest of sha256, written last, and checked before anything in the folder is used."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from unigrpo.digests import sha256_path

MANIFEST = "manifest.json"  # of a folder: bytes and sha256 of every other file in it


def seal(folder: Path) -> None:
    """Write a finished folder's manifest, and have all of it on the disk before this returns."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    content = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_path(path)}
               for path in files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST, *(part for part in folder.rglob("*") if part.is_dir()), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal_problems(folder: Path) -> list[str]:
    """How a sealed folder differs from its manifest, each file in words; empty if every byte is as it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wanted = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({str(error) or type(error).__name__:.200})"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found)]
    problems += [f"{name} is not in {MANIFEST}" for name in sorted(found - wanted.keys())]
    for name in sorted(wanted.keys() & found):
        size, digest = wanted[name]
        if (given := (folder / name).stat().st_size) != size:
            problems.append(f"{name} has {given} bytes, {size} were written")
        elif (other := sha256_path(folder / name)) != digest:
            problems.append(f"{name} has sha256 {other[:16]}..., {digest[:16]}... was written")
    return problems


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full; safetensors says so in words only."""
    from safetensors import SafetensorError

    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    return isinstance(error, SafetensorError) and any(f"os error {code})" in str(error) for code in full)
