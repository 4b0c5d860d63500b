"""GenEval's rules on scenes small enough to check in the head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unigrpo.evaluation.geneval import Options, compute_iou, flow_grpo_reward, keep, relative_position, summarize, verdict
from unigrpo.types import PromptRecord


class Labelled(NamedTuple):
    label: str
    box: tuple[float, float, float, float]
    score: float = 0.95
    color: str | None = None


LEFT, RIGHT = (0.0, 0.0, 8.0, 8.0), (20.0, 0.0, 28.0, 8.0)


def record(*include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = (), tag: str = "position") -> PromptRecord:
    return PromptRecord(id="", tag=tag, prompt="", include=include, exclude=exclude)


def test_scores_are_compared_strictly_in_float32() -> None:
    # float32(0.3) = 0.30000001192...: above 0.3 as a double, equal to the threshold as an array element.
    at, above = float(np.float32(0.3)), float(np.nextafter(np.float32(0.3), np.float32(1)))
    assert keep([Labelled("square", LEFT, at)], "colors") == {}
    assert list(keep([Labelled("square", LEFT, above)], "colors")) == ["square"]
    assert keep([Labelled("square", LEFT, 0.85)], "counting") == {}, "counting needs 0.9"


def test_the_cap_comes_before_the_suppression() -> None:
    # Two copies of one box and another: with a cap of 2 the copies use it up, and one of them is then suppressed.
    items = [Labelled("square", LEFT, 0.9), Labelled("square", LEFT, 0.8), Labelled("square", RIGHT, 0.7)]
    assert keep(items, "colors", Options(max_objects=2, max_overlap=0.5)) == {"square": items[:1]}
    assert keep(items[::-1], "colors", Options(max_overlap=0.5)) == {"square": [items[0], items[2]]}
    assert keep(items[::-1], "colors") == {"square": items}, "no suppression by default"


def test_iou_counts_the_last_pixel() -> None:
    # [0, 1] and [1, 2] in x as inclusive pixels: 2 wide each, 1 shared of 3.
    assert compute_iou((0, 0, 1, 0), (1, 0, 2, 0)) == pytest.approx(1 / 3)
    assert compute_iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0


def test_thirty_degrees_off_an_axis_is_the_border() -> None:
    def point(degrees: float) -> tuple[float, float, float, float]:
        x, y = 100 * math.cos(math.radians(degrees)), 100 * math.sin(math.radians(degrees))
        return x, y, x, y
    origin = (0.0, 0.0, 0.0, 0.0)
    assert relative_position(point(29), origin) == {"right of"}
    assert relative_position(point(31), origin) == {"right of", "below"}
    assert relative_position(point(-90), origin) == {"above"}
    assert relative_position(origin, origin) == frozenset()


def test_near_objects_have_no_relation() -> None:
    # Centres 4 apart, sizes 20 and 20: the offset must exceed a tenth of 40.
    assert relative_position((4, 0, 24, 20), (0, 0, 20, 20)) == frozenset()
    # 8 apart: shrunk to 4, half of the unshrunk 8, and not more than half. 9 apart: 5 / 9.
    assert relative_position((8, 0, 28, 20), (0, 0, 20, 20)) == frozenset()
    assert relative_position((9, 0, 29, 20), (0, 0, 20, 20)) == {"right of"}


@given(st.lists(st.floats(0, 500, width=32), min_size=8, max_size=8))
def test_relations_mirror(values: list[float]) -> None:
    box_a, box_b = values[:4], values[4:]
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relative_position(box_b, box_a) == {opposite[relation] for relation in relative_position(box_a, box_b)}


def test_every_failure_is_reported_and_a_failed_clause_is_no_target() -> None:
    prompt = record({"class": "circle", "count": 1, "color": "red"},
                    {"class": "square", "count": 1, "position": ["left of", 0]})
    objects = {"circle": [Labelled("circle", RIGHT, color="blue")], "square": [Labelled("square", LEFT)]}
    assert verdict(prompt, objects) == (False, "expected red circle>=1, found 0 red; and 1 blue\n"
                                               "no target for square to be left of")
    objects["circle"] = [Labelled("circle", RIGHT, color="red")]
    assert verdict(prompt, objects) == (True, "")


def test_extra_objects_hurt_only_where_excluded() -> None:
    three = {"circle": [Labelled("circle", LEFT)] * 3}
    two = {"class": "circle", "count": 2}
    assert verdict(record(two), three).correct
    assert verdict(record(two, exclude=({"class": "circle", "count": 3},)), three) == (False, "expected circle<3, found 3")


def test_the_soft_reward_of_a_mirrored_pair() -> None:
    prompt = record({"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": ["left of", 0]})
    mirrored = {"circle": [Labelled("circle", LEFT)], "square": [Labelled("square", RIGHT)]}
    assert flow_grpo_reward(prompt, mirrored) == (pytest.approx(2 / 3), 0, 0)                              # 1, 1, 0
    assert flow_grpo_reward(prompt, mirrored, official_position_bug=True) == (0.75, 0, 0)                  # 1, 1, 0, 1
    right = {"circle": [Labelled("circle", RIGHT)], "square": [Labelled("square", LEFT)]}
    assert flow_grpo_reward(prompt, right) == flow_grpo_reward(prompt, right, official_position_bug=True) == (1, 1, 1)


def test_the_soft_reward_may_be_negative_unless_clamped() -> None:
    prompt, eight = record({"class": "circle", "count": 2}), {"circle": [Labelled("circle", LEFT)] * 8}
    assert flow_grpo_reward(prompt, eight) == (-2, 0, 1)                                              # 1 - 6 / 2
    assert flow_grpo_reward(prompt, eight, clamp=True) == (0, 0, 1)


def test_the_overall_score_weighs_tags_alike() -> None:
    summary = summarize([("colors", "a", True), ("colors", "a", False), ("colors", "b", False), ("counting", "c", True)])
    assert summary.overall == pytest.approx((1 / 3 + 1) / 2)
    assert (summary.correct_prompts, summary.prompts) == (2, 3)
    assert "colors           = 33.33% (1 / 3)" in summary.lines()
    with pytest.raises(ValueError, match="at least one verdict"):
        summarize([])
