"""False alarms, misses and speed of the firewall between training prompts and benchmarks.

    python benchmarks/firewall.py --benchmarks ../shared/benchmarks [--number 20000] [--pairs FILE] [--write FILE.md]

Truth for GenEval's grammar is the structured specification that a prompt was made from; the firewall sees the text alone. What
agrees with a list of free texts has no such truth: --pairs writes these pairs for reading.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

from unigrpo.evaluation.geneval import COLORS, RELATIONS, TAGS
from unigrpo.prompts.canonical import forms
from unigrpo.prompts.firewall import Firewall, shipped_firewall
from unigrpo.prompts.geneval_grammar import CLASSES, draw, fields, specification, to_record
from unigrpo.prompts.importers import read_prompts, text_record
from unigrpo.prompts.shipped import LISTS
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes import sample_record

GENEVAL = ("geneval", "geneval_unseen_objects")


def near_misses(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record with one thing changed: a number, a colour, a class, the relation; or colours or objects exchanged."""
    tag, clauses = entry["tag"], entry["include"]
    names = [clause["class"] for clause in clauses][::-1 if tag == "position" else 1]
    colors = [clause["color"] for clause in clauses if "color" in clause]
    count = clauses[0]["count"]
    relation = next((clause["position"][0] for clause in clauses if "position" in clause), "")
    for place in range(len(names)):
        for other in CLASSES:
            if other not in names:
                changed = [*names[:place], other, *names[place + 1:]]
                yield fields(tag, changed, colors=colors, count=count, relation=relation)
    if tag == "counting":
        yield from (fields(tag, names, count=number) for number in range(2, 8) if number != count)
    if tag == "position":
        yield from (fields(tag, pair, relation=other) for other in RELATIONS for pair in (names, names[::-1]))
    for changed in product(COLORS, repeat=len(colors)) if colors else ():
        yield fields(tag, names, colors=changed)


def confusion(entries: Iterable[dict[str, Any]], protected: set[Any], firewall: Firewall) -> Counter[str]:
    """Counts of right and wrong answers of the firewall, from the text alone."""
    counts: Counter[str] = Counter()
    for entry in entries:
        found = firewall.overlap(text_record(entry["prompt"], tag="text", split="train", source="benchmark")) is not None
        same = specification(entry["include"]) in protected
        counts[("caught" if found else "missed") if same else ("false alarm" if found else "passed")] += 1
    return counts


def row(name: str, counts: Counter[str]) -> str:
    """A row of the table."""
    return (f"| {name} | {sum(counts.values()):,} | {counts['caught'] + counts['missed']:,} | {counts['missed']} | "
            f"{counts['passed'] + counts['false alarm']:,} | {counts['false alarm']} |")


def agreements(records: Iterable[PromptRecord], firewall: Firewall) -> list[tuple[str, str, str]]:
    """(kind, prompt, protected prompt) of every record that agrees with a protected text."""
    return [(found.kind, found.record.prompt, "; ".join(sorted({str(place.prompt) for place in found.places})))
            for found in firewall.overlaps(records)]


def inner_groups(texts: Iterable[str]) -> list[tuple[str, str, str]]:
    """(kind, text, text) of all pairs of different texts of the benchmarks that have one form."""
    pairs: dict[tuple[str, str], str] = {}
    for kind in ("canonical", "reordered"):
        groups: dict[str, list[str]] = defaultdict(list)
        for text in texts:
            if (form := getattr(forms(text), kind)) is not None:
                groups[form].append(text)
        for group in groups.values():
            for pair in combinations(group, 2):
                pairs.setdefault(pair, kind)
    return [(kind, *pair) for pair, kind in pairs.items()]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--benchmarks", type=Path, required=True, help="folder of the official files")
    arguments.add_argument("--number", type=int, default=20_000, help="of random prompts of each source")
    arguments.add_argument("--pairs", type=Path, help="write what agrees with free texts, for reading")
    arguments.add_argument("--write", type=Path, help="write the tables")
    args = arguments.parse_args()

    official = {name: read_prompts(args.benchmarks / file).records for name, file in LISTS.items()}
    protected = {specification(record.include) for name in GENEVAL for record in official[name]}
    geneval = Firewall().protect_shipped(allow=["t2i_compbench_*"])
    entries = [json.loads(json.dumps({"tag": r.tag, "include": r.include, "prompt": r.prompt}))
               for name in GENEVAL for r in official[name]]
    near = {json.dumps(edit): edit for entry in entries for edit in near_misses(entry)}
    drawn = [draw(TAGS[i % len(TAGS)], generator(0, "benchmark", i)) for i in range(args.number)]
    lines = ["# The firewall: false alarms, misses, speed", "",
             f"Made by `python benchmarks/firewall.py --benchmarks ../shared/benchmarks --number {args.number} --write ...`; "
             "[how to read it](../prompts.md).", "",
             "| prompts of GenEval's grammar | number | of a protected specification | missed | of another | false alarms |",
             "|---|---:|---:|---:|---:|---:|",
             row("official records with one thing changed", confusion(near.values(), protected, geneval)),
             row("random, as the official ones were drawn", confusion(drawn, protected, geneval))]

    free = Firewall()
    for name, file in LISTS.items():
        if name not in GENEVAL:
            free.protect_file(args.benchmarks / file)
    distinct = {record.prompt: record for record in map(to_record, drawn)}
    worlds = {record.prompt: record for record in (sample_record(generator(0, "benchmark", i)) for i in range(args.number))}
    texts = list(dict.fromkeys(record.prompt for records in official.values() for record in records))
    found = {"random prompts of GenEval's grammar against T2I-CompBench": (len(distinct), agreements(distinct.values(), free)),
             "random prompts of the shapes world against all lists": (
                 len(worlds), [(found.kind, found.record.prompt, str(found.places[0]))
                               for found in shipped_firewall().overlaps(worlds.values())]),
             "the benchmarks' prompts against each other": (len(texts), inner_groups(texts))}
    lines += ["", "| different texts | number | pairs that agree | canonical | reordered |", "|---|---:|---:|---:|---:|"]
    for name, (number, pairs) in found.items():
        kinds = Counter(kind if kind == "reordered" else "canonical" for kind, *_ in pairs)
        lines.append(f"| {name} | {number:,} | {len(pairs)} | {kinds['canonical']} | {kinds['reordered']} |")
    lists = Firewall()
    for name, file in LISTS.items():
        if name.endswith("_train"):
            lists.protect_file(args.benchmarks / file)
    kinds = Counter(overlap.kind for name in LISTS if name.endswith("_val") for overlap in lists.overlaps(official[name]))
    shared = {name: len({specification(record.include) for record in official[name]}) for name in GENEVAL}
    lines += ["", f"GenEval's {len(official['geneval'])} prompts are {shared['geneval']} specifications, the "
              f"{len(official[GENEVAL[1]])} of unseen objects are {shared[GENEVAL[1]]}. Of T2I-CompBench's 2,400 validation "
              f"prompts its own training lists hold {kinds['exact']} word for word, {kinds['canonical']} more in other words "
              f"and {kinds['reordered']} more in another order."]
    if args.pairs is not None:
        args.pairs.write_text("".join(f"{name}\t{kind}\t{a}\t{b}\n" for name, (_, pairs) in found.items() for kind, a,
                                      b in pairs))

    firewall = shipped_firewall()
    speeds = []
    for name, records in (("GenEval's grammar", list(distinct.values())), ("T2I-CompBench",
                                                                           official["t2i_compbench_complex_train"])):
        start = time.process_time()
        firewall.overlaps(records)
        speeds.append(f"{name}: {len(records) / (time.process_time() - start):,.0f}")
    start = time.process_time()
    shipped_firewall()
    lines += ["", f"Prompts per second of one core against all {sum(firewall.sources.values()):,} protected prompts, "
              f"{'; '.join(speeds)}; reading the shipped digests takes {time.process_time() - start:.2f} s once read from disk "
              f"(Python {platform.python_version()}, {platform.machine()})."]
    print("\n".join(lines))
    if args.write is not None:
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
