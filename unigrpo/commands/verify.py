"""`unigrpo verify`: is what we publish what the outcomes give, and does a stage give it again?"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the top parser's sub-commands."""
    parser = commands.add_parser("verify", help="re-derive every published number from the outcomes, or run a stage again")
    parser.add_argument("number", nargs="?", default="all", metavar="NUMBER|all",
                        help="part of a path (unigrpo-sft/bench/shapes/exact, claims, README.md) or a number as it stands")
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--rerun", metavar="NAME", help="run this stage of dvc.yaml (evaluate@tiny-sft) again in a temporary "
                        "copy and compare bytes, and intervals where bytes differ")
    parser.set_defaults(function=verify_command)


def verify_command(args: argparse.Namespace) -> int:
    """Returns 0 if all is as published, 1 if not. Raises ValueError for a name that does not exist."""
    from unigrpo.cli import project_root

    root = project_root()
    if args.rerun is not None:
        from unigrpo.commands.rerun import rerun

        return rerun(root, args.rerun)
    from unigrpo.report.verify import select, table, verify

    start = time.monotonic()
    checks = select(verify(root, args.scale), args.number)
    wrong = [check for check in checks if not check.right]
    print("\n".join(table(checks) if args.number == "all" else [check.line() for check in checks if check.right]))
    for check in wrong:
        print(check.line(), file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"{len(checks)} published leaves derived again in {seconds:.0f} s, {len(wrong)} wrong")
    return 1 if wrong else 0
