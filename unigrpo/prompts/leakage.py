"""The firewall between splits: no prompt of one split says what a prompt of another says, in any words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from unigrpo.prompts.canonical import include_form
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.scene import SHAPES
from unigrpo.worlds.shapes.specification import read_include

Splits = Mapping[str, Sequence[PromptRecord]]
KINDS: tuple[str, ...] = ("exact", "canonical", "specification")


def canonical_text(prompt: str) -> str:
    """A prompt without case, punctuation, articles and plurals: texts that are equal here are the same prompt."""
    words = []
    for word in re.findall(r"[a-z0-9]+", prompt.lower()):
        if word in ("a", "an", "the"):
            continue
        if len(word) > 4 and re.search(r"(s|x|z|ch|sh)es$", word):
            word = word[:-2]
        elif len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
            word = word[:-1]
        words.append(word)
    return " ".join(words)


def specification_key(record: PromptRecord) -> str:
    """What a prompt asks for, freed from its words: paraphrases share it, whatever has to be inferred."""
    if all(clause["class"] in SHAPES for clause in record.include):
        return read_include(record.include).key()
    return str(include_form(record.include) or canonical_text(record.prompt))  # of a file's prompt, about other things


def keys(record: PromptRecord) -> dict[str, str]:
    """The three forms in which two prompts are compared."""
    return {"exact": record.prompt, "canonical": canonical_text(record.prompt), "specification": specification_key(record)}


@dataclass(frozen=True)
class Leak:
    """Two prompts of different splits that are the same in one of the three forms."""

    kind: str
    first: PromptRecord
    second: PromptRecord

    def __str__(self) -> str:
        first, second = self.first, self.second
        return (f"{self.kind}: {first.prompt!r} ({first.id}) in {first.split} and "
                f"{second.prompt!r} ({second.id}) in {second.split}")


def find_leaks(splits: Splits) -> list[Leak]:
    """All pairs of prompts, one per split and form, that occur in two splits; the strictest form of each pair only."""
    leaks: list[Leak] = []
    seen: set[tuple[str, str]] = set()
    for kind in KINDS:
        owners: dict[str, dict[str, PromptRecord]] = {}
        for split, records in splits.items():
            for record in records:
                owners.setdefault(keys(record)[kind], {}).setdefault(split, record)
        for by_split in owners.values():
            for first, second in combinations(by_split.values(), 2):
                if (first.id, second.id) not in seen:
                    seen.add((first.id, second.id))
                    leaks.append(Leak(kind, first, second))
    return leaks


def refuse_leaks(splits: Splits) -> None:
    """Raise ValueError naming the prompts and their splits if anything leaks."""
    leaks = find_leaks(splits)
    if leaks:
        shown = "; ".join(str(leak) for leak in leaks[:5])
        raise ValueError(f"prompts must not be shared between splits, got {len(leaks)} pairs that are: {shown}"
                         f"{'; ...' if len(leaks) > 5 else ''}; remove one of each pair")


def deduplicate(records: Iterable[PromptRecord]) -> tuple[list[PromptRecord], int]:
    """The first record of each canonical text, and how many were dropped."""
    kept: dict[str, PromptRecord] = {}
    total = 0
    for record in records:
        total += 1
        kept.setdefault(canonical_text(record.prompt), record)
    return list(kept.values()), total - len(kept)


def phrases(record: PromptRecord) -> list[str]:
    """The concepts a prompt leaves to be inferred, each with its kind."""
    return [f"{record.reasoning}: {clause['inferred']['concept']}" for clause in record.include if "inferred" in clause]


def leakage_report(splits: Splits) -> dict[str, Any]:
    """What the firewall compared and found, and how far evaluation is from the data that trained.

    Returns: {"pairs": {"a-b": {form: shared prompts}}, "leaks": total, "evaluation": {...}}.
    """
    forms = {split: {kind: {keys(r)[kind] for r in records} for kind in KINDS} for split, records in splits.items()}
    pairs = {f"{a}-{b}": {kind: len(forms[a][kind] & forms[b][kind]) for kind in KINDS} for a, b in combinations(splits, 2)}
    trained = Counter(p for split in ("sft", "train") for r in splits.get(split, ()) for p in phrases(r))
    judged = [p for r in splits.get("eval", ()) for p in phrases(r)]
    heldout = sum(r.source.endswith("/heldout") for r in splits.get("eval", ()))
    return {"pairs": pairs, "leaks": sum(sum(counts.values()) for counts in pairs.values()),
            "evaluation": {"prompts": len(splits.get("eval", ())), "held_out_combinations": heldout,
                           "concepts": len(set(judged)), "concepts_seen_in_training": len(set(judged) & set(trained))}}
