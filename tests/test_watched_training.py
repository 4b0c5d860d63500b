"""Whole stages in this process at scale smoke: rewards by name, the sentinel of a run, and what an evaluation writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from small import ROOT

from unigrpo.config import load_config
from unigrpo.evaluation.outcomes import HEADLINE
from unigrpo.rewards import REWARDS
from unigrpo.rewards.registry import FACTORIES
from unigrpo.schema import REWARD_NAMES, THRESHOLDS
from unigrpo.stages import base, curate, evaluate, sft, train

EAGER = {name: 0.0 for name in THRESHOLDS if name not in ("in_a_row", "baseline_probes")} | {"in_a_row": 1}
RUNS = {
    "honest": {},
    "hacked": {"reward": {"weights": {"planted_rewards:ever_better": 1.0}}, "train": {"sentinel": {"thresholds": EAGER}}},
    "watched": {"reward": {"weights": {"planted_rewards:brightness": 1.0},
                           "options": {"planted_rewards:brightness": {"share": 1.0}}},
                "train": {"sentinel": {"thresholds": EAGER}}},
    "stopped": {"reward": {"weights": {"planted_rewards:ever_better": 1.0}},
                "train": {"sentinel": {"thresholds": EAGER, "stop": True}}},
    "mixed": {"reward": {"weights": {"geneval_soft_shapes": 1.0, "planted_rewards:brightness": 0.5, "shapes_exact": 0.0},
                         "options": {"planted_rewards:brightness": {"share": 2.0}, "geneval_soft_shapes": {"clamp": True}}}},
    "missing": {"reward": {"weights": {"planted_rewards:missing": 1.0}, "max_missing": 1.0}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """curate, base and sft of scale smoke, and runs of our own."""
    folder = tmp_path_factory.mktemp("watched")
    shutil.copytree(ROOT / "params", folder / "params")
    (folder / "params" / "runs.yaml").write_text(yaml.safe_dump(RUNS))
    for stage in (curate, base, sft):
        stage.run("smoke", root=folder)
    return folder


def journal_tags(root: Path, name: str) -> dict[str, str]:
    """Tags that a stage set while it ran, as its journal keeps them for MLflow."""
    tags: dict[str, str] = {}
    for path in (root / ".unigrpo").rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if any(name in json.dumps(row) for row in rows[:1]):
            for row in rows:
                tags |= row.get("tags", {}) if row["kind"] == "tags" else {}
    return tags


def test_names_in_the_schema_are_those_that_exist():
    from unigrpo.evaluation.sentinel import Thresholds

    assert set(REWARD_NAMES) == {*REWARDS, *FACTORIES}
    assert set(THRESHOLDS) == set(Thresholds.__dataclass_fields__)


@pytest.mark.parametrize(("change", "message"), [
    ({"reward": {"weights": {"beauty": 1.0}}}, "unknown reward 'beauty' in weights; choose from blip_vqa"),
    ({"reward": {"weights": {"shapes_exact": 0.0, "shapes_graded": 0.0}}}, "one of the weights must not be 0"),
    ({"reward": {"options": {"pickscore": {}}}}, r"options must belong to rewards of weights, \['shapes_graded'\], got"),
    ({"train": {"sentinel": {"thresholds": {"brightnes": 1.0}}}}, "unknown threshold 'brightnes'; choose from sigmas"),
    ({"train": {"sentinel": {"thresholds": {"brightness": -1.0}}}}, "thresholds must be at least 0"),
    ({"evaluate": {"control_images": 9}}, "evaluate.control_images=9 must be at most evaluate.images_per_prompt=2"),
])
def test_wrong_params_are_refused_when_they_are_read(tmp_path, change, message):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "params" / "runs.yaml").write_text(yaml.safe_dump({"wrong": change}))
    with pytest.raises(ValueError, match=message):
        load_config("smoke", run="wrong", root=tmp_path)


def test_an_honest_run_is_probed_and_raises_nothing(root):
    metrics = train.run("smoke", run="honest", seed=0, root=root)
    assert (metrics["sentinel/alarms"], metrics["sentinel/probes"]) == (0, 3)
    curves = pd.read_csv(root / "artifacts/smoke/honest/0/curves.csv")
    assert {"sentinel/brightness", "sentinel/distinct_texts", "sentinel/alarms", "probe/reward", "probe/exact"} <= set(curves)
    assert not (root / ".unigrpo/good/smoke-honest-0").exists()


def test_an_alarm_is_said_tagged_kept_and_goes_on(root, capsys):
    metrics = train.run("smoke", run="hacked", seed=0, root=root)
    said = capsys.readouterr().err
    assert "train smoke-hacked-0: ALARM, step 1: the reward rose from" in said
    assert metrics["sentinel/alarms"] >= 1
    alarms = {name: step for name, step in metrics.items() if name.startswith("sentinel/alarm/")}
    assert min(alarms.values()) == 1
    good = root / ".unigrpo/good/smoke-hacked-0"
    assert [path.name for path in good.iterdir()] == ["step-000000"]
    assert (good / "step-000000" / "model.safetensors").is_file()
    assert str(good) in said
    tags = journal_tags(root, "smoke-hacked-0")
    assert tags["sentinel.good_step"] == "0"
    assert {f"sentinel/alarm/{guard}" for guard in tags["sentinel.alarm"].split(",")} == set(alarms)


def test_a_run_may_stop_at_an_alarm(root):
    with pytest.raises(ValueError, match="stops at its sentinel's alarm, as train\\.sentinel\\.stop asks: step 1"):
        train.run("smoke", run="stopped", seed=0, root=root)
    assert not (root / "artifacts/smoke/stopped/0/training.json").exists()


def test_a_resumed_run_remembers_what_its_sentinel_saw(root, monkeypatch):
    """Without the start of the run in its state, a resumed run would take its own first probe for the start."""
    folder, files = root / "artifacts/smoke/watched/0", ("training.json", "curves.csv", "checkpoint/model.safetensors")
    train.run("smoke", run="watched", seed=0, root=root)
    whole = [(folder / name).read_bytes() for name in files]
    shutil.rmtree(folder)
    look, probes = train.look, []

    def interrupted(*args, **kwargs):
        probes.append(1)
        if len(probes) == 2:
            raise KeyboardInterrupt
        return look(*args, **kwargs)

    monkeypatch.setattr(train, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run("smoke", run="watched", seed=0, root=root)
    train.run("smoke", run="watched", seed=0, root=root)
    assert len(probes) == 4  # steps 0, then 1 twice, then 2
    assert [(folder / name).read_bytes() for name in files] == whole


def test_rewards_by_name_with_options_reach_the_run(root):
    metrics = train.run("smoke", run="mixed", seed=0, root=root)
    curves = pd.read_csv(root / "artifacts/smoke/mixed/0/curves.csv")
    assert {"reward/geneval_soft_shapes", "reward/geneval_soft_shapes/strict", "reward/planted_rewards:brightness",
            "reward/shapes_exact"} <= set(curves)
    assert (curves["reward/planted_rewards:brightness"] > 1).all()  # twice the mean pixel of bright pictures
    both = curves["reward/geneval_soft_shapes"] + 0.5 * curves["reward/planted_rewards:brightness"]
    assert curves["reward/mean"].tolist() == pytest.approx(both.tolist(), rel=1e-4)
    assert metrics["sentinel/probes"] == 3


def test_a_run_whose_rewards_are_all_missing_says_so_and_trains_nothing(root):
    metrics = train.run("smoke", run="missing", seed=0, root=root)
    curves = pd.read_csv(root / "artifacts/smoke/missing/0/curves.csv")
    assert (curves["reward/missing"] == 1).all()
    assert curves["probe/reward_missing"].max() == 1
    assert "reward/mean" not in curves
    assert metrics["sentinel/alarms"] == 0


def test_an_evaluation_writes_controls_understanding_and_what_the_sentinel_compares(root):
    metrics = evaluate.run("smoke", checkpoint="sft", root=root)
    folder = root / "artifacts/smoke/sft"
    outcomes = pd.read_csv(folder / "outcomes.csv")
    images = {(cfg, thinking): sorted(set(rows["images"])) for (cfg, thinking), rows in outcomes.groupby(["cfg", "thinking"])}
    assert images.pop(HEADLINE) == [2]
    assert set(map(tuple, images.values())) == {(1,)}
    assert ("off", "truncated") in images
    table = pd.read_csv(folder / "understanding.csv")
    assert len(table) == 24
    assert metrics["understanding/text_loss"] == pytest.approx(table["nats"].sum() / table["tokens"].sum(), rel=1e-5)
    assert {"understanding/plan_accuracy", "sentinel/edge_density", "sentinel/edge_density/noise", "sentinel/border_red",
            "bench/shapes/cfg_off-thinking_truncated/exact"} <= set(metrics)
    assert json.loads((folder / "metrics.json").read_text()) == dict(sorted(metrics.items()))
