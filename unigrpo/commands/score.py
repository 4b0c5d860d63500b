"""`unigrpo score`: images against a benchmark, and the canaries that stand before it."""

from __future__ import annotations

from typing import Any

from unigrpo.commands import score_canary, score_compbench, score_geneval


def add_parser(commands: Any) -> None:
    """The command and its benchmarks."""
    parser = commands.add_parser("score", help="a folder of images against a benchmark, by anyone's generator")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    score_geneval.add_parser(benchmarks)
    score_compbench.add_parser(benchmarks)
    score_canary.add_parser(benchmarks)
