"""GenEval's layout: what is written is read back, and a set that is not what it should be is never scored unsaid."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geneval_sets import RECORDS, clause, write_set
from scorer_models import picture

from unigrpo.evaluation.backends.coco import CLASSES
from unigrpo.evaluation.geneval_folder import (
    check_files,
    metadata_of,
    parse_metadata,
    read_image_set,
    read_metadata_file,
    write_results,
    write_sample,
)
from unigrpo.evaluation.images import read_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", RECORDS[:3], samples=2)


def read(folder: Path, **settings: Any) -> Any:
    return check_files(read_image_set(folder, CLASSES, **{"samples": 2, "metadata": folder.with_suffix(".jsonl"), **settings}))


def test_what_is_written_is_read_back(folder: Path) -> None:
    images = read(folder)
    assert [sample.metadata for sample in images.samples] == [record for record in RECORDS[:3] for _ in range(2)]
    assert [sample.path.relative_to(folder).as_posix() for sample in images.samples][:3] == [
        "00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png"]
    assert (images.prompts, images.missing, images.prompt_set[:8]) == (3, (), "prompts_")
    assert images.suffix == f"_{images.prompt_set}_2_samples", "another set and another number of samples are named"
    assert len({sample.digest for sample in images.samples}) == 6
    assert (read_image(images.samples[3].path) == picture(3)).all()
    assert [metadata_of(sample.record) for sample in images.samples[::2]] == RECORDS[:3]


def test_what_is_none_of_the_set_is_passed_over(folder: Path) -> None:
    (folder / "grid.png").write_bytes(b"no image")
    (folder / "00000" / "grid.png").write_bytes(b"no image")
    (folder / "old").mkdir()
    (folder / "00000" / "samples" / "notes.txt").write_text("seed 42")
    assert len(read(folder).samples) == 6


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "00001" / "metadata.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SAMPLE = Path("00001") / "samples" / "0001.png"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated image": (lambda f: (f / SAMPLE).write_bytes((f / SAMPLE).read_bytes()[:-40]), r"0001\.png is truncated"),
    "zero bytes": (lambda f: (f / SAMPLE).write_bytes(b""), r"0001\.png is empty"),
    "another size": (lambda f: write_sample(f, 1, 1, picture(3, 48, 32)),
                     r"0001\.png is 32 x 48 where 5 of 6 images are 48 x 48"),
    "missing sample": (lambda f: (f / SAMPLE).unlink(), r"1 missing, first 00001/samples/0001\.png"),
    "missing prompt": (lambda f: shutil.rmtree(f / "00002"), "1 missing, first prompt 00002"),
    "unknown class": (lambda f: rewrite(f, include=[clause("unicorn")]), r"00001/metadata\.jsonl is not line 2"),
    "other metadata": (lambda f: rewrite(f, prompt="a cup"), r"00001/metadata\.jsonl is not line 2 of"),
    "metadata that is no JSON": (lambda f: (f / "00001" / "metadata.jsonl").write_text("{"), "wanted one JSON object, got '{'"),
    "no metadata": (lambda f: (f / "00001" / "metadata.jsonl").unlink(), r"metadata\.jsonl cannot be read \(No such file"),
    "a prompt too many": (lambda f: shutil.copytree(f / "00000", f / "00003"), r"00003 is prompt 3, and .* has 3"),
    "a prompt twice": (lambda f: shutil.copytree(f / "00000", f / "0"), "prompt 0 twice: 0 and 00000"),
    "a sample too many": (lambda f: write_sample(f, 0, 2, picture(0)), r"0002\.png is sample 2, where a prompt has 2"),
    "a sample twice": (lambda f: shutil.copy(f / SAMPLE, (f / SAMPLE).with_name("1.png")), r"1\.png is sample 1, twice"),
    "a half-written sample": (lambda f: shutil.copy(f / SAMPLE, (f / SAMPLE).with_name("0001.png.tmp")),
                              r"0001\.png\.tmp begins like a sample"),
    "samples that are a file": (lambda f: (shutil.rmtree(f / "00001" / "samples"), (f / "00001" / "samples").touch()),
                                r"samples cannot be read \(Not a directory\)"),
    "a sample that is a folder": (lambda f: ((f / SAMPLE).unlink(), (f / SAMPLE).mkdir()), r"0001\.png cannot be read"),
    "a link to itself": (lambda f: ((f / SAMPLE).unlink(), (f / SAMPLE).symlink_to(f / SAMPLE)),
                         r"0001\.png cannot be read \(Too many levels"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sets_are_refused_and_say_where(folder: Path, kind: str) -> None:
    damage, words = BROKEN[kind]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read(folder)


def test_a_prompt_in_two_folders_is_found_without_a_prompt_set(folder: Path) -> None:
    shutil.copytree(folder / "00000", folder / "00003")
    with pytest.raises(ValueError, match="a prompt twice: 00000 and 00003 are both 'one cup on a table'"):
        read(folder, metadata=None)


def test_a_prompt_set_may_hold_a_prompt_twice(tmp_path: Path) -> None:
    twice = write_set(tmp_path / "twice", [RECORDS[0], RECORDS[0]], samples=2)
    assert len(read(twice).samples) == 4


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere cannot be read"):
        read_image_set(tmp_path / "nowhere", CLASSES)
    with pytest.raises(ValueError, match="holds no prompts: wanted folders 00000"):
        read_image_set(tmp_path, CLASSES)


def test_a_set_of_unknown_prompts_is_refused_or_marked(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"3 prompts are not GenEval's 553.*--allow-partial"):
        read(folder, metadata=None)
    images = read(folder, metadata=None, allow_partial=True)
    assert images.suffix == "_unknown_2_samples_partial"


def test_partial_sets_are_marked(folder: Path) -> None:
    (folder / SAMPLE).unlink()
    shutil.rmtree(folder / "00000" / "samples")
    images = read(folder, allow_partial=True)
    assert images.missing == ("00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0001.png")
    assert images.suffix.endswith("_partial")
    assert (len(images.samples), images.prompts) == (3, 2)
    shutil.rmtree(folder / "00001")
    shutil.rmtree(folder / "00002")
    with pytest.raises(ValueError, match="1 prompts and no image"):
        read(folder, allow_partial=True)


def test_sizes_may_be_mixed_on_purpose(folder: Path) -> None:
    write_sample(folder, 1, 1, picture(3, 48, 32))
    assert len(read_image_set(folder, CLASSES, samples=2, metadata=folder.with_suffix(".jsonl")).samples) == 6
    images = read_image_set(folder, CLASSES, samples=2, metadata=folder.with_suffix(".jsonl"))
    assert len(check_files(images, mixed_sizes=True).samples) == 6


@pytest.mark.parametrize(("change", "words"), [
    ({"include": [clause("unicorn")]}, "unknown class 'unicorn', which the detector never finds"),
    ({"exclude": [clause("unicorn", 2)]}, "unknown class 'unicorn'"),
    ({"include": [clause("cup", color="grey")]}, "unknown colour 'grey'"),
    ({"include": [clause("cup"), clause("fork", position=["behind", 0])]}, "'position' must be one of left of"),
    ({"include": [clause("cup", position=["above", 1]), clause("fork")]}, "name an earlier clause"),
    ({"include": [clause("cup"), clause("fork", position=["above", 1])]}, "name an earlier clause"),
    ({"include": [clause("cup", 0)]}, "'count' of at least 1"),
    ({"include": []}, "at least one include clause"),
    ({"tag": "colours"}, "unknown tag 'colours'"),
    ({"prompt": 3}, "'prompt' to be str"),
])
def test_metadata_that_could_never_score_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_metadata({**RECORDS[1], **change}, "here", CLASSES)


def test_prompt_sets_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    for text, words in (("", "empty"), (json.dumps(RECORDS[0]) + "\n[1]\n", "line 2"), ("{\n", "line 1")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_metadata_file(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_metadata_file(tmp_path / "none.jsonl")
    path.write_bytes(b"\r\n".join(json.dumps(record).encode() for record in RECORDS))
    assert read_metadata_file(path)[0] == RECORDS, "Windows line ends, no last one"


def test_results_have_the_official_keys_in_order(tmp_path: Path) -> None:
    row = {"details": "{}", "filename": "a/00000/samples/0000.png", "tag": "colors", "prompt": "p", "correct": True,
           "reason": "", "metadata": "{}", "more": np.nan}
    write_results(tmp_path / "results.jsonl", [row, row])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert list(json.loads(lines[0])) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert (len(lines), [path.name for path in tmp_path.iterdir()]) == (2, ["results.jsonl"])
