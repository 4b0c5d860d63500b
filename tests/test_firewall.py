"""The firewall: disguised benchmark prompts are caught, other specifications are not, shipped digests are the benchmarks'."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path

import pytest
from disguises import DISGUISES
from official_files import BENCHMARKS, needs_benchmarks

from unigrpo.evaluation.geneval import COLORS, RELATIONS
from unigrpo.prompts import geneval_grammar, shipped
from unigrpo.prompts.canonical import forms, include_form
from unigrpo.prompts.firewall import Firewall, refuse_overlap, shipped_firewall
from unigrpo.prompts.geneval_grammar import fields, official_lines, official_specifications, specification, to_record
from unigrpo.prompts.importers import CATEGORIES, read_prompts, text_record
from unigrpo.seeding import generator
from unigrpo.worlds.shapes import sample_record

OFFICIAL = [json.loads(line) for line in official_lines()]


def plain_record(prompt: str):
    return text_record(prompt, tag="text", split="train", source="test")


def not_caught(texts: list[str], firewall: Firewall) -> list[str]:
    """The texts that are not found in one of the firm forms (canonical, or exact where a disguise changed nothing)."""
    return [text for text in texts if (found := firewall.overlap(plain_record(text))) is None or found.kind == "reordered"]


@pytest.fixture(scope="module")
def geneval() -> Firewall:
    return Firewall().protect_shipped(allow=["t2i_compbench_*", "geneval_unseen_objects"])


@pytest.fixture(scope="module")
def everything() -> Firewall:
    return shipped_firewall()


def test_there_are_at_least_twenty_disguises() -> None:
    assert len(DISGUISES) >= 20


@pytest.mark.parametrize("name", DISGUISES)
def test_disguises_are_caught(name: str, geneval: Firewall) -> None:
    texts = [text for record in OFFICIAL for text in DISGUISES[name](record)]
    assert len(texts) >= 15
    assert not_caught(texts[::1 + len(texts) // 120], geneval) == []


@pytest.mark.slow
def test_every_disguise_of_every_official_record_is_caught(geneval: Firewall) -> None:
    texts = [text for disguise in DISGUISES.values() for record in OFFICIAL for text in disguise(record)]
    assert len(texts) > 20_000
    assert not_caught(texts, geneval) == []


def test_a_disguise_changes_the_text() -> None:
    """No disguise is caught only because it is none."""
    for name, disguise in DISGUISES.items():
        changed = [text != record["prompt"] for record in OFFICIAL for text in disguise(record)]
        assert sum(changed) >= 5, name


def test_other_words_for_the_same_clauses_are_caught(geneval: Firewall) -> None:
    """Whatever the text says, a record judged like an official one is the official one."""
    for entry in OFFICIAL:
        record = to_record({**entry, "prompt": "as many timepieces as a bicycle has wheels"})
        found = geneval.overlap(record)
        assert found is not None
        assert found.kind == "specification"


def test_text_and_clauses_have_one_form() -> None:
    for entry in OFFICIAL:
        assert include_form(entry["include"]) == forms(entry["prompt"]).canonical
    assert include_form([{"class": "circle", "count": 1, "cell": "top left"}]) is None


def edits(entry: dict) -> list[dict]:
    """Official records with one thing changed: a count, a colour, the relation, colours or objects exchanged."""
    clauses = entry["include"]
    names = [c["class"] for c in clauses]
    if entry["tag"] == "counting":
        return [fields("counting", names, count=n) for n in (2, 3, 4, 5)]
    if entry["tag"] == "colors":
        return [fields("colors", names, colors=[color]) for color in COLORS]
    if entry["tag"] == "color_attr":
        return [fields("color_attr", names, colors=pair) for pair in product(COLORS, repeat=2)]
    if entry["tag"] == "position":
        return [fields("position", pair, relation=rel) for rel in RELATIONS for pair in (names, names[::-1])]
    return [fields("two_object", [*names, "dog"][:2])]


def test_near_misses_pass(geneval: Firewall) -> None:
    """One change makes another specification, which the text must tell: no false alarm, and no miss where it is official."""
    near = {json.dumps(edit): edit for entry in OFFICIAL for edit in edits(entry)}
    assert len(near) > 10_000
    sample = list(near.values())[::7]
    wrong = [edit["prompt"] for edit in sample if (geneval.overlap(plain_record(edit["prompt"])) is not None)
             != (specification(edit["include"]) in official_specifications())]
    assert wrong == []


def test_the_worlds_prompts_pass(everything: Firewall) -> None:
    records = [sample_record(generator(0, "firewall", i)) for i in range(400)]
    assert refuse_overlap(records, everything) == 400


@pytest.mark.parametrize(("ours", "theirs", "kind"), [
    ("The gray-coloured cat, next to a bench", "a bench near a grey cat", "canonical"),
    ("a sofa in front of a chicken", "a chicken hidden by a couch", "canonical"),
    ("A white and black cat", "the black, white cat", "canonical"),
    ("A red-coloured dog, 1 cat (blue), 4k", "a photo of a blue cat and a red dog", "canonical"),
    ("three cats that are blue", "3 blue cats", "canonical"),
    ("a wood spoon and a metal fork", "a metallic fork and a wooden spoon", "canonical"),
    ("three women, four bees and three ships", "4 bees, 3 ships and 3 women", "canonical"),
    ("a dog and a cat left of a bench", "a cat left of a bench with a dog", "canonical"),
    ("Knives and children", "a child and a knife", "canonical"),
    ("一只红色的狗", "一只红色的狗。", "canonical"),
    ("On the metal hook by the glass mirror hang the leather belt and the fluffy scarf",
     "The leather belt and fluffy scarf hang on the metallic hook by the glass mirror.", "reordered"),
])
def test_files_are_protected(tmp_path: Path, ours: str, theirs: str, kind: str) -> None:
    path = tmp_path / "benchmark.txt"
    path.write_text(f"something else\n{theirs}\n", encoding="utf-8")
    overlap = Firewall().protect_file(path).overlap(plain_record(ours))
    assert overlap is not None
    assert overlap.kind == kind
    assert str(overlap.places[0]) == f"{path}, line 2 ({theirs!r})"


@pytest.mark.parametrize(("ours", "theirs"), [
    ("a red dog and a blue cat", "a blue dog and a red cat"), ("a dog left of a cat", "a cat left of a dog"),
    ("a dog left of a cat", "a dog above a cat"), ("two dogs", "three dogs"), ("a hot dog", "a dog"),
    ("a black cap", "a black cape"), ("a red kit", "a red kite"), ("one tub", "one tube"), ("the sky", "the ski"),
    ("a wine glass", "a glass of wine"), ("an orange", "an orange cat"), ("a purple orange", "an orange and purple vase"),
    ("a chicken hidden by a couch", "a couch hidden by a chicken"), ("一只狗", "一只猫"), ("कुत्ता", "कत"), ("🐶", "🐱"),
    ("one girl, two sofas, three peaches, three pigs, four beds, two cups and six birds",
     "two girls, one sofa, three peaches, three pigs, four beds, two cups and six birds"),
    ("The black cat sleeps on the white sofa beside the red lamp under a green clock",
     "The white cat sleeps on the black sofa beside the red lamp under a green clock"),
])
def test_different_prompts_stay_different(ours: str, theirs: str) -> None:
    assert not {f for f in forms(ours) if f} & {f for f in forms(theirs) if f}


def test_an_overlap_lists_the_pairs(tmp_path: Path, everything: Firewall) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"tag": "counting", "prompt": "four wizards", "include": [{"class": "wizard", "count": 4}]}))
    firewall = shipped_firewall(against=[path])
    good, bench, wizards = map(plain_record, ("a wizard above a bench", "The BENCHES!", "Wizards x4"))
    with pytest.raises(ValueError, match=r"of 3 these are: 2 \(2 canonical; ") as error:
        refuse_overlap([good, bench, wizards], firewall)
    assert f"- canonical: 'The BENCHES!' ({bench.id}) is in geneval" in str(error.value)
    assert f"- canonical: 'Wizards x4' ({wizards.id}) is in {path}, line 1 ('four wizards')" in str(error.value)
    assert "a wizard above a bench" not in str(error.value)
    assert refuse_overlap([good, wizards], everything) == 2


def test_lists_can_be_allowed_by_name(everything: Firewall) -> None:
    record = plain_record("a photo of a bench")
    with pytest.raises(ValueError, match="in geneval"):
        refuse_overlap([record], everything)
    assert Firewall().protect_shipped(allow=["geneval*"]).overlap(record) is None
    with pytest.raises(ValueError, match=r"must be among geneval, .* got \['flickr'\]"):
        Firewall().protect_shipped(allow=["flickr"])


def test_long_and_hostile_texts_take_no_time() -> None:
    start = time.process_time()
    for unit in ("is ", "please ", "a dog left of ", "it above it , ", "left of it is ", "red and ", ", ", "a has it ", "((",
                 "two ",
                 "<", "in the ", "--a 1", "black and white ", "on the left "):
        forms(unit * (4000 // len(unit)))
    assert time.process_time() - start < 5


@needs_benchmarks
def test_shipped_digests_are_those_of_the_official_files(tmp_path: Path) -> None:
    for path in shipped.write_digests(BENCHMARKS, tmp_path):
        assert path.read_bytes() == (shipped.FOLDER / path.name).read_bytes(), path.name
    assert {p.name for p in shipped.FOLDER.iterdir()} == {f"{name}.txt" for name in shipped.LISTS}


@needs_benchmarks
@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*/*_*")), ids=lambda path: path.name)
def test_every_list_of_the_benchmarks_is_known(path: Path, everything: Firewall) -> None:
    """The parts of T2I-CompBench's lists (seen, unseen, action, ...) included."""
    if path.name in ("object_names.txt", "new_objects.txt"):  # no prompts
        return
    records = read_prompts(path).records[::5]
    assert {overlap.kind for overlap in everything.overlaps(records)} == {"exact"}
    assert len(everything.overlaps(records)) == len(records)


def test_shipped_lists_hold_no_text_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (shipped.FOLDER / "geneval.txt").read_text()
    assert len(shipped.LISTS) == 2 + 2 * len(CATEGORIES)
    assert text == shipped.digest_text("geneval", (entry["prompt"] for entry in OFFICIAL))
    assert not any(word in text for word in geneval_grammar.CLASSES if len(word) > 4)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    for content, message in ((text[:-40], "got .* and 552 prompts"), (text.replace("version 1", "version 0"), "by version 1")):
        (tmp_path / "geneval.txt").write_text(content)
        shipped.read_digests.cache_clear()
        with pytest.raises(ValueError, match=message):
            shipped.read_digests("geneval")
    (tmp_path / "geneval.txt").unlink()
    with pytest.raises(ValueError, match="is missing"):
        shipped.read_digests("geneval")
    monkeypatch.undo()
    shipped.read_digests.cache_clear()
