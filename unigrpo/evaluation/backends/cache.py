"""Scores of images, kept as they are made: one line each in a file that only grows, so that a kill costs one line at most."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def score_key(image_digest: str, identity: str) -> str:
    """The key of a score: sha256 over the image file's sha256 and everything else that decides the score.

    Args:
        image_digest: `images.digest` of the file.
        identity: text of scorer, weights digest and options, and of the prompt where the score depends on it.
    """
    return hashlib.sha256(f"{image_digest}\n{identity}".encode()).hexdigest()


class ScoreCache:
    """JSON values by key, in a JSONL file.

    A value is on its way to the disk when `put` returns: one write at the file's end, so that processes may share a file. A
    line that a kill or a full disk cut off is skipped when the file is read (`damaged` counts them) and its score made again.

    Args:
        path: of the file; it and its folder are made with the first value.
    Raises: ValueError if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._values: dict[str, Any] = {}
        self._torn = False  # the file's last line has no end: the next one must not be glued to it
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise ValueError(f"the score cache {self.path} cannot be read ({error.strerror or error}); "
                             "give another file, or remove it") from error
        self._torn = bool(data) and not data.endswith(b"\n")
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                self.damaged += bool(line)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any | None:
        """The value, or None if there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value.

        Raises: ValueError for NaN and infinity, which are no scores, for what is no JSON, for None, and if the file cannot be
            opened; OSError if the disk is full.
        """
        if value is None:
            raise ValueError(f"a score of {self.path} must not be None, which means that there is none")
        try:
            line = json.dumps({"key": key, "value": value}, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"a score must be finite JSON to be kept in {self.path}: {error}") from error
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"the score cache {self.path} cannot be written ({error.strerror or error}); give a file in a "
                             "folder that can be, with --cache") from error
        try:
            whole = b"\n" + line if self._torn else line
            written = os.write(file, whole)
            self._torn = written != len(whole)
        finally:
            os.close(file)
        if self._torn:
            raise OSError(f"only {written} of {len(whole)} bytes could be written to {self.path}; is the disk full?")
        self._values[key] = value
