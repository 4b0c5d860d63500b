"""What DVC's files say: a stage's outputs, its entry in dvc.lock, and DVC's own digest of a file or folder.

Read as YAML and computed here, so that a stage can record what it made, and a page can be checked, without starting DVC.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHUNK = 1 << 20  # bytes
IGNORED = ("__pycache__",)  # of .dvcignore, what may lie in an output


@dataclass(frozen=True)
class LockEntry:
    """A stage's entry in dvc.lock: path -> md5, a folder's ending in ".dir"."""

    deps: Mapping[str, str]
    outs: Mapping[str, str]


def stage_address(stage: str, name: str) -> str:
    """How DVC names the execution that the launcher calls `stage name`."""
    if stage == "report" and name.endswith("-experiments"):
        return f"experiments@{name.removesuffix('-experiments')}"
    return f"{stage}@{name}"


def stage_outputs(root: Path, address: str) -> list[str]:
    """The outputs (outs, metrics, plots) that dvc.yaml gives a stage such as train@tiny-unigrpo-0, relative to `root`.

    Raises: ValueError where dvc.yaml has no such stage.
    """
    content = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for file in content.get("vars", []):
        names |= yaml.safe_load((root / file).read_text(encoding="utf-8"))
    stage, _, key = address.partition("@")
    if stage not in content["stages"]:
        raise ValueError(f"stage must be one of {list(content['stages'])}, the stages of dvc.yaml, got {address!r}")
    template = content["stages"][stage]
    items = names[template["foreach"].strip("${}")]
    if key not in items:
        raise ValueError(f"{stage} must be one of {[f'{stage}@{item}' for item in items]}, got {address!r}")
    values = {"key": key, "item": key}
    if isinstance(items, Mapping):
        values |= {f"item.{name}": str(value) for name, value in items[key].items()}
    outs = [out if isinstance(out, str) else next(iter(out))
            for part in ("outs", "metrics", "plots") for out in template["do"].get(part, [])]
    return [re.sub(r"\$\{([\w.]+)\}", lambda match: values[match[1]], out) for out in outs]


def lock_entry(root: Path, address: str) -> LockEntry | None:
    """The stage's entry in dvc.lock; None where there is none."""
    path = root / "dvc.lock"
    entry = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages", {}).get(address) if path.is_file() else None
    if entry is None:
        return None
    return LockEntry(*({item["path"]: item["md5"] for item in entry.get(part, [])} for part in ("deps", "outs")))


def file_md5(path: Path) -> str:
    """md5 of a file's bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def dvc_md5(path: Path) -> str | None:
    """The digest that dvc.lock has of a file, or of a folder (ends in ".dir"); None where there is nothing."""
    if path.is_file():
        return file_md5(path)
    if not path.is_dir():
        return None
    files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file() and not set(IGNORED) & set(p.parts)}
    listing = [{"md5": file_md5(files[name]), "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def cache_folder(root: Path) -> Path:
    """Where DVC keeps outputs: the folder that its config names (cache.dir), or .dvc/cache."""
    from configparser import ConfigParser, Error

    folder = root / ".dvc" / "cache"
    for name in ("config", "config.local"):
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(root / ".dvc" / name, encoding="utf-8")
        except Error:
            continue
        if "cache" in parser and "dir" in parser["cache"]:
            folder = (root / ".dvc" / parser["cache"]["dir"]).resolve()
    return folder


def missing_in_cache(cache: Path, md5: str) -> int:
    """How many of an output's objects the cache lacks: its listing and its files, or its one file."""
    def object_path(digest: str) -> Path:
        return cache / "files" / "md5" / digest[:2] / digest[2:]

    path = object_path(md5)
    if not path.is_file():
        return 1
    if not md5.endswith(".dir"):
        return 0
    return sum(not object_path(item["md5"]).is_file() for item in json.loads(path.read_text(encoding="utf-8")))
