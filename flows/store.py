"""Files in Metaflow's datastore, by sha256: how inputs and outputs move between machines.

A manifest says which files belong together: {path relative to the root: (sha256, bytes)}. Every file is compared with its
manifest when it arrives, and files reach their places only when all of them agree.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from unigrpo.digests import sha256_path

Files = dict[str, tuple[str, int]]
FOLDER = "unigrpo"   # below the datastore's root, beside Metaflow's own flows
STAGING = Path(".unigrpo/incoming")
THREADS = 8          # files on their way at once
CHUNK = 1 << 20      # bytes
UNSEEN = ("__pycache__",)


class Store:
    """A datastore of Metaflow, S3 or another one, as places for files.

    Args:
        storage: Metaflow's own object for reading and writing it.
    """

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    @classmethod
    def of(cls, flow: Any) -> Store:
        """The datastore that the running task's artifacts go to. Metaflow has no public name for it."""
        return cls(flow._datastore._storage_impl)

    @classmethod
    def configured(cls) -> Store:
        """The datastore that Metaflow is configured for, outside a task."""
        from metaflow.metaflow_config import DEFAULT_DATASTORE
        from metaflow.plugins import DATASTORES

        kind = next(kind for kind in DATASTORES if kind.TYPE == DEFAULT_DATASTORE)
        return cls(kind(kind.get_datastore_root_from_config(lambda text: print(text, file=sys.stderr))))

    # ------------------------------------------------------------------------------------------------ single objects

    def put(self, key: str, path: Path) -> None:
        """Store a file under a key, whatever is there."""
        with path.open("rb") as file:
            self.storage.save_bytes([(f"{FOLDER}/{key}", file)], overwrite=True, len_hint=1)

    def has(self, key: str, size: int) -> bool:
        """Whether an object of that size is there."""
        return bool(self.storage.is_file([f"{FOLDER}/{key}"])[0]) and self.storage.size_file(f"{FOLDER}/{key}") == size

    def put_json(self, key: str, value: Any) -> None:
        """Store a small JSON value under a key, whatever is there."""
        content = io.BytesIO(json.dumps(value, sort_keys=True).encode())
        self.storage.save_bytes([(f"{FOLDER}/{key}", content)], overwrite=True, len_hint=1)

    def get_json(self, key: str) -> Any:
        """A small JSON value, or None where there is none."""
        with self.storage.load_bytes([f"{FOLDER}/{key}"]) as found:
            return next((json.loads(Path(path).read_text(encoding="utf-8")) for _, path, _ in found if path is not None), None)

    def get(self, key: str, target: Path, digest: str) -> None:
        """Copy an object to `target`. Raises ValueError if it is missing or has another sha256."""
        target.parent.mkdir(parents=True, exist_ok=True)
        found, seen = None, hashlib.sha256()
        with self.storage.load_bytes([f"{FOLDER}/{key}"]) as objects:
            for _, path, _ in objects:
                if path is None:
                    break
                with open(path, "rb") as source, target.open("wb") as copy:
                    while chunk := source.read(CHUNK):
                        seen.update(chunk)
                        copy.write(chunk)
                found = seen.hexdigest()
        if found != digest:
            target.unlink(missing_ok=True)
            raise ValueError(f"{self.storage.full_uri(f'{FOLDER}/{key}')} must have sha256 {digest}, "
                             + ("and is missing" if found is None else f"got {found}")
                             + "; remove it there and rerun the stage that made it")

    # ------------------------------------------------------------------------------------------------ many files

    def send(self, root: Path, paths: Iterable[str]) -> Files:
        """Store files, and all files of folders. Content that is there already does not travel again.

        Args:
            paths: relative to `root`.
        Returns: their manifest. Raises ValueError if one is missing.
        """
        names = sorted({name for path in paths for name in files_below(root, path)})

        def send_one(name: str) -> tuple[str, tuple[str, int]]:
            path = root / name
            digest, size = sha256_path(path), path.stat().st_size
            if not self.has(place(digest), size):
                self.put(place(digest), path)
            return name, (digest, size)

        return dict(side_by_side(send_one, names))

    def receive(self, root: Path, files: Mapping[str, tuple[str, int]], key: Callable[[str], str] | None = None) -> None:
        """Fetch files to their places below `root`; none is put in place unless all of them are right.

        Args:
            key: where a file of that path lies; under its sha256 by default.
        Raises: ValueError naming what is missing or different, or a path that leaves `root`.
        """
        staging = root / STAGING / uuid.uuid4().hex

        def receive_one(name: str) -> None:
            self.get(key(name) if key else place(files[name][0]), staging / inside(name), files[name][0])

        try:
            side_by_side(receive_one, sorted(files))
            for name in sorted(files):
                target = root / inside(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def place(digest: str) -> str:
    """Where content lies."""
    return f"files/{digest[:2]}/{digest}"


def inside(name: str) -> str:
    """The path, if it stays below the root. Raises ValueError otherwise."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
        raise ValueError(f"a manifest's paths must stay below the project, got {name!r}")
    return name


def files_below(root: Path, path: str) -> list[str]:
    """A file's path, or those of all files of a folder, relative to `root`. Raises ValueError if there is none."""
    if (root / path).is_dir():
        return sorted(found.relative_to(root).as_posix() for found in (root / path).rglob("*")
                      if found.is_file() and not set(UNSEEN) & set(found.parts))
    if not (root / path).is_file():
        raise ValueError(f"{path} is missing: an earlier stage makes it (dvc repro runs what is needed)")
    return [Path(path).as_posix()]


def side_by_side(function: Callable[[str], Any], items: list[str]) -> list[Any]:
    """The function of every item, several at a time. The first error ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))
