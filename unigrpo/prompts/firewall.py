"""The firewall between training prompts and benchmarks: no prompt that trains asks for what a benchmark asks for, in any words.

A prompt is compared in four forms, and the first that agrees names the kind of match:

    exact          the same text
    canonical      the same specification, read from the texts (`canonical.forms`)
    specification  the same specification, read from the training record's include clauses, whatever its text
    reordered      the same words with the same numbers and attributes in another order; long texts only

Benchmarks are known by shipped digests (`shipped`), so that a clone without them is as safe; further files by their prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from unigrpo.prompts.canonical import Forms, forms, include_form
from unigrpo.prompts.importers import read_prompts
from unigrpo.prompts.shipped import LISTS, digest, read_digests
from unigrpo.types import PromptRecord

KINDS: tuple[str, ...] = ("exact", "canonical", "specification", "reordered")
SHOWN = 50  # pairs that an error spells out


@dataclass(frozen=True)
class Place:
    """Where a protected prompt stands: a shipped list (no line, no text), or a line of a file."""

    source: str
    line: int | None = None
    prompt: str | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line} ({self.prompt!r})"


@dataclass(frozen=True)
class Overlap:
    """A training prompt that asks for what protected prompts ask for."""

    kind: str
    record: PromptRecord
    places: tuple[Place, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.record.prompt!r} ({self.record.id}) is in {'; '.join(map(str, self.places))}"

    def row(self) -> str:
        """As a JSON line."""
        return json.dumps({"kind": self.kind, "id": self.record.id, "prompt": self.record.prompt,
                           "places": [vars(place) for place in self.places]}, ensure_ascii=False)


@dataclass
class Firewall:
    """Protected prompts, by the digests of their forms."""

    sources: Counter[str] = field(default_factory=Counter)  # prompts per list or file
    places: dict[tuple[str, str], list[Place]] = field(default_factory=dict)  # (form, digest) -> where

    def _protect(self, place: Place, digests: Iterable[str | None]) -> None:
        for form, value in zip(Forms._fields, digests, strict=True):
            if value is not None:
                self.places.setdefault((form, value), []).append(place)

    def protect_shipped(self, allow: Sequence[str] = ()) -> Firewall:
        """Protect every benchmark list that ships as digests.

        Args:
            allow: names or patterns of lists to leave out; "t2i_compbench_*_train" where these are the training prompts.
        Raises: ValueError for a pattern that names no list.
        """
        unknown = [pattern for pattern in allow if not any(fnmatch(name, pattern) for name in LISTS)]
        if unknown:
            raise ValueError(f"allowed lists must be among {', '.join(LISTS)}, or patterns of them, got {unknown}")
        for name in LISTS:
            if not any(fnmatch(name, pattern) for pattern in allow):
                entries = read_digests(name)
                self.sources[name] = len(entries)
                for entry in entries:
                    self._protect(Place(name), entry)
        return self

    def protect_file(self, path: Path) -> Firewall:
        """Protect every prompt of a file that `import-prompts` can read. Raises ValueError as `importers.read_prompts` does."""
        imported = read_prompts(path)
        self.sources[str(path)] = len(imported.records)
        for record, line in zip(imported.records, imported.lines, strict=True):
            place = Place(str(path), line, record.prompt)
            self._protect(place, [None if form is None else digest(form) for form in forms(record.prompt)])
            if (stated := include_form(record.include)) is not None:
                known = self.places.setdefault(("canonical", digest(stated)), [])
                known += [place] if place not in known else []
        return self

    def overlap(self, record: PromptRecord) -> Overlap | None:
        """What a record has in common with the protected prompts, in the strictest form that agrees; None for nothing."""
        text = forms(record.prompt)
        stated = include_form(record.include)
        for kind, form, value in (("exact", "exact", text.exact), ("canonical", "canonical", text.canonical),
                                  ("specification", "canonical", stated), ("reordered", "reordered", text.reordered)):
            if value is not None and (places := self.places.get((form, digest(value)))):
                return Overlap(kind, record, tuple(dict.fromkeys(places)))
        return None

    def overlaps(self, records: Iterable[PromptRecord]) -> list[Overlap]:
        """The overlaps of many records, in their order."""
        return [found for record in records if (found := self.overlap(record)) is not None]


def shipped_firewall(*, against: Sequence[Path] = (), allow: Sequence[str] = ()) -> Firewall:
    """A firewall of the shipped lists and further files; see `Firewall.protect_shipped` and `protect_file`."""
    firewall = Firewall().protect_shipped(allow)
    for path in against:
        firewall.protect_file(path)
    return firewall


def summary(overlaps: Sequence[Overlap]) -> str:
    """How many overlaps of which kind, and with what."""
    kinds = Counter(overlap.kind for overlap in overlaps)
    sources = Counter(source for overlap in overlaps for source in {place.source for place in overlap.places})
    return (f"{len(overlaps)} ({', '.join(f'{kinds[kind]} {kind}' for kind in KINDS if kinds[kind])}; "
            f"{', '.join(f'{number} in {source}' for source, number in sources.most_common())})")


def refuse_overlap(records: Iterable[PromptRecord], firewall: Firewall) -> int:
    """Compare all records with all protected prompts.

    Returns: how many records were compared.
    Raises: ValueError listing the pairs, each with the training prompt, the kind of match and where the other stands.
    """
    records = list(records)
    overlaps = firewall.overlaps(records)
    if overlaps:
        pairs = "\n".join(f"- {overlap}" for overlap in overlaps[:SHOWN])
        rest = f"\n- and {len(overlaps) - SHOWN} more" if len(overlaps) > SHOWN else ""
        raise ValueError(f"training prompts must not be in a benchmark, but of {len(records)} these are: {summary(overlaps)}\n"
                         f"{pairs}{rest}\nleave them out: `unigrpo check-prompts FILE --output CLEAN` writes the others")
    return len(records)
