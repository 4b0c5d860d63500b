"""Figures of the report as PNG bytes: training curves, results with intervals.

matplotlib's defaults and its own font, no dates: the same numbers give the same bytes, whatever the machine's settings.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unigrpo.report.reading import Checkpoint

COLORS = {"base": "#8b929c", "sft": "#3f6fb5", "unigrpo": "#c8502d"}
OTHER_COLORS = ("#2f8f6b", "#8a5aa8", "#b08a1e", "#3a9bb0", "#a84a72", "#6b7a2a")
INK, FAINT = "#22252a", "#d9dce1"
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": "#9aa0a8", "axes.labelcolor": INK, "text.color": INK, "xtick.color": "#5a6068",
         "ytick.color": "#5a6068", "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.grid": True, "grid.color": "#eceef1", "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False,
         "legend.fontsize": 7.5}


@dataclass(frozen=True)
class Panel:
    """One small plot: what is drawn, and what to look for.

    Args:
        title: what it shows. columns: metrics of curves.csv and their names in the legend.
        unit: of the vertical axis. log: logarithmic, for what spans orders of magnitude.
    """

    title: str
    columns: dict[str, str]
    unit: str = ""
    log: bool = False


SUPERVISED_PANELS = (
    Panel("Image loss", {"image/loss": "velocity error"}, "mean squared error"),
    Panel("Text loss", {"text/loss": "cross-entropy"}, "nats a token"),
    Panel("Next token right", {"text/accuracy": "share"}, "share"),
)


def training_panels(updates: int) -> tuple[Panel, ...]:
    """The RL curves in the order docs/curves.md explains them. `updates`: optimizer steps a rollout."""
    last = f"update_{updates}"
    return (
        Panel("Reward", {"reward/mean": "mean of the rollouts"}),
        Panel("Probe on validation prompts", {"probe/exact": "exact", "probe/thinking_accuracy": "thinking right"}, "share"),
        Panel("Groups without signal", {"reward/zero_std_groups": "all siblings equal"}, "share of groups"),
        Panel(f"Clipped, update {updates}", {f"{last}/text/clip_fraction": "text", f"{last}/image/clip_fraction": "image"},
              "share of actions"),
        Panel(f"Ratio of tokens, update {updates}", {f"{last}/text/ratio_mean": "mean"}),
        Panel(f"Ratio of image steps, update {updates}", {f"{last}/image/ratio_mean": "mean"}),
        Panel("Entropy of the thinking", {"text/entropy": "replayed"}, "nats a token"),
        Panel("Length of the thinking", {"thinking/length": "mean", "thinking/length_max": "longest"}, "tokens"),
        Panel("Distance from the reference", {"image/velocity_mse": "velocity MSE", "image/latent_kl": "latent KL"}, log=True),
        Panel("Penalty against policy", {"image/penalty_gradient_ratio": "gradient norms"}, "ratio", log=True),
        Panel("Gradient norm", {"understanding/grad_norm": "understanding", "generation/grad_norm": "generation"}, log=True),
        Panel("Rollout against replay", {"mismatch/text": "text, nats", "mismatch/image": "image, clip widths"}, log=True),
    )


def arm_colors(arms: Sequence[str]) -> dict[str, str]:
    """A colour for every arm: the same for the same arm in every figure and table."""
    others = iter(OTHER_COLORS * (1 + len(arms) // len(OTHER_COLORS)))
    return {arm: COLORS.get(arm) or next(others) for arm in arms}


def png(figure: Figure) -> bytes:
    """A figure as PNG, without the name and version of what made it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` values, shorter at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - width // 2, 0), np.minimum(index + (width + 1) // 2, len(values))
    return (sums[high] - sums[low]) / (high - low)


def curves_figure(checkpoints: Sequence[Checkpoint], panels: Sequence[Panel], colors: Mapping[str, str]) -> bytes | None:
    """Training curves as small multiples. None if no panel has a curve.

    One checkpoint: a colour a metric, faint as logged and strong as a running mean. Several: a colour an arm, running means
    only, and the panel's second metric dashed.
    """
    shown = [panel for panel in panels
             if any(_points(c.curves, name) is not None for c in checkpoints for name in panel.columns)]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    several = len(checkpoints) > 1
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(9.6, 2.15 * rows), layout="constrained")
        for place, panel in enumerate(shown):
            axes = figure.add_subplot(rows, columns, place + 1)
            for checkpoint in checkpoints:
                for number, (name, label) in enumerate(panel.columns.items()):
                    points = _points(checkpoint.curves, name)
                    if points is None:
                        continue
                    steps, values = points
                    color = colors[checkpoint.run] if several else (colors[checkpoint.run], "#3f6fb5", "#2f8f6b")[number]
                    _draw(axes, steps, values, color, "_" if several else label, dashed=several and number > 0,
                          faint=not several)
            axes.set_title(panel.title)
            axes.set_ylabel(panel.unit)
            axes.ticklabel_format(axis="y", useOffset=False)
            if panel.log and _positive(axes):
                axes.set_yscale("log")
            if several and len(panel.columns) > 1:
                for name, style in zip(panel.columns.values(), ("-", "--"), strict=True):
                    axes.plot([], [], style, color=INK, linewidth=1.0, label=name)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(loc="best", handlelength=1.6)
            if place >= len(shown) - columns:
                axes.set_xlabel("step")
        if several:
            runs = dict.fromkeys(checkpoint.run for checkpoint in checkpoints)
            figure.legend(handles=[Line2D([], [], color=colors[run], linewidth=2, label=run) for run in runs],
                          loc="outside upper left", ncols=6, fontsize=8.5)
        return png(figure)


def _points(curves: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and values where a metric was logged; None if never."""
    if name not in curves.columns:
        return None
    rows = curves[["step", name]].dropna()
    return None if rows.empty else (rows["step"].to_numpy(), rows[name].to_numpy())


def _draw(axes: Any, steps: np.ndarray, values: np.ndarray, color: str, label: str, *, dashed: bool, faint: bool) -> None:
    """One curve; few points are drawn as points."""
    style = "--" if dashed else "-"
    if len(values) <= 20:
        axes.plot(steps, values, style, color=color, label=label, linewidth=1.4, marker="o", markersize=2.6)
        return
    if faint:
        axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(values, max(3, len(values) // 20)), style, color=color, label=label, linewidth=1.5)


def _positive(axes: Any) -> bool:
    """Whether all drawn values may stand on a logarithmic axis."""
    return all((np.asarray(line.get_ydata()) > 0).all() for line in axes.get_lines())


BARS = {                                     # metric below bench/shapes/ -> its row in the results figure
    "exact": "exact, all prompts", "exact/plain": "exact, plain prompts", "exact/reasoning": "exact, reasoning prompts",
    "geneval": "GenEval's rules", "thinking_accuracy": "thinking right, sampled",
    "cfg_off-thinking_greedy/thinking_accuracy": "thinking right, greedy", "image_given_plan": "image, given a right plan",
}


def results_figure(report: Mapping[str, Any], pairs: Sequence[tuple[str, Sequence[tuple[str, Path]]]] = (), *,
                   arms: Sequence[str] | None = None) -> bytes:
    """Every arm's main measures with intervals, from report.json; optionally pictures before and after beside them.

    Args:
        report: as build_report returns it. pairs: (prompt, ((arm, picture file), ...)) for the pictures.
        arms: that are drawn, all by default.
    """
    if arms is None:
        arms = [arm for arm in ("base", "sft", "unigrpo") if arm in report["arms"]] \
            + sorted(set(report["arms"]) - {"base", "sft", "unigrpo"})
    gap, many = min(0.2, 0.8 / len(arms)), len(arms) > 4
    colors = arm_colors(arms)
    names = [name for name in BARS if any(f"bench/shapes/{name}" in report["arms"][arm] for arm in arms)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(9.6, (0.12 * len(arms) if many else 0.5) * len(names) + 1.1), layout="constrained")
        grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1]) if pairs else figure.add_gridspec(1, 1)
        axes = figure.add_subplot(grid[0, 0])
        for number, arm in enumerate(arms):
            offset = (number - (len(arms) - 1) / 2) * gap
            for row, name in enumerate(names):
                entry = report["arms"][arm].get(f"bench/shapes/{name}")
                if entry is None:
                    continue
                low, high = (entry[key] if entry[key] is not None else entry["value"] for key in ("low", "high"))
                axes.plot([100 * low, 100 * high], [row + offset] * 2, color=colors[arm], linewidth=1.6, alpha=0.55)
                axes.plot(100 * entry["value"], row + offset, "o", color=colors[arm], markersize=4 if many else 5.2,
                          label=arm if row == 0 else None)
        axes.set_yticks(range(len(names)), [BARS[name] for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of images, bars are 95 % intervals")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(6, len(arms)), fontsize=8.5)
        if pairs:
            _pictures(figure, grid[0, 1], pairs, colors)
        return png(figure)


def _pictures(figure: Figure, place: Any, pairs: Sequence[tuple[str, Sequence[tuple[str, Path]]]],
              colors: Mapping[str, str]) -> None:
    """Pictures of the same prompts: one row a prompt, one column an arm."""
    from matplotlib.image import imread

    arms = len(pairs[0][1])
    inner = place.subgridspec(len(pairs), 1 + arms, width_ratios=[1.5, *[1] * arms], wspace=0.02, hspace=0.02)
    for row, (prompt, pictures) in enumerate(pairs):
        text = figure.add_subplot(inner[row, 0])
        text.axis("off")
        text.text(1.0, 0.5, _wrap(prompt, 24), ha="right", va="center", fontsize=7.5, transform=text.transAxes)
        for column, (arm, path) in enumerate(pictures):
            axes = figure.add_subplot(inner[row, column + 1])
            axes.imshow(imread(path), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(True)
                side.set_color(FAINT)
            if row == 0:
                axes.set_title(arm, color=colors[arm], loc="center")


def _wrap(text: str, width: int) -> str:
    """A text on several lines."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
