"""Prompt files of others as our records: GenEval's and T2I-CompBench's official files, JSONL in two schemas, plain lines.

A text without a machine-readable specification becomes one include clause whose class is the text itself: the record then
passes every check of `records`, and a verdict by detection, which would be wrong for it, finds no such class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unigrpo.prompts.records import parse_record, record_id
from unigrpo.types import PromptRecord

HERE = Path(__file__).parent
CATEGORIES: tuple[str, ...] = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
GENEVAL = "geneval/evaluation_metadata.jsonl"
FOLDERS: dict[str, tuple[str, ...]] = {"geneval": (".", "geneval", "prompts"), "t2i_compbench": (".", "t2i_compbench",
                                                                                                "examples/dataset")}
LONGEST = 4000  # characters of a prompt; more is a file of another kind


@dataclass(frozen=True)
class Imported:
    """Records of a file, the line each came from (from 1), and how many lines repeated an earlier one."""

    records: list[PromptRecord]
    lines: list[int]
    repeated: int


def official_digests() -> dict[str, str]:
    """Name of an official file ("geneval/evaluation_metadata.jsonl") -> its sha256."""
    rows = (HERE / "official.sha256").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (row.split() for row in rows if row and not row.startswith("#"))}


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, without space around them, with their numbers.

    Raises: ValueError naming file and line for what is no UTF-8 text, and for a file without any line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: wanted a file of prompts, got {'a folder' if path.is_dir() else 'no such file'}")
    lines = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: wanted UTF-8 text, got the bytes {raw[error.start:error.start + 8]!r}; "
                             "was the file cut off, or is it compressed?") from error
        if any(ord(character) < 32 and character != "\t" for character in text):
            raise ValueError(f"{path}, line {number}: wanted text, got the control characters of another kind of file in "
                             f"{text[:40]!r}")
        if text:
            lines.append((number, text))
    if not lines:
        raise ValueError(f"{path}: wanted at least one prompt, got {'blank lines' if path.stat().st_size else 'an empty file'}")
    return lines


def text_record(prompt: str, *, tag: str, split: str, source: str) -> PromptRecord:
    """The record of a text whose specification nobody wrote down."""
    include = ({"class": prompt, "count": 1},)
    return PromptRecord(id=record_id(tag, prompt, include), tag=tag, prompt=prompt, include=include, split=split, source=source)


def json_record(line: str, where: str, *, split: str, source: str) -> PromptRecord:
    """The record of a JSON line in our schema or in GenEval's, which lacks an id.

    Raises: ValueError naming place, wanted and given.
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: wanted one complete JSON object a line, got {line[-60:]!r} ({error}); was the file cut off?"
                         ) from error
    foreign = isinstance(data, dict) and "id" not in data
    record = parse_record(json.dumps({**data, "id": "0" * 16}) if foreign else line, where)
    if foreign:
        record = replace(record, id=record_id(record.tag, record.prompt, record.include, record.exclude))
    return replace(record, split=record.split or split, source=record.source or source)


def read_prompts(path: Path, *, tag: str = "text", split: str = "", source: str = "") -> Imported:
    """All prompts of a file, each record once.

    Args:
        path: JSON lines in our schema or GenEval's, told by a first character "{"; else one prompt a line.
        tag: of plain lines. split, source: of records that have none.
    Raises: ValueError naming file and line: not text, cut off, no JSON object, a wrong or unknown key, one id for two records,
        a prompt longer than LONGEST; or a file without prompts.
    """
    path = Path(path)
    lines = read_lines(path)
    is_json = lines[0][1].startswith(("{", "["))
    records: dict[str, PromptRecord] = {}
    numbers: dict[str, int] = {}
    for number, line in lines:
        where = f"{path}, line {number}"
        record = json_record(line, where, split=split, source=source or path.name) if is_json else text_record(
            line, tag=tag, split=split, source=source or path.name)
        if len(record.prompt) > LONGEST:
            raise ValueError(f"{where}: wanted a prompt of at most {LONGEST} characters, got {len(record.prompt)}")
        add_record(records, record, where)
        numbers.setdefault(record.id, number)
    return Imported(list(records.values()), list(numbers.values()), len(lines) - len(records))


def add_record(records: dict[str, PromptRecord], record: PromptRecord, where: str) -> None:
    """Add a record to those by id, unless it is there. Raises ValueError if its id asks for something else there.

    Otherwise one of the two would be left out, and no firewall would see it.
    """
    first = records.setdefault(record.id, record)
    if (first.prompt, first.include, first.exclude) != (record.prompt, record.include, record.exclude):
        raise ValueError(f"{where}: wanted an id of its own, got {record.id} of another record, {first.prompt!r}; give each "
                         "prompt its own id, or none")


def check_digest(path: Path, name: str, given: Mapping[str, str] | None = None) -> None:
    """Refuse an official file with other bytes than the known ones.

    Args:
        path: the file. name: which official file it should be.
        given: file name -> sha256 that replaces the known one (a newer release).
    Raises: ValueError naming file, wanted and given digest.
    """
    wanted = (given or {}).get(path.name) or official_digests()[name]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wanted.lower():
        raise ValueError(f"{path}: wanted sha256 {wanted}, got {found}; fetch it again without converting line ends, or give "
                         f"--sha256 {path.name}={found} if you trust this file")


def find_official(root: Path, name: str) -> Path:
    """An official file in the folder that a user names, which may be its own folder, a clone or a folder of benchmarks.

    Raises: ValueError naming the places looked at.
    """
    benchmark, file = name.split("/")
    if root.is_file():
        return root
    places = [root / folder / file for folder in FOLDERS[benchmark]]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"wanted {file} of {benchmark} under {root}, found none of {', '.join(map(str, places))}; give --from the "
                     "folder of the official prompt files")


def import_geneval(root: Path, digests: Mapping[str, str] | None = None) -> Imported:
    """The 553 records of GenEval, in their order."""
    path = find_official(root, GENEVAL)
    check_digest(path, GENEVAL, digests)
    return read_prompts(path, split="eval", source="geneval")


def import_t2i_compbench(root: Path, *, part: str = "val", categories: Sequence[str] = CATEGORIES,
                         digests: Mapping[str, str] | None = None) -> Imported:
    """Lists of T2I-CompBench++, one after the other; the tag is the category.

    Args:
        root: the folder of the official files.
        part: "val", 300 prompts a category, which evaluation uses, or "train", 700.
        categories: some of CATEGORIES.
    Raises: ValueError for an unknown category or part, a missing file or other bytes.
    """
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown or part not in ("val", "train"):
        raise ValueError(f"categories must be among {CATEGORIES} and the part val or train, got {[*categories]} and {part!r}")
    if root.is_file():
        raise ValueError(f"--from must be the folder of T2I-CompBench's lists, got the file {root}")
    records: list[PromptRecord] = []
    lines: list[int] = []
    repeated = 0
    for category in categories:
        name = f"t2i_compbench/{category}_{part}.txt"
        path = find_official(root, name)
        check_digest(path, name, digests)
        found = read_prompts(path, tag=category, split="eval" if part == "val" else "train", source=name.removesuffix(".txt"))
        records += found.records
        lines += found.lines
        repeated += found.repeated
    return Imported(records, lines, repeated)
