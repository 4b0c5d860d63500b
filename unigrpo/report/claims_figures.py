"""Figures of a report of all experiments as PNG bytes, from report.json alone: intervals of claims, frontier, sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from unigrpo.report.claims import NOT_RUN, REFUTED, SUPPORTED, unit
from unigrpo.report.figures import FAINT, INK, OTHER_COLORS, STYLE, png

VERDICT_COLORS = {SUPPORTED: "#1d7a4c", REFUTED: "#b3382c"}       # others are grey: nothing was decided
GREY = "#626973"
KIND_NAMES = {"velocity_mse": "velocity MSE", "latent_kl": "latent KL", "latent_kl_published": "latent KL, as published",
              "none": "no penalty"}


def all_figures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> PNG, of all that a report of all experiments draws beside the main report's figures."""
    found: dict[str, bytes | None] = {f"claim_{claim['name']}": claim_figure(claim) for claim in report["claims"]}
    found |= {"frontier": frontier_figure(report["frontier"]), "sweeps": sweeps_figure(report["sweeps"])}
    return {name: picture for name, picture in found.items() if picture is not None}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the report's style; call within `matplotlib.rc_context()`."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def claim_figure(claim: Mapping[str, Any]) -> bytes | None:
    """A claim's comparisons in points: the interval over seeds as a bar, single seeds as dots, what it must clear as a line.
    None where nothing has run."""
    rows = [one for one in claim["comparisons"] if one["verdict"] != NOT_RUN]
    metrics = list(dict.fromkeys(one["metric"] for one in rows))
    if not rows:
        return None
    counts = [sum(one["metric"] == metric for one in rows) for metric in metrics]
    with matplotlib.rc_context():
        figure = new_figure(9.6, 0.42 * len(rows) + 0.62 * len(metrics) + 0.2)
        grid = figure.add_gridspec(len(metrics), 1, height_ratios=[count + 0.6 for count in counts])
        for place, metric in enumerate(metrics):
            scale, _, name = unit(metric)
            axes = figure.add_subplot(grid[place, 0])
            shown = [one for one in rows if one["metric"] == metric]
            axes.axvline(0, color="#9aa0a8", linewidth=1)
            for height, one in enumerate(shown):
                color = VERDICT_COLORS.get(one["verdict"], GREY)
                if one["margin"]:
                    axes.plot([-scale * one["direction"] * one["margin"]] * 2, [height - 0.4, height + 0.4], ":", color=INK,
                              linewidth=1.2)
                if one["low"] is not None:
                    axes.plot([scale * one["low"], scale * one["high"]], [height] * 2, color=color, linewidth=2.4, alpha=0.6,
                              solid_capstyle="butt")
                for single in one["seeds"]:
                    axes.plot(scale * single["value"], height - 0.22, ".", color=color, markersize=4.5, alpha=0.7)
                axes.plot(scale * one["mean"], height, "o", color=color, markersize=6)
            axes.set_yticks(range(len(shown)), [label(one) for one in shown])
            axes.set_ylim(len(shown) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(f"{name}, difference")
        return png(figure)


def label(one: Mapping[str, Any]) -> str:
    """A comparison in a figure's margin."""
    words = one["words"].removeprefix("against ")
    return words if one["decides"] else f"({words})"


def frontier_figure(points: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Held-out accuracy against drift, a line for each penalty from its weakest weight to its strongest; a panel for each
    length of training and reward. None where no point has both numbers."""
    there = [one for one in points if one["accuracy"] and one["velocity_mse"]]
    groups = list(dict.fromkeys((one["steps"], one["reward_is"]) for one in there))
    if not there:
        return None
    kinds = list(dict.fromkeys(one["regularizer"] for one in points))
    colors = dict(zip(kinds, ("#c8502d", "#3f6fb5", "#2f8f6b", "#8a5aa8", *OTHER_COLORS), strict=False))
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    with matplotlib.rc_context():
        figure = new_figure(4.9 * columns, 3.5 * rows + 0.3)
        for place, group in enumerate(groups):
            axes = figure.add_subplot(rows, columns, place + 1)
            for kind in kinds:
                line = sorted((one for one in there if (one["steps"], one["reward_is"]) == group
                               and one["regularizer"] == kind), key=lambda one: one["weight"] or 0)
                if not line:
                    continue
                drift, values = [one["velocity_mse"] for one in line], [100 * one["accuracy"]["value"] for one in line]
                axes.plot(drift, values, "-", color=colors[kind], linewidth=1, alpha=0.6)
                for one, x, y in zip(line, drift, values, strict=True):
                    if one["accuracy"]["low"] is not None:
                        axes.plot([x, x], [100 * one["accuracy"]["low"], 100 * one["accuracy"]["high"]], color=colors[kind],
                                  linewidth=1.4, alpha=0.4)
                    axes.plot(x, y, "o", color=colors[kind], markersize=6, markerfacecolor="white" if one["alarms"] else None,
                              label=KIND_NAMES.get(kind, kind) if one is line[0] else None)
                    if one["weight"] is not None:
                        axes.annotate(f"{one['weight']:g}", (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7,
                                      color=colors[kind])
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{group[0]} steps, reward {group[1]}")
            axes.set_xlabel("drift: velocity MSE to the reference")
            axes.set_ylabel("exact accuracy, %")
            axes.legend(loc="best")
        return png(figure)


def sweeps_figure(sweeps: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Every point's difference from its baseline with its interval over prompts. None where nothing has run."""
    rows = [(sweep, point) for sweep in sweeps for point in sweep["points"] if point["difference"]]
    if not rows:
        return None
    with matplotlib.rc_context():
        figure = new_figure(9.6, 0.26 * len(rows) + 0.9)
        axes = figure.add_subplot(1, 1, 1)
        axes.axvline(0, color="#9aa0a8", linewidth=1)
        last, height, ticks = None, 0.0, []
        for sweep, point in rows:
            height += 0.0 if last is None else 1.0 if last == sweep["name"] else 1.5
            last, found = sweep["name"], point["difference"]
            if found["low"] is not None:
                axes.plot([100 * found["low"], 100 * found["high"]], [height] * 2, color=GREY, linewidth=2.2, alpha=0.5)
            axes.plot(100 * found["value"], height, "o", color=GREY, markersize=5)
            ticks.append((height, f"{sweep['name']}: {point['run']}"))
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
        axes.set_ylim(height + 0.7, -0.7)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", color=FAINT)
        axes.set_xlabel("points of exact accuracy from the baseline, one seed, bars are 95 % intervals over prompts")
        return png(figure)
