"""Verdicts, outcomes and metrics of one checkpoint: tables, files, and readers that refuse what is damaged.

    verdicts (one row an image, Parquet)  ->  outcomes (one row a prompt and cell, CSV)  ->  metrics (flat JSON)

Every published value and interval derives from the outcomes. A cell is one way of sampling: guidance off or on, and thinking
on (sampled), off, shuffled (another prompt's), truncated (its first half) or greedy. The headline cell is guidance off,
thinking on.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from unigrpo.evaluation.statistics import Measure, value_of

CFG = ("off", "on")
THINKING = ("on", "off", "shuffled", "truncated", "greedy")
HEADLINE = ("off", "on")                                        # (cfg, thinking)

VERDICT_COLUMNS = {                                             # one row an image
    "prompt_id": "str", "tag": "str",
    "reasoning": "str",                                         # the kind of inference, "" for plain prompts
    "needs_reasoning": "bool", "sample": "int64", "cfg": "str", "thinking": "str",
    "thinking_text": "str",                                     # as decoded, "" without thinking
    "image": "str",                                             # relative path of a saved image, "" where none was saved
    "exact": "bool", "geneval": "bool", "graded": "float64", "plan_right": "bool",
    "reason": "str",                                            # GenEval's messages
    "detections": "str",                                        # JSON
}
TEXT_COLUMNS = ("prompt_id", "tag", "reasoning", "needs_reasoning", "cfg", "thinking")
COUNT_COLUMNS = ("images", "exact", "geneval", "plan_right", "exact_and_plan_right")
OUTCOME_COLUMNS = (*TEXT_COLUMNS, *COUNT_COLUMNS, "graded_sum")     # one row a prompt and cell
CELL_ORDER = ["cfg", "thinking", "prompt_id"]

MEASURES = {                                                    # name -> the columns divided by each other
    "exact": ("exact", "images"),
    "geneval": ("geneval", "images"),                           # official: mean over tags
    "graded": ("graded_sum", "images"),
    "thinking_accuracy": ("plan_right", "images"),
    "image_given_plan": ("exact_and_plan_right", "plan_right"),
}


def significant(value: float, digits: int = 6) -> float:
    """Rounded to so many significant digits, so that files do not differ by noise of the last bits."""
    return float(f"{value:.{digits}g}")


# ----------------------------------------------------------------------------------------------------------- verdicts

def join_verdicts(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Verdicts of several batches and cells as one table in an order of its own: it does not depend on the batches.

    Raises: ValueError if a (prompt, sample, cell) occurs twice or columns are missing.
    """
    verdicts = pd.concat([_with_types(frame, "verdicts") for frame in frames], ignore_index=True)
    key = [*CELL_ORDER, "sample"]
    if (twice := verdicts.duplicated(key)).any():
        raise ValueError(f"each image has one verdict, but {_named(verdicts, twice, key)} occurs twice")
    return verdicts.sort_values(key, ignore_index=True)


def write_verdicts(verdicts: pd.DataFrame, path: Path) -> None:
    """One row an image, as Parquet; equal verdicts give equal bytes (with the same pandas and pyarrow)."""
    _with_types(verdicts, str(path)).to_parquet(path, engine="pyarrow", compression="zstd", index=False)


def read_verdicts(path: Path) -> pd.DataFrame:
    """Verdicts from Parquet.

    Raises: FileNotFoundError; ValueError naming the file if it is damaged or columns are missing.
    """
    try:
        verdicts = pd.read_parquet(path, engine="pyarrow")
    except FileNotFoundError:
        raise
    except Exception as error:                                  # of a damaged file, anything: KeyError, ArrowInvalid, ...
        raise ValueError(f"{path} is no whole Parquet file ({error}); restore it with `dvc checkout`, "
                         "or evaluate again") from error
    return _with_types(verdicts, str(path))


# ----------------------------------------------------------------------------------------------------------- outcomes

def count_outcomes(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Outcomes per prompt and cell.

    Args:
        verdicts: one row an image.
    Returns: OUTCOME_COLUMNS sorted by cell, then prompt; counts of images, and `graded_sum` over them (6 digits).
    """
    rows = verdicts.assign(exact_and_plan_right=verdicts["exact"] & verdicts["plan_right"])
    groups = rows.groupby(list(TEXT_COLUMNS), sort=False, dropna=False)
    outcomes = groups.agg(images=("sample", "size"), exact=("exact", "sum"), geneval=("geneval", "sum"),
                          plan_right=("plan_right", "sum"), exact_and_plan_right=("exact_and_plan_right", "sum"),
                          graded_sum=("graded", "sum")).reset_index()
    outcomes["graded_sum"] = outcomes["graded_sum"].map(significant).astype("float64")
    return outcomes.astype(dict.fromkeys(COUNT_COLUMNS, "int64")).sort_values(CELL_ORDER, ignore_index=True)


def write_outcomes(outcomes: pd.DataFrame, path: Path) -> None:
    """Outcomes as CSV, in columns OUTCOME_COLUMNS."""
    outcomes.to_csv(path, columns=list(OUTCOME_COLUMNS), index=False, lineterminator="\n", float_format="%.6g")


def read_outcomes(path: Path, *, empty: bool = False) -> pd.DataFrame:
    """Outcomes from CSV, checked line by line.

    Args:
        empty: accept the header alone: the checkpoint was evaluated on other benchmarks.
    Raises: FileNotFoundError; ValueError naming the file, the line and what was wanted, if the file was cut, columns are
        missing, a value is no count, counts contradict each other, or a prompt occurs twice in a cell.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted text in UTF-8 ({error})" + _REMEDY) from error
    lines = text.splitlines()
    header = ",".join(OUTCOME_COLUMNS)
    if not lines or lines[0] != header:
        missing = [name for name in OUTCOME_COLUMNS if name not in (lines[0].split(",") if lines else [])]
        raise ValueError(f"{path} line 1: wanted the header {header}, "
                         + (f"which lacks {', '.join(missing)}" if missing else f"got {lines[0]}") + _REMEDY)
    if not text.endswith("\n"):
        raise ValueError(f"{path} line {len(lines)}: the file ends inside a line, wanted a line end after "
                         f"{len(OUTCOME_COLUMNS)} fields" + _REMEDY)
    if len(lines) == 1 and not empty:
        raise ValueError(f"{path} line 2: the file holds no outcome, wanted one line a prompt and cell" + _REMEDY)
    try:
        for number, fields in enumerate(csv.reader(io.StringIO(text)), start=1):
            if len(fields) != len(OUTCOME_COLUMNS):
                raise ValueError(f"{path} line {number}: wanted {len(OUTCOME_COLUMNS)} fields ({header}), got {len(fields)}"
                                 + _REMEDY)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}" + _REMEDY) from error
    frame = pd.read_csv(io.StringIO(text), dtype="str", keep_default_na=False)
    for name in COUNT_COLUMNS:
        _refuse(path, frame, ~frame[name].str.fullmatch(r"[0-9]{1,15}"), f"wanted a count in {name}", name)
    numbers = pd.to_numeric(frame["graded_sum"], errors="coerce")
    _refuse(path, frame, ~numbers.map(math.isfinite), "wanted a number in graded_sum", "graded_sum")
    for name, choices in (("needs_reasoning", ("True", "False")), ("cfg", CFG), ("thinking", THINKING)):
        _refuse(path, frame, ~frame[name].isin(choices), f"wanted {name} in {', '.join(choices)}", name)
    outcomes = frame.astype(dict.fromkeys(COUNT_COLUMNS, "int64")).assign(
        graded_sum=numbers, needs_reasoning=frame["needs_reasoning"] == "True")
    _refuse(path, frame, outcomes["images"] < 1, "wanted at least one image", "images")
    for name in ("exact", "geneval", "plan_right"):
        _refuse(path, frame, outcomes[name] > outcomes["images"], f"wanted at most as many {name} as images", name)
    both = outcomes["exact_and_plan_right"]
    _refuse(path, frame, (both > outcomes["exact"]) | (both > outcomes["plan_right"]),
            "wanted exact_and_plan_right at most exact and plan_right", "exact_and_plan_right")
    _refuse(path, frame, frame.duplicated(CELL_ORDER), "wanted each prompt once a cell, this one came before", "prompt_id")
    return outcomes[list(OUTCOME_COLUMNS)]


# ------------------------------------------------------------------------------------------------------------ metrics

def cell(outcomes: pd.DataFrame, cfg: str = HEADLINE[0], thinking: str = HEADLINE[1]) -> pd.DataFrame:
    """The outcomes of one cell, by prompt id.

    Raises: ValueError listing the cells there are, if this one is not among them.
    """
    rows = outcomes[(outcomes["cfg"] == cfg) & (outcomes["thinking"] == thinking)]
    if rows.empty:
        there = sorted(f"cfg_{cfg}-thinking_{thinking}" for cfg, thinking in set(zip(outcomes["cfg"], outcomes["thinking"],
                                                                                     strict=True)))
        raise ValueError(f"no outcomes in the cell cfg_{cfg}-thinking_{thinking}; there are {', '.join(there) or 'none'}")
    return rows.sort_values("prompt_id", ignore_index=True)


def measure(rows: pd.DataFrame, name: str) -> Measure:
    """A measure of one cell's outcomes (or of a selection of them), ready for an interval or a paired difference.

    Args:
        rows: outcomes of one cell, as `cell` returns them.
        name: a key of MEASURES. `geneval` is the official mean over tags, the others pool the prompts.
    Raises: ValueError listing the measures, if there is none of this name.
    """
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}; choose from {', '.join(MEASURES)}")
    numerator, denominator = MEASURES[name]
    return Measure(rows[numerator].to_numpy(), rows[denominator].to_numpy(),
                   strata=rows["tag"].to_numpy() if name == "geneval" else None, prompts=rows["prompt_id"].to_numpy())


def compute_metrics(outcomes: pd.DataFrame, benchmark: str = "shapes") -> dict[str, float]:
    """The flat metrics of a checkpoint.

    Args:
        outcomes: of all cells; the headline cell must be there.
    Returns: `bench/<benchmark>/<measure>` of the headline cell; its exact accuracy per tag (`exact/<tag>`), of reasoning and
        plain prompts (`exact/reasoning`, `exact/plain`) and per kind of reasoning (`reasoning/<kind>`); and per cell
        `cfg_<..>-thinking_<..>/{exact,geneval,thinking_accuracy}`. Sorted, 6 significant digits. A value with nothing to
        divide by is left out, as is the thinking accuracy of cells without thinking.
    """
    head = cell(outcomes)
    found = {name: value_of(measure(head, name)) for name in MEASURES}
    found |= {f"exact/{tag}": value_of(measure(rows, "exact")) for tag, rows in head.groupby("tag")}
    found |= {f"reasoning/{kind}": value_of(measure(rows, "exact")) for kind, rows in head.groupby("reasoning") if kind}
    for name, needs in (("reasoning", True), ("plain", False)):
        found[f"exact/{name}"] = value_of(measure(head[head["needs_reasoning"] == needs], "exact"))
    for (cfg, thinking), rows in outcomes.groupby(["cfg", "thinking"]):
        names = ("exact", "geneval") if thinking == "off" else ("exact", "geneval", "thinking_accuracy")
        found |= {f"cfg_{cfg}-thinking_{thinking}/{name}": value_of(measure(rows, name)) for name in names}
    return {f"bench/{benchmark}/{name}": significant(value) for name, value in sorted(found.items()) if not math.isnan(value)}


def write_metrics(metrics: dict[str, float], path: Path) -> None:
    """Metrics as sorted JSON, one a line.

    Raises: ValueError if a value is not finite: JSON has no such number.
    """
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise ValueError(f"metrics must be finite, but {', '.join(bad)} of {path} are not")
    path.write_text(json.dumps(dict(sorted(metrics.items())), indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- checks

_REMEDY = "; restore the file with `git checkout`, or evaluate again"


def _refuse(path: Path, frame: pd.DataFrame, wrong: pd.Series, wanted: str, column: str) -> None:
    """Raise for the first wrong row, naming its line."""
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ValueError(f"{path} line {row + 2}: {wanted}, got {frame[column].iloc[row]!r}" + _REMEDY)


def _with_types(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The verdict columns in their order and types."""
    if missing := [name for name in VERDICT_COLUMNS if name not in frame.columns]:
        raise ValueError(f"{where}: the columns {', '.join(missing)} are missing; wanted {', '.join(VERDICT_COLUMNS)}")
    for name, choices in (("cfg", CFG), ("thinking", THINKING)):
        if not (known := frame[name].isin(choices)).all():
            raise ValueError(f"{where}: wanted {name} in {', '.join(choices)}, got {frame[name][~known].iloc[0]!r}")
    try:
        finite, typed = frame["graded"].map(math.isfinite), frame[list(VERDICT_COLUMNS)].astype(VERDICT_COLUMNS)
    except Exception as error:
        raise ValueError(f"{where}: the columns must have the types {VERDICT_COLUMNS} ({error})") from error
    if not finite.all():
        raise ValueError(f"{where}: wanted finite graded scores, got {frame['graded'][~finite].iloc[0]}")
    return typed


def _named(frame: pd.DataFrame, chosen: pd.Series, columns: list[str]) -> str:
    """The first chosen row's values of some columns."""
    row = frame[chosen].iloc[0]
    return ", ".join(f"{name} {row[name]}" for name in columns)
