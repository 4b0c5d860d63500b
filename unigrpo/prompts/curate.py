"""Curation: generate, deduplicate, balance, split without leakage, and say what came out.

A prompt's split is a function of its specification, so that paraphrases stay together and nothing leaks by construction;
`leakage.refuse_leaks` then checks the result without relying on that.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from unigrpo.prompts.firewall import Firewall, refuse_overlap, shipped_firewall
from unigrpo.prompts.leakage import canonical_text, deduplicate, leakage_report, refuse_leaks, specification_key
from unigrpo.prompts.records import write_records
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.prompts import TAGS, sample_record
from unigrpo.worlds.shapes.reasoning import KINDS
from unigrpo.worlds.shapes.thinking import parse_plan, plan_satisfies, sft_thinking

SPLITS: tuple[str, ...] = ("sft", "train", "validation", "eval")
TRAINED: tuple[str, ...] = ("sft", "train", "validation")  # validation too: hyper-parameters are chosen on it
SHARES: dict[str, float] = {"sft": 0.38, "train": 0.32, "validation": 0.08, "eval": 0.22}  # of all specifications
PATIENCE = 400  # draws without a new prompt after which a stratum counts as exhausted


@lru_cache(maxsize=1 << 16)
def _place(key: str, seed: int) -> float:
    """A specification's place in [0, 1)."""
    return float(generator(seed, "split", key).random())


def split_of(key: str, seed: int, shares: Mapping[str, float] = SHARES) -> str:
    """The split that owns a specification: a keyed draw, with the given shares of all specifications."""
    rest = _place(key, seed) * sum(shares.values())
    for split in SPLITS[:-1]:
        rest -= shares[split]
        if rest < 0:
            return split
    return SPLITS[-1]


def _strata(reasoning_kinds: Sequence[str], reasoning_share: float, tags: Sequence[str]) -> dict[str, float]:
    """Name -> share: plain prompts evenly over the categories, reasoning prompts evenly over the kinds."""
    kinds = list(reasoning_kinds) if reasoning_share > 0 else []
    share = reasoning_share if kinds else 0.0
    plain = {f"plain/{tag}": (1 - share) / len(tags) for tag in tags}
    return {name: value for name, value in (plain | {f"reasoning/{k}": share / len(kinds) for k in kinds}).items() if value > 0}


def generate(*, seed: int, sizes: Mapping[str, int], shares: Mapping[str, float] = SHARES,
             reasoning_kinds: Sequence[str] = KINDS, reasoning_share: float = 0.65, heldout_share: float = 0.15,
             heldout_eval_share: float = 0.3,
             max_paraphrases: int = 2, tags: Sequence[str] = TAGS,
             **world: Any) -> dict[str, list[PromptRecord]]:
    """Prompts for every split, balanced over categories and kinds of reasoning.

    Args:
        seed: of the prompts; independent of the seed of any training.
        sizes: prompts wanted per split. A stratum whose specifications run out leaves its rest to the others.
        shares: share of all specifications that each split owns.
        reasoning_kinds, reasoning_share: which kinds, and the share of prompts that need one.
        heldout_share: share of (phrase, partner) pairs that only evaluation sees.
        heldout_eval_share: share of evaluation's reasoning prompts made of them.
        max_paraphrases: prompts per specification in validation and eval; more would be counted as evidence twice.
        tags: GenEval categories in use.
        world: further keywords of `sample_record` (reasoning_difficulty, object_shares, cell_share).
    Returns: split -> records, in a keyed random order.
    Raises: ValueError for unknown splits, or if a split cannot be filled.
    """
    for name, mapping in (("sizes", sizes), ("shares", shares)):
        if set(mapping) != set(SPLITS) or min(mapping.values()) <= 0:
            raise ValueError(f"curate.{name} needs a positive number for each of {SPLITS}, got {dict(mapping)}")
    strata = _strata(reasoning_kinds, reasoning_share, tags)
    rng = generator(seed, "prompts")
    found: dict[str, list[PromptRecord]] = {split: [] for split in SPLITS}
    filled: Counter[tuple[str, str]] = Counter()  # (split, cell); a cell is a stratum, or its held-out part in eval
    paraphrases: Counter[str] = Counter()
    texts: set[str] = set()
    quota: dict[tuple[str, str], int] = {}
    for split, (name, share) in ((split, item) for split in SPLITS for item in strata.items()):
        wanted = round(sizes[split] * share)
        can_hold = split == "eval" and name.startswith("reasoning/") and heldout_share > 0
        held = round(wanted * heldout_eval_share) if can_hold else 0
        quota[split, name] = wanted - held
        if held:
            quota[split, name + "/heldout"] = held

    def draw(name: str) -> PromptRecord:
        kind, value = name.split("/", 1)
        if kind == "plain":
            return sample_record(rng, reasoning_share=0.0, tag_weights={value: 1.0}, heldout_share=heldout_share, **world)
        weights = {tag: 1.0 for tag in tags if tag != "counting" or value in ("arithmetic", "comparison")}
        return sample_record(rng, reasoning_kinds=[value], reasoning_share=1.0, tag_weights=weights,
                             heldout_share=heldout_share, **world)

    def offer(record: PromptRecord, name: str) -> bool:
        key = specification_key(record)
        split = split_of(key, seed, shares)
        cell = name + ("/heldout" if record.source.endswith("/heldout") else "")
        text = canonical_text(record.prompt)
        if filled[split, cell] >= quota.get((split, cell), 0) or len(found[split]) >= sizes[split] or text in texts:
            return False
        if split in ("validation", "eval") and paraphrases[key] >= max_paraphrases:
            return False
        filled[split, cell] += 1
        paraphrases[key] += 1
        texts.add(text)
        found[split].append(replace(record, split=split))
        return True

    spent: set[tuple[str, str]] = set()  # cells that ran out; they leave their rest to the others
    for _ in range(6):
        open_strata = list(strata)
        misses: Counter[str] = Counter()
        while open_strata:
            for name in list(open_strata):
                misses[name] = 0 if offer(draw(name), name) else misses[name] + 1
                cells = [cell for cell in quota if cell[1] in (name, name + "/heldout")]
                unfilled = {cell for cell in cells if filled[cell] < quota[cell] and cell not in spent}
                if misses[name] > PATIENCE:
                    spent |= unfilled
                if misses[name] > PATIENCE or not unfilled:
                    open_strata.remove(name)
        short = {split: sizes[split] - len(found[split]) for split in SPLITS}
        if not any(short.values()):
            break
        for split, missing in short.items():
            able = [cell for cell in quota if cell[0] == split and cell not in spent]
            for cell in able:
                quota[cell] += -(-missing // len(able))
    if any(short.values()):
        raise ValueError(f"the world has too few distinct prompts for curate.sizes {dict(sizes)}: short of {short}; "
                         "ask for fewer, or change curate.shares or the world's settings")
    return {split: [records[int(i)] for i in generator(seed, "order", split).permutation(len(records))]
            for split, records in found.items()}


def statistics(splits: Mapping[str, Sequence[PromptRecord]]) -> dict[str, Any]:
    """Counts per split: categories, kinds of reasoning, objects, lengths, distinct specifications."""
    report: dict[str, Any] = {}
    for split, records in splits.items():
        objects = Counter(sum(clause["count"] for clause in r.include) for r in records)
        words = [len(r.prompt.split()) for r in records]
        report[split] = {
            "prompts": len(records), "specifications": len({specification_key(r) for r in records}),
            "tags": dict(sorted(Counter(r.tag for r in records).items())),
            "reasoning": dict(sorted(Counter(r.reasoning for r in records if r.reasoning).items())),
            "needs_reasoning": round(sum(r.needs_reasoning for r in records) / max(len(records), 1), 4),
            "held_out_combinations": sum(r.source.endswith("/heldout") for r in records),
            "objects": {str(k): objects[k] for k in sorted(objects)},
            "wrong_plans": sum(r.thinking is not None and not plan_satisfies(parse_plan(r.thinking), r) for r in records),
            "words": {"mean": round(sum(words) / max(len(words), 1), 2), "max": max(words, default=0)}}
    return report


def add_thinking(records: Sequence[PromptRecord], *, seed: int, error_share: float,
                 systematic_share: float) -> list[PromptRecord]:
    """The records with a thinking each, some of the reasoning prompts' being wrong; see `thinking.sft_thinking`."""
    return [replace(r, thinking=sft_thinking(r, generator(seed, "thinking", r.id), error_share, systematic_share)[0])
            for r in records]


def from_file(split: str, records: Sequence[PromptRecord], size: int) -> list[PromptRecord]:
    """The first `size` prompts of a file, without duplicates, as a split. Raises ValueError if there are fewer."""
    kept, dropped = deduplicate(replace(r, split=split, thinking=None) for r in records)
    if len(kept) < size:
        raise ValueError(f"curate.files.{split} must hold the {size} distinct prompts of curate.{split}, got {len(kept)} "
                         f"and {dropped} duplicates; lower curate.{split} in params, or give a longer file")
    return kept[:size]


def curate(folder: Path, *, seed: int, sizes: Mapping[str, int], thinking_error: float, systematic_share: float,
           shares: Mapping[str, float] = SHARES, extra: Mapping[str, Sequence[PromptRecord]] | None = None,
           files: Mapping[str, Sequence[PromptRecord]] | None = None, firewall: Firewall | None = None,
           **settings: Any) -> dict[str, float]:
    """Write `<split>.jsonl`, `statistics.json` and `leakage.json`.

    Args:
        folder: where to write; nothing is written if anything leaks.
        seed, sizes, shares, settings: see `generate`.
        thinking_error: share of wrong plans among the sft split's reasoning prompts.
        systematic_share: share of these that are the concept's systematic mistake.
        extra: split -> imported records that join the generated ones (a benchmark's prompts in eval, say).
        files: split -> records that take the place of the generated ones.
        firewall: what no split that trains or chooses may ask for; the shipped benchmarks by default.
    Returns: metrics, flat: prompts per split, share that needs reasoning, dropped duplicates, leaks (0), prompts compared with
        the benchmarks.
    Raises: ValueError naming both prompts and their splits if a prompt, its canonical text or its specification is in two; or
        listing the prompts that ask for what a benchmark asks for.
    """
    splits = generate(seed=seed, sizes=sizes, shares=shares, **settings)
    dropped = 0
    for split, records in (files or {}).items():
        splits[split] = from_file(split, records, sizes[split])
    for split, records in (extra or {}).items():
        if split not in SPLITS:
            raise ValueError(f"extra prompts need a split among {SPLITS}, got {split!r}")
        merged, removed = deduplicate([*splits[split], *(replace(r, split=split) for r in records)])
        splits[split] = merged
        dropped += removed
    refuse_leaks(splits)
    firewall = shipped_firewall() if firewall is None else firewall
    compared = sum(refuse_overlap(splits[split], firewall) for split in TRAINED)
    splits["sft"] = [r if r.thinking is not None else thought for r, thought in zip(
        splits["sft"], add_thinking(splits["sft"], seed=seed, error_share=thinking_error,
                                    systematic_share=systematic_share), strict=True)]
    report = leakage_report(splits)
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        write_records(folder / f"{split}.jsonl", records)
    stats = statistics(splits)
    for name, content in (("statistics", stats), ("leakage", report)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    metrics: dict[str, float] = {"curate/leaks": report["leaks"], "curate/duplicates_dropped": dropped,
                                 "curate/eval_held_out": report["evaluation"]["held_out_combinations"],
                                 "curate/benchmark_checked": compared,
                                 "curate/benchmark_prompts": sum(firewall.sources.values())}
    metrics["curate/sft_wrong_plans"] = round(stats["sft"]["wrong_plans"] / stats["sft"]["prompts"], 4)
    for split, entry in stats.items():
        metrics[f"curate/{split}_prompts"] = entry["prompts"]
        metrics[f"curate/{split}_specifications"] = entry["specifications"]
        metrics[f"curate/{split}_needs_reasoning"] = entry["needs_reasoning"]
    return dict(sorted(metrics.items()))
