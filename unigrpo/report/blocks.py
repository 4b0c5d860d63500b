"""Results in the README and in docs/: every one stands in a block between two marks, written from a report.json by
`unigrpo report --readme`, so that no number there is typed.

    <!-- results claims: begin (written by `unigrpo report --readme`) -->  ...  <!-- results claims: end -->
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unigrpo.report.table import BEGIN, END, PREFIX, arm_order, readme_block

WIDTH = 128
Report = Mapping[str, Any]


def pages(root: Path) -> list[Path]:
    """Where blocks may stand."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]


def marks(name: str) -> tuple[str, str]:
    """The two marks of a block."""
    return (BEGIN, END) if name == "main" else (BEGIN.replace("results:", f"results {name}:"),
                                                END.replace("results:", f"results {name}:"))


def names_in(text: str) -> list[str]:
    """The blocks that a page holds, by their first marks."""
    return [match[1] or "main" for match in re.finditer(r"<!-- results(?: (\w+))?: begin ", text)]


def fill(text: str, reports: Mapping[str, Report], where: str) -> str:
    """A page with every block rewritten.

    Args:
        reports: main and experiments. where: the page's name, for errors.
    Raises: ValueError if a block is unknown, is not closed, or its report is missing.
    """
    for name in names_in(text):
        if name not in BLOCKS:
            raise ValueError(f"{where} has a block of results {name!r}; choose from {', '.join(BLOCKS)}")
        which, write = BLOCKS[name]
        begin, end = marks(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"{where} must hold one line {begin!r} and after it one {end!r}")
        if which not in reports:
            raise ValueError(f"{where} shows results of the report {which}, which is missing: `make repro` and "
                             "`make experiments` make the reports")
        new = write(reports[which]) if name == "main" else "\n".join([begin, "", write(reports[which]), "", end])
        text = text[:text.index(begin)] + new + text[text.index(end) + len(end):]
    return text


def block_of(text: str, name: str) -> str:
    """A block as it stands in a page, marks included; empty where it is not closed."""
    begin, end = marks(name)
    return text[text.index(begin):text.index(end) + len(end)] if begin in text and end in text else ""


# --------------------------------------------------------------------------------------------------------------- blocks

def points(entry: Mapping[str, Any], form: str = "+.1f") -> str:
    """'+17.8 points (+14.7 to +20.9)'."""
    bounds = "" if entry["low"] is None else f" ({100 * entry['low']:{form}} to {100 * entry['high']:{form}})"
    return f"{100 * entry['value']:{form}} points{bounds}"


def seeds_block(report: Report) -> str:
    """What all seeds of unigrpo say together, as a paragraph."""
    gain = report["differences"]["unigrpo-sft"]
    exact, arm, control = gain[f"{PREFIX}exact"], report["arms"]["unigrpo"], report["controls"]["unigrpo"]
    seeds = list(exact["seeds"])
    alarms = sum(len(entry["alarms"]) for name, entry in report["sentinel"].items() if name.startswith("unigrpo/"))
    kinds = sorted(((name.rpartition("/")[2].replace("_", " "), found["value"]) for name, found in gain.items()
                    if name.startswith(f"{PREFIX}reasoning/")), key=lambda pair: -pair[1])
    named = [f"{kind} ({100 * value:+.1f})" for kind, value in kinds]
    own, other = (arm[f"{PREFIX}{cell}/exact"]["value"] for cell in ("cfg_off-thinking_on", "cfg_off-thinking_shuffled"))
    text = (
        f"That is training seed {seeds[0]}. Over seeds {', '.join(seeds)} (`make experiments`) exact accuracy changes by "
        f"{points(exact)}{', a t interval over seeds' if len(seeds) > 1 else ''}; singly "
        f"{', '.join(format(100 * single['value'], '+.1f') for single in exact['seeds'].values())}. Sampled thinking is right "
        f"by {points(gain[f'{PREFIX}thinking_accuracy'])} more, greedy thinking by "
        f"{points(gain[f'{PREFIX}cfg_off-thinking_greedy/thinking_accuracy'])}, and images by "
        f"{points(gain[f'{PREFIX}image_given_plan'])} where the plan is right. With another prompt's thinking in place of its "
        f"own {100 * other:.1f} % of images are right instead of {100 * own:.1f} %; with the first half of its own accuracy "
        f"changes by {-100 * control['thinking on - truncated']['value']:+.1f} points. The sentinel raised "
        f"{'no alarm' if alarms == 0 else f'{alarms} alarms'}. ")
    if named:
        text += (f"By kind of reasoning the change is largest for {', '.join(named[:3])} and smallest for "
                 f"{', '.join(named[:-3:-1])}.")
    return textwrap.fill(text.strip(), WIDTH, break_long_words=False, break_on_hyphens=False)


def claims_block(report: Report) -> str:
    """Every claim with its verdict and its sentence, as a table."""
    rows = [f"| {claim['title']} | {claim['verdict']} | {claim['sentence']} |" for claim in report["claims"]]
    return "\n".join(["| claim | verdict | in a sentence |", "| --- | --- | --- |", *rows])


def arms_block(report: Report) -> str:
    """The warm-up and every full-length arm: whether it ran, exact accuracy and its two factors, counted cost, as a table."""
    warm = {"status": "the warm-up", "seeds": [], "exact": report["arms"].get("sft", {}).get(f"{PREFIX}exact"), "cost": {}}
    rows = []
    for name, found in [("sft", warm), *((name, report["roster"][name]) for name in arm_order(report["roster"]))]:
        if found.get("point"):
            continue
        shares = [report["arms"].get(name, {}).get(PREFIX + key) for key in ("thinking_accuracy", "image_given_plan")]
        counted = [f"{found['cost'][key]:.3g}" if key in found["cost"] else "-" for key in ("model_calls", "flops")]
        rows.append([name, found["status"], ", ".join(map(str, found["seeds"])) or "-", *map(share, [found["exact"], *shares]),
                     *counted])
    header = ["arm", "", "seeds", "exact accuracy, %", "thinking right, %", "image right, given a right plan, %",
              "image model calls", "FLOPs"]
    lines = [f"| {' | '.join(row)} |" for row in [header, *rows]]
    return "\n".join([lines[0], f"| --- | --- | --- |{' ---: |' * 5}", *lines[1:]])


def share(entry: Mapping[str, Any] | None) -> str:
    """'64.1 [61.3, 66.9]' in per cent."""
    if entry is None:
        return "-"
    bounds = "" if entry["low"] is None else f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    return f"{100 * entry['value']:.1f}{bounds}"


def frontier_block(report: Report) -> str:
    """Every penalty and weight: validation and held-out accuracy beside drift, as a table."""
    rows = []
    for one in report["frontier"]:
        weight = "-" if one["weight"] is None else f"{one['weight']:g}"
        numbers = ["-" if one[key] is None else f"{one[key]:{form}}" for key, form in (
            ("velocity_mse", ".2e"), ("latent_kl", ".2e"), ("sentinel", ".2f"))]
        validation = "-" if one["validation"] is None else f"{100 * one['validation']:.1f}"
        rows.append(f"| {one['run']} | {one['steps']} | {one['reward_is']} | {one['regularizer']} | {weight} | {validation} | "
                    f"{share(one['accuracy'])} | {' | '.join(numbers)} |")
    names = ("run", "steps", "reward", "penalty", "weight", "validation, %", "exact accuracy, %", "velocity MSE", "latent KL",
             "sentinel")
    return "\n".join([f"| {' | '.join(names)} |", f"| --- | ---: | --- | --- |{' ---: |' * 6}", *rows])


def sweeps_block(report: Report) -> str:
    """Every sweep point with its difference from the baseline, as a table."""
    rows = []
    for sweep in report["sweeps"]:
        for point in sweep["points"]:
            if point["run"] == sweep["baseline"]:
                continue
            found = point["difference"]
            changed = ", ".join(f"`{key}: {json.dumps(point['values'][key])}`" for key in sweep["keys"]
                                if point["values"][key] != sweep["points"][0]["values"][key])
            rows.append(f"| {sweep['name']} | {point['run']} | {changed} | {share(point['accuracy'])} | "
                        f"{point['status'] if found is None else points(found).replace(' points', '')} |")
    return "\n".join(["| sweep | point | what it changes | exact accuracy, % | from the baseline, points |",
                      "| --- | --- | --- | ---: | ---: |", *rows])


BLOCKS: dict[str, tuple[str, Callable[[Report], str]]] = {      # name -> (report, writer)
    "main": ("main", readme_block), "seeds": ("experiments", seeds_block), "claims": ("experiments", claims_block),
    "arms": ("experiments", arms_block), "frontier": ("experiments", frontier_block), "sweeps": ("experiments", sweeps_block),
}
