"""`unigrpo import-prompts`, `make-prompts` and `check-prompts`: prompt files in, prompt records out, none of a benchmark's."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

OURS = ("geneval", "t2i-compbench")


def add_parser(commands: Any) -> None:
    """Add the three commands to the top parser's sub-commands."""
    importer = commands.add_parser("import-prompts", help="a benchmark's prompts, or a file of prompts, as prompt records")
    importer.add_argument("source", metavar="geneval|t2i-compbench|FILE", help="JSON lines in GenEval's schema or ours, or one "
                          "prompt a line")
    importer.add_argument("--from", dest="root", type=Path, metavar="PATH", help="where a benchmark's official files are")
    importer.add_argument("--sha256", nargs="+", default=[], metavar="[FILE=]HEX", help="expect this instead of the known "
                                                                                        "sha256")
    importer.add_argument("--part", choices=["val", "train"], default="val", help="of T2I-CompBench; evaluation uses val")
    importer.add_argument("--category", nargs="+", help="of T2I-CompBench; all eight by default")
    importer.add_argument("--split", help="of records that have none: sft, train, validation or eval (benchmarks: eval)")
    importer.add_argument("--output", type=Path, required=True, help="JSON lines of prompt records")
    importer.set_defaults(function=run_import)

    maker = commands.add_parser("make-prompts", help="training prompts of GenEval's grammar that no benchmark has")
    maker.add_argument("--number", type=int, required=True)
    maker.add_argument("--seed", type=int, default=0)
    maker.add_argument("--mix", help="weights, as in position=7,counting=5,color_attr=3,colors=1,two_object=1 (the default)")
    maker.add_argument("--heldout", nargs="+", default=[], metavar="CLASS", help="classes that no prompt names")
    maker.add_argument("--max-count", type=int, default=4, help="counting asks for 2 to this many; GenEval for 2 to 4")
    maker.add_argument("--fill", action="store_true", help="a tag that runs out leaves its rest to the others")
    maker.add_argument("--output", type=Path, required=True, help="JSON lines of prompt records")
    maker.set_defaults(function=run_make)

    checker = commands.add_parser("check-prompts", help="refuse training prompts that ask for what a benchmark asks for")
    checker.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what `import-prompts` reads")
    checker.add_argument("--output", type=Path, help="write the prompts that overlap with nothing, instead of refusing")
    checker.add_argument("--report", type=Path, help="write every overlap as a JSON line")
    checker.set_defaults(function=run_check)
    for parser in (maker, checker):
        parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="FILE", help="further prompts to protect")
        parser.add_argument("--allow", nargs="+", default=[], metavar="LIST",
                            help="shipped lists that may overlap, as in t2i_compbench_*_train")


def run_import(args: argparse.Namespace) -> int:
    """Import; returns the exit status. Raises ValueError for what the user can mend."""
    from unigrpo.prompts.importers import CATEGORIES, GENEVAL, import_geneval, import_t2i_compbench, read_prompts
    from unigrpo.prompts.records import write_records

    if args.source in OURS and args.root is None:
        raise ValueError(f"import-prompts {args.source} needs --from, the folder of the official files")
    if args.source != "t2i-compbench" and (args.category or args.part != "val"):
        raise ValueError("--category and --part are T2I-CompBench's")
    if args.source in OURS and args.split:
        raise ValueError("--split is for a FILE: a benchmark's lists have their own")
    if args.source == "geneval":
        file = args.root.name if args.root.is_file() else Path(GENEVAL).name
        imported = import_geneval(args.root, given_digests(args.sha256, file))
    elif args.source == "t2i-compbench":
        imported = import_t2i_compbench(args.root, part=args.part, categories=args.category or CATEGORIES,
                                        digests=given_digests(args.sha256, None))
    else:
        if args.root is not None:
            raise ValueError(f"--from goes with geneval and t2i-compbench; the file itself was given as {args.source}")
        path = Path(args.source)
        check_given(path, given_digests(args.sha256, path.name))
        if args.split not in (None, "sft", "train", "validation", "eval"):
            raise ValueError(f"--split must be sft, train, validation or eval, got {args.split!r}")
        imported = read_prompts(path, split=args.split or "")
    write_records(args.output, imported.records)
    tags = Counter(record.tag for record in imported.records)
    print(f"wrote {args.output}: {len(imported.records)} prompts ({', '.join(f'{n} {tag}' for tag, n in tags.items())}); "
          f"{imported.repeated} repeated lines left out")
    if args.source not in OURS:
        from unigrpo.prompts.firewall import shipped_firewall, summary

        overlaps = shipped_firewall().overlaps(imported.records)
        print(f"overlap with benchmarks: {summary(overlaps)}; not for training" if overlaps else "overlap with benchmarks: 0")
    return 0


def run_make(args: argparse.Namespace) -> int:
    """Generate; returns the exit status. Raises ValueError for what the user can mend."""
    from unigrpo.prompts.firewall import refuse_overlap, shipped_firewall
    from unigrpo.prompts.geneval_grammar import FLOW_GRPO_MIX, training_prompts
    from unigrpo.prompts.records import write_records

    firewall = shipped_firewall(against=args.against, allow=args.allow)
    records, dropped = training_prompts(args.number, seed=args.seed, mix=read_mix(args.mix) if args.mix else FLOW_GRPO_MIX,
                                        heldout_classes=args.heldout, max_count=args.max_count, fill=args.fill,
                                        refused=lambda record: firewall.overlap(record) is not None)
    refuse_overlap(records, firewall)
    write_records(args.output, records)
    tags = Counter(record.tag for record in records)
    print(f"wrote {args.output}: {len(records)} prompts ({', '.join(f'{n} {tag}' for tag, n in tags.items())}); draws left "
          f"out: {', '.join(f'{n} {reason}' for reason, n in dropped.items())}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Compare; returns the exit status. Raises ValueError listing the pairs if there are some and no --output is given."""
    from unigrpo.prompts.firewall import refuse_overlap, shipped_firewall, summary
    from unigrpo.prompts.importers import add_record, read_prompts
    from unigrpo.prompts.records import write_records
    from unigrpo.types import PromptRecord

    firewall = shipped_firewall(against=args.against, allow=args.allow)
    records: dict[str, PromptRecord] = {}
    for path in args.files:
        imported = read_prompts(path)
        for record, line in zip(imported.records, imported.lines, strict=True):
            add_record(records, record, f"{path}, line {line}")
    overlaps = firewall.overlaps(records.values())
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text("".join(overlap.row() + "\n" for overlap in overlaps), encoding="utf-8")
    if args.output is None:
        refuse_overlap(records.values(), firewall)
    else:
        bad = {overlap.record.id for overlap in overlaps}
        kept = [record for record in records.values() if record.id not in bad]
        if not kept:
            raise ValueError(f"all {len(records)} prompts overlap with a benchmark: {summary(overlaps)}; nothing to write")
        write_records(args.output, kept)
        print(f"wrote {args.output}: {len(kept)} of {len(records)} prompts{f'; left out {summary(overlaps)}' if bad else ''}")
        return 0
    print(f"no overlap: {len(records)} prompts against {sum(firewall.sources.values())} of {len(firewall.sources)} lists")
    return 0


def given_digests(items: list[str], only: str | None) -> dict[str, str]:
    """--sha256 as file name -> digest; a bare digest is that of the only file.

    Raises: ValueError for anything else.
    """
    digests = {}
    for item in items:
        name, _, value = item.rpartition("=")
        if name and only is not None and name != only:
            raise ValueError(f"--sha256 names {name}, but the file is {only}: nothing would be compared")
        if (not name and only is None) or len(value) != 64 or any(c not in "0123456789abcdefABCDEF" for c in value):
            raise ValueError(f"--sha256 takes {'[FILE=]' if only else 'FILE='}HEX with 64 hex digits, got {item!r}")
        digests[name or str(only)] = value
    return digests


def check_given(path: Path, digests: dict[str, str]) -> None:
    """Compare a user's file with the digest the user gave for it, if any. Raises ValueError naming both."""
    from unigrpo.prompts.importers import check_digest

    if path.is_file() and path.name in digests:
        check_digest(path, path.name, digests)


def read_mix(text: str) -> dict[str, float]:
    """--mix as tag -> weight. Raises ValueError naming the part that is none."""
    mix: dict[str, float] = {}
    for part in text.split(","):
        tag, _, weight = part.partition("=")
        try:
            mix[tag.strip()] = float(weight)
        except ValueError:
            raise ValueError(f"--mix takes TAG=WEIGHT, divided by commas, got {part!r}") from None
    return mix
