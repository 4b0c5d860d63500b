"""Prompt records as files: JSONL, one record a line, every line checked when it is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unigrpo.types import PromptRecord

TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,), "tag": (str,), "prompt": (str,), "include": (list,), "exclude": (list,), "split": (str,), "source": (str,),
    "thinking": (str, type(None)), "needs_reasoning": (bool,), "reasoning": (str, type(None))}
REQUIRED = ("id", "tag", "prompt", "include")


def record_id(tag: str, prompt: str, include: Iterable[dict[str, Any]], exclude: Iterable[dict[str, Any]] = ()) -> str:
    """16 hex digits: sha256 of what is asked and how it is judged, as JSON with sorted keys.

    What the prompt implies ("inferred", an annotation for the warm-up data) is left out, as no verdict depends on it.
    """
    clauses = [[{k: v for k, v in clause.items() if k != "inferred"} for clause in part] for part in (include, exclude)]
    content = json.dumps([tag, prompt, *clauses], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def write_records(path: Path, records: Iterable[PromptRecord]) -> None:
    """Write records as JSONL; keys sorted, so that equal records are equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(asdict(record), sort_keys=True, ensure_ascii=False) + "\n")


def _check(condition: bool, where: str, wanted: str, got: object) -> None:
    """Raise naming the place, what was wanted and what came."""
    if not condition:
        raise ValueError(f"{where}: wanted {wanted}, got {got!r:.120}")


def _check_clause(clause: object, where: str) -> None:
    """One entry of include or exclude."""
    _check(isinstance(clause, dict), where, "a clause, an object with class and count", clause)
    assert isinstance(clause, dict)
    for key, kind in (("class", str), ("count", int)):
        _check(key in clause, where, f"the key {key!r} in every clause", clause)
        right = isinstance(clause[key], kind) and not isinstance(clause[key], bool)
        _check(right, where, f"{key!r} to be {kind.__name__}", clause[key])
    _check(clause["count"] >= 1, where, "'count' of at least 1", clause["count"])
    _check(isinstance(clause.get("color", ""), str), where, "'color' to be str", clause.get("color"))
    position = clause.get("position")
    _check(position is None or (isinstance(position, list) and len(position) == 2 and isinstance(position[0], str)
                                and isinstance(position[1], int)), where, "'position' to be [relation, clause index]", position)


def parse_record(line: str, where: str) -> PromptRecord:
    """One JSONL line.

    Args:
        line: JSON text.
        where: file and line, for the error.
    Raises: ValueError naming place, wanted and given.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: wanted one complete JSON object a line, got {line.strip()[-60:]!r} ({error}); "
                         "was the file cut off?") from error
    _check(isinstance(data, dict), where, "a JSON object", data)
    for key in REQUIRED:
        _check(key in data, where, f"the key {key!r}", sorted(data))
    unknown = sorted(set(data) - set(TYPES))
    _check(not unknown, where, f"only the keys {sorted(TYPES)}", unknown)
    for key, value in data.items():
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in TYPES[key])
        _check(isinstance(value, TYPES[key]), where, f"{key!r} to be {wanted}", value)
    _check(re.fullmatch("[A-Za-z0-9_-]{1,64}", data["id"]) is not None, where,
           "an id of letters, digits, - and _ (files are named by it)", data["id"])
    _check(bool(data["prompt"].strip()), where, "a prompt with words", data["prompt"])
    _check(bool(data["include"]), where, "at least one include clause", data["include"])
    for key in ("include", "exclude"):
        for clause in data.get(key, ()):
            _check_clause(clause, f"{where}, {key}")
        data[key] = tuple(data.get(key, ()))
    for clause in data["include"]:
        target = (clause.get("position") or ["", 0])[1]
        _check(0 <= target < len(data["include"]), where, "'position' to name an include clause", target)
    return PromptRecord(**data)


def read_records(path: Path) -> list[PromptRecord]:
    """Read and check a JSONL file of prompts.

    Raises: ValueError naming file, line, what was wanted and what came: a truncated line, a missing or unknown key, a wrong
        type, a repeated id, or an empty file. FileNotFoundError if there is none.
    """
    records: list[PromptRecord] = []
    seen: dict[str, int] = {}
    with Path(path).open("rb") as file:
        for number, data in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: wanted text in UTF-8, got {data[error.start:error.start + 8]!r}") from error
            record = parse_record(line, where)
            _check(record.id not in seen, where, "an id of its own", f"{record.id} of line {seen.get(record.id)}")
            seen[record.id] = number
            records.append(record)
    if not records:
        raise ValueError(f"{path}: wanted at least one prompt record, got an empty file; run the curate stage again")
    return records
