"""Re-deriving every published number: reports from outcomes, blocks of the README and of docs/ from these reports.

Nothing is trusted but the tables of single prompts (outcomes.csv, understanding.csv, benchmarks.csv), the curves, the counts of
training.json and params/: from them each report.json is made again, and compared leaf by leaf; each block is written again from
what was derived, not from what was published, and compared as text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo.config import load_config
from unigrpo.digests import sha256_path
from unigrpo.report.blocks import BLOCKS, block_of, fill, names_in, pages
from unigrpo.report.experiments import full_report
from unigrpo.report.reading import FOLDERS, read_inputs
from unigrpo.report.table import read_report

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Check:
    """One published leaf: where it stands, what is published, what the outcomes give.

    Args:
        file: relative to the project. path: of the leaf, or the block's name and the place of the number in it.
    """

    file: str
    path: str
    published: Any
    derived: Any

    @property
    def right(self) -> bool:
        """Whether the two are the same."""
        return bool(self.published == self.derived and type(self.published) is type(self.derived))

    def line(self) -> str:
        """The check in words."""
        if self.right:
            return f"ok     {self.file}: {self.path} = {self.published}"
        return f"WRONG  {self.file}: {self.path} is {self.published}, the outcomes give {self.derived}"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of a JSON value; items of lists are called by their name, run or seed where they have one."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for place, item in enumerate(value):
            found = next((str(item[key]) for key in ("name", "run", "arm", "seed") if item.get(key) is not None), "") \
                if isinstance(item, Mapping) else ""
            yield from leaves(item, f"{path}/{place}{':' + found if found else ''}")
    else:
        yield path, value


def verify(root: Path, scale: str) -> list[Check]:
    """Every published leaf of a scale's reports and of the blocks in README.md and docs/.

    Raises: ValueError if there is no report at all, or params are wrong.
    """
    found: list[Check] = []
    derived: dict[str, dict[str, Any]] = {}
    config = load_config(scale, root=root)
    for which, folder in FOLDERS.items():
        path = root / "artifacts" / scale / folder / "report.json"
        if not path.is_file():
            continue
        file = path.relative_to(root).as_posix()
        published = read_report(path)
        try:
            inputs = read_inputs(scale, which, root, pictures=False)
            made = json.loads(json.dumps(full_report(inputs, config), sort_keys=True))     # as it is read from a file
        except ValueError as error:
            found.append(Check(file, "inputs", "published", f"no report: {error}"))
            found += [Check(file, f"inputs/{name}", digest, sha256_path(root / name))
                      for name, digest in published.get("inputs", {}).items() if (root / name).exists()]
            continue
        derived[which] = made
        # Of what DVC holds and is not here there is no digest to compare.
        there = {key: value for key, value in published.get("inputs", {}).items()
                 if key in made["inputs"] or (root / key).exists() or not is_held(key)}
        found += compare(file, published | {"inputs": there}, made)
    if not found:
        raise ValueError(f"artifacts/{scale} has no report; `make repro` makes one, and README.md publishes scale tiny")
    return found + (check_pages(root, derived) if scale == "tiny" or derived else [])


def is_held(path: str) -> bool:
    """Whether an input of a report is kept by DVC and so may be missing in a fresh clone."""
    return path.endswith(("/samples", "/prompts"))


def compare(file: str, published: Mapping[str, Any], derived: Mapping[str, Any]) -> list[Check]:
    """One check a leaf that either side has; what a side lacks is called missing."""
    first, second = dict(leaves(published)), dict(leaves(derived))
    return [Check(file, path, first.get(path, "missing"), second.get(path, "missing")) for path in {**first, **second}]


def check_pages(root: Path, derived: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """One check a number in every block, and one for a block whose words differ."""
    found = []
    for path in pages(root):
        text, file = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        try:
            new = fill(text, {which: report for which, report in derived.items()}, file) if names_in(text) else text
        except ValueError as error:
            found.append(Check(file, "marks", "published", str(error)))
            continue
        for name in names_in(text):
            found += check_block(file, name, block_of(text, name), block_of(new, name))
    return found


def check_block(file: str, name: str, published: str, derived: str) -> list[Check]:
    """The numbers of a block in their order; if there are fewer or more, or other words, the block as a whole."""
    old, new = NUMBER.findall(published), NUMBER.findall(derived)
    found = [Check(file, f"block {name}, number {place}", a, b)
             for place, (a, b) in enumerate(zip(old, new, strict=False), start=1)]
    if len(old) != len(new) or (all(one.right for one in found) and published != derived):
        return [*found, Check(file, f"block {name}", "other words", f"{BLOCKS[name][0]} report says otherwise; "
                              "`unigrpo report --readme` writes it")]
    return found


# ------------------------------------------------------------------------------------------------------------- selection

def select(checks: Sequence[Check], wanted: str) -> list[Check]:
    """The checks that a word or a number means: a part of file or path, or a value as people read it ('19.0', '+19.0 %').

    Raises: ValueError if there is none.
    """
    if wanted == "all":
        return list(checks)
    found = [check for check in checks if wanted.lower() in f"{check.file}: {check.path}".lower()]
    if not found:
        found = [check for check in checks if is_shown_as(check.published, wanted)]
    if not found:
        raise ValueError(f"nothing published is called or reads {wanted!r}; name a part of a path "
                         "(unigrpo-sft/bench/shapes/exact, claims, README.md) or a number as it stands (19.0)")
    return found


def is_shown_as(value: Any, text: str) -> bool:
    """Whether a number would be written like this: as it is, or in percent, with as many digits."""
    shown = text.strip().rstrip("%").strip()
    if not NUMBER.fullmatch(shown) or isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    if isinstance(value, str):
        return bool(NUMBER.fullmatch(value)) and value.lstrip("+") == shown.lstrip("+")
    digits = len(shown.partition(".")[2])
    signed = math.copysign(1, value) < 0
    return any(f"{scale * value:.{digits}f}" in (shown.lstrip("+"), f"-{shown}" if signed else "") for scale in (1, 100))


def table(checks: Sequence[Check]) -> list[str]:
    """One line a file and part: how many values and intervals were derived again, and how many are wrong."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.file, re.split(r"[/,]", check.path)[0]), []).append(check)
    rows = [("file", "part", "leaves", "intervals", "wrong")]
    rows += [(file, part, str(len(found)), str(sum(one.path.endswith("/low") and one.published is not None for one in found)),
              str(sum(not one.right for one in found))) for (file, part), found in groups.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if place < 2 else cell.rjust(width)
                      for place, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
