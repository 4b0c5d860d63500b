"""Verdicts to outcomes to metrics: the sums by hand, stable bytes, and readers that refuse damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from unigrpo.evaluation.outcomes import (
    OUTCOME_COLUMNS,
    VERDICT_COLUMNS,
    cell,
    compute_metrics,
    count_outcomes,
    join_verdicts,
    measure,
    read_outcomes,
    read_verdicts,
    significant,
    write_metrics,
    write_outcomes,
    write_verdicts,
)
from unigrpo.evaluation.statistics import paired_difference
from unigrpo.seeding import generator

# prompt, tag, kind of reasoning, then per sample: exact, geneval, plan right, graded
IMAGES = [
    ("aa", "colors", "", [(1, 1, 1, 1.0), (0, 1, 1, 0.5)]),
    ("bb", "counting", "arithmetic", [(0, 0, 1, 0.25), (1, 1, 0, 1.0)]),
    ("cc", "counting", "opposites", [(0, 0, 0, 0.0), (0, 0, 0, 1 / 3)]),
]


def verdicts_of(cfg: str = "off", thinking: str = "on") -> pd.DataFrame:
    rows = [{"prompt_id": prompt, "tag": tag, "reasoning": kind, "needs_reasoning": bool(kind), "sample": sample, "cfg": cfg,
             "thinking": thinking, "thinking_text": "a red circle, \"top\" .", "image": "", "exact": bool(exact),
             "geneval": bool(geneval), "graded": graded, "plan_right": bool(plan), "reason": "a\nb", "detections": "[]"}
            for prompt, tag, kind, images in IMAGES for sample, (exact, geneval, plan, graded) in enumerate(images)]
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS))


@pytest.fixture
def outcomes() -> pd.DataFrame:
    return count_outcomes(join_verdicts([verdicts_of(), verdicts_of(thinking="off"), verdicts_of(thinking="shuffled")]))


def test_counts_by_hand(outcomes: pd.DataFrame) -> None:
    assert tuple(outcomes.columns) == OUTCOME_COLUMNS
    rows = cell(outcomes)
    assert rows["images"].tolist() == [2, 2, 2]
    assert rows["exact"].tolist() == [1, 1, 0]
    assert rows["geneval"].tolist() == [2, 1, 0]
    assert rows["plan_right"].tolist() == [2, 1, 0]
    assert rows["exact_and_plan_right"].tolist() == [1, 0, 0]
    assert rows["graded_sum"].tolist() == [1.5, 1.25, 0.333333]


def test_metrics_by_hand(outcomes: pd.DataFrame) -> None:
    metrics = compute_metrics(outcomes)
    assert list(metrics) == sorted(metrics)
    assert {name.removeprefix("bench/shapes/"): value for name, value in metrics.items() if "/cfg_" not in name} == {
        "exact": 0.333333,                          # 2 of 6
        "geneval": 0.625,                           # mean over tags of 2/2 and 1/4
        "graded": 0.513889,                         # (1.5 + 1.25 + 0.333333) / 6
        "thinking_accuracy": 0.5,                   # 3 of 6
        "image_given_plan": 0.333333,               # 1 of 3
        "exact/colors": 0.5, "exact/counting": 0.25, "exact/plain": 0.5, "exact/reasoning": 0.25,
        "reasoning/arithmetic": 0.5, "reasoning/opposites": 0.0,
    }
    cells = {name.removeprefix("bench/shapes/cfg_off-thinking_") for name in metrics if "/cfg_" in name}
    assert cells == {f"{thinking}/{name}" for thinking, names in
                     (("on", ("exact", "geneval", "thinking_accuracy")), ("off", ("exact", "geneval")),
                      ("shuffled", ("exact", "geneval", "thinking_accuracy"))) for name in names}


def test_undefined_metrics_are_left_out(tmp_path: Path) -> None:
    never = verdicts_of().assign(plan_right=False)
    metrics = compute_metrics(count_outcomes(never))
    assert metrics["bench/shapes/thinking_accuracy"] == 0
    assert "bench/shapes/image_given_plan" not in metrics
    with pytest.raises(ValueError, match="metrics must be finite, but a of"):
        write_metrics({"a": float("nan")}, tmp_path / "metrics.json")


def test_metrics_are_sorted_and_rounded(outcomes: pd.DataFrame, tmp_path: Path) -> None:
    write_metrics(dict(reversed(compute_metrics(outcomes).items())), tmp_path / "metrics.json")
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == compute_metrics(outcomes)
    assert list(stored) == sorted(stored)
    assert significant(123456.789) == 123457
    assert significant(1 / 3) == 0.333333


def test_bytes_do_not_depend_on_the_order_of_batches(tmp_path: Path) -> None:
    cells = [verdicts_of(), verdicts_of(thinking="off"), verdicts_of("on", "on")]
    for name, frames in (("a", cells), ("b", [frame.sample(frac=1, random_state=3) for frame in reversed(cells)])):
        verdicts = join_verdicts(frames)
        write_verdicts(verdicts, tmp_path / f"{name}.parquet")
        write_outcomes(count_outcomes(verdicts), tmp_path / f"{name}.csv")
    for suffix in ("parquet", "csv"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_files_come_back_as_they_were(outcomes: pd.DataFrame, tmp_path: Path) -> None:
    verdicts = join_verdicts([verdicts_of()])
    write_verdicts(verdicts, tmp_path / "verdicts.parquet")
    pd.testing.assert_frame_equal(read_verdicts(tmp_path / "verdicts.parquet"), verdicts)
    write_outcomes(outcomes, tmp_path / "outcomes.csv")
    pd.testing.assert_frame_equal(read_outcomes(tmp_path / "outcomes.csv"), outcomes)


def test_damaged_verdicts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.parquet"
    write_verdicts(verdicts_of(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"verdicts\.parquet is no whole Parquet file"):
        read_verdicts(path)
    verdicts_of().drop(columns=["reason", "exact"]).to_parquet(path)
    with pytest.raises(ValueError, match=r"verdicts\.parquet: the columns exact, reason are missing"):
        read_verdicts(path)
    with pytest.raises(ValueError, match="prompt_id aa, sample 0 occurs twice"):
        join_verdicts([verdicts_of(), verdicts_of()])
    with pytest.raises(ValueError, match=r"wanted thinking in on, off, shuffled, truncated, greedy, got 'loud'"):
        join_verdicts([verdicts_of(thinking="loud")])
    with pytest.raises(ValueError, match="wanted finite graded scores, got nan"):
        join_verdicts([verdicts_of().assign(graded=np.nan)])


# Line 2 is aa,colors,,False,off,off,2,1,2,2,1,1.5
@pytest.mark.parametrize(("old", "new", "message"), [
    ("geneval,", "", "line 1: .* which lacks geneval"),
    ("2,1,2,2,1,1.5", "2,1,2,2,1", "line 2: wanted 12 fields .* got 11"),
    ("2,1,2,2,1,1.5", "2,1,2,x,1,1.5", "line 2: wanted a count in plan_right, got 'x'"),
    ("2,1,2,2,1,1.5", "2,1,2,2,1,nan", "line 2: wanted a number in graded_sum"),
    ("2,1,2,2,1,1.5", "2,3,2,2,1,1.5", "line 2: wanted at most as many exact as images"),
    ("2,1,2,2,1,1.5", "2,1,2,2,2,1.5", "line 2: wanted exact_and_plan_right at most"),
    ("arithmetic,True,off,off", "arithmetic,yes,off,off", "line 3: wanted needs_reasoning in True, False, got 'yes'"),
    ("arithmetic,True,off,off", "arithmetic,True,off,of", "line 3: wanted thinking in on, off"),
    ("bb,counting", "aa,counting", "line 3: wanted each prompt once a cell"),
])
def test_damaged_outcomes_are_refused(outcomes: pd.DataFrame, tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "outcomes.csv"
    write_outcomes(outcomes, path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=r"outcomes\.csv " + message):
        read_outcomes(path)


def test_outcomes_cut_anywhere_inside_a_line_are_refused(outcomes: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "outcomes.csv"
    write_outcomes(outcomes, path)
    whole = path.read_text()
    for size in range(len(whole)):
        path.write_text(whole[:size])
        if not whole[:size].endswith("\n") or whole[:size].count("\n") == 1:
            with pytest.raises(ValueError, match=r"outcomes\.csv line \d+: "):
                read_outcomes(path)


def test_cells_and_checkpoints_are_paired_by_prompt(outcomes: pd.DataFrame) -> None:
    on, shuffled = (measure(cell(outcomes, thinking=thinking), "exact") for thinking in ("on", "shuffled"))
    assert paired_difference(on, shuffled, generator(0, "test"))["value"] == 0
    fewer = measure(cell(outcomes[outcomes["prompt_id"] != "bb"]), "exact")
    with pytest.raises(ValueError, match="same prompts on both sides, got 3 and 2"):
        paired_difference(on, fewer, generator(0, "test"))


def test_unknown_names_list_the_choices(outcomes: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"cfg_on-thinking_on; there are cfg_off-thinking_off, cfg_off-thinking_on, "):
        cell(outcomes, cfg="on")
    with pytest.raises(ValueError, match=r"unknown measure 'beauty'; choose from exact, geneval, "):
        measure(cell(outcomes), "beauty")
