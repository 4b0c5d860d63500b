"""`unigrpo export`: a checkpoint in the official layout, with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the top parser's sub-commands."""
    parser = commands.add_parser("export", help="write a BAGEL checkpoint in the official layout, with a model card")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    parser.add_argument("output", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--merge", action="store_true", help="add the adapters to the weights instead of exporting them beside")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Export; returns the exit status. Raises ValueError for what the user can mend."""
    from unigrpo.interchange import export_release

    export_release(args.checkpoint, args.output, merge=args.merge, report=lambda line: print(line, flush=True))
    return 0
