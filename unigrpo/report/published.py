"""Published figures of the paper and of the model it starts from, each with its source: shown beside ours, never mixed.

Another model (BAGEL-7B-MoT), another scale and other benchmarks than our scale tiny, so no difference between the two means
anything. `read` says how we know: the paper's text was not at hand, so its figures are those that third-party notes quote.
"""

from __future__ import annotations

from typing import Any

PAPER = "arXiv 2603.23500, as quoted by third-party notes"
README = "README of ByteDance-Seed/Bagel"
MILR = "the MILR paper's table, as quoted by third-party notes"


def row(system: str, benchmark: str, value: float | str, source: str, note: str = "") -> dict[str, Any]:
    """One published figure; text where only a direction is known."""
    return {"system": system, "benchmark": benchmark, "value": value, "source": source, "note": note}


PUBLISHED: list[dict[str, Any]] = [
    row("BAGEL-7B-MoT", "GenEval, overall", 0.82, README),
    row("BAGEL-7B-MoT, prompts rewritten or thinking", "GenEval, overall", 0.88, README,
        "users measured 0.78 and 0.86, and 0.80 without against 0.79 with thinking (Bagel issues 123 and 109)"),
    row("UniGRPO", "GenEval, overall", 0.90, PAPER, "with guidance at evaluation"),
    row("UniGRPO", "text alignment (TA)", 0.8381, PAPER, "the exact metric is not known to us"),
    row("image only (FlowGRPO)", "GenEval and TA", "below UniGRPO", PAPER, "figures not known to us"),
    row("thinking only (TextGRPO)", "GenEval and TA", "below UniGRPO", PAPER, "figures not known to us"),
    row("no regulariser", "reward hacking", "reward rises, images break", PAPER),
    row("latent KL", "reward hacking", "grid artifacts", PAPER),
    row("velocity MSE", "reward hacking", "most stable", PAPER),
    row("no guidance in training", "final quality", "not worse", PAPER, "guidance is on at evaluation"),
    row("BAGEL-7B-MoT", "T2I-CompBench, colour", 0.8027, MILR),
    row("BAGEL-7B-MoT", "T2I-CompBench, shape", 0.5685, MILR),
    row("BAGEL-7B-MoT", "T2I-CompBench, texture", 0.7021, MILR),
    row("BAGEL-7B-MoT", "T2I-CompBench, spatial", 0.3488, MILR),
    row("BAGEL-7B-MoT", "T2I-CompBench, non-spatial", 0.3101, MILR),
    row("BAGEL-7B-MoT", "T2I-CompBench, complex", 0.3824, MILR),
]
