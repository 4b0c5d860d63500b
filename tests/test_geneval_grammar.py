"""GenEval's grammar: the official records byte for byte; training prompts that are none of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from official_files import BENCHMARKS, needs_benchmarks

from unigrpo.evaluation.geneval import TAGS
from unigrpo.prompts.firewall import shipped_firewall
from unigrpo.prompts.geneval_grammar import (
    CLASSES,
    FLOW_GRPO_MIX,
    capacity,
    fields,
    official_lines,
    official_specifications,
    quota,
    specification,
    to_fields,
    training_prompts,
)
from unigrpo.prompts.importers import GENEVAL, official_digests
from unigrpo.prompts.records import read_records, write_records
from unigrpo.types import PromptRecord


@pytest.fixture(scope="module")
def records() -> list[PromptRecord]:
    return training_prompts(500, seed=7, heldout_classes=["dog", "hot dog", "person"])[0]


def test_the_official_files_are_made_byte_for_byte() -> None:
    """By their published digests, so that a clone without the files checks it too."""
    import json

    metadata = "".join(line + "\n" for line in official_lines())
    prompts = "".join(json.loads(line)["prompt"] + "\n" for line in official_lines())
    digests = official_digests()
    assert hashlib.sha256(metadata.encode()).hexdigest() == digests[GENEVAL]
    assert hashlib.sha256(prompts.encode()).hexdigest() == digests["geneval/generation_prompts.txt"]


@needs_benchmarks
def test_the_official_files_are_equal() -> None:
    assert "".join(line + "\n" for line in official_lines()) == (BENCHMARKS / GENEVAL).read_text()
    assert [*CLASSES] == (BENCHMARKS / "geneval" / "object_names.txt").read_text().split("\n")[:80]


def test_records_of_each_tag() -> None:
    assert fields("counting", ["scissors"], count=3) == {
        "tag": "counting", "include": [{"class": "scissors", "count": 3}], "exclude": [{"class": "scissors", "count": 4}],
        "prompt": "a photo of three scissorses"}
    assert fields("position", ["orange", "dog"], relation="above") == {
        "tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "orange", "count": 1, "position": ["above", 0]}],
        "prompt": "a photo of an orange above a dog"}
    assert fields("color_attr", ["cup", "tv"], colors=["orange", "red"])["prompt"] == "a photo of an orange cup and a red tv"
    assert "exclude" not in fields("single_object", ["cup"])


def test_mirrored_and_swapped_records_have_one_specification() -> None:
    def of(*args, **kwargs):
        return specification(fields(*args, **kwargs)["include"])

    assert of("position", ["cup", "tv"], relation="left of") == of("position", ["tv", "cup"], relation="right of")
    assert of("position", ["cup", "tv"], relation="left of") != of("position", ["tv", "cup"], relation="left of")
    assert of("two_object", ["cup", "tv"]) == of("two_object", ["tv", "cup"])
    assert of("color_attr", ["cup", "tv"], colors=["red", "blue"]) != of("color_attr", ["cup", "tv"], colors=["blue", "red"])
    assert len(official_specifications()) == 552  # one of the 553 names another's objects the other way round


def test_training_prompts_keep_the_mix_and_the_classes_out(records: list[PromptRecord]) -> None:
    assert Counter(r.tag for r in records) == quota(500, FLOW_GRPO_MIX)
    used = {clause["class"] for record in records for clause in record.include}
    assert used & {"dog", "hot dog", "person"} == set()
    assert len(used) == 77
    assert len({specification(record.include) for record in records}) == len({record.id for record in records}) == 500


def test_training_prompts_are_not_official(records: list[PromptRecord]) -> None:
    """By construction, and by the text as the firewall reads it."""
    assert not {specification(record.include) for record in records} & official_specifications()
    assert shipped_firewall(allow=["t2i_compbench_*", "geneval_unseen_objects"]).overlaps(records) == []


def test_the_firewall_keeps_other_benchmarks_out() -> None:
    firewall = shipped_firewall()
    kept, dropped = training_prompts(300, seed=7, refused=lambda record: firewall.overlap(record) is not None)
    free, _ = training_prompts(300, seed=7)
    assert firewall.overlaps(kept) == []
    assert dropped["firewall"] > 0
    assert len(firewall.overlaps(free)) > 0  # so the firewall did something


def test_training_prompts_are_keyed(records: list[PromptRecord]) -> None:
    again, _ = training_prompts(500, seed=7, heldout_classes=["person", "hot dog", "dog"])
    assert again == records
    other, _ = training_prompts(500, seed=8, heldout_classes=["dog", "hot dog", "person"])
    assert {r.id for r in other} != {r.id for r in records}
    few, _ = training_prompts(200, seed=7, heldout_classes=["dog", "hot dog", "person"])
    assert {r.id for r in few} <= {r.id for r in records}


def test_training_prompts_are_records_of_genevals_schema(records: list[PromptRecord], tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", records)
    assert read_records(tmp_path / "train.jsonl") == records
    for record in records:
        entry = to_fields(record)
        colors = [clause["color"] for clause in record.include if "color" in clause]
        names = [clause["class"] for clause in record.include][::-1 if record.tag == "position" else 1]
        relation = next((c["position"][0] for c in record.include if "position" in c), "")
        assert entry == fields(record.tag, names, colors=colors, count=record.include[0]["count"], relation=relation)
        assert record.split == "train"


def test_a_tag_that_runs_out_is_an_error_or_leaves_its_rest() -> None:
    with pytest.raises(ValueError, match=r"the tag counting has 160 of its 240 specifications left .* 140 too few; lower its"):
        training_prompts(300, seed=0, mix={"counting": 1})
    with pytest.raises(ValueError, match="the tag single_object has 0 of its 80 specifications"):
        training_prompts(1, seed=0, mix={"single_object": 1})
    records, _ = training_prompts(400, seed=0, mix={"counting": 3, "colors": 1, "position": 1}, fill=True)
    assert Counter(r.tag for r in records) == {"counting": 160, "colors": 120, "position": 120}
    more, _ = training_prompts(300, seed=0, mix={"counting": 1}, max_count=8)
    assert {r.include[0]["count"] for r in more} == set(range(2, 9))


def test_capacity_counts_specifications() -> None:
    """Against counting them, on three classes one of which has no colour."""
    from itertools import permutations, product

    from unigrpo.evaluation.geneval import COLORS, RELATIONS
    names, things = ["person", "cup", "tv"], ["cup", "tv"]
    every = {
        "single_object": [fields("single_object", [n]) for n in names],
        "two_object": [fields("two_object", p) for p in permutations(names, 2)],
        "counting": [fields("counting", [n], count=c) for n in names for c in (2, 3, 4)],
        "colors": [fields("colors", [n], colors=[c]) for n in things for c in COLORS],
        "position": [fields("position", p, relation=r) for p in permutations(names, 2) for r in RELATIONS],
        "color_attr": [fields("color_attr", p, colors=c) for p in permutations(things) for c in product(COLORS, repeat=2)
                       if c[0] != c[1]]}
    for tag in TAGS:
        assert len({specification(entry["include"]) for entry in every[tag]}) == capacity(tag, 3, 2), tag


@pytest.mark.parametrize(("arguments", "message"), [
    ({"mix": {"colours": 1}}, r"got \['colours'\]"), ({"heldout_classes": ["unicorn"]}, r"got \['unicorn'\]"),
    ({"mix": {}}, "positive sum"), ({"mix": {"colors": -1, "counting": 2}}, "at least 0"), ({"mix": {"colors": float("nan")}},
                                                                                            "nan"),
    ({"max_count": 11}, r"max_count in \[2, 10\]"), ({"heldout_classes": CLASSES[:78]}, "got 2 and 4"), ({"number": 0},
                                                                                                         "got 0"),
])
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_prompts(**{"number": 5, "seed": 0, **arguments})


def test_quotas_add_up() -> None:
    assert quota(17, FLOW_GRPO_MIX) == {"two_object": 1, "counting": 5, "colors": 1, "position": 7, "color_attr": 3}
    for number in range(1, 60):
        assert sum(quota(number, {"counting": 1, "colors": 1, "position": 1.5}).values()) == number
