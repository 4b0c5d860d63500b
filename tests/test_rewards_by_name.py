"""Sums of rewards, functions of the user's, and rewards by name."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_fakes import values
from scorer_models import save_clip

from unigrpo.credit import assign_credit
from unigrpo.rewards import REWARDS
from unigrpo.rewards.conformance import CLAUSES, example_batch
from unigrpo.rewards.custom import custom
from unigrpo.rewards.mixture import weighted_sum
from unigrpo.rewards.registry import FACTORIES, make_reward
from unigrpo.rewards.shapes import Images, RewardFunction, shapes_exact, shapes_graded
from unigrpo.types import PromptRecord, Reward

# ------------------------------------------------------------------------------------------------------------------ sums

def test_a_mixture_is_the_weighted_sum_of_reward_weights() -> None:
    batch = example_batch()
    batch.images[2, 0, 0, 0] = np.nan
    weights = {"shapes_graded": 1.0, "shapes_exact": 0.5}
    parts: dict[str, RewardFunction] = {"shapes_graded": shapes_graded, "shapes_exact": shapes_exact}
    records = weighted_sum("both", parts, weights, threads=2)(batch.images, batch.prompts, batch.thinking)
    assert [item.name for item in records] == ["both", "both/shapes_graded", "both/shapes_exact"]
    direct = [part(batch.images, batch.prompts, batch.thinking)[0] for part in parts.values()]
    mixed, metrics = assign_credit(records, ["text", "image"], group_size=4, weights={"both": 1.0})  # type: ignore[list-item]
    summed, expected = assign_credit(direct, ["text", "image"], group_size=4, weights=weights)  # type: ignore[list-item]
    assert torch.equal(mixed[0], summed[0])
    assert metrics["reward/mean"] == expected["reward/mean"]
    assert metrics["reward/missing"] == 1 / 8
    assert metrics["reward/both/shapes_exact"] == expected["reward/shapes_exact"]


def test_a_part_of_weight_0_is_logged_and_its_gaps_do_not_matter() -> None:
    def gaps(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        return [Reward("gaps", torch.full((len(images),), torch.nan))]

    batch = example_batch()
    total, *parts = weighted_sum("m", {"gaps": gaps, "x": shapes_exact}, {"gaps": 0.0, "x": 2.0})(
        batch.images, batch.prompts, batch.thinking)
    assert torch.equal(total.value, 2 * parts[1].value)
    assert parts[0].value.isnan().all()


def test_a_mixture_by_name() -> None:
    batch = example_batch()
    reward = make_reward("mixture", {"weights": {"shapes_graded": 1, "shapes_exact": 1}, "name": "sum"})
    assert reward(batch.images, batch.prompts, batch.thinking)[0].name == "sum"
    with pytest.raises(ValueError, match="options for judge, which has no weight"):
        make_reward("mixture", {"weights": {"shapes_exact": 1}, "options": {"judge": {}}})
    with pytest.raises(ValueError, match="one that is not 0"):
        make_reward("mixture", {"weights": {"shapes_exact": 0}})


# --------------------------------------------------------------------------------------------------------------- by name

USER = '''
import numpy as np, torch
from unigrpo.types import Reward
imported = True
def brightness(images, prompts, thinking): return images.mean(axis=(1, 2, 3))
def records(images, prompts, thinking):
    value = torch.as_tensor(images.mean(axis=(1, 2, 3)))
    return [Reward("light", value), Reward("dark", 1 - value)]
def factory(gain): return lambda images, prompts, thinking: gain * images.mean(axis=(1, 2, 3))
def infinite(images, prompts, thinking): return np.full(len(images), np.inf)
def short(images, prompts, thinking): return [1.0]
number = 3
'''


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_rewards_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_functions_of_the_users(user_module: str) -> None:
    batch = example_batch()
    light = batch.images.mean(axis=(1, 2, 3)).tolist()
    assert user_module not in sys.modules
    make_reward("shapes_exact")
    assert user_module not in sys.modules, "imported only when it is named"
    name = f"{user_module}:brightness"
    assert values(make_reward(name), batch.images, batch.prompts)[name] == pytest.approx(light)
    found = values(make_reward(f"{user_module}:records"), batch.images, batch.prompts)
    assert list(found) == [f"{user_module}:records", f"{user_module}:records/dark"]
    twice = values(make_reward(f"{user_module}:factory", {"gain": 2}), batch.images, batch.prompts)
    assert twice[f"{user_module}:factory"] == pytest.approx([2 * value for value in light])


@pytest.mark.parametrize(("name", "message"), [
    ("os.path", r"is named module:name, as in my_rewards:brightness, got 'os.path'"),
    ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
    ("MODULE:absent", "has no 'absent'"),
    ("MODULE:number", r"must be a function \(images, prompts, thinking\), got int"),
    ("a b:c", "is named module:name"),
])
def test_a_wrong_name_says_what_is_wrong(user_module: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        custom(name.replace("MODULE", user_module))


@pytest.mark.parametrize(("name", "message"), [("infinite", "it is infinite for image 0"), ("short", r"\(8,\), got \(1,\)")])
def test_a_users_wrong_values_stop_the_run(user_module: str, name: str, message: str) -> None:
    batch = example_batch()
    with pytest.raises(ValueError, match=message):
        make_reward(f"{user_module}:{name}")(batch.images, batch.prompts, batch.thinking)


def test_rewards_by_name_are_made_once_and_wrong_options_are_named(tmp_path: Path) -> None:
    clip_folder = save_clip(tmp_path / "clip")
    options = {"weights": str(clip_folder), "canaries": None, "batch": 8}
    assert make_reward("clip_score", options) is make_reward("clip_score", dict(reversed(options.items())))
    with pytest.raises(ValueError, match=r"takes the options weights, canaries, device, batch, hessel, openai: .*'size'"):
        make_reward("clip_score", {**options, "size": 3})
    with pytest.raises(ValueError, match="missing a required argument: 'canaries'"):
        make_reward("clip_score", {"weights": str(clip_folder)})
    with pytest.raises(ValueError, match="the reward shapes_exact takes no options"):
        make_reward("shapes_exact", {"a": 1})
    with pytest.raises(ValueError, match="unknown reward 'beauty'; choose from blip_vqa, clip_score"):
        make_reward("beauty")
    with pytest.raises(ValueError, match="must be JSON values"):
        make_reward("clip_score", {"weights": clip_folder})
    with pytest.raises(ValueError, match="the others belong to `unigrpo serve-rewards`"):
        make_reward("clip_score", {"server": {"url": "http://127.0.0.1:1"}, "batch": 3})


def test_every_factory_exists() -> None:
    for path in FACTORIES.values():
        module, _, name = path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_every_reward_by_name_says_whose_weights_it_loads() -> None:
    licences = json.loads((Path(__file__).parents[1] / "docs" / "licences.json").read_text())
    named = {name for row in licences["weights"] for name in row["rewards"]}
    assert named.isdisjoint(licences["no_model"])
    assert named | set(licences["no_model"]) == {*REWARDS, *FACTORIES}
    for row in licences["weights"]:
        assert set(row) == {"weights", "rewards", "licence", "commercial_use", "source"}
        assert row["commercial_use"] in ("yes", "no", "not checked")
        assert all(row.values())


def test_the_docs_name_every_reward_and_what_is_there() -> None:
    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    assert [name for name in (*REWARDS, *FACTORIES) if f"`{name}`" not in text] == []
    assert [clause for clause in CLAUSES if f"`{clause}`" not in text] == []
    options = {name: set(inspect.signature(getattr(importlib.import_module(path.partition(":")[0]),
                                                   path.partition(":")[2])).parameters) for name, path in FACTORIES.items()}
    rows = {name: line.split("|")[-2] for line in text.splitlines() if line.startswith("| `") for name in FACTORIES
            if f"`{name}`" in line.split("|")[1]}
    for name in ("pickscore", "clip_score", "blip_vqa", "mixture"):
        assert set(re.findall(r"`(\w+)`", rows[name])) == options[name]
