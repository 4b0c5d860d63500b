"""The report: values and intervals by hand, escaping, equal bytes, and errors that name file and stage."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from report_inputs import write_artifacts
from scipy.stats import t as student

from unigrpo.evaluation.outcomes import compute_metrics, read_outcomes, write_metrics, write_outcomes
from unigrpo.evaluation.statistics import value_of
from unigrpo.report.blocks import fill
from unigrpo.report.data import named_measures
from unigrpo.report.figures import results_figure
from unigrpo.report.markup import json_tables
from unigrpo.report.resampling import across
from unigrpo.report.table import BEGIN, END, readme_block, results_table, terminal_table
from unigrpo.stages.report import run

PROJECT = Path(__file__).resolve().parent.parent
EXACT = "bench/shapes/exact"


WORDS = '<script>alert("x")</script> & "two" <b>circles</b>'


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records stay in the journal: nothing here needs a database."""
    monkeypatch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose main report has been written; tests read it only."""
    root = tmp_path_factory.mktemp("project")
    write_artifacts(root, words=WORDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)
        run("smoke", root=root)
    return root


def report_of(root: Path, which: str = "report") -> dict:
    return json.loads((root / "artifacts" / "smoke" / which / "report.json").read_text(encoding="utf-8"))


def test_values_are_those_of_the_outcomes(project: Path) -> None:
    report = report_of(project)
    for name, folder in (("base", "base"), ("sft", "sft"), ("unigrpo", "unigrpo/0")):
        rows = pd.read_csv(project / "artifacts" / "smoke" / folder / "outcomes.csv")
        head = rows[(rows["cfg"] == "off") & (rows["thinking"] == "on")]
        found = report["arms"][name]
        assert found[EXACT]["value"] == pytest.approx(head["exact"].sum() / head["images"].sum(), rel=1e-5)
        assert found[EXACT]["low"] < found[EXACT]["value"] < found[EXACT]["high"]
        by_tag = head.groupby("tag")[["geneval", "images"]].sum()
        assert found["bench/shapes/geneval"]["value"] == pytest.approx((by_tag["geneval"] / by_tag["images"]).mean(), rel=1e-5)
        # The headline cell is in the report twice, under two names, and must say the same.
        assert found["bench/shapes/cfg_off-thinking_on/exact"] == found[EXACT]
    gain = report["differences"]["unigrpo-sft"][EXACT]
    before, after = (report["arms"][name][EXACT]["value"] for name in ("sft", "unigrpo"))
    assert gain["value"] == pytest.approx(after - before, abs=1e-5)
    assert gain["over"] == "prompts"
    assert gain["seeds"] == {"0": {key: gain[key] for key in ("value", "low", "high")}}
    assert report["arms"]["sft"][EXACT]["seeds"] == {}
    controls = report["controls"]["unigrpo"]
    assert controls["thinking on - shuffled"]["low"] > 0
    assert {"thinking on - truncated", "thinking on - off/reasoning", "thinking on - off/counting"} <= set(controls)
    assert report["cost"]["sft"]["flops"] == 3.2e13
    assert set(report["inputs"]) >= {f"artifacts/smoke/{name}" for name in ("unigrpo/0/outcomes.csv", "prompts", "curate.json")}


def test_understanding_and_sentinel_are_in_the_report(project: Path) -> None:
    report = report_of(project)
    lost = report["understanding"]["unigrpo-sft"]
    assert lost["text_loss"]["high"] < 0
    assert "plan_accuracy/plain" in lost
    found = report["sentinel"]["unigrpo/0"]
    assert (found["probes"], found["alarms"]) == (7, {"gold/thinking": 40})
    edges = found["evaluation"]["edge_density"]
    assert edges["past"]
    assert (edges["before"], edges["after"]) == (0.14, pytest.approx(0.21))
    assert not found["evaluation"]["brightness"]["past"]
    assert set(report["sentinel"]) == {"unigrpo/0"}
    page = (project / "artifacts" / "smoke" / "report" / "report.html").read_text(encoding="utf-8")
    assert "unigrpo/0: 7 probes, ALARM: gold/thinking at step 40." in page
    assert 'class="gain wrong">+0.07' in page
    section = page[page.index('<section id="understanding">'):]
    assert "unigrpo − sft: text loss, nats a token" in section[:section.index("</section>")]


def test_paired_interval_by_hand(tmp_path: Path) -> None:
    """Every prompt gains exactly one image of four, so every resample gains .25: the paired interval has no width."""
    write_artifacts(tmp_path, shown=2, steps=3)
    folders = [tmp_path / "artifacts" / "smoke" / name for name in ("sft", "unigrpo/0")]
    before = read_outcomes(folders[0] / "outcomes.csv")
    before["exact"] = before["exact"].clip(upper=3)
    before["exact_and_plan_right"] = before[["exact", "plan_right"]].min(axis=1)
    for folder, outcomes in zip(folders, (before, before.assign(exact=before["exact"] + 1)), strict=True):
        write_outcomes(outcomes, folder / "outcomes.csv")
        write_metrics(compute_metrics(outcomes), folder / "metrics.json")
    numbers = run("smoke", root=tmp_path)
    report = report_of(tmp_path)
    gain = report["differences"]["unigrpo-sft"][EXACT]
    assert (gain["value"], gain["low"], gain["high"]) == pytest.approx((0.25, 0.25, 0.25))
    assert numbers[f"{EXACT}/unigrpo-sft"] == gain["value"]
    assert "raises exact accuracy" in report["headline"]["sentence"]
    assert "+25.0 points (95 % interval +25.0 to +25.0)" in report["headline"]["sentence"]
    sft = report["arms"]["sft"][EXACT]
    assert sft["high"] - sft["low"] > 0.01


def test_seeds_by_hand() -> None:
    singles = {seed: {"value": value, "low": value - 0.1, "high": value + 0.1}
               for seed, value in (("0", 0.1), ("1", 0.2), ("2", 0.3))}
    entry = across(singles)
    half = student.ppf(0.975, 2) * 0.1 / 3**0.5                      # the sample standard deviation of .1, .2, .3 is .1
    assert (entry["value"], entry["low"], entry["high"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-5)
    assert entry["over"] == "seeds"
    assert entry["seeds"] == singles


def test_measures_are_the_metrics(project: Path) -> None:
    """The report's measures and the metrics of evaluate are two lists of the same things."""
    folder = project / "artifacts" / "smoke" / "sft"
    metrics = json.loads((folder / "metrics.json").read_text())
    measures = named_measures(read_outcomes(folder / "outcomes.csv"))
    assert {name: float(f"{value_of(found):.6g}") for name, found in measures.items()} == {
        name: value for name, value in metrics.items() if name.startswith("bench/")}


def test_experiments_pair_seeds(tmp_path: Path) -> None:
    write_artifacts(tmp_path, checkpoints=("base", "sft", "unigrpo/0", "unigrpo/1", "image_only/0", "image_only/1"),
                    shown=2, steps=3)
    run("smoke", which="experiments", root=tmp_path)
    report = report_of(tmp_path, "experiments")
    assert set(report["arms"]) == {"base", "sft", "unigrpo", "image_only"}
    entry = report["differences"]["unigrpo-image_only"][EXACT]
    singles = [report["arms"]["unigrpo"][EXACT]["seeds"][s]["value"] - report["arms"]["image_only"][EXACT]["seeds"][s]["value"]
               for s in ("0", "1")]
    assert entry["over"] == "seeds"
    assert [entry["seeds"][s]["value"] for s in ("0", "1")] == pytest.approx(singles, abs=2e-6)
    assert entry["value"] == pytest.approx(sum(singles) / 2, abs=2e-6)
    assert "over 2 seeds" in report["headline"]["sentence"]


class Checker(HTMLParser):
    """Collects what a page fetches, runs, or leaves open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_escaped_and_stands_alone(project: Path) -> None:
    page = (project / "artifacts" / "smoke" / "report" / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not checker.tags & {"script", "link", "iframe", "b"}
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in checker.sources)
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp;" in page
    anchors = {source[1:] for source in checker.sources if source.startswith("#")}
    assert anchors == set(re.findall(r'<section id="([^"]+)"', page))
    for expected in ("Before and after", "Leakage between splits", "guidance off, thinking sampled (headline)", "67.5 %",
                     "39.0 %"):
        assert expected in page
    assert str(project) not in page


def test_two_runs_are_equal_bytes(project: Path, tmp_path: Path) -> None:
    write_artifacts(tmp_path, words=WORDS)
    run("smoke", root=tmp_path)
    for name in ("report.html", "report.json"):
        first, second = (root / "artifacts" / "smoke" / "report" / name for root in (project, tmp_path))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("file", "stage"), [
    ("curate.json", "curate"), ("prompts/leakage.json", "curate"), ("base/curves.csv", "base"), ("sft/training.json", "sft"),
    ("unigrpo/0/training.json", "train"), ("unigrpo/0/outcomes.csv", "evaluate"),
    ("sft/understanding.csv", "evaluate"), ("sft/samples/samples.json", "evaluate"),
    ("sft/samples/0000000000000001-cfg_off-thinking_on.png", "evaluate")])
def test_missing_input_is_named_with_its_stage(tmp_path: Path, file: str, stage: str) -> None:
    write_artifacts(tmp_path, shown=2, steps=3)
    (tmp_path / "artifacts" / "smoke" / file).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(file)} is missing: the {stage} stage makes it"):
        run("smoke", root=tmp_path)


def test_damaged_inputs_are_refused(tmp_path: Path) -> None:
    write_artifacts(tmp_path, shown=2, steps=3)
    folder = tmp_path / "artifacts" / "smoke"
    good = (folder / "sft" / "metrics.json").read_text()
    metrics = json.loads(good)
    write_metrics(metrics | {EXACT: 0.999}, folder / "sft" / "metrics.json")
    with pytest.raises(ValueError, match=r"sft/metrics.json: bench/shapes/exact is 0.999, but outcomes.csv"):
        run("smoke", root=tmp_path)
    (folder / "sft" / "metrics.json").write_text(good)
    (folder / "sft" / "training.json").write_text('{"cost/')
    with pytest.raises(ValueError, match=r"sft/training.json is no whole JSON file .*; run the sft stage again"):
        run("smoke", root=tmp_path)
    (folder / "sft" / "training.json").write_text("{}")
    outcomes = read_outcomes(folder / "sft" / "outcomes.csv").replace({"prompt_id": {f"{0:016x}": "f" * 16}})
    write_outcomes(outcomes, folder / "sft" / "outcomes.csv")
    with pytest.raises(ValueError, match="unigrpo/0 and sft were not evaluated alike"):
        run("smoke", root=tmp_path)
    with pytest.raises(ValueError, match="main or experiments, got 'all'"):
        run("smoke", which="all", root=tmp_path)


def test_terminal_table_and_readme(project: Path) -> None:
    report = report_of(project)
    table = terminal_table(report)
    assert table == results_table(project / "artifacts" / "smoke" / "report" / "report.json")
    assert f"{100 * report['arms']['unigrpo'][EXACT]['value']:.1f} [" in table
    assert len({len(line) for line in table.splitlines()[2:5]}) == 1
    readme = f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n"
    new = fill(readme, {"main": report}, "README.md")
    assert new.startswith(f"# Title\n\n{BEGIN}\n")
    assert new.endswith(f"{END}\n\nrest\n")
    assert "old" not in new
    assert fill(new, {"main": report}, "README.md") == new
    with pytest.raises(ValueError, match=r"README.md must hold one line"):
        fill(f"# Title\n\n{BEGIN}\n", {"main": report}, "README.md")
    with pytest.raises(ValueError, match=r"README.md has a block of results 'other'; choose from main"):
        fill("<!-- results other: begin (", {"main": report}, "README.md")
    with pytest.raises(ValueError, match=r"results of the report main, which is missing"):
        fill(readme, {}, "README.md")
    assert results_figure(report)[:4] == b"\x89PNG"


def test_json_tables_escape_and_nest() -> None:
    markup = json_tables({"a<b": 1, "splits": {"x": {"n": 3}, "y": {"n": 40_000}}, "list": ["<i>"], "none": [],
                          "deep": {"k": [{"q": 1.5}]}})
    assert "a&lt;b" in markup
    assert "&lt;i&gt;" in markup
    assert "40\u00a0000" in markup
    assert "<h3>Splits</h3>" in markup
    assert "1.5" in markup


def test_readme_agrees_with_the_report() -> None:
    """The README's numbers are those of the committed report, where the pipeline has run."""
    path = PROJECT / "artifacts" / "tiny" / "report" / "report.json"
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    if path.is_file():
        assert readme_block(json.loads(path.read_text(encoding="utf-8"))) in readme, "run `unigrpo report --readme`"
