"""`unigrpo score canary`: record what scorers say of the canary pictures, or check them against a record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unigrpo.commands import score_compbench

KINDS = {"detector": "a Mask2Former's folder or name on the hub, or an OWLv2's",
         "color": "the colour model's, a CLIP with quick_gelu", "clip": "the CLIP's of CLIPScore", "blip": "a BLIP-VQA's",
         "depth": "a DPT's"}


def add_parser(benchmarks: Any) -> None:
    """The command and its arguments."""
    parser = benchmarks.add_parser("canary", help="known pictures with recorded scores: record them, or check this device")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE", help="write what the scorers say here, on a trusted device")
    what.add_argument("--check", type=Path, metavar="FILE", help="compare with what was recorded")
    for kind, text in KINDS.items():
        parser.add_argument(f"--{kind}", help=text)
    parser.add_argument("--any-activation", action="store_true",
                        help="--clip may be another CLIP than OpenAI's, such as PickScore's, which runs with plain GELU")
    parser.add_argument("--class-names", type=Path, help="GenEval's object_names.txt, as when scoring")
    score_compbench.add_model_options(parser)
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Record or check; returns the exit status. Raises ValueError for a scorer that is broken on this device."""
    from unigrpo.evaluation.backends import canary

    scorers = load_scorers(args)
    device = canary.device_name(args.device)
    if args.record is not None:
        lines = canary.record(args.record, scorers, device)
        print("\n".join([*lines, f"recorded on {device} in {args.record}; look at the lines above before trusting it"]))
        return 0
    for kind, worst in canary.check(args.check, scorers, device).items():
        print(f"{kind}: as recorded on {device}, within {worst:.2g} (allowed {canary.TOLERANCES[kind]:g})")
    return 0


def load_scorers(args: argparse.Namespace) -> dict[str, Any]:
    """The scorers that were named, by kind. Raises ValueError if there are none."""
    from unigrpo.evaluation.backends.weights import quiet_transformers

    if not any(getattr(args, kind) for kind in KINDS):
        raise ValueError("name at least one scorer: " + ", ".join(f"--{kind}" for kind in KINDS))
    quiet_transformers()
    scorers: dict[str, Any] = {}
    if args.detector:
        from unigrpo.commands.score_geneval import load_detector

        scorers["detector"] = load_detector(args) if args.labels is None else score_compbench.load_detector(args)
    if args.color:
        from unigrpo.evaluation.backends.clip import ClipColors

        scorers["colors"] = ClipColors.load(args.color, device=args.device)
    if args.clip:
        from unigrpo.evaluation.backends.clip import OPENAI_ACTIVATION, ClipSimilarity

        scorers["similarity"] = ClipSimilarity.load(args.clip, device=args.device,
                                                    activation=None if args.any_activation else OPENAI_ACTIVATION)
    if args.blip:
        scorers["yes"] = score_compbench.load_scorer("blip", args)
    if args.depth:
        scorers["depth"] = score_compbench.load_scorer("depth", args)
    return scorers
