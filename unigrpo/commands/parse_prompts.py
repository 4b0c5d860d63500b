"""`unigrpo parse-prompts`: noun phrases and parts of speech of prompt files, once, as a cache without prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the top parser's sub-commands."""
    parser = commands.add_parser("parse-prompts", help="noun phrases and parts of speech, for score t2i-compbench")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one prompt a line, such as color_val.txt")
    parser.add_argument("--output", type=Path, default=Path("parses.json"), help="the cache; one that exists is added to")
    parser.add_argument("--model", default="en_core_web_sm", help="spaCy model; the benchmark's is the default")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Parse; returns the exit status. Raises ValueError for what the user can mend."""
    from unigrpo.evaluation.parses import load_parses, load_spacy, parse_prompts, save_parses

    missing = [str(file) for file in args.files if not file.is_file()]
    if missing:
        raise ValueError(f"prompt files are missing: {', '.join(missing)}")
    prompts = [line.strip() for file in args.files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    known = load_parses(args.output) if args.output.is_file() else None
    nlp, parser = load_spacy(args.model)
    parses = parse_prompts(prompts, nlp, parser, known)
    save_parses(args.output, parses)
    new = len(parses.entries) - (len(known.entries) if known else 0)
    print(f"{args.output}: {len(parses.entries)} prompts, {new} of them new, parsed by {parses.name}")
    return 0
