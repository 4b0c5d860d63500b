"""Importing prompt files: official ones by digest, others by schema; bad files are named with their line; the commands."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from official_files import BENCHMARKS, needs_benchmarks

from unigrpo.cli import main
from unigrpo.prompts.geneval_grammar import official_lines
from unigrpo.prompts.importers import CATEGORIES, read_prompts
from unigrpo.prompts.records import read_records, record_id


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    """A folder like GenEval's prompts/, made by the grammar."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "evaluation_metadata.jsonl").write_text("".join(line + "\n" for line in official_lines()))
    return folder


def test_geneval(geneval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "geneval.jsonl"
    for root in (geneval, geneval.parent, geneval / "evaluation_metadata.jsonl"):
        assert main(["import-prompts", "geneval", "--from", str(root), "--output", str(out)]) == 0
        records = read_records(out)
        assert [r.prompt for r in records] == [json.loads(line)["prompt"] for line in official_lines()]
    assert {(r.split, r.source) for r in records} == {("eval", "geneval")}
    assert all(r.id == record_id(r.tag, r.prompt, r.include, r.exclude) for r in records)
    assert "553 prompts (80 single_object, 99 two_object, 80 counting, 94 colors, 100 position" in capsys.readouterr().out


def test_another_file_is_refused_unless_its_digest_is_given(geneval: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    path = geneval / "evaluation_metadata.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    command = ["import-prompts", "geneval", "--from", str(geneval), "--output", str(tmp_path / "out.jsonl")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "wanted sha256 5c48e0813e812e3c" in error
    assert "without converting line ends" in error
    assert not (tmp_path / "out.jsonl").exists()
    found = error.split("--sha256 evaluation_metadata.jsonl=")[1].split()[0]
    assert main([*command, "--sha256", found]) == 0
    assert main([*command, "--sha256", f"evaluation_metadata.jsonl={found.upper()}"]) == 0
    assert main([*command, "--sha256", "abc"]) == 2
    assert "[FILE=]HEX with 64 hex digits, got 'abc'" in capsys.readouterr().err


def test_a_missing_file_names_the_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path / "out.jsonl")]
    assert main(["import-prompts", "geneval", "--from", str(tmp_path), *out]) == 2
    assert f"{tmp_path}/geneval/evaluation_metadata.jsonl" in capsys.readouterr().err
    assert main(["import-prompts", "t2i-compbench", "--from", str(tmp_path), *out]) == 2
    assert f"{tmp_path}/examples/dataset/color_val.txt" in capsys.readouterr().err
    assert main(["import-prompts", "geneval", *out]) == 2
    assert "needs --from" in capsys.readouterr().err


@needs_benchmarks
@pytest.mark.parametrize(("part", "number", "repeated", "split"), [("val", 300, 0, "eval"), ("train", 700, 41, "train")])
def test_t2i_compbench(tmp_path: Path, part: str, number: int, repeated: int, split: str, capsys) -> None:
    out = tmp_path / "t2i.jsonl"
    assert main(["import-prompts", "t2i-compbench", "--from", str(BENCHMARKS), "--part", part, "--output", str(out)]) == 0
    records = read_records(out)
    assert len(records) == 8 * number - repeated
    assert f"{repeated} repeated lines left out" in capsys.readouterr().out
    assert list(Counter(r.tag for r in records)) == [*CATEGORIES]
    assert {(r.split, r.source) for r in records} == {(split, f"t2i_compbench/{c}_{part}") for c in CATEGORIES}
    assert not any("\r" in r.prompt or r.prompt != r.prompt.strip() for r in records)
    assert all(r.include == ({"class": r.prompt, "count": 1},) for r in records)


@needs_benchmarks
def test_t2i_compbench_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    shutil.copyfile(BENCHMARKS / "t2i_compbench" / "spatial_val.txt", folder / "spatial_val.txt")
    out = tmp_path / "out.jsonl"
    command = ["import-prompts", "t2i-compbench", "--from", str(folder), "--output", str(out), "--category"]
    assert main([*command, "spatial"]) == 0
    assert len(read_records(out)) == 300
    (folder / "spatial_val.txt").write_bytes((folder / "spatial_val.txt").read_bytes()[:-9])
    assert main([*command, "spatial"]) == 2
    assert "spatial_val.txt: wanted sha256 8707a1d7" in capsys.readouterr().err
    assert main([*command, "colour"]) == 2
    assert "categories must be among ('color', 'shape'" in capsys.readouterr().err


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa griffin on a roof\r\n\r\n  a photo of a bench\na piñata\na griffin on a roof".encode())
    out = tmp_path / "out.jsonl"
    assert main(["import-prompts", str(path), "--split", "train", "--output", str(out)]) == 0
    assert [(r.prompt, r.tag, r.split, r.source) for r in read_records(out)] == [
        ("a griffin on a roof", "text", "train", "mine.txt"), ("a photo of a bench", "text", "train", "mine.txt"),
        ("a piñata", "text", "train", "mine.txt")]
    printed = capsys.readouterr().out
    assert "3 prompts (3 text); 1 repeated lines left out" in printed
    assert "overlap with benchmarks: 1 (1 exact; " in printed


def test_genevals_schema_and_ours(tmp_path: Path) -> None:
    lines = [*official_lines()[180:182]]
    (tmp_path / "theirs.jsonl").write_text("\n".join([*lines, *lines]))
    imported = read_prompts(tmp_path / "theirs.jsonl", split="eval")
    assert (len(imported.records), imported.lines, imported.repeated) == (2, [1, 2], 2)
    assert main(["import-prompts", str(tmp_path / "theirs.jsonl"), "--output", str(tmp_path / "ours.jsonl")]) == 0
    again = read_prompts(tmp_path / "ours.jsonl")
    assert [r.id for r in again.records] == [r.id for r in imported.records]
    assert {r.source for r in again.records} == {"theirs.jsonl"}


LINE = official_lines()[180]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "wanted at least one prompt, got an empty file"),
    (b"\n \r\n", "wanted at least one prompt, got blank lines"),
    (f"{LINE}\n{LINE[:-20]}".encode(), "line 2: wanted one complete JSON object a line, got .*cut off"),
    (f"{LINE}\n[1]\n".encode(), "line 2: wanted a JSON object"),
    (f"{LINE}\n\nplain words\n".encode(), "line 3: wanted one complete JSON object a line, got 'plain words'"),
    (f"{LINE}\n{LINE.replace('prompt', 'promt')}\n".encode(), "line 2: wanted the key 'prompt'"),
    (f"{LINE}\n{LINE[:-1]}, \"seed\": 3}}\n".encode(), r"line 2: wanted only the keys .*got \['seed'\]"),
    (LINE.replace('"count": 2', '"count": "2"').encode(), "line 1.*'count' to be int, got '2'"),
    (LINE.replace(LINE[LINE.index("a photo"):-2], " ").encode(), "line 1: wanted a prompt with words"),
    (b'{"id": "1", "tag": "t", "prompt": "a", "include": [{"class": "a", "count": 1}]}\n'
     b'{"id": "1", "tag": "t", "prompt": "b", "include": [{"class": "b", "count": 1}]}', "line 2: wanted an id of its own, "
                                                                                         "got 1 of another record, 'a'"),
    (b'{"id": "1", "tag": "t", "prompt": "a", "include": [{"class": "a", "count": 1}]}\n'
     b'{"id": "1", "tag": "t", "prompt": "a", "include": [{"class": "a", "count": 2}]}', "line 2: wanted an id of its own"),
    (b"a dog\na caf\xe9\n", r"line 2: wanted UTF-8 text, got the bytes b'\\xe9'"),
    (b"a dog\n\x1f\x8b\x08\x00rest", "line 2: wanted UTF-8 text"),
    (b"a dog\nPK\x03\x04\n", "line 2: wanted text, got the control characters"),
    (b"a dog\n" + b"a cat and " * 500, "line 2: wanted a prompt of at most 4000 characters, got 4999"),
])
def test_bad_files_are_named_with_their_line(tmp_path: Path, capsys, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path))
    assert main(["import-prompts", str(path), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(f"unigrpo import-prompts: {path}")
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a folder"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match="got no such file"):
        read_prompts(tmp_path / "none")


def test_make_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made.jsonl"
    assert main(["make-prompts", "--number", "80", "--seed", "3", "--mix", "position=3,colors=1", "--heldout", "dog", "cat",
                 "--output", str(made)]) == 0
    assert "80 prompts (60 position, 20 colors)" in capsys.readouterr().out
    assert main(["check-prompts", str(made)]) == 0
    assert "no overlap: 80 prompts against 8768 of 18 lists" in capsys.readouterr().out
    mixed = tmp_path / "mixed.txt"
    mixed.write_text("a griffin\nBENCHES, 4k\none television\n")
    assert main(["check-prompts", str(made), str(mixed), "--report", str(tmp_path / "report.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "of 83 these are: 2 (1 exact, 1 canonical; " in error
    assert "- canonical: 'BENCHES, 4k'" in error
    assert [json.loads(row)["prompt"] for row in (tmp_path / "report.jsonl").read_text().splitlines()] == [
        "BENCHES, 4k", "one television"]
    clean = tmp_path / "clean.jsonl"
    assert main(["check-prompts", str(mixed), "--against", str(made), "--output", str(clean)]) == 0
    assert [r.prompt for r in read_records(clean)] == ["a griffin"]
    assert main(["check-prompts", str(made), "--against", str(made)]) == 2
    assert f"80 in {made}" in capsys.readouterr().err
    assert main(["make-prompts", "--number", "9", "--mix", "position", "--output", str(made)]) == 2
    assert "--mix takes TAG=WEIGHT, divided by commas, got 'position'" in capsys.readouterr().err


def test_no_prompt_hides_behind_the_id_of_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, prompt in (("a", "a photo of a bench"), ("b", "a griffin")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": "1", "tag": "t", "prompt": prompt,
                                                            "include": [{"class": prompt, "count": 1}]}))
    assert main(["check-prompts", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 2
    assert "b.jsonl, line 1: wanted an id of its own, got 1 of another record, 'a photo of a bench'" in capsys.readouterr().err
    assert main(["check-prompts", str(tmp_path / "b.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    assert "no overlap: 1 prompts" in capsys.readouterr().out


def test_arguments_without_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a griffin\n")
    out = ["--output", str(tmp_path / "out.jsonl")]
    for arguments, message in (([str(path), "--part", "train"], "T2I-CompBench's"), ([str(path), "--from", "x"],
                                                                                     "--from goes with"),
                               (["geneval", "--from", str(tmp_path), "--split", "train"], "--split is for a FILE"),
                               ([str(path), "--split", "test"], "got 'test'"), ([str(path), "--sha256", "0" * 64],
                                                                                "wanted sha256 0"),
                               ([str(path), "--sha256", f"mien.txt={'0' * 64}"], "names mien.txt, but the file is mine.txt")):
        assert main(["import-prompts", *arguments, *out]) == 2
        assert message in capsys.readouterr().err
