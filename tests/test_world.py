"""The world of shapes: scenes, pixels, prompts and plans say the same thing."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest

from unigrpo.evaluation.geneval import relative_position
from unigrpo.seeding import generator
from unigrpo.worlds.shapes import (
    CELLS,
    COLORS,
    SHAPES,
    Object,
    caption_text,
    parse_plan,
    plan_satisfies,
    plan_text,
    random_scene,
    render,
    sample_record,
    sample_scene,
    sft_thinking,
    vocabulary,
    wrong_plan,
)
from unigrpo.worlds.shapes.prompts import TAGS
from unigrpo.worlds.shapes.reasoning import ATTRIBUTES, KINDS, MIXTURES, infer
from unigrpo.worlds.shapes.scene import CELL_CENTERS, OPPOSITES, PALETTE, RELATIONS, relation_holds
from unigrpo.worlds.shapes.specification import Clause, Specification, all_specifications, draw, satisfies, specification

RECORDS = [sample_record(generator(0, "world", i), reasoning_difficulty=1 + i % 2) for i in range(1500)]


def test_keyed_numbers_depend_on_every_part_of_the_key() -> None:
    keys: list[tuple[str | int, ...]] = [(0, "a"), (1, "a"), (0, "a", 0), (0, "a", "0"), (0, "a0"), (0,)]
    draws = [generator(*key).random() for key in keys]  # type: ignore[arg-type]
    assert len(set(draws)) == len(keys)
    assert generator(3, "x", 7).random() == generator(3, "x", 7).random()
    with pytest.raises(TypeError, match="int or str"):
        generator(0, 1.5)  # type: ignore[arg-type]


def test_palette_is_well_separated() -> None:
    distances = [np.linalg.norm(np.subtract(PALETTE[a], PALETTE[b])) for a, b in combinations(COLORS, 2)]
    assert min(distances) > 0.39


def test_rendering_is_plain_where_nothing_is_drawn_and_solid_inside() -> None:
    scene = (Object("red", "square", "center"),)
    image = render([scene], generator(0, "r"), jitter=0.0, size_variation=0.0)[0]
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.float32
    assert np.allclose(image[16, 16], PALETTE["red"], atol=1e-6)
    assert np.allclose(image[:11], image[0, 0])
    assert np.allclose(image[:, 21:], image[0, 0])
    covered = (image[..., 1].astype(float) - image[0, 0, 1]).sum() / (PALETTE["red"][1] - image[0, 0, 1])
    assert covered == pytest.approx(6 * 6 + (4 * 6 + 4) * 0.8, rel=1e-5)  # by hand: 7.6 px, a rim of 0.8


def test_a_picture_does_not_depend_on_later_scenes() -> None:
    scenes = [random_scene(generator(1, i)) for i in range(8)]
    assert np.array_equal(render(scenes, generator(0, "r"))[:3], render(scenes[:3], generator(0, "r")))


def test_relations_are_genevals_rule_at_nominal_places() -> None:
    for a in CELLS:
        for b in CELLS:
            boxes = []
            for cell in (a, b):
                x, y = CELL_CENTERS[CELLS.index(cell) % 3], CELL_CENTERS[CELLS.index(cell) // 3]
                boxes.append((x - 4.2, y - 4.2, x + 4.2, y + 4.2))
            official = relative_position(boxes[0], boxes[1])
            assert {name for name in RELATIONS if relation_holds(name, a, b)} == set(official), (a, b)
            assert all(relation_holds(OPPOSITES[n], b, a) for n in RELATIONS if relation_holds(n, a, b))


def test_the_space_of_specifications() -> None:
    keys = [spec.key() for spec in all_specifications()]
    assert len(keys) == len(set(keys))
    single = 4 * 7 * 10                                  # shape x colour or none x cell or none
    counting = 4 * 3 * 7 + 6 * 5 * 7 ** 2                # 2..4 of one shape; (1,2) (2,1) (2,2) (1,3) (3,1) of two
    two = comb(4, 2) * 7 ** 2 * (10 ** 2 - 9 ** 2)       # at most one of the two has a cell
    more = comb(4, 3) * 6 ** 3 + 6 ** 4                  # three or four, all coloured
    related = 7 ** 2 * 6 * 4 + 7 ** 3 * 4 * 12           # two, or two of three: 4 relations, told from either side
    assert len(keys) == single + counting + two + more + related == 27220 >= 20_000
    assert {specification(r).key() for r in RECORDS} <= set(keys)


def test_a_relation_told_from_the_other_side_is_the_same_specification() -> None:
    clauses = (Clause("circle", color="red"), Clause("square"))
    swapped = Specification(clauses[::-1], ("right of", 0, 1))
    assert Specification(clauses, ("left of", 0, 1)).key() == swapped.key() != Specification(clauses, ("right of", 0, 1)).key()


def test_prompts_are_varied_balanced_and_in_the_vocabulary() -> None:
    words = set(vocabulary())
    assert vocabulary() == sorted(words)
    assert len(words) < 200
    assert {"plan", "first", "then", "draw"} <= words
    assert {w for r in RECORDS for w in r.prompt.split()} <= words
    assert set(Counter(r.tag for r in RECORDS)) == set(TAGS)
    kinds = Counter(r.reasoning for r in RECORDS)
    assert 0.6 < 1 - kinds[None] / len(RECORDS) < 0.7
    assert all(0.05 * len(RECORDS) < kinds[kind] < 0.12 * len(RECORDS) for kind in KINDS)
    assert len({r.prompt for r in RECORDS}) > 0.85 * len(RECORDS)
    sizes = Counter(specification(r).size for r in RECORDS)
    assert sizes[4] < 0.2 * len(RECORDS)
    assert max(sizes) == 4


def test_records_follow_genevals_schema() -> None:
    for record in RECORDS:
        classes = [clause["class"] for clause in record.include]
        assert len(set(classes)) == len(classes), "GenEval looks at a class's first boxes only"
        assert record.needs_reasoning == (record.reasoning is not None) == any("inferred" in c for c in record.include)
        assert [i for i, c in enumerate(record.include) if "position" in c] == ([1] if record.tag == "position" else [])
        excluded = [{"class": c["class"], "count": c["count"] + 1} for c in record.include]
        assert list(record.exclude) == (excluded if record.tag == "counting" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_an_inference_does_not_say_its_answer(kind: str) -> None:
    """The value is not in the words, or not alone: a list, two numbers to compare, or the colours to mix."""
    rng = generator(0, "infer", kind)
    values = {"count": (1, 2, 3, 4), "color": COLORS, "class": SHAPES, "position": RELATIONS}
    for attribute in ATTRIBUTES[kind]:
        for value in values[attribute]:
            found = [infer(kind, attribute, value, rng, difficulty=d) for d in (1, 2) for _ in range(10)]
            if kind == "mixture" and value not in MIXTURES:
                assert found == [None] * 20
                continue
            for inference in found:
                assert inference is not None
                assert inference.misread != value
                if kind in ("sides", "world_color", "opposite", "mixture"):
                    assert str(value) not in inference.phrase
                elif kind in ("negation", "ordinal"):
                    assert sum(word in inference.phrase.split() for word in values[attribute]) >= 2


@pytest.mark.parametrize(("phrase", "answer"), [
    ("three minus two", 1), ("two plus one", 3), ("half of six", 3), ("two times two", 4), ("one plus one", 2)])
def test_arithmetic_by_hand(phrase: str, answer: int) -> None:
    rng = generator(0, "sums")
    found = {i.phrase: value for value in (1, 2, 3, 4) for _ in range(200)
             if (i := infer("arithmetic", "count", value, rng, difficulty=2)) is not None}
    assert found[phrase] == answer


def test_sampled_scenes_satisfy_their_prompt_and_wrong_ones_do_not() -> None:
    for i, record in enumerate(RECORDS):
        rng = generator(1, "scene", i)
        scene = sample_scene(record, rng)
        assert plan_satisfies(scene, record), record.prompt
        extra = Object("red", "circle", next(c for c in CELLS if c not in {o.cell for o in scene}))
        assert not plan_satisfies((*scene, extra), record)
        assert not plan_satisfies(scene[1:], record)
        if record.needs_reasoning:
            for systematic in (True, False):
                wrong = wrong_plan(record, rng, systematic=systematic)
                assert not plan_satisfies(wrong, record)
                assert 1 <= len(wrong) <= 4
                assert len({item.cell for item in wrong}) == len(wrong)
        else:
            with pytest.raises(ValueError, match="infer"):
                wrong_plan(record, rng, systematic=True)


def test_each_wrong_attribute_is_wrong() -> None:
    spec = Specification((Clause("circle", 1, "red"), Clause("square")), ("left of", 0, 1))
    right = (Object("red", "circle", "left"), Object("blue", "square", "right"))
    assert satisfies(right, spec)
    assert satisfies(right[::-1], spec)
    for wrong in (Object("blue", "circle", "left"), Object("red", "cross", "left"), Object("red", "circle", "top right")):
        assert not satisfies((wrong, right[1]), spec)
    cell = Specification((Clause("circle", 1, None, "top"),))
    assert satisfies((Object("red", "circle", "top"),), cell)
    assert not satisfies((Object("red", "circle", "left"),), cell)
    assert all(satisfies(draw(cell, generator(0, i)), cell) for i in range(5))


def test_systematic_mistakes_are_the_same_every_time_and_random_ones_differ() -> None:
    record = next(r for r in RECORDS if r.reasoning == "world_color" and r.tag == "colors")
    colors = {systematic: {wrong_plan(record, generator(2, i), systematic=systematic)[0].color for i in range(40)}
              for systematic in (True, False)}
    assert len(colors[True]) == 1
    assert len(colors[False]) == 5


def test_warm_up_thinking_is_wrong_as_often_as_stated() -> None:
    reasoning = [r for r in RECORDS if r.needs_reasoning]
    plain = [r for r in RECORDS if not r.needs_reasoning]
    right = []
    for i, record in enumerate(reasoning):
        text, is_right = sft_thinking(record, generator(3, i), 0.4, 0.5)
        assert plan_satisfies(parse_plan(text), record) == is_right
        right.append(is_right)
    assert np.mean(right) == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / len(right)))
    assert all(sft_thinking(r, generator(3, i), 0.4, 0.5)[1] for i, r in enumerate(plain))


def test_plans_round_trip_in_every_phrasing() -> None:
    openers, words = set(), set(vocabulary())
    for i in range(1500):
        rng = generator(4, i)
        scene = random_scene(rng)
        text = plan_text(scene, rng)
        assert parse_plan(text) == scene
        assert set(text.split()) <= words
        assert len(text.split()) <= 36
        openers.add(text.split()[0])
    assert len(openers) == 5


@pytest.mark.parametrize("text", [
    "", "draw", "draw a red circle", "a red circle at the", "draw a pink circle left .",
    "draw a red circle left a blue cross right .",
    "draw a red circle left , a blue cross left .", "draw a red circle left . .", "left red circle , and",
    "a red circle left , a red circle right , a red circle top , a red circle bottom , a red circle center ."])
def test_malformed_plans_are_refused(text: str) -> None:
    assert parse_plan(text) is None


def test_mixed_phrasings_are_read() -> None:
    scene = (Object("orange", "cross", "top left"), Object("red", "circle", "left"))
    for text in ("plan : top left orange cross , a red circle left .", "an orange cross in the top left and left red circle"):
        assert parse_plan(text) == scene


def test_captions_are_literal_and_keep_away_from_what_is_reserved() -> None:
    words = set(vocabulary())
    for i in range(300):
        scene = random_scene(generator(5, i))
        assert set(caption_text(scene, generator(6, i)).split()) <= words
    scene = (Object("red", "circle", "top"),)
    assert parse_plan(caption_text(scene, generator(0, "c"), reserved=lambda key: True)) == scene
    told = {caption_text(scene, generator(7, i), reserved=lambda key: "top" not in key) for i in range(30)}
    assert all(text.endswith("a red circle in the top") for text in told)
