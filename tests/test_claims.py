"""Claims, frontier and sweeps: verdicts by hand, intervals equal to the plain bootstrap, arms that are missing, the page."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from flow_scripts import ROOT
from report_inputs import write_artifacts
from scipy.stats import t as student

from unigrpo.config import load_config
from unigrpo.evaluation.outcomes import cell, compute_metrics, measure, read_outcomes, write_metrics, write_outcomes
from unigrpo.evaluation.statistics import Measure, mean_interval, paired_difference
from unigrpo.report.claims import (
    CLAIMS,
    NOT_RUN,
    OBSERVED,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    Comparison,
    sentinel_drift,
    together,
    trained_drift,
    verdict,
)
from unigrpo.report.reading import run_settings
from unigrpo.report.resampling import Statistics
from unigrpo.report.table import results_table
from unigrpo.seeding import generator
from unigrpo.stages.report import run

SHORT = {"train": {"num_steps": 1}}
POINTS = {
    "image_only": {}, "text_only": {},
    "latent_kl": {"objective": {"image": {"regularizer": "latent_kl", "regularizer_weight": 9.0}}},
    "short_point": SHORT, "noisy_point": {**SHORT, "rollout": {"noise_level": 1.5}},
    "early_point": {**SHORT, "rollout": {"window": {"kind": "contiguous"}}}, "lost_point": {**SHORT, "credit": {"std": "none"}},
    "strong_point": {**SHORT, "objective": {"image": {"regularizer_weight": 5.0}}},
    "hacked_point": {**SHORT, "reward": {"weights": {"shapes_tolerant": 1.0}}},
}
SEEDS = tuple(f"{name}/{seed}" for name in ("unigrpo", "image_only", "text_only", "latent_kl") for seed in range(3))
SINGLE = tuple(f"{name}/0" for name in POINTS if name.endswith("_point"))


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experiments of a small project, two of which failed or never ran; tests read it only."""
    root = tmp_path_factory.mktemp("project")
    write_artifacts(root, prompts=60, checkpoints=("base", "sft", *SEEDS, *SINGLE), shown=2, steps=30, points=POINTS)
    folder = root / "artifacts" / "smoke"
    shutil.rmtree(folder / "latent_kl" / "2")
    shutil.rmtree(folder / "lost_point" / "0")
    (folder / "lost_point" / "0").mkdir()
    (folder / "lost_point" / "0" / "failed.json").write_text('{"error": "three updates <were> not finite"}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)
        run("smoke", which="experiments", root=root)
    return root


@pytest.fixture(scope="module")
def report(project: Path) -> dict:
    return json.loads((project / "artifacts" / "smoke" / "experiments" / "report.json").read_text(encoding="utf-8"))


def outcomes(project: Path, name: str, **where: str):
    return cell(read_outcomes(project / "artifacts" / "smoke" / name / "outcomes.csv"), **where)


def claim(report: dict, name: str) -> dict:
    return next(one for one in report["claims"] if one["name"] == name)


# ------------------------------------------------------------------------------------------------------------ verdicts

@pytest.mark.parametrize(("low", "high", "settings", "seeds", "wanted"), [
    (0.01, 0.05, {}, 3, SUPPORTED), (-0.01, 0.05, {}, 3, UNDECIDED), (-0.05, -0.01, {}, 3, REFUTED),
    (0.0, 0.05, {}, 3, UNDECIDED),                                         # an interval that touches 0 does not leave it out
    (0.01, 0.05, {}, 2, UNDECIDED), (None, None, {}, 1, UNDECIDED),
    (-0.02, 0.01, {"margin": 0.03}, 3, SUPPORTED), (-0.04, 0.01, {"margin": 0.03}, 3, UNDECIDED),
    (-0.09, -0.04, {"margin": 0.03}, 3, REFUTED), (-0.025, -0.02, {"margin": 0.03}, 3, SUPPORTED),
    (-0.05, -0.01, {"direction": -1}, 3, SUPPORTED), (0.01, 0.05, {"direction": -1}, 3, REFUTED),
    (0.01, 0.02, {"direction": -1, "margin": 0.03}, 3, SUPPORTED)])
def test_a_verdict_follows_the_interval(low, high, settings, seeds, wanted) -> None:
    assert verdict(low, high, Comparison("a", "b", "against b", **settings), seeds) == wanted


@pytest.mark.parametrize(("verdicts", "wanted"), [
    ([SUPPORTED, SUPPORTED], SUPPORTED), ([SUPPORTED, UNDECIDED], UNDECIDED), ([SUPPORTED, REFUTED], REFUTED),
    ([UNDECIDED, REFUTED], REFUTED), ([REFUTED, NOT_RUN], NOT_RUN), ([], NOT_RUN)])
def test_a_claim_needs_all_that_decides(verdicts, wanted) -> None:
    beside = {"verdict": REFUTED, "decides": False}
    assert together([{"verdict": one, "decides": True} for one in verdicts] + [beside]) == wanted


def test_terms_are_signed_products() -> None:
    one = Comparison("a", "b", "", cells=(("on", "on"), ("off", "on")), prompts=("reasoning", "plain"))
    signs = {(arm, guidance, which): sign for sign, arm, (guidance, _), which in one.terms()}
    assert len(signs) == 8
    assert signs["a", "on", "reasoning"] == signs["b", "off", "reasoning"] == signs["b", "on", "plain"] == 1
    assert signs["b", "on", "reasoning"] == signs["a", "on", "plain"] == signs["a", "off", "reasoning"] == -1
    assert [sign for sign, *_ in Comparison("a", "a", "", cells=(("off", "on"), ("off", "off"))).terms()] == [1, -1]


# ----------------------------------------------------------------------------------------------------------- intervals

def test_shared_draws_are_those_of_the_plain_bootstrap() -> None:
    rng = np.random.default_rng(0)
    statistics = Statistics(seed=3, resamples=1200)                        # more than two chunks
    strata = np.array(["b", "a", "c"])[rng.integers(3, size=40)]
    for labels in (None, strata):
        first, second = (Measure(rng.integers(5, size=40), rng.integers(1, 5, size=40), strata=labels) for _ in range(2))
        for wanted, found in (
                (mean_interval(first, generator(3, "bootstrap"), resamples=1200), statistics.value(first)),
                (paired_difference(first, second, generator(3, "bootstrap"), resamples=1200),
                 statistics.difference(first, second))):
            assert [found[key] for key in ("value", "low", "high")] == pytest.approx(
                [wanted[key] for key in ("value", "low", "high")], rel=1e-5)
    with pytest.raises(ValueError, match="the same prompts on both sides, got 40 and 39"):
        statistics.difference(first, Measure(np.ones(39), np.ones(39)))
    with pytest.raises(ValueError, match="denominator sums to 0"):
        statistics.draws(Measure(np.zeros(4), np.zeros(4)))


def test_over_seeds_by_hand(project: Path, report: dict) -> None:
    """Each seed's difference from the counts, their mean, and Student's t with two degrees of freedom."""
    one = claim(report, "joint")["comparisons"][0]
    assert (one["a"], one["b"], one["over"]) == ("unigrpo", "text_only", "seeds")
    singles = []
    for seed in range(3):
        pair = [outcomes(project, f"{name}/{seed}") for name in ("unigrpo", "text_only")]
        singles.append(np.subtract(*(rows["exact"].sum() / rows["images"].sum() for rows in pair)))
    assert [single["value"] for single in one["seeds"]] == pytest.approx(singles, abs=1e-6)
    half = student.ppf(0.975, 2) * np.std(singles, ddof=1) / math.sqrt(3)
    assert [one["mean"], one["low"], one["high"]] == pytest.approx(
        [np.mean(singles), np.mean(singles) - half, np.mean(singles) + half], rel=1e-4)
    assert one["verdict"] == SUPPORTED
    entry = report["differences"]["unigrpo-text_only"]["bench/shapes/exact"]
    assert [entry[key] for key in ("value", "low", "high")] == [one["mean"], one["low"], one["high"]]


def test_a_difference_of_differences(project: Path, report: dict) -> None:
    """What thinking gains on reasoning prompts minus what it gains on plain ones, from the counts."""
    one = claim(report, "thinking")["comparisons"][-1]
    on, off = outcomes(project, "unigrpo/0"), outcomes(project, "unigrpo/0", thinking="off")

    def share(rows, needs):
        return rows.loc[rows["needs_reasoning"] == needs, "exact"].sum() / rows.loc[rows["needs_reasoning"] == needs,
                                                                                   "images"].sum()

    wanted = share(on, True) - share(off, True) - share(on, False) + share(off, False)
    assert one["seeds"][0]["value"] == pytest.approx(wanted, abs=1e-6)
    assert one["seeds"][0]["low"] < wanted < one["seeds"][0]["high"]
    assert (one["cell"], one["prompts"]) == ("cfg_off-thinking_on - cfg_off-thinking_off", "reasoning - plain")


# ----------------------------------------------------------------------------------------------------- arms and points

def test_what_did_not_run_is_a_row(report: dict) -> None:
    joint = claim(report, "joint")
    assert joint["verdict"] == NOT_RUN
    assert [one["verdict"] for one in joint["comparisons"]] == [SUPPORTED, SUPPORTED, NOT_RUN, NOT_RUN]
    assert "there are no results of image_context, sft_longer (not listed in params/experiment.yaml)" in joint["sentence"]
    assert "against text_only" in joint["sentence"]
    missing = {(one["arm"], one["seed"]): one["why"] for one in report["missing"]}
    assert missing["latent_kl", "2"] == "not run"
    assert missing["lost_point", "0"] == "failed: three updates <were> not finite"
    assert missing["cfg_rollout", None] == "not listed in params/experiment.yaml"
    assert report["roster"]["latent_kl"]["status"] == "ran, but seed 2 not run"
    assert report["roster"]["lost_point"]["exact"] is None
    two_seeds = next(one for one in claim(report, "penalty")["comparisons"] if one["b"] == "latent_kl")
    assert (two_seeds["verdict"], len(two_seeds["seeds"])) == (UNDECIDED, 2)


def test_points_are_grouped_by_what_they_change(report: dict) -> None:
    sweeps = {sweep["name"]: sweep for sweep in report["sweeps"]}
    assert set(sweeps) == {"Noise of the SDE", "Steps that are trained (the SDE window)", "Scale of advantages"}
    noise = sweeps["Noise of the SDE"]
    assert noise["keys"] == ["rollout.noise_level"]
    assert [(point["run"], point["values"]["rollout.noise_level"]) for point in noise["points"]][1] == ("noisy_point", 1.5)
    assert noise["points"][0]["run"] == noise["baseline"] == "short_point"
    assert noise["points"][0]["difference"] is None
    assert noise["points"][1]["difference"]["over"] == "prompts"
    assert sweeps["Scale of advantages"]["verdict"] == NOT_RUN
    assert sweeps["Scale of advantages"]["points"][1]["status"].startswith("failed: ")
    settings = claim(report, "settings")
    assert settings["verdict"] == OBSERVED
    assert "One seed decides nothing" in settings["sentence"]
    assert "noisy_point" not in {pair.partition("-")[0] for pair in report["differences"]}


def test_the_frontier_is_what_changes_penalty_and_reward_alone(report: dict) -> None:
    points = {point["run"]: point for point in report["frontier"]}
    assert set(points) == {"unigrpo", "image_only", "text_only", "latent_kl", "short_point", "strong_point", "hacked_point"}
    assert points["latent_kl"]["weight"] == 9.0
    assert points["hacked_point"]["reward_is"] == "shapes_tolerant"
    assert points["strong_point"]["steps"] == 1
    full = [point for point in report["frontier"] if point["steps"] == points["unigrpo"]["steps"]]
    best = [point["run"] for point in full if point["best"]]
    assert "unigrpo" in best                                               # the most accurate, with the least drift
    assert "text_only" not in best
    assert "Observed under the reward shapes_tolerant" in claim(report, "penalty")["sentence"]


def test_drift_is_taken_at_steps_that_every_arm_measures() -> None:
    """An arm without a penalty knows its distance at monitored steps only; it is never 0 for want of a measurement."""
    every = np.arange(35) * 1e-5
    sparse = np.where(np.arange(35) % 10 == 0, every, np.nan)
    inputs = SimpleNamespace(settings={"a": {"train.monitor_every": 10}})
    drifts = [trained_drift(SimpleNamespace(run="a", curves=pd.DataFrame({"step": range(35), "image/velocity_mse": values})),
                            inputs, "velocity_mse") for values in (every, sparse)]
    assert drifts == pytest.approx([30e-5, 30e-5])
    without = SimpleNamespace(run="a", curves=pd.DataFrame({"step": range(35)}))
    assert trained_drift(without, inputs, "velocity_mse") is None


@pytest.mark.parametrize(("before", "after", "wanted"), [(0.5, 0.35, 1.2), (0.0, 0.0, None)])
def test_a_statistic_that_was_0_has_no_unit_of_drift(before: float, after: float, wanted: float | None) -> None:
    """`edge_density` may change by a share of its value at the warm-up: a base that draws nothing has none."""
    metrics = [{"sentinel/edge_density": value, "sentinel/edge_density/noise": 0.0} for value in (before, after)]
    warm, found = (SimpleNamespace(metrics=values) for values in metrics)
    drift = sentinel_drift(found, SimpleNamespace(arms=lambda: {"sft": [warm]}))
    assert drift == (None if wanted is None else pytest.approx(wanted))         # 0.15 of 0.25 * 0.5


def test_the_page_has_it_all(project: Path, report: dict) -> None:
    folder = project / "artifacts" / "smoke" / "experiments"
    page = (folder / "report.html").read_text(encoding="utf-8")
    for anchor in ("claims", "frontier", "sweeps", "arms", "side", "paper"):
        assert f'<section id="{anchor}">' in page
    assert "three updates &lt;were&gt; not finite" in page
    assert "<were>" not in page
    for one in CLAIMS:
        assert f'id="claim-{one.name}"' in page
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {"results", "claim_joint", "claim_penalty", "claim_thinking", "frontier", "sweeps"}
    assert page.count("data:image/png") > len(names)
    side = page[page.index('<section id="side">'):page.index('<section id="paper">')]
    assert re.findall(r"background:[^>]*></span>(\w+)</p>", side)[:5] == [
        "sft", "unigrpo", "image_only", "latent_kl", "text_only"]
    assert "Published, not ours" in page
    assert str(project) not in page
    text = results_table(folder / "report.json")
    assert "not run" in text
    assert claim(report, "thinking")["title"] in text


def test_other_outcomes_other_verdict(tmp_path: Path) -> None:
    """The sentence and the verdict are written from the numbers: with the arms swapped they say the opposite."""
    write_artifacts(tmp_path, prompts=60, checkpoints=("base", "sft", *SEEDS), shown=1, steps=3, points=POINTS)
    folder = tmp_path / "artifacts" / "smoke"
    for seed in range(3):
        tables = [read_outcomes(folder / name / str(seed) / "outcomes.csv") for name in ("unigrpo", "image_only")]
        for name, table in zip(("image_only", "unigrpo"), tables, strict=True):
            path = folder / name / str(seed)
            write_outcomes(table, path / "outcomes.csv")
            kept = {key: value for key, value in json.loads((path / "metrics.json").read_text()).items()
                    if not key.startswith("bench/")}
            write_metrics(kept | compute_metrics(table), path / "metrics.json")
    run("smoke", which="experiments", root=tmp_path)
    found = json.loads((folder / "experiments" / "report.json").read_text(encoding="utf-8"))
    one = claim(found, "joint")["comparisons"][1]
    assert (one["b"], one["verdict"]) == ("image_only", REFUTED)
    assert one["high"] < 0
    assert "the other way" in claim(found, "joint")["sentence"]


def test_measures_of_a_claim_are_the_outcomes(project: Path) -> None:
    """A part of the prompts with zeros elsewhere has the value of the part alone."""
    rows = outcomes(project, "unigrpo/1")
    part = rows[rows["needs_reasoning"]]
    kept = np.where(rows["needs_reasoning"], rows["exact"], 0), np.where(rows["needs_reasoning"], rows["images"], 0)
    statistics = Statistics(seed=0, resamples=500)
    assert statistics.value(Measure(*kept))["value"] == statistics.value(measure(part, "exact"))["value"]


def test_a_run_that_a_scale_refuses_does_not_stop_its_report(tmp_path):
    """Half of smoke's prompts are none for each of two processes in each of two updates."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    everything = run_settings("smoke", tmp_path)
    scale = tmp_path / "params" / "scales" / "smoke.yaml"
    scale.write_text(scale.read_text().replace("processes: 1", "processes: 2"))
    with pytest.raises(ValueError, match="nearest valid values"):
        load_config("smoke", run="group_16", root=tmp_path)
    assert set(everything) - set(run_settings("smoke", tmp_path)) == {"group_16", "group_24"}
