"""sha256 of files, folders, values and of the code that moves numbers: the identity of a stage execution."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
CHUNK = 1 << 20  # bytes

# Modules that record, report or schedule, and so cannot move a number. dvc.yaml leaves them out of every stage's
# dependencies, and a change in them leaves an interrupted run resumable.
RECORDERS = frozenset({
    "unigrpo", "unigrpo.__main__", "unigrpo.checks", "unigrpo.cli", "unigrpo.closure", "unigrpo.commands",
    "unigrpo.commands.doctor", "unigrpo.commands.export", "unigrpo.commands.generate", "unigrpo.commands.import_bagel",
    "unigrpo.commands.parse_prompts", "unigrpo.commands.prompts", "unigrpo.commands.score", "unigrpo.commands.score_canary",
    "unigrpo.commands.doctor_run", "unigrpo.commands.rerun", "unigrpo.commands.score_compbench",
    "unigrpo.commands.score_geneval", "unigrpo.commands.serve_rewards", "unigrpo.commands.verify", "unigrpo.courier",
    "unigrpo.digests", "unigrpo.dvcfiles", "unigrpo.experiment", "unigrpo.footprint", "unigrpo.gallery", "unigrpo.generate",
    "unigrpo.interchange", "unigrpo.journal", "unigrpo.links", "unigrpo.plan",
    "unigrpo.preemption", "unigrpo.probe", "unigrpo.progress", "unigrpo.resume", "unigrpo.roofline", "unigrpo.sealed",
    "unigrpo.stages", "unigrpo.stages.run", "unigrpo.stepmodel", "unigrpo.tracking"})


def sha256_json(value: Any) -> str:
    """Digest of a JSON value: keys sorted, no white space, so that equal values have equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def sha256_path(path: Path) -> str:
    """Digest of a file's bytes, or of a folder's relative file names and bytes. Raises ValueError if it is missing."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return sha256_json([[p.relative_to(path).as_posix(), sha256_path(p)] for p in files])
    if not path.is_file():
        raise ValueError(f"{path} is missing: an earlier stage makes it (dvc repro runs what is needed)")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_inputs(root: Path, inputs: Iterable[str]) -> dict[str, str]:
    """Digest of every input, keyed by its path relative to `root`."""
    return {path: sha256_path(root / path) for path in sorted(inputs)}


def sha256_code() -> str:
    """Digest of the package's modules, without those that only record."""
    modules = {".".join(("unigrpo", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): p
               for p in PACKAGE.rglob("*.py")}
    return sha256_json({name: sha256_path(path) for name, path in modules.items() if name not in RECORDERS})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys; leaves as they are."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{place}.")
        else:
            out[place] = value
    return out
