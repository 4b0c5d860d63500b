"""All numbers of a report: those that every report has, and in a report of all experiments claims, frontier and sweeps.

    claims     a list of {name, title, statement, verdict, sentence, comparisons}, see claims.py
    frontier   a list of points: regulariser, weight, reward, accuracy, drift, see sweeps.py
    sweeps     a list of {name, keys, baseline, verdict, points}, see sweeps.py
    roster     run -> {status, seeds, changes, exact, cost}, of every run that is listed or that a claim names
    missing    a list of {arm, seed, why}
    published  the paper's figures, see published.py
"""

from __future__ import annotations

from typing import Any

from unigrpo.config import Config
from unigrpo.report.claims import CLAIMS, OBSERVED, build_claims
from unigrpo.report.data import build_report
from unigrpo.report.published import PUBLISHED
from unigrpo.report.reading import Inputs
from unigrpo.report.resampling import Statistics
from unigrpo.report.sweeps import build_frontier, build_roster, build_sweeps, frontier_sentence, sweep_sentence


def full_report(inputs: Inputs, config: Config) -> dict[str, Any]:
    """Everything in report.json.

    Raises: ValueError if two checkpoints were evaluated on different prompts.
    """
    statistics = Statistics(seed=config.evaluate.seed, resamples=config.report.bootstrap)
    report = build_report(inputs, config, statistics)
    if inputs.which != "experiments":
        return report
    named = list(dict.fromkeys(arm for claim in CLAIMS for one in claim.comparisons for arm in (one.a, one.b)))
    frontier, sweeps = build_frontier(inputs, statistics), build_sweeps(inputs, statistics)
    roster = build_roster(inputs, statistics, named)
    reasons = {arm: str(entry["status"]) for arm, entry in roster.items() if not entry["seeds"]}
    missing: list[dict[str, Any]] = [{"arm": name.partition("/")[0], "seed": name.partition("/")[2], "why": why}
                                     for name, why in inputs.missing.items()]
    missing += [{"arm": arm, "seed": None, "why": why} for arm, why in reasons.items()
                if arm not in {one["arm"] for one in missing}]
    score = report.get("scores", {}).get(report["measured"]["headline_metric"], "the exact accuracy")
    return report | {
        "claims": build_claims(inputs, statistics, reasons, {"settings": sweep_sentence(sweeps),
                                                             "penalty": (OBSERVED, frontier_sentence(frontier))}, score),
        "frontier": frontier, "sweeps": sweeps, "roster": roster, "missing": missing, "published": PUBLISHED}
