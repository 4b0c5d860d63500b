"""`unigrpo doctor`: what is wrong, in words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from unigrpo.commands import doctor_run


def add_parser(commands: Any) -> None:
    """Add the command to the top parser's sub-commands."""
    parser = commands.add_parser("doctor", help="say in words what is wrong with a part of a run")
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    reward = parts.add_parser("reward", help="try a reward against the contract that training relies on")
    reward.add_argument("name", metavar="NAME|module:name", help="a reward by name, or your own function (imported)")
    add_options(reward)
    reward.add_argument("--size", type=int, default=32, help="pixels a side of the pictures it is tried on")
    reward.add_argument("--images", type=Path, metavar="DIR", help="try it on the first 8 images of this folder instead")
    reward.add_argument("--prompts", type=Path, metavar="FILE", help="with --images: their prompt records, one a line")
    reward.add_argument("--tolerance", type=float, default=1e-4,
                        help="how far values may differ between batches, as a share of the largest; 1e-4 by default")
    reward.set_defaults(function=reward_command)
    run = parts.add_parser("run", help="a run's chain: MLflow, commit, params, DVC stage and lock, checkpoint, Metaflow",
                           description="Exit status: 0 if every link holds today, 1 if one differs or is unknown.")
    run.add_argument("id", nargs="+", metavar="ID", help="an MLflow run id or its beginning, a Metaflow pathspec, or a name as "
                                                         "in `train tiny-unigrpo-0`, which means its latest run")
    run.set_defaults(function=doctor_run.run_command)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--option, for rewards that take options."""
    parser.add_argument("--option", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="an option of the reward; the value is JSON, or text as it stands")


def read_options(items: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs -> options. Raises ValueError for something else."""
    import json

    options: dict[str, Any] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key.isidentifier() or key in options:
            raise ValueError(f"--option takes KEY=VALUE, each key once, got {item!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def reward_command(args: argparse.Namespace) -> int:
    """Try a reward; returns 0 if it keeps every clause, 1 if not. Raises ValueError for what the user can mend."""
    from unigrpo.rewards.conformance import check_reward, example_batch
    from unigrpo.rewards.custom import load_function
    from unigrpo.rewards.registry import make_reward

    options = read_options(args.option)
    if not 8 <= args.size <= 2048 or not 0 <= args.tolerance < 1:
        raise ValueError(f"--size from 8 to 2048 and --tolerance from 0 to 1 wanted, got {args.size} and {args.tolerance}")
    if (args.images is None) != (args.prompts is None):
        raise ValueError("--images needs --prompts and the other way round: rewards judge an image by its prompt")
    # A user's function is tried as it was written: the trainer's wrapper would hide a gradient.
    reward = load_function(args.name, options) if ":" in args.name else make_reward(args.name, options)
    batch = folder_batch(args.images, args.prompts) if args.images else example_batch(size=args.size)
    report = check_reward(reward, batch, tolerance=args.tolerance)
    print("\n".join(report.lines()))
    if report.broken:
        print(f"{args.name} breaks {len(report.broken)} of the contract's clauses: "
              f"{', '.join(finding.clause for finding in report.broken)}", file=sys.stderr)
    return 1 if report.broken else 0


def folder_batch(folder: Path, prompts: Path) -> Any:
    """The first eight images of a folder, by name, and the first prompts of a file."""
    from unigrpo.prompts.records import read_records
    from unigrpo.rewards.conformance import example_batch
    from unigrpo.rewards.pictures import read_picture

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:8]
    if not paths:
        raise ValueError(f"{folder} has no images (png, jpg, webp)")
    return example_batch(pictures=[read_picture(path) for path in paths], prompts=read_records(prompts)[:len(paths)])
