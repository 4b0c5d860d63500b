"""Rewards and verdicts of the shapes world on planted scenes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from unigrpo.evaluation.outcomes import compute_metrics, count_outcomes
from unigrpo.evaluation.shapes import is_plan_right, verdict_rows
from unigrpo.rewards import REWARDS, get_reward
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.prompts import sample_record, sample_scene
from unigrpo.worlds.shapes.render import render
from unigrpo.worlds.shapes.scene import Object, Scene
from unigrpo.worlds.shapes.thinking import plan_text

RED_CIRCLE, BLUE_CIRCLE = Object("red", "circle", "left"), Object("blue", "circle", "left")
GREEN_SQUARE = Object("green", "square", "right")


def record(name: str, tag: str, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> PromptRecord:
    return PromptRecord(id=name, tag=tag, prompt="", include=include, exclude=exclude)


COLORED = record("aa", "colors", {"class": "circle", "count": 1, "color": "red"})
IN_CELL = record("bb", "colors", {"class": "circle", "count": 1, "color": "red", "cell": "left"})
BESIDE = record("cc", "position", {"class": "square", "count": 1},
                {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]})
TWO = record("dd", "counting", {"class": "circle", "count": 2}, exclude=({"class": "circle", "count": 3},))


def pictures(*scenes: Scene) -> np.ndarray:
    return render(list(scenes), generator(0, "test", "rewards"))


def rewards(name: str, prompt: PromptRecord, *scenes: Scene) -> list[float]:
    (reward,) = get_reward(name)(pictures(*scenes), [prompt] * len(scenes), [""] * len(scenes))
    assert (reward.name, reward.segment, reward.value.shape) == (name, None, (len(scenes),))
    return [float(value) for value in reward.value]


@pytest.mark.parametrize("name", sorted(REWARDS))
@pytest.mark.parametrize(("prompt", "right", "wrong"), [
    (COLORED, (RED_CIRCLE,), (BLUE_CIRCLE,)),
    (COLORED, (RED_CIRCLE,), (GREEN_SQUARE,)),
    (IN_CELL, (RED_CIRCLE,), (Object("red", "circle", "top"),)),
    (BESIDE, (RED_CIRCLE, GREEN_SQUARE), (Object("red", "circle", "right"), Object("green", "square", "left"))),
    (TWO, (RED_CIRCLE, Object("yellow", "circle", "top")), (RED_CIRCLE,)),
])
def test_wrong_is_worth_less_than_right(name: str, prompt: PromptRecord, right: Scene, wrong: Scene) -> None:
    good, bad = rewards(name, prompt, right, wrong)
    assert good == 1
    assert bad < 1


@pytest.mark.parametrize("prompt", [COLORED, IN_CELL, TWO])
def test_extra_objects_are_punished_unless_the_rule_is_tolerant(prompt: PromptRecord) -> None:
    right = (RED_CIRCLE,) if prompt is not TWO else (RED_CIRCLE, Object("yellow", "circle", "top"))
    for extra in (Object("red", "circle", "bottom right"), Object("purple", "triangle", "bottom")):
        for name, tolerated in (("shapes_graded", False), ("shapes_exact", False), ("shapes_tolerant", True)):
            alone, crowded = rewards(name, prompt, right, (*right, extra))
            assert alone == 1
            assert (crowded == 1) is tolerated, (name, extra)


def test_drawing_both_answers_hacks_the_tolerant_reward_only() -> None:
    either = (BLUE_CIRCLE, Object("red", "circle", "top"))
    assert rewards("shapes_tolerant", COLORED, either) == [1]
    assert rewards("shapes_exact", COLORED, either) == [0]
    assert rewards("shapes_graded", COLORED, either)[0] < 1


def test_graded_rewards_rise_with_what_is_right() -> None:
    nothing, shape, both = rewards("shapes_graded", COLORED, (GREEN_SQUARE,), (BLUE_CIRCLE,), (RED_CIRCLE,))
    assert nothing < shape < both == 1


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_an_image_that_is_not_finite_has_no_reward(name: str) -> None:
    images = pictures((RED_CIRCLE,), (RED_CIRCLE,))
    images[1, 3, 3, 0] = np.nan
    (reward,) = REWARDS[name](images, [COLORED, COLORED], ["", ""])
    assert reward.value[0] == 1
    assert bool(reward.value[1].isnan())


def test_an_unknown_reward_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown reward 'beauty'; choose from .*pickscore, shapes_exact, shapes_graded, "
                                         r"shapes_tolerant, or module:name"):
        get_reward("beauty")


def test_verdicts_of_a_batch() -> None:
    """Right; right with an extra object (GenEval does not mind); wrong colour with a right plan; right with a wrong plan."""
    scenes: list[Scene] = [(RED_CIRCLE,), (RED_CIRCLE, GREEN_SQUARE), (BLUE_CIRCLE,), (RED_CIRCLE,)]
    right, wrong = "plan : left red circle .", "plan : left blue circle ."
    rows = verdict_rows(pictures(*scenes), [COLORED] * 4, [right, right, right, wrong], samples=range(4), cfg="off", cell="on",
                 paths=["a.png", "", "", ""])
    assert rows["exact"].tolist() == [True, False, False, True]
    assert rows["geneval"].tolist() == [True, True, False, True]
    assert rows["plan_right"].tolist() == [True, True, True, False]
    assert rows["reason"].tolist() == ["", "", "expected red circle>=1, found 0 red; and 1 blue", ""]
    assert rows["graded"][0] == rows["graded"][3] == 1
    assert rows["image"].tolist() == ["a.png", "", "", ""]
    assert sorted(item[:2] for item in json.loads(rows["detections"][1])) == [["circle", "red"], ["square", "green"]]
    metrics = compute_metrics(count_outcomes(rows))
    assert metrics["bench/shapes/exact"] == 0.5
    assert metrics["bench/shapes/geneval"] == metrics["bench/shapes/thinking_accuracy"] == 0.75
    assert metrics["bench/shapes/image_given_plan"] == 0.333333


def test_scenes_that_satisfy_their_prompts_are_right_by_every_rule() -> None:
    """The detector's scores clear both of GenEval's thresholds, and no drawing turns a relation."""
    rng = generator(0, "test", "prompts")
    records = [sample_record(rng) for _ in range(300)]
    scenes = [sample_scene(item, rng) for item in records]
    images, plans = render(scenes, rng), [plan_text(scene, rng) for scene in scenes]
    rows = verdict_rows(images, records, plans, samples=range(300), cfg="off", cell="on")
    assert rows["exact"].mean() >= 0.995
    assert rows["geneval"].mean() >= 0.995, rows["reason"].unique()
    assert (rows["geneval"] | ~rows["exact"]).all(), "what is exact is right by GenEval's more tolerant rules"
    assert rows["plan_right"].all()
    for name in REWARDS:
        assert get_reward(name)(images, records, plans)[0].value.mean() >= 0.995
    # Another prompt's picture is rarely right.
    assert verdict_rows(images[::-1], records, plans, samples=range(300), cfg="off", cell="shuffled")["exact"].mean() < 0.1


def test_plans_are_right_only_if_well_formed_and_complete() -> None:
    assert is_plan_right("a red circle at the top .", COLORED)
    assert not is_plan_right("a red circle at the top , a red circle at the left .", COLORED)
    assert not is_plan_right("a red circle circle", COLORED)
    assert not is_plan_right("", COLORED)


def test_bad_batches_are_refused() -> None:
    images = pictures((RED_CIRCLE,), (RED_CIRCLE,))
    with pytest.raises(ValueError, match=r"one record, text, sample and path per image wanted, got .*'thinking': 1"):
        verdict_rows(images, [COLORED] * 2, [""], samples=[0, 1], cfg="off", cell="on")
    images[1] = np.inf
    with pytest.raises(ValueError, match="sample 1 of prompt aa has values that are not finite"):
        verdict_rows(images, [COLORED] * 2, ["", ""], samples=[0, 1], cfg="off", cell="on")
