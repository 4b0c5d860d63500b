"""Results as plain text: a table for the terminal, and the README's block, both from report.json alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unigrpo.report.benchmarks import main_rows

PREFIX = "bench/shapes/"
BEGIN, END = "<!-- results: begin (written by `unigrpo report --readme`) -->", "<!-- results: end -->"
ROWS = {                                     # metric below bench/shapes/ -> its name for people
    "exact": "exact accuracy", "exact/plain": "exact, plain prompts", "exact/reasoning": "exact, reasoning prompts",
    "geneval": "GenEval's rules", "thinking_accuracy": "thinking right, sampled",
    "cfg_off-thinking_greedy/thinking_accuracy": "thinking right, greedy",
    "image_given_plan": "image right, given a right plan",
    "cfg_on-thinking_on/exact": "exact, with guidance",
}


def read_report(path: Path) -> dict[str, Any]:
    """report.json. Raises ValueError naming it, if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the report stage makes it (`make repro`)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); run the report stage again") from error
    return dict(content)


def results_table(path: Path) -> str:
    """The terminal table of a report.json."""
    return terminal_table(read_report(path))


def arm_order(arms: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The stages in their order, then unigrpo, then other runs by name."""
    first = ("base", "sft", "unigrpo")
    return [arm for arm in first if arm in arms] + sorted(set(arms) - set(first))


def percent(entry: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """'53.7 [51.2, 56.1]' in percent, '-' for nothing."""
    if entry is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    value = f"{100 * entry['value']:{form}}"
    return value if entry["low"] is None else f"{value} [{100 * entry['low']:{form}}, {100 * entry['high']:{form}}]"


def result_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results table: every arm (in a report of all experiments the first three), and unigrpo's gain over
    sft."""
    arms = arm_order(report["arms"])[:3 if "roster" in report else None]
    gain = report["differences"].get("unigrpo-sft", {})
    header = ["%", *arms, *(["unigrpo - sft"] if gain else [])]
    rows = []
    shapes = {PREFIX + name: label for name, label in ROWS.items()}
    for metric, label in (shapes | main_rows(report.get("scores", {}))).items():
        if any(metric in report["arms"][arm] for arm in arms):
            rows.append([label, *(percent(report["arms"][arm].get(metric)) for arm in arms),
                         *([percent(gain.get(metric), sign=True)] if gain else [])])
    return header, rows


def terminal_table(report: Mapping[str, Any]) -> str:
    """What `make repro` ends with: the headline, a table with 95 % intervals, and how it was measured; of all experiments also
    the verdicts, and a line an arm."""
    header, rows = result_rows(report)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    claims = [line for claim in report.get("claims", ()) for line in textwrap.wrap(
        f"{claim['title']}. {claim['sentence']}", 120, subsequent_indent="    ")]
    lines = [report["headline"]["sentence"], "", *lines, "", footnote(report)]
    if "roster" in report:
        lines += ["", *arm_lines(report["roster"])]
    return "\n".join([*lines, "", *claims] if claims else lines)


def arm_lines(roster: Mapping[str, Any]) -> list[str]:
    """A line an arm: its exact accuracy, or why there is none."""
    width = max(len(name) for name in roster)
    return [f"{name.ljust(width)}  {percent(found['exact']) if found['exact'] else '-':>20}  "
            f"{found['status'] if found['status'] != 'ran' else 'seeds ' + ', '.join(found['seeds'])}"
            for name, found in roster.items()]


def footnote(report: Mapping[str, Any]) -> str:
    """One line on how the numbers were made."""
    facts = report["measured"]
    over = "over training seeds" if any(entry["over"] == "seeds" for found in report["arms"].values()
                                        for entry in found.values()) else "over prompts"
    return (f"{facts['prompts']} prompts x {facts['images_per_prompt']} images; guidance off and thinking sampled unless said; "
            f"[95 % interval {over}], differences paired." + "".join(f" {line}." for line in facts.get("benchmarks", [])))


def readme_block(report: Mapping[str, Any]) -> str:
    """The README's results between its two marks: headline, table, footnote."""
    header, rows = result_rows(report)
    table = ["| " + " | ".join(row) + " |" for row in [header, ["---", *["---:"] * (len(header) - 1)], *rows]]
    return "\n".join([BEGIN, "", f"**{report['headline']['sentence']}**", "", *table, "", footnote(report), "", END])
