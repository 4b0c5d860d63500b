"""benchmarks.csv: values by hand, files that come back, damage that is refused; and a report made of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_inputs import write_artifacts

from unigrpo.evaluation.benchmark_table import HEADER, make_table, read_table, score_names, table_metrics, write_table
from unigrpo.evaluation.controls import COLUMNS
from unigrpo.evaluation.outcomes import OUTCOME_COLUMNS, write_metrics
from unigrpo.report.table import terminal_table
from unigrpo.stages.report import run

CELLS = (("off", "on"), ("on", "on"))


def row(category: str, prompt: str, score_sum: float, *, benchmark: str = "geneval", score: str = "geneval_toy",
        cfg: str = "off", images: int = 4) -> dict[str, Any]:
    return {"benchmark": benchmark, "score": score, "category": category, "prompt_id": prompt, "cfg": cfg, "thinking": "on",
            "images": images, "score_sum": score_sum}


def example(skill: int = 2) -> pd.DataFrame:
    """Two tasks of two and one prompts, a category of T2I-CompBench, both cells; `skill` right images for the first prompt."""
    rows = []
    for cfg, _ in CELLS:
        rows += [row("colors", "a", skill, cfg=cfg), row("colors", "b", 3, cfg=cfg), row("counting", "c", 1, cfg=cfg)]
        rows += [row("color", prompt, total, benchmark="t2i_compbench", score="t2i_compbench_color_toy_partial", cfg=cfg,
                     images=10) for prompt, total in (("d", 1.2345678), ("e", 2.5))]
    return make_table(rows)


def test_values_by_hand() -> None:
    """colors 5 of 8, counting 1 of 4: overall (0.625 + 0.25) / 2, the official mean over tasks and not 6 of 12."""
    metrics = table_metrics(example())
    assert metrics["bench/geneval/overall"] == 0.4375
    assert metrics["bench/geneval/colors"] == 0.625
    assert metrics["bench/geneval/cfg_on-thinking_on/counting"] == 0.25
    assert metrics["bench/t2i_compbench_partial/color"] == pytest.approx((1.23457 + 2.5) / 20, rel=1e-5)
    assert not [metric for metric in metrics if metric.startswith("bench/t2i_compbench/")]  # a part is no score of it
    assert list(metrics) == sorted(metrics)
    assert score_names(example())["bench/geneval/colors"] == "geneval_toy"
    assert table_metrics(make_table()) == {}


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for table in (example(), make_table()):
        write_table(table, tmp_path / "benchmarks.csv")
        pd.testing.assert_frame_equal(read_table(tmp_path / "benchmarks.csv"), table, check_dtype=len(table) > 0)
    assert (tmp_path / "benchmarks.csv").read_text() == HEADER + "\n"
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.csv")


@pytest.mark.parametrize(("change", "wanted"), [
    (lambda text: "", r"line 1: wanted the header benchmark,score,.* got 'nothing'"),
    (lambda text: text.replace("score_sum", "sum"), r"line 1: wanted the header"),
    (lambda text: text[:-1], r"line 11: the file ends inside a line"),
    (lambda text: text.replace("geneval_toy,", "", 1), r"line 2: wanted 8 fields .* got 7"),
    (lambda text: text.replace(",4,2\n", ",four,2\n", 1), r"wanted at least one image, got 'four'"),
    (lambda text: text.replace(",4,2\n", ",0,2\n", 1), r"wanted at least one image, got '0'"),
    (lambda text: text.replace(",4,2\n", ",4,nan\n", 1), r"wanted a number in score_sum, got 'nan'"),
    (lambda text: text.replace(",4,2\n", ",4,5\n", 1), r"at most 1, got '5'"),
    (lambda text: text.replace(",4,2\n", ",4,-1\n", 1), r"at most 1, got '-1'"),
    (lambda text: text.replace("geneval,geneval", "genevil,geneval", 1), r"line 2: wanted benchmark in geneval, t2i_compbench"),
    (lambda text: text.replace("off,on", "half,on", 1), r"line 2: wanted cfg in off, on, got 'half'"),
    (lambda text: text + text.splitlines()[1] + "\n", r"line 12: wanted each prompt once a cell"),
    (lambda text: text.replace("geneval_toy", "geneval_other", 1), r"geneval has scores of several names, geneval_other and"),
    (lambda text: "".join(line for line in text.splitlines(keepends=True) if ",b,on" not in line),
     r"geneval has other prompts in the cell cfg_on-thinking_on"),
    (lambda text: "".join(line for line in text.splitlines(keepends=True) if ",off," not in line),
     r"lacks the headline cell cfg_off-thinking_on"),
])
def test_damage_is_refused_with_its_place(tmp_path: Path, change: Any, wanted: str) -> None:
    path = tmp_path / "benchmarks.csv"
    write_table(example(), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"benchmarks\.csv.*{wanted}.*evaluate again"):
        read_table(path)


# -- reports ----------------------------------------------------------------------------------------------------------


def put(root: Path, tables: dict[str, pd.DataFrame], *, shapes: bool) -> dict[str, Any]:
    """Write a report of these tables, with or without the shapes world beside them."""
    write_artifacts(root, shown=2, steps=3)
    for name, table in tables.items():
        folder = root / "artifacts" / "smoke" / name
        write_table(table, folder / "benchmarks.csv")
        metrics = json.loads((folder / "metrics.json").read_text()) if shapes else {}
        write_metrics(metrics | table_metrics(table), folder / "metrics.json")
        if not shapes:
            (folder / "outcomes.csv").write_text(",".join(OUTCOME_COLUMNS) + "\n")
            (folder / "understanding.csv").write_text(",".join(COLUMNS) + "\n")
            (folder / "samples" / "samples.json").write_text("[]\n")
    run("smoke", root=root)
    return json.loads((root / "artifacts" / "smoke" / "report" / "report.json").read_text())


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records stay in the journal: nothing here needs a database."""
    monkeypatch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)


def test_a_report_of_these_benchmarks_alone(tmp_path: Path) -> None:
    """Values and a paired interval by hand, honest names, the mark of a part, and no row of the shapes world."""
    report = put(tmp_path, {"base": example(0), "sft": example(2), "unigrpo/0": example(4)}, shapes=False)
    assert report["headline"]["metric"] == report["measured"]["headline_metric"] == "bench/geneval/overall"
    assert report["headline"]["sentence"].startswith(
        "On 3 prompts with 4 images each, UniGRPO does not reliably change geneval_toy: 43.8 % after the warm-up, 56.2 % after "
        "training, +12.5 points (95 % interval")
    entry = report["differences"]["unigrpo-sft"]["bench/geneval/overall"]
    assert entry["value"] == 0.125
    assert 0 == entry["low"] <= entry["value"] <= entry["high"] == 0.25  # both of colors are the first prompt, or neither is
    assert report["scores"]["bench/t2i_compbench_partial/color"] == "t2i_compbench_color_toy_partial (partial)"
    assert report["scores"]["bench/geneval/cfg_on-thinking_on/colors"] == "geneval_toy, colors, guidance on, thinking on"
    assert report["measured"]["benchmarks"] == [
        "geneval_toy: 3 prompts, 12 images",
        "t2i_compbench_color_toy_partial: 2 prompts, 20 images; a partial set is no score of the benchmark"]
    assert not [metric for arm in report["arms"].values() for metric in arm if "shapes" in metric]
    table = terminal_table(report)
    assert "t2i_compbench_color_toy_partial (partial)" in table
    assert "43.8 [" in table
    page = (tmp_path / "artifacts" / "smoke" / "report" / "report.html").read_text()
    assert page.count("(partial)") >= 2
    assert "exact accuracy" not in page


def test_a_report_of_both(tmp_path: Path) -> None:
    """The shapes world keeps the headline; the other rows stand beside it, and the value's own table is the file."""
    table = example()
    report = put(tmp_path, dict.fromkeys(("base", "sft", "unigrpo/0"), table), shapes=True)
    assert report["headline"]["metric"] == "bench/shapes/exact"
    for metric, value in table_metrics(table).items():
        assert report["arms"]["sft"][metric]["value"] == value
    page = (tmp_path / "artifacts" / "smoke" / "report" / "report.html").read_text()
    assert "exact accuracy" in page
    assert "geneval_toy, colors" in page


def test_checkpoints_that_were_scored_differently_are_not_compared(tmp_path: Path) -> None:
    other = example().replace({"score": {"geneval_toy": "geneval_other"}})
    with pytest.raises(ValueError, match=r"base and sft were not evaluated alike: bench/geneval/overall is geneval_toy there "
                                         r"and geneval_other here"):
        put(tmp_path, {"base": example(), "sft": other, "unigrpo/0": example()}, shapes=False)


def test_checkpoints_that_were_evaluated_on_other_benchmarks_are_not_compared(tmp_path: Path) -> None:
    part = example().replace({"score": {"geneval_toy": "geneval_toy_partial"}})
    with pytest.raises(ValueError, match=r"base and unigrpo/0 were not evaluated alike: unigrpo/0 has no bench/geneval/o"):
        put(tmp_path, {"base": example(), "sft": example(), "unigrpo/0": part}, shapes=False)


def test_metrics_of_another_run_are_refused(tmp_path: Path) -> None:
    write_artifacts(tmp_path, shown=2, steps=3)
    write_table(example(), tmp_path / "artifacts" / "smoke" / "sft" / "benchmarks.csv")
    with pytest.raises(ValueError, match=r"sft/metrics\.json: bench/geneval/\S+ is None, but benchmarks\.csv beside it gives"):
        run("smoke", root=tmp_path)
