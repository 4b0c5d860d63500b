"""Prompt files and curation: bad files are named, nothing leaks, categories are balanced."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from unigrpo.prompts.curate import SHARES, SPLITS, curate, generate, split_of
from unigrpo.prompts.leakage import canonical_text, deduplicate, find_leaks, refuse_leaks, specification_key
from unigrpo.prompts.records import parse_record, read_records, record_id, write_records
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes import parse_plan, plan_satisfies, sample_record
from unigrpo.worlds.shapes.prompts import make_record
from unigrpo.worlds.shapes.reasoning import KINDS
from unigrpo.worlds.shapes.specification import Clause, Specification

SIZES = {"sft": 160, "train": 120, "validation": 40, "eval": 120}
RECORDS = [sample_record(generator(0, "prompts", i)) for i in range(40)]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[PromptRecord]]:
    return generate(seed=0, sizes=SIZES)


def test_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "prompts.jsonl"
    unique = list({r.id: r for r in RECORDS}.values())
    write_records(path, unique)
    assert read_records(path) == unique
    first = path.read_bytes()
    write_records(path, unique)
    assert path.read_bytes() == first


@pytest.mark.parametrize(("change", "message"), [
    (lambda line: line[:-20], "one complete JSON object"),
    (lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "include"}), "the key 'include'"),
    (lambda line: json.dumps({**json.loads(line), "include": "circle"}), "'include' to be list, got 'circle'"),
    (lambda line: json.dumps({**json.loads(line), "prompt": 3}), "'prompt' to be str, got 3"),
    (lambda line: json.dumps({**json.loads(line), "prompt": " "}), "a prompt with words"),
    (lambda line: json.dumps({**json.loads(line), "include": [{"class": "circle"}]}), "'count' in every clause"),
    (lambda line: json.dumps({**json.loads(line), "include": [{"class": "circle", "count": 0}]}), "at least 1"),
    (lambda line: json.dumps({**json.loads(line), "include": []}), "at least one include"),
    (lambda line: json.dumps({**json.loads(line), "colour": "red"}), "only the keys"),
    (lambda line: "[]", "a JSON object"),
])
def test_bad_lines_are_named(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    write_records(path, RECORDS[:3])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], change(lines[1]), lines[2]]) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_records(path)
    assert f"{path}, line 2" in str(error.value)


def test_empty_files_and_repeated_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="empty file"):
        read_records(path)
    write_records(path, [RECORDS[0], RECORDS[0]])
    with pytest.raises(ValueError, match=r"line 2: wanted an id of its own, got '\w+ of line 1'"):
        read_records(path)


def test_genevals_own_lines_are_read() -> None:
    line = {"tag": "position", "include": [{"class": "dog", "count": 1},
                                           {"class": "bear", "count": 1, "position": ["left of", 0]}],
            "prompt": "a photo of a bear left of a dog", "id": "0" * 16}
    record = parse_record(json.dumps(line), "here")
    assert record.include[1]["position"] == ["left of", 0]
    assert not record.needs_reasoning


def test_ids_name_content_only() -> None:
    record = next(r for r in RECORDS if r.needs_reasoning)
    assert len(record.id) == 16
    assert int(record.id, 16) >= 0
    stripped = [{k: v for k, v in clause.items() if k != "inferred"} for clause in record.include]
    assert record_id(record.tag, record.prompt, stripped, record.exclude) == record.id
    assert record_id(record.tag, record.prompt + " .", stripped, record.exclude) != record.id


@pytest.mark.parametrize(("first", "second"), [
    ("A red Circle", "the red circle"), ("two circles", "two circle"), ("three crosses", "three cross"),
    ("a circle, a square", "a circle , a square")])
def test_canonical_text(first: str, second: str) -> None:
    assert canonical_text(first) == canonical_text(second)
    assert canonical_text("a red circle") != canonical_text("a blue circle")
    assert canonical_text("grass") == "grass"


def test_splits_do_not_leak_and_are_full(splits: dict[str, list[PromptRecord]]) -> None:
    assert {name: len(records) for name, records in splits.items()} == SIZES
    assert find_leaks(splits) == []
    for name, records in splits.items():
        assert {r.split for r in records} == {name}
        assert len({canonical_text(r.prompt) for r in records}) == len(records)
        assert all(split_of(specification_key(r), 0) == name for r in records)


def test_categories_kinds_and_held_out_combinations_are_balanced(splits: dict[str, list[PromptRecord]]) -> None:
    for name in ("sft", "train", "eval"):
        records = splits[name]
        assert sum(r.needs_reasoning for r in records) / len(records) == pytest.approx(0.65, abs=0.05)
        kinds = Counter(r.reasoning for r in records if r.needs_reasoning)
        assert set(kinds) == set(KINDS)
        assert min(kinds.values()) > 0.6 * max(kinds.values())
        assert set(Counter(r.tag for r in records)) == {"single_object", "two_object", "counting", "colors", "position",
                                                        "color_attr"}
    held = {name: sum(r.source == "shapes/heldout" for r in records) for name, records in splits.items()}
    assert held["sft"] == held["train"] == held["validation"] == 0
    assert held["eval"] == pytest.approx(0.3 * 0.65 * SIZES["eval"], abs=8)


def test_splits_depend_on_the_seed_only(splits: dict[str, list[PromptRecord]]) -> None:
    assert generate(seed=0, sizes=SIZES) == splits
    assert {r.id for r in generate(seed=1, sizes=SIZES)["eval"]} != {r.id for r in splits["eval"]}


def test_shares_of_specifications_are_kept() -> None:
    owners = Counter(split_of(str(i), 0) for i in range(2000))
    for split in SPLITS:
        assert owners[split] / 2000 == pytest.approx(SHARES[split] / sum(SHARES.values()), abs=0.04)


@pytest.mark.parametrize(("form", "prompt"), [
    ("exact", None), ("canonical", lambda text: text.replace("a ", "The ", 1).upper()),
    ("specification", lambda text: text + " please")])
def test_a_planted_duplicate_stops_the_stage_and_is_named(tmp_path: Path, splits, form: str, prompt) -> None:
    victim = next(r for r in splits["train"] if r.prompt.startswith("draw a "))
    planted = replace(victim, id="f" * 16, prompt=victim.prompt if prompt is None else prompt(victim.prompt), split="eval")
    with pytest.raises(ValueError, match=f"got 1 pairs that are: {form}") as error:
        curate(tmp_path / "out", seed=0, sizes=SIZES, thinking_error=0.4, systematic_share=0.5, extra={"eval": [planted]})
    for part in (repr(victim.prompt), repr(planted.prompt), victim.id, planted.id, "in train", "in eval"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_reasoning_prompt_is_a_paraphrase_of_the_plain_one() -> None:
    spec = Specification((Clause("circle", 3),))
    plain = replace(make_record(spec, "three circles"), split="train")
    puzzle = replace(make_record(spec, "two plus one circles"), split="eval", needs_reasoning=True)
    with pytest.raises(ValueError, match="specification: 'three circles'"):
        refuse_leaks({"train": [plain], "eval": [puzzle]})


def test_duplicates_within_a_split_are_dropped() -> None:
    record = RECORDS[0]
    kept, dropped = deduplicate([record, replace(record, id="0" * 16, prompt=record.prompt.upper())])
    assert kept == [record]
    assert dropped == 1


def test_curate_writes_everything_the_same_way_twice(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        metrics = curate(tmp_path / folder, seed=0, sizes=SIZES, thinking_error=0.4, systematic_share=0.5)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted([*(f"{split}.jsonl" for split in SPLITS), "leakage.json", "statistics.json"])
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert metrics["curate/leaks"] == 0
    assert list(metrics) == sorted(metrics)
    sft = read_records(tmp_path / "a" / "sft.jsonl")
    wrong = [r for r in sft if not plan_satisfies(parse_plan(r.thinking or ""), r)]
    assert all(parse_plan(r.thinking or "") is not None for r in sft)
    assert all(r.needs_reasoning for r in wrong)
    assert len(wrong) / sum(r.needs_reasoning for r in sft) == pytest.approx(0.4, abs=0.12)
    assert all(r.thinking is None for r in read_records(tmp_path / "a" / "eval.jsonl"))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sizes": {**SIZES, "eval": 0}}, "curate.sizes"), ({"sizes": SIZES, "shares": {"sft": 1.0}}, "curate.shares"),
    ({"sizes": {**SIZES, "validation": 4000}, "reasoning_share": 0.0, "tags": ["single_object"]}, "too few distinct prompts"),
    ({"sizes": SIZES, "reasoning_kinds": ["astrology"]}, "astrology")])
def test_impossible_requests_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(seed=0, **arguments)
