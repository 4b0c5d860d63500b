"""Bad params are refused as they load: which key, what was wanted, what came, which file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from small import ROOT

from unigrpo.config import load_config

SCALES = sorted(p.stem for p in (ROOT / "params" / "scales").glob("*.yaml"))


@pytest.fixture
def root(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


def change(root: Path, file: str, section: str, **values):
    path = root / "params" / file
    content = yaml.safe_load(path.read_text())
    content[section] = {**(content[section] or {}), **values}
    path.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_and_run_loads(scale):
    for run in [None, *yaml.safe_load((ROOT / "params" / "runs.yaml").read_text())]:
        assert load_config(scale, run=run, root=ROOT).scale == scale


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_lists_every_section(scale):
    """DVC refuses a missing key, so each section is there, {} where nothing differs."""
    base = yaml.safe_load((ROOT / "params" / "base.yaml").read_text())
    assert set(yaml.safe_load((ROOT / "params" / "scales" / f"{scale}.yaml").read_text())) == set(base)


def test_base_holds_every_key_and_a_comment_for_each():
    """No default lives in Python: a key missing from base.yaml and its scale would not load. Comments say what it is."""
    load_config("tiny", root=ROOT)
    lines = (ROOT / "params" / "base.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > 60


def test_unknown_key(root):
    change(root, "scales/tiny.yaml", "train", learning_rate=1.0e-4)
    with pytest.raises(ValueError, match=r"train\.learning_rate is not a key.*scales/tiny\.yaml"):
        load_config("tiny", root=root)


def test_unknown_section(root):
    path = root / "params" / "scales" / "tiny.yaml"
    path.write_text(path.read_text() + "trian: {}\n")
    with pytest.raises(ValueError, match=r"trian is not a key.*scales/tiny\.yaml"):
        load_config("tiny", root=root)


def test_value_out_of_range(root):
    change(root, "base.yaml", "sft", thinking_error=1.5)
    with pytest.raises(ValueError, match=r"sft\.thinking_error: .*less than or equal to 1, got 1\.5.*base\.yaml"):
        load_config("tiny", root=root)


def test_exponent_without_point_is_explained(root):
    path = root / "params" / "scales" / "tiny.yaml"
    path.write_text(path.read_text().replace("understanding_lr: ", "understanding_lr: 4e-4x #"))
    with pytest.raises(ValueError, match=r"optim\.understanding_lr.*write 1\.0e-4"):
        load_config("tiny", root=root)


def test_window_outside_the_steps(root):
    change(root, "scales/tiny.yaml", "rollout", window={"kind": "subset", "size": 2, "range": [0, 99]})
    with pytest.raises(ValueError, match=r"rollout: window\.range must lie in \[0, num_steps="):
        load_config("tiny", root=root)


def test_group_of_one(root):
    change(root, "scales/tiny.yaml", "rollout", group_size=1)
    with pytest.raises(ValueError, match=r"rollout\.group_size.*greater than or equal to 2, got 1"):
        load_config("tiny", root=root)


def test_odd_updates_name_the_nearest_valid(root):
    change(root, "scales/tiny.yaml", "train", updates_per_rollout=3)
    with pytest.raises(ValueError, match=r"prompts_per_step=16 must be a multiple of train\.updates_per_rollout=3.*\[15, 18\]"):
        load_config("tiny", root=root)


def test_micro_batch_names_the_nearest_valid(root):
    change(root, "scales/tiny.yaml", "train", micro_batch=20)
    with pytest.raises(ValueError, match=r"train\.micro_batch=20 must divide the 64 rollouts.*\[8, 16\]"):
        load_config("tiny", root=root)


def test_image_size_that_does_not_divide(root):
    change(root, "scales/tiny.yaml", "model", image_size=[30, 32])
    with pytest.raises(ValueError, match=r"model: image_size=\(30, 32\) must be multiples of"):
        load_config("tiny", root=root)


def test_dropout_is_refused(root):
    change(root, "scales/tiny.yaml", "model", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0"):
        load_config("tiny", root=root)


def test_unknown_scale_and_run_list_the_choices(root):
    with pytest.raises(ValueError, match=r"tinny\.yaml is missing.*smoke.*tiny"):
        load_config("tinny", root=root)
    with pytest.raises(ValueError, match=r"run must be one of .*unigrpo.*got 'unigpro'"):
        load_config("tiny", run="unigpro", root=root)


def test_broken_yaml(root):
    (root / "params" / "scales" / "tiny.yaml").write_text("model: [1, 2\n")
    with pytest.raises(ValueError, match=r"tiny\.yaml must be valid YAML"):
        load_config("tiny", root=root)


def test_a_run_replaces_rewards_and_merges_the_rest(root):
    (root / "params" / "runs.yaml").write_text(
        "unigrpo: {}\nother: {reward: {weights: {shapes_tolerant: 2.0}}, objective: {image: {regularizer: none}}}\n")
    config = load_config("tiny", run="other", root=root)
    assert config.reward.weights == {"shapes_tolerant": 2.0}
    assert config.objective.image.regularizer == "none"
    assert config.objective.image.clip_low == load_config("tiny", run="unigrpo", root=root).objective.image.clip_low
