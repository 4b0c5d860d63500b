"""`unigrpo import-bagel`: the released checkpoint, checked, as our checkpoint folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the top parser's sub-commands."""
    parser = commands.add_parser("import-bagel", help="check a released BAGEL checkpoint and write it as a checkpoint folder")
    parser.add_argument("source", metavar="PATH|REPO", help="folder in the official layout, or ByteDance-Seed/BAGEL-7B-MoT")
    parser.add_argument("--output", type=Path, help="checkpoint folder; checkpoints/<name of the source> by default")
    parser.add_argument("--revision", help="of the repository: a commit, branch or tag")
    parser.add_argument("--sha256", nargs="+", default=[], metavar="FILE=HEX", help="refuse files with another sha256")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="the same from a file as sha256sum writes it")
    parser.add_argument("--no-finite-check", action="store_true", help="do not look for numbers that are not finite")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Import; returns the exit status. Raises ValueError for what the user can mend."""
    from unigrpo.interchange import fetch, import_release, read_digests

    digests = read_digests(args.digests) if args.digests else {}
    for item in args.sha256:
        name, separator, value = item.partition("=")
        if not separator or len(value) != 64:
            raise ValueError(f"--sha256 takes FILE=HEX with 64 hex digits, got {item!r}")
        digests[name] = value
    folder = fetch(args.source, revision=args.revision)
    hub = not Path(args.source).is_dir()
    # A snapshot's folder is named by its commit.
    origin = {"repository": args.source, "revision": folder.name} if hub else {}
    output = args.output or Path("checkpoints") / (Path(args.source).name if hub else Path(args.source).resolve().name)
    import_release(folder, output, digests=digests, finite=not args.no_finite_check, origin=origin,
                   report=lambda line: print(line, flush=True))
    return 0
