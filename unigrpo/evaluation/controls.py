"""What the thinking contributes, and what training did to understanding: pure functions of tables, and of token ids.

    controls       cells of one checkpoint against each other, on the same prompts and noise: the thinking it wrote, none,
                   another prompt's, half of its own
    understanding  before against after, on held-out prompts: the loss on a right plan in words, and how often the greedy plan
                   is right
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from unigrpo.evaluation.outcomes import HEADLINE, cell, measure, significant
from unigrpo.evaluation.statistics import Measure, value_of

CONTROLS = {                                # name -> (first, second) thinking of the cells compared, guidance off
    "thinking on - shuffled": ("on", "shuffled"),
    "thinking on - truncated": ("on", "truncated"),
    "thinking on - off": ("on", "off"),
    "thinking greedy - on": ("greedy", "on"),
}
COLUMNS = ("prompt_id", "tag", "needs_reasoning", "tokens", "nats", "plans", "plans_right")
Difference = Callable[[Measure, Measure], dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------- controls

def truncate(tokens: Tensor, lengths: Tensor, *, stop: int, pad: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Thinkings cut after a share of their tokens, each ended by the stop token as a whole one is.

    Args:
        tokens: (B, T) ids, padded on the right. lengths: (B,), the stop token included where there is one.
        share: of the tokens before the stop token, rounded down; at least one token of a thinking that has any is kept.
    Returns: tokens (B, T') and lengths (B,) with the stop token at lengths - 1.
    Raises: ValueError for a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"a thinking is cut after a share of its tokens in (0, 1), got {share}")
    stopped = tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] == stop
    content = lengths - (stopped & (lengths > 0)).to(lengths.dtype)
    keep = torch.maximum((content * share).long(), content.clamp(max=1))
    width = int(keep.max()) + 1
    columns = torch.arange(width, device=tokens.device)
    cut = torch.nn.functional.pad(tokens, (0, max(0, width - tokens.shape[1])), value=pad)[:, :width]
    cut = torch.where(columns < keep[:, None], cut, torch.full_like(cut, pad))
    return torch.where(columns == keep[:, None], torch.full_like(cut, stop), cut), keep + 1


def thinking_effects(outcomes: pd.DataFrame, difference: Difference, *,
                     guidance: str = HEADLINE[0]) -> dict[str, dict[str, Any]]:
    """Differences in exact accuracy between cells of one checkpoint, over all prompts and per category.

    Args:
        outcomes: of all cells. difference: two measures of the same prompts -> value, low, high, paired.
    Returns: `<control>` and `<control>/<category>`, categories being the tags, plain and reasoning; controls whose cells are
        not both there are left out.
    """
    there = set(outcomes.loc[outcomes["cfg"] == guidance, "thinking"])
    found = {}
    for name, (first, second) in CONTROLS.items():
        if not {first, second} <= there:
            continue
        pair = [cell(outcomes, guidance, thinking) for thinking in (first, second)]
        found[name] = difference(*(measure(rows, "exact") for rows in pair))
        for category, masks in categories(pair).items():
            found[f"{name}/{category}"] = difference(*(measure(rows[mask], "exact") for rows, mask
                                                       in zip(pair, masks, strict=True)))
    return found


def categories(tables: Sequence[pd.DataFrame]) -> dict[str, list[np.ndarray]]:
    """Category -> which rows of each table are in it: the tags of the first table, then plain and reasoning prompts."""
    found = {str(tag): [(table["tag"] == tag).to_numpy() for table in tables] for tag in sorted(set(tables[0]["tag"]))}
    found |= {name: [(table["needs_reasoning"] == needs).to_numpy() for table in tables]
              for name, needs in (("plain", False), ("reasoning", True))}
    return {name: masks for name, masks in found.items() if masks[0].any()}


# -------------------------------------------------------------------------------------------------------- understanding

def understanding_table(outcomes: pd.DataFrame, losses: Mapping[str, tuple[int, float]]) -> pd.DataFrame:
    """One row a held-out prompt: the loss on a right plan, and the greedy plans.

    Args:
        outcomes: of all cells, the greedy one among them.
        losses: prompt id -> (tokens, nats) of a right plan in words after the prompt.
    Raises: ValueError if a prompt has no loss, or there is no greedy cell.
    """
    rows = cell(outcomes, HEADLINE[0], "greedy")
    if missing := sorted(set(rows["prompt_id"]) - set(losses)):
        raise ValueError(f"every prompt needs the loss of a right plan, {missing[0]} and {len(missing) - 1} others have none")
    pairs = [losses[name] for name in rows["prompt_id"]]
    return pd.DataFrame({
        "prompt_id": rows["prompt_id"], "tag": rows["tag"], "needs_reasoning": rows["needs_reasoning"],
        "tokens": [count for count, _ in pairs], "nats": [significant(nats) for _, nats in pairs],
        "plans": rows["images"], "plans_right": rows["plan_right"]}, columns=list(COLUMNS))


def understanding_measures(table: pd.DataFrame) -> dict[str, Measure]:
    """`text_loss` (nats a token of a right plan) and `plan_accuracy` (share of greedy plans that are right), over all prompts
    and per category."""
    found = {}
    for category, masks in {"": [np.ones(len(table), dtype=bool)], **categories([table])}.items():
        rows = table[masks[0]]
        ids, end = rows["prompt_id"].to_numpy(), f"/{category}" if category else ""
        found[f"text_loss{end}"] = Measure(rows["nats"].to_numpy(), rows["tokens"].to_numpy(), prompts=ids)
        found[f"plan_accuracy{end}"] = Measure(rows["plans_right"].to_numpy(), rows["plans"].to_numpy(), prompts=ids)
    return found


def understanding_metrics(table: pd.DataFrame) -> dict[str, float]:
    """The flat metrics of a checkpoint: `understanding/<measure>`, 6 significant digits."""
    return {f"understanding/{name}": significant(value_of(found)) for name, found in understanding_measures(table).items()}


def understanding_change(before: pd.DataFrame, after: pd.DataFrame, difference: Difference) -> dict[str, dict[str, Any]]:
    """After minus before for every measure, paired by prompt.

    A training that only makes the policy surer of one phrasing raises the text loss and leaves the plans right, so a loss of
    understanding is both: the loss up and the accuracy down, each past its interval.

    Raises: ValueError if the prompts differ.
    """
    first, second = understanding_measures(after), understanding_measures(before)
    return {name: difference(first[name], second[name]) for name in first if name in second}


def is_understanding_lost(change: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the text loss rose and the plan accuracy fell, each with an interval that leaves out 0."""
    loss, accuracy = change["text_loss"], change["plan_accuracy"]
    return loss["low"] is not None and loss["low"] > 0 and accuracy["high"] < 0


def write_understanding(table: pd.DataFrame, path: Path) -> None:
    """The table as CSV, in COLUMNS."""
    table.to_csv(path, columns=list(COLUMNS), index=False, lineterminator="\n", float_format="%.6g")


def read_understanding(path: Path, *, empty: bool = False) -> pd.DataFrame:
    """The table from CSV; `empty`: of an evaluation that was not on the shapes world.

    Raises: FileNotFoundError; ValueError naming the file and the line, if it is damaged.
    """
    text = path.read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0]) != COLUMNS or (len(rows) < 2) != empty or not text.endswith("\n"):
        raise ValueError(f"{path} line 1: wanted the header {','.join(COLUMNS)}, whole lines and {'no' if empty else 'a'} "
                         "prompt; evaluate again")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(COLUMNS) or row[2] not in ("True", "False") or not _counts(row):
            raise ValueError(f"{path} line {number}: wanted {','.join(COLUMNS)} with counts of at least one token and plan, "
                             f"got {','.join(row)}; evaluate again")
    table = pd.DataFrame(rows[1:], columns=list(COLUMNS))
    return table.assign(needs_reasoning=table["needs_reasoning"] == "True", nats=table["nats"].astype("float64")).astype(
        dict.fromkeys(("tokens", "plans", "plans_right"), "int64"))


def _counts(row: Sequence[str]) -> bool:
    """Whether a row's numbers are possible."""
    try:
        tokens, nats, plans, right = int(row[3]), float(row[4]), int(row[5]), int(row[6])
    except ValueError:
        return False
    return tokens > 0 and math.isfinite(nats) and nats >= 0 and plans > 0 and 0 <= right <= plans
