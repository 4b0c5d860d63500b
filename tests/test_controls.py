"""Controls of the thinking and the understanding check: by hand, and with the paired intervals of the report."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from unigrpo.evaluation.controls import (
    CONTROLS,
    is_understanding_lost,
    read_understanding,
    thinking_effects,
    truncate,
    understanding_change,
    understanding_measures,
    understanding_metrics,
    understanding_table,
    write_understanding,
)
from unigrpo.evaluation.statistics import Measure, paired_difference, value_of
from unigrpo.seeding import generator

STOP, PAD = 9, 0
TAGS = ("counting", "position")


def difference(first: Measure, second: Measure) -> dict[str, float]:
    return paired_difference(first, second, generator(0, "bootstrap"), resamples=500)


def outcomes(skill: dict[str, float], prompts: int = 60, images: int = 4) -> pd.DataFrame:
    """Outcomes whose exact images are coin flips of a stated bias; counting prompts gain nothing from thinking."""
    rng = np.random.default_rng(0)
    rows = []
    for thinking, bias in skill.items():
        for i in range(prompts):
            tag = TAGS[i % 2]
            exact = int(rng.binomial(images, skill["off"] if tag == "counting" and "off" in skill else bias))
            right = int(rng.binomial(images, 0.5)) if thinking != "greedy" else images * (i % 3 > 0)
            rows.append({"prompt_id": f"{i:04d}", "tag": tag, "reasoning": "", "needs_reasoning": i % 3 == 0, "cfg": "off",
                         "thinking": thinking, "images": images, "exact": exact, "geneval": exact, "plan_right": right,
                         "exact_and_plan_right": 0, "graded_sum": float(exact)})
    return pd.DataFrame(rows)


def test_truncation_by_hand():
    """Five tokens and a stop keep two; an unstopped six keep three; one and a stop keep one; a stop alone stays."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, STOP], [1, 2, 3, 4, 5, 6], [7, STOP, PAD, PAD, PAD, PAD],
                           [STOP, PAD, PAD, PAD, PAD, PAD]])
    cut, lengths = truncate(tokens, torch.tensor([6, 6, 2, 1]), stop=STOP, pad=PAD)
    assert cut.tolist() == [[1, 2, STOP, PAD], [1, 2, 3, STOP], [7, STOP, PAD, PAD], [STOP, PAD, PAD, PAD]]
    assert lengths.tolist() == [3, 4, 2, 1]
    most, _ = truncate(torch.tensor([[1]]), torch.tensor([1]), stop=STOP, pad=PAD)
    assert most.tolist() == [[1, STOP]], "an unstopped thinking is ended too"
    with pytest.raises(ValueError, match=r"in \(0, 1\), got 1"):
        truncate(tokens, torch.tensor([6, 6, 2, 1]), stop=STOP, pad=PAD, share=1)


def test_effects_per_category_are_differences_of_those_prompts():
    table = outcomes({"on": 0.8, "off": 0.4, "shuffled": 0.1, "truncated": 0.6, "greedy": 0.8})
    found = thinking_effects(table, difference)
    assert {name.partition("/")[0] for name in found} == set(CONTROLS)
    assert {name.partition("/")[2] for name in found} == {"", *TAGS, "plain", "reasoning"}
    rows = table[table["tag"] == "position"]
    means = rows.groupby("thinking")["exact"].sum() / rows.groupby("thinking")["images"].sum()
    assert found["thinking on - truncated/position"]["value"] == pytest.approx(means["on"] - means["truncated"])
    assert found["thinking on - off/position"]["low"] > 0.1, "where thinking helps the interval says so"
    assert found["thinking on - off/counting"]["low"] < 0 < found["thinking on - off/counting"]["high"]
    assert found["thinking on - off/position"]["prompts"] == 30


def test_effects_without_a_cell_leave_its_control_out():
    found = thinking_effects(outcomes({"on": 0.8, "off": 0.4}), difference)
    assert {name.partition("/")[0] for name in found} == {"thinking on - off"}


def table(loss: float, plans: float, prompts: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    found = outcomes({"greedy": 0.5}, prompts)
    found["plan_right"] = np.where(np.arange(prompts) < plans * prompts, 4, 0)
    return understanding_table(found, {f"{i:04d}": (10, 10 * loss + float(rng.random())) for i in range(prompts)})


def test_understanding_by_hand():
    found = outcomes({"greedy": 0.5}, 3).assign(plan_right=[4, 0, 2])
    rows = understanding_table(found, {"0000": (2, 1.0), "0001": (4, 1.0), "0002": (2, 2.0), "other": (1, 9.0)})
    metrics = understanding_metrics(rows)
    assert metrics["understanding/text_loss"] == 0.5
    assert metrics["understanding/plan_accuracy"] == 0.5
    assert metrics["understanding/text_loss/counting"] == 0.75                  # prompts 0 and 2: 3 nats of 4 tokens
    assert metrics["understanding/plan_accuracy/reasoning"] == 1.0              # prompt 0
    assert value_of(understanding_measures(rows)["text_loss/plain"]) == 0.5
    with pytest.raises(ValueError, match="0001 and 0 others have none"):
        understanding_table(found, {"0000": (2, 1.0), "0002": (2, 2.0)})


def test_lost_understanding_is_both_measures_past_their_intervals():
    before = table(0.5, 0.8)
    lost = understanding_change(before, table(0.7, 0.5), difference)
    assert lost["text_loss"]["value"] == pytest.approx(0.2)
    assert lost["plan_accuracy"]["value"] == pytest.approx(-0.3)
    assert is_understanding_lost(lost)
    assert not is_understanding_lost(understanding_change(before, before, difference))
    assert not is_understanding_lost(understanding_change(before, table(0.7, 0.8), difference)), "another phrasing alone"
    assert not is_understanding_lost(understanding_change(before, table(0.5, 0.5), difference))
    with pytest.raises(ValueError, match="the same prompts"):
        understanding_change(before, table(0.5, 0.8, prompts=30), difference)


def test_the_table_survives_its_file_and_damage_is_named(tmp_path):
    path = tmp_path / "understanding.csv"
    write_understanding(table(0.5, 0.8), path)
    pd.testing.assert_frame_equal(read_understanding(path), table(0.5, 0.8))
    whole = path.read_text()
    for damage, line in ((whole[:-5], 1), (whole.replace("0001,position,False,10", "0001,position,False,0"), 3),
                         (whole.replace("0001,position,False,10", "0001,position,maybe,10"), 3), ("a,b\n1,2\n", 1)):
        path.write_text(damage)
        with pytest.raises(ValueError, match=f"understanding.csv line {line}: .*evaluate again"):
            read_understanding(path)
