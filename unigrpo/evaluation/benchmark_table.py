"""benchmarks.csv: GenEval and T2I-CompBench of one checkpoint, one row a prompt and cell; metrics and measures from it.

Every published value and interval of these benchmarks derives from the table. `score` is the name that the number may be
called by: it tells the detector and whatever differs from the official protocol, and a partial set's metrics are apart.
Nothing here imports a scorer, so that a checkpoint that is evaluated without one depends on none.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from unigrpo.evaluation.outcomes import CFG, HEADLINE, THINKING, significant
from unigrpo.evaluation.statistics import Measure, value_of

GENEVAL, T2I = "geneval", "t2i_compbench"
COLUMNS = ("benchmark", "score", "category", "prompt_id", "cfg", "thinking", "images", "score_sum")
KEY = ["benchmark", "cfg", "thinking", "category", "prompt_id"]
HEADER = ",".join(COLUMNS)
OVERALL = "overall"
_REMEDY = "; restore the file with `git checkout`, or evaluate again"


def make_table(rows: Sequence[dict[str, Any]] = ()) -> pd.DataFrame:
    """Rows with the columns COLUMNS as a table, sorted; sums of scores rounded to 6 significant digits."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS)).astype({"images": "int64", "score_sum": "float64"})
    frame["score_sum"] = frame["score_sum"].map(significant).astype("float64")
    return frame.sort_values(KEY, ignore_index=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """The table as CSV; the header alone where no such benchmark was drawn."""
    table.to_csv(path, columns=list(COLUMNS), index=False, lineterminator="\n", float_format="%.6g")


def read_table(path: Path) -> pd.DataFrame:
    """A table from CSV, checked line by line; without rows where the checkpoint was evaluated on other benchmarks.

    Raises: FileNotFoundError; ValueError naming the file, the line and what was wanted, if the file was cut, columns are
        missing, a value is of another kind, a prompt occurs twice in a cell, cells differ in their prompts, or one part of a
        benchmark has scores of several names.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if not lines or lines[0] != HEADER:
        raise ValueError(f"{path} line 1: wanted the header {HEADER}, got {lines[0] if lines else 'nothing'!r}" + _REMEDY)
    if not text.endswith("\n"):
        raise ValueError(f"{path} line {len(lines)}: the file ends inside a line, wanted a line end after {len(COLUMNS)} fields"
                         + _REMEDY)
    for number, fields in enumerate(csv.reader(io.StringIO(text)), start=1):
        if len(fields) != len(COLUMNS):
            raise ValueError(f"{path} line {number}: wanted {len(COLUMNS)} fields ({HEADER}), got {len(fields)}" + _REMEDY)
    frame = pd.read_csv(io.StringIO(text), dtype="str", keep_default_na=False)
    _refuse(path, frame, ~frame["images"].str.fullmatch(r"[1-9]\d*"), "wanted at least one image", "images")
    sums = pd.to_numeric(frame["score_sum"], errors="coerce")
    _refuse(path, frame, ~sums.map(math.isfinite).astype("bool"), "wanted a number in score_sum", "score_sum")
    for name, choices in (("benchmark", (GENEVAL, T2I)), ("cfg", CFG), ("thinking", THINKING)):
        _refuse(path, frame, ~frame[name].isin(choices), f"wanted {name} in {', '.join(choices)}", name)
    table = frame.assign(images=frame["images"].astype("int64"), score_sum=sums.astype("float64"))
    room = table["images"] * (1 + 1e-5)
    _refuse(path, frame, (table["score_sum"].abs() > room) | ((table["benchmark"] == GENEVAL) & (table["score_sum"] < 0)),
            "wanted a score an image of at most 1", "score_sum")
    _refuse(path, frame, frame.duplicated(KEY), "wanted each prompt once a cell, this one came before", "prompt_id")
    _check_parts(path, table)
    return table[list(COLUMNS)]


def is_partial(score: str) -> bool:
    """Whether a score's name says that its set was not complete."""
    return "partial" in score.split("_")


def parts(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(metric, rows) of everything that has a value, the headline cell under the benchmark's own names first.

    `bench/geneval/{overall,<task>}` and `bench/t2i_compbench/<category>`, the same for every cell as
    `bench/<benchmark>/cfg_<..>-thinking_<..>/<name>`; `bench/<benchmark>_partial/...` where the set was not complete, which is
    no score of the benchmark.
    """
    cells = sorted(set(zip(table["cfg"], table["thinking"], strict=True)))
    for cell, place in [(HEADLINE, ""), *((cell, "cfg_{}-thinking_{}/".format(*cell)) for cell in cells)]:
        rows = table[(table["cfg"] == cell[0]) & (table["thinking"] == cell[1])]
        for (benchmark, partial), found in rows.groupby(["benchmark", rows["score"].map(is_partial)]):
            prefix = f"bench/{benchmark}{'_partial' if partial else ''}/{place}"
            if benchmark == GENEVAL:
                yield prefix + OVERALL, found
            for category, members in found.groupby("category"):
                yield f"{prefix}{category}", members


def measures(table: pd.DataFrame) -> dict[str, Measure]:
    """Metric -> measure, ready for an interval or a paired difference; GenEval's overall is the official mean over tasks."""
    return {metric: Measure(rows["score_sum"].to_numpy(), rows["images"].to_numpy(), prompts=rows["prompt_id"].to_numpy(),
                            strata=rows["category"].to_numpy() if metric.endswith(f"/{OVERALL}") else None)
            for metric, rows in parts(table)}


def table_metrics(table: pd.DataFrame) -> dict[str, float]:
    """Metric -> value, sorted, 6 significant digits."""
    return {metric: significant(value_of(found)) for metric, found in sorted(measures(table).items())}


def score_names(table: pd.DataFrame) -> dict[str, str]:
    """Metric -> the name that its score may be called by."""
    return {metric: str(rows["score"].iloc[0]) for metric, rows in parts(table)}


def _refuse(path: Path, frame: pd.DataFrame, wrong: pd.Series, wanted: str, column: str) -> None:
    """Raise for the first wrong row, naming its line."""
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ValueError(f"{path} line {row + 2}: {wanted}, got {frame[column].iloc[row]!r}" + _REMEDY)


def _check_parts(path: Path, table: pd.DataFrame) -> None:
    """One name a score, and the same prompts in every cell, the headline cell among them."""
    for benchmark, found in table.groupby("benchmark"):
        groups = [("", found)] if benchmark == GENEVAL else list(found.groupby("category"))
        for category, rows in groups:
            if len(names := sorted(set(rows["score"]))) > 1:
                raise ValueError(f"{path}: {benchmark} {category}".rstrip() + f" has scores of several names, "
                                 f"{' and '.join(names)}; wanted one" + _REMEDY)
        sets = {cell: set(zip(rows["category"], rows["prompt_id"], strict=True))
                for cell, rows in found.groupby(["cfg", "thinking"])}
        if HEADLINE not in sets:
            raise ValueError(f"{path}: {benchmark} lacks the headline cell cfg_{HEADLINE[0]}-thinking_{HEADLINE[1]}" + _REMEDY)
        for cell, there in sets.items():
            if there != sets[HEADLINE]:
                raise ValueError(f"{path}: {benchmark} has other prompts in the cell cfg_{cell[0]}-thinking_{cell[1]} than in "
                                 "the headline cell; wanted the same" + _REMEDY)
