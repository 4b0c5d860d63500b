"""T2I-CompBench's files: prompts, images and their names, parses and the command that makes them; broken and missing ones."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from compbench_sets import PARSER, PROMPTS, draw, write_prompts
from official_files import BENCHMARKS, needs_benchmarks
from vqa_models import nlp

from unigrpo.cli import main
from unigrpo.evaluation import t2i_outputs as outputs
from unigrpo.evaluation.parses import Parses, digest, load_parses, parse_prompts, save_parses
from unigrpo.evaluation.t2i_compbench import CATEGORIES
from unigrpo.evaluation.t2i_prompts import OFFICIAL_SHA256, find_images, read_prompts

OFFICIAL = BENCHMARKS / "t2i_compbench"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


# -- prompt files and images ------------------------------------------------------------------------------------------------

@needs_benchmarks
def test_official_prompt_files_are_known() -> None:
    for category in CATEGORIES:
        files = read_prompts(OFFICIAL, category)
        assert files.official
        assert len(files.prompts) == 300
        assert not any("\r" in prompt or prompt != prompt.strip() for prompt in files.prompts)
    complex_files = read_prompts(OFFICIAL, "complex")
    assert (len(complex_files.spatial_keys), len(complex_files.action_keys)) == (58, 212)
    read = {name for category in CATEGORIES for name in read_prompts(OFFICIAL, category).sha256}
    assert read == set(OFFICIAL_SHA256)


def test_other_prompt_files_are_refused_unless_meant(prompts: Path) -> None:
    with pytest.raises(ValueError, match=r"numeracy_val.txt, new_objects.txt must be T2I-CompBench's own"):
        read_prompts(prompts, "numeracy")
    files = read_prompts(prompts, "numeracy", own=True)
    assert files.prompts == tuple(PROMPTS["numeracy"])
    assert not files.official
    with pytest.raises(ValueError, match=r"color_val.txt is missing"):
        read_prompts(prompts / "nowhere", "color")


@pytest.mark.parametrize(("text", "message"), [("a cup\na cup\n", "stands there twice"), ("\n\n", "holds no prompts"),
                                               ("a_cup\n", "cannot be a file name"), ("a/b\n", "cannot be a file name"),
                                               ("cup " * 70, "cannot be a file name")])
def test_prompts_that_names_cannot_tell_apart(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "color_val.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path, "color", own=True)


def test_names_are_the_official_ones() -> None:
    assert outputs.file_name("A dog runs.", 12) == "A dog runs._000012.png"
    assert outputs.split_name("A dog runs._000012.png") == ("A dog runs.", 12)
    assert outputs.split_name("a cup_extra_000003.png") == ("a cup", 3), "the prompt ends at the first underscore"
    for wrong in ("a cup_12.png", "a cup_000012.jpg", "a cup000012.png", "a cup_0000012.png"):
        assert outputs.split_name(wrong) is None
        with pytest.raises(ValueError, match="must be named"):
            outputs.question_id(wrong)
    assert [outputs.seed_of(number) for number in (0, 9, 10, 2999)] == [42, 51, 42, 51]


def test_images_that_do_not_fit_are_named(tmp_path: Path, prompts: Path) -> None:
    files = read_prompts(prompts, "color", own=True)
    with pytest.raises(ValueError, match="samples is missing"):
        find_images(tmp_path, files)
    folder = draw(tmp_path / "set", "color")
    samples = folder / "samples"
    assert find_images(folder, files).complete
    first, second = (outputs.file_name(PROMPTS["color"][0], number) for number in (0, 1))
    for name, message in {"notes.png": "is not named", outputs.file_name("a red cup and a blue book", 20): "has number 20",
                          outputs.file_name("a red cup and a blue book", 10): "have one number",
                          first.replace("_000000", "_x_000000"): "have one number"}.items():
        (samples / name).write_bytes((samples / second).read_bytes())
        with pytest.raises(ValueError, match=message):
            find_images(folder, files, partial=True)
        (samples / name).unlink()
    (samples / first).rename(samples / outputs.file_name(PROMPTS["color"][1], 0))
    with pytest.raises(ValueError, match="should be of prompt 0, 'a red cup and a blue book'"):
        find_images(folder, files)
    (samples / outputs.file_name(PROMPTS["color"][1], 0)).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 20 images, the first ones a red cup and a blue book_000000.png"):
        find_images(folder, files)
    partial = find_images(folder, files, partial=True)
    assert (len(partial.numbers), partial.missing, partial.complete) == (19, (0,), False)
    (samples / "readme.txt").write_text("of no matter")
    assert find_images(folder, files, partial=True) == partial


# -- parses -----------------------------------------------------------------------------------------------------------------

def test_parses_hold_no_prompt_and_give_its_words(tmp_path: Path) -> None:
    path = tmp_path / "parses.json"
    prompt = "a red cup near the small wooden dog"
    save_parses(path, parse_prompts([prompt], nlp, PARSER))
    text = path.read_text()
    assert not any(word in text.split('"parses"')[1] for word in prompt.split() if len(word) > 1)
    parse = load_parses(path).of(prompt)
    assert parse.noun_chunks == ("a red cup", "the small wooden dog")
    assert parse.tokens[:3] == (("a", "DET"), ("red", "ADJ"), ("cup", "NOUN"))
    assert load_parses(path).name == "spacy 0.0.0 model en_core_web_sm model_version 0"
    before = path.read_bytes()
    save_parses(path, parse_prompts([prompt], nlp, PARSER, load_parses(path)))
    assert path.read_bytes() == before


def test_missing_parses_are_named(tmp_path: Path) -> None:
    parses = parse_prompts(["a cup"], nlp, PARSER)
    parses.require(["a cup"], "x")
    with pytest.raises(ValueError, match=r"lacks 12 prompts(.|\n)*- prompt 0\n(.|\n)*and 2 more"):
        parses.require([*(f"prompt {n}" for n in range(12)), "a cup"], "x")
    with pytest.raises(ValueError, match="no parse of 'a dog'"):
        parses.of("a dog")
    wrong = Parses(PARSER, {digest("a cup"): {"chunks": [[0, 99]], "tokens": []}})
    with pytest.raises(ValueError, match="points outside"):
        wrong.of("a cup")
    with pytest.raises(ValueError, match="one cache has one parser"):
        parse_prompts(["a dog"], nlp, {**PARSER, "model_version": "2"}, parses)


def test_damaged_parses_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "parses.json"
    with pytest.raises(ValueError, match="is missing"):
        load_parses(path)
    for content in ("{", "[]", '{"format": "unigrpo/parses/1", "parser": {}}',
                    '{"format": "unigrpo/parses/1", "parser": {}, "parses": {"x": {"chunks": [["a", 1]], "tokens": []}}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="must be a cache of parses"):
            load_parses(path)
    path.write_text('{"format": "unigrpo/parses/9", "parser": {}, "parses": {}}')
    with pytest.raises(ValueError, match="must be of format unigrpo/parses/1, got 'unigrpo/parses/9'"):
        load_parses(path)


def test_parse_prompts_command(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    def load(model: str) -> Any:
        if model != "en_core_web_sm":
            raise OSError(model)
        pipeline = types.SimpleNamespace(meta={"version": "3.8.0"})
        return type("Pipeline", (), {"__call__": lambda self, text: nlp(text), "meta": pipeline.meta})()

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load, __version__="3.8.9"))
    output = tmp_path / "new" / "parses.json"
    arguments = ["parse-prompts", str(prompts / "color_val.txt"), "--output", str(output)]
    assert main(arguments) == 0
    assert load_parses(output).parser == {"spacy": "3.8.9", "model": "en_core_web_sm", "model_version": "3.8.0"}
    assert load_parses(output).of(PROMPTS["color"][0]).noun_chunks == ("a red cup", "a blue book")
    assert main([*arguments[:2], str(prompts / "spatial_val.txt"), *arguments[2:]]) == 0
    assert "4 prompts, 2 of them new" in capsys.readouterr().out
    assert main([*arguments, "--model", "en_core_web_lg"]) == 2
    assert "python -m spacy download en_core_web_lg" in capsys.readouterr().err
    assert main(["parse-prompts", str(tmp_path / "none.txt"), "--output", str(output)]) == 2
    assert "none.txt" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "pip install spacy && python -m spacy download en_core_web_sm" in error
    assert "a cache made on another machine will do" in " ".join(error.split())
