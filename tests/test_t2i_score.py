"""`unigrpo score t2i-compbench`: prompt files, images, parses, models in, official files out; killed, broken, partial."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scorer_models import picture, save_clip, save_mask2former
from vqa_models import nlp, save_blip, save_dpt, save_owlv2

from unigrpo.cli import main
from unigrpo.commands import score_compbench
from unigrpo.evaluation import t2i_outputs as outputs
from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.cache import ScoreCache
from unigrpo.evaluation.parses import Parses, digest, load_parses, parse_prompts, save_parses
from unigrpo.evaluation.t2i_compbench import CATEGORIES, three_in_one
from unigrpo.evaluation.t2i_prompts import OFFICIAL_SHA256, find_images, read_prompts
from unigrpo.evaluation.t2i_score import Models, check_files, score_category, write_score

OFFICIAL = Path(__file__).parents[2] / "shared" / "benchmarks" / "t2i_compbench"
PARSER = {"spacy": "0.0.0", "model": "en_core_web_sm", "model_version": "0"}
PROMPTS = {
    "color": ["a red cup and a blue book", "a blue dog and a red cat"],
    "shape": ["a round cup and a wooden book", "a small dog"],
    "texture": ["a wooden cup", "a red cat"],
    "spatial": ["a cup on the left of a dog", "a boy near a girl"],
    "3d_spatial": ["a cup behind a dog", "a cat in front of a bench"],
    "numeracy": ["two cups", "a dog and three cats"],
    "non_spatial": ["A dog is holding a cup.", "A cat is on the bench."],
    "complex": ["The red cup is near the blue dog.", "The red dog is holding the cup."],
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt files of our own, with line ends as various as the official ones."""
    folder = tmp_path_factory.mktemp("prompts")
    for place, (name, lines) in enumerate(PROMPTS.items()):
        end = ("\n", "\r\n")[place % 2]
        (folder / f"{name}_val.txt").write_bytes((end.join(lines) + end * (place % 3 > 0)).encode())
    (folder / "complex_val_spatial.txt").write_bytes(PROMPTS["complex"][0].upper().encode())
    (folder / "complex_val_action.txt").write_bytes((PROMPTS["complex"][1] + "\r\n").encode())
    (folder / "new_objects.txt").write_bytes(b"cup - cups\ndog - dogs\ncat - cats\n")
    return folder


@pytest.fixture(scope="module")
def parses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parses") / "parses.json"
    save_parses(path, parse_prompts([prompt for lines in PROMPTS.values() for prompt in lines], nlp, PARSER))
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_blip(folder / "blip")
    save_dpt(folder / "depth")
    save_clip(folder / "clip")
    save_mask2former(folder / "detector")
    save_owlv2(folder / "owlv2")
    return folder


def draw(folder: Path, category: str, *, size: int = 32) -> Path:
    """A complete set of images, all different."""
    (folder / "samples").mkdir(parents=True)
    for number in range(10 * len(PROMPTS[category])):
        name = outputs.file_name(PROMPTS[category][number // 10], number)
        Image.fromarray(picture(number, size, size)).save(folder / "samples" / name)
    return folder


class Sees:
    """A detector that answers by the image's number, which its first pixel is, and counts what it is asked."""

    name, identity, labels = "sees", "sees 1", ("cup", "dog", "cat", "bench", "person")

    def __init__(self, answer: Callable[[int], list[Detected]], stop: int | None = None) -> None:
        self.answer, self.stop, self.seen = answer, stop, []  # type: ignore[var-annotated]

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        if self.stop is not None and len(self.seen) >= self.stop:
            raise KeyboardInterrupt
        self.seen += [int(image[0, 0, 0]) for image in images]
        return [self.answer(int(image[0, 0, 0])) for image in images]


def number_images(folder: Path, category: str, size: tuple[int, int] = (64, 64)) -> Path:
    """A complete set whose images are their own numbers; `size` is (width, height)."""
    (folder / "samples").mkdir(parents=True)
    for number in range(10 * len(PROMPTS[category])):
        name = outputs.file_name(PROMPTS[category][number // 10], number)
        Image.new("RGB", size, (number, 7, 7)).save(folder / "samples" / name)
    return folder


def score(folder: Path, prompts: Path, parses: Path | None, category: str, models: Models, cache: Path,
          **options: Any) -> Any:
    files = read_prompts(prompts, category, own=True)
    images = find_images(folder, files, partial=options.get("partial", False))
    return score_category(files, images, models, load_parses(parses) if parses else None, ScoreCache(cache), **options)


# -- rules on files ---------------------------------------------------------------------------------------------------------

def test_boxes_are_scaled_to_the_official_input(tmp_path: Path, prompts: Path, parses: Path) -> None:
    """On a 64 px image 20 px are 150 of 479: "near" is decided there, not in the image's own pixels."""
    folder = number_images(tmp_path / "set", "spatial")

    def answer(number: int) -> list[Detected]:
        if number < 10:
            return [Detected("cup", (0, 20, 10, 30), 0.9), Detected("dog", (40, 20, 50, 30), 0.5 if number == 9 else 0.8)]
        gap = 19.0 if number < 15 else 21.0
        return [Detected("person", (0, 0, 4, 4), 0.9), Detected("cup", (gap, gap, gap + 4, gap + 4), 0.9)]

    result = score(folder, prompts, parses, "spatial", Models(detector=Sees(answer)), tmp_path / "cache")
    found = result.answers["spatial"]
    assert found[:9] == pytest.approx([0.25 * 0.9 + 0.25 * 0.8 + 0.5] * 9)
    assert found[9] == 0, "a detection of exactly 0.5 does not count"
    # A boy near a girl: one person is both, officially.
    assert found[10:] == pytest.approx([0.95] * 10)
    assert result.record["score"] == pytest.approx(np.mean(found))
    assert result.record["name"] == "t2i_compbench_spatial_sees_5labels_own_prompts"
    assert result.record["detector_ceiling"] == 1
    pairs = [answer(number) for number in (10, 15)]
    assert [item.box[0] * 479 / 64 < 150 for item in (pairs[0][1], pairs[1][1])] == [True, False]


def test_near_is_measured_in_the_official_pixels(tmp_path: Path, prompts: Path, parses: Path) -> None:
    folder = number_images(tmp_path / "set", "complex", size=(64, 64))

    def answer(number: int) -> list[Detected]:
        gap = 20.0 if number < 5 else 22.0                                                   # 149.7 and 164.7 of 479
        return [Detected("cup", (0, 0, 4, 4), 1.0), Detected("dog", (gap, gap, gap + 4, gap + 4), 1.0)]

    class Constant:
        name = identity = "constant"

        def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
            return np.full(len(images), 0.25)

    models = Models(blip=Constant(), clip=Constant(), detector=Sees(answer))
    result = score(folder, prompts, parses, "complex", models, tmp_path / "cache")
    near, far = 1.0, 0.5 + 0.5 * 150 / (22 * 479 / 64)
    assert result.answers["spatial"][:10] == pytest.approx([near] * 5 + [far] * 5, abs=1e-6)
    # Two noun phrases a prompt, .25 each; the first prompt is a spatial one, the second an action.
    assert set(result.answers["blip"]) == {"0.0625"}
    assert result.answers["complex"] == pytest.approx([(near + 0.0625) / 2] * 5 + [(far + 0.0625) / 2] * 5
                                                      + [(0.25 + 0.0625) / 2] * 10)
    assert list(result.record["parts"]) == ["blip", "clip", "spatial", "complex"]
    save_parses(tmp_path / "other.json", parse_prompts(PROMPTS["complex"], nlp, {**PARSER, "model": "en_core_web_lg"}))
    other = score(folder, prompts, tmp_path / "other.json", "complex", models, tmp_path / "cache")
    assert other.record["name"] == result.record["name"].replace("_own_prompts", "_other_parser_own_prompts")


def test_depth_is_asked_only_where_both_objects_are(tmp_path: Path, prompts: Path, parses: Path) -> None:
    folder = number_images(tmp_path / "set", "3d_spatial", size=(60, 40))
    asked: list[int] = []

    class Ramp:
        """Nearer to the right."""

        name = identity = "ramp"

        def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
            asked.extend(int(image[0, 0, 0]) for image in images)
            return [np.tile(np.linspace(0, 1, image.shape[1], dtype=np.float32), (image.shape[0], 1)) for image in images]

    def answer(number: int) -> list[Detected]:
        cup, dog = Detected("cup", (0, 0, 20, 30), 0.8), Detected("dog", (10, 0, 30, 30), 0.6)
        return [cup, dog] if number < 5 else [cup]

    result = score(folder, prompts, parses, "3d_spatial", Models(detector=Sees(answer), depth=Ramp()), tmp_path / "cache",
                   official=False)
    assert asked == [0, 1, 2, 3, 4]
    both, one = 0.25 * 1.4 + 0.5 * (10 / 30 / 0.5), 0.25 * 0.8
    assert result.answers["3d_spatial"] == pytest.approx([both] * 5 + [one] * 5 + [0.0] * 10, abs=1e-6)
    assert result.record["name"] == "t2i_compbench_3d_spatial_sees_5labels_ramp_corrected_own_prompts"
    # Officially the ramp is read across: both boxes have the same depth, and neither is behind.
    asked.clear()
    official = score(folder, prompts, parses, "3d_spatial", Models(detector=Sees(answer), depth=Ramp()), tmp_path / "cache")
    assert asked == [0, 1, 2, 3, 4], "kept scores of other rules do not answer"
    assert official.answers["3d_spatial"] == pytest.approx([0.35] * 5 + [one] * 5 + [0.0] * 10)
    assert official.record["official_rules"]


def test_a_phrase_that_stands_twice_is_asked_once_and_counts_twice(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a red cup near a red cup\n")
    (tmp_path / "set" / "samples").mkdir(parents=True)
    for number in range(10):
        name = outputs.file_name("a red cup near a red cup", number)
        Image.new("RGB", (8, 8), (number, 7, 7)).save(tmp_path / "set" / "samples" / name)
    save_parses(tmp_path / "parses.json", parse_prompts(["a red cup near a red cup"], nlp, PARSER))
    asked: list[str] = []

    class Half:
        name = identity = "half"

        def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
            asked.extend(texts)
            return np.full(len(images), 0.5)

    result = score(tmp_path / "set", tmp_path, tmp_path / "parses.json", "color", Models(blip=Half()), tmp_path / "cache")
    assert asked == ["a red cup?"] * 10
    assert result.answers["blip"] == ["0.2500"] * 10


def test_ceiling_counts_what_has_no_label(tmp_path: Path, prompts: Path) -> None:
    folder = number_images(tmp_path / "set", "numeracy")
    cats = [Detected("cat", (20 * n, 0, 20 * n + 10, 10), 0.9) for n in range(3)]
    models = Models(detector=Sees(lambda number: [Detected("cup", (0, 0, 9, 9), 0.9), *cats]),
                    labels=frozenset({"cat", "dog", "wolf"}))
    result = score(folder, prompts, None, "numeracy", models, tmp_path / "cache")
    assert result.answers["numeracy"] == pytest.approx([0.0] * 10 + [0.5] * 10)
    assert result.record["detector_labels"] == 2
    assert result.record["detector_ceiling"] == 0.5
    assert result.record["prompts_beyond_labels"] == 1
    assert result.record["objects_beyond_labels"] == {"cup": 1}


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path, prompts: Path, parses: Path) -> None:
    folder = number_images(tmp_path / "set", "spatial")

    def answer(number: int) -> list[Detected]:
        return [Detected("cup", (0, 0, 10 + number, 10), 0.6 + number / 100), Detected("dog", (40, 0, 50, 10), 0.7),
                Detected("person", (5, 5, 9, 9), 0.8)]

    whole = Sees(answer)
    write_score(tmp_path / "whole", score(folder, prompts, parses, "spatial", Models(detector=whole), tmp_path / "a", batch=3))
    assert sorted(whole.seen) == list(range(20))
    killed = Sees(answer, stop=7)
    with pytest.raises(KeyboardInterrupt):
        score(folder, prompts, parses, "spatial", Models(detector=killed), tmp_path / "b", batch=3)
    assert len(killed.seen) == 9
    with (tmp_path / "b").open("ab") as file:
        file.write(b'{"key": "cut o')
    rest = Sees(answer)
    write_score(tmp_path / "rest", score(folder, prompts, parses, "spatial", Models(detector=rest), tmp_path / "b", batch=4))
    assert sorted(killed.seen + rest.seen) == list(range(20))
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) == 4
    assert all((tmp_path / "whole" / file).read_bytes() == (tmp_path / "rest" / file).read_bytes() for file in files)
    # Another image in an old one's place is asked about.
    Image.new("RGB", (64, 64), (77, 7, 7)).save(folder / "samples" / outputs.file_name(PROMPTS["spatial"][0], 3))
    again = Sees(answer)
    score(folder, prompts, parses, "spatial", Models(detector=again), tmp_path / "b")
    assert again.seen == [77]


def test_results_of_others_are_not_overwritten(tmp_path: Path, prompts: Path) -> None:
    folder = number_images(tmp_path / "set", "numeracy")
    result = score(folder, prompts, None, "numeracy", Models(detector=Sees(lambda number: [])), tmp_path / "cache")
    (tmp_path / "out" / "annotation_num").mkdir(parents=True)
    theirs = tmp_path / "out" / "annotation_num" / "vqa_result.json"
    theirs.write_text("[]")
    with pytest.raises(ValueError, match="give another --output"):
        write_score(tmp_path / "out", result)
    assert theirs.read_text() == "[]"
    write_score(tmp_path / "ours", result)
    write_score(tmp_path / "ours", result)


# -- prompt files and images ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official prompt files lie next to the project's checkout")
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


def test_damaged_images_are_refused_or_counted(tmp_path: Path, prompts: Path) -> None:
    folder = number_images(tmp_path / "set", "numeracy")
    paths = sorted((folder / "samples").iterdir())
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[2].read_bytes()[:-20])
    paths[3].write_bytes(b"no picture at all")
    files = read_prompts(prompts, "numeracy", own=True)
    images = find_images(folder, files)
    with pytest.raises(ValueError, match=r"3 of 20 images cannot be read(.|\n)*is empty(.|\n)*truncated(.|\n)*is no image"):
        check_files(images, partial=False)
    models = Models(detector=Sees(lambda number: [Detected("cup", (0, 0, 9, 9), 0.9)]))
    with pytest.raises(ValueError, match="3 of 20 images cannot be read"):
        score(folder, prompts, None, "numeracy", models, tmp_path / "cache")
    result = score(folder, prompts, None, "numeracy", models, tmp_path / "cache", partial=True)
    assert (result.record["images"], result.record["unreadable"], result.record["complete"]) == (17, 3, False)
    assert "_partial" in result.record["name"]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="20 of 20 images cannot be read"):
        check_files(images, partial=True)


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
    output = tmp_path / "parses.json"
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


# -- the command ------------------------------------------------------------------------------------------------------------

def models_of(checkpoints: Path, *roles: str) -> list[str]:
    sizes = ["--input-size", "64", "--blip-size", "64", "--depth-size", "64"]
    return [part for role in roles for part in (f"--{role}", str(checkpoints / role))] + sizes


def test_every_category_end_to_end(tmp_path: Path, prompts: Path, parses: Path, checkpoints: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny random checkpoints in official format, all categories in one call: layout, formats, averages, names."""
    for category in PROMPTS:
        draw(tmp_path / "images" / category, category)
    roles = models_of(checkpoints, "blip", "clip", "depth", "detector")
    canary = ["--canary", str(tmp_path / "canary.json")]
    assert main(["score", "canary", "--record", canary[1], *roles]) == 0
    arguments = ["score", "t2i-compbench", str(tmp_path / "images"), "--prompts", str(prompts), "--parses", str(parses),
                 "--own-prompts", "--min-score", "0.05", *roles, *canary]
    assert main(arguments) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    records = {}
    for path in (tmp_path / "images").glob("*/unigrpo_score.json"):
        record = json.loads(path.read_text())
        assert path.parent.name == record["name"]
        assert f"score    {record['score']:.4f}, the mean of 20 images" in shown
        records[record["category"]] = record, path.parent
    assert set(records) == set(PROMPTS)
    assert records["color"][0]["name"] == "t2i_compbench_color_blip_hf_64px_own_prompts"
    assert records["3d_spatial"][0]["name"] == (
        "t2i_compbench_3d_spatial_mask2former_hf_64px_80labels_above0.05_dpt_hf_64px_own_prompts")
    places = {"color": "annotation_blip/blip_vqa_score.txt", "spatial": "labels/annotation_obj_detection_2d/avg_score.txt",
              "3d_spatial": "labels/annotation_obj_detection_3d/avg_result.txt", "numeracy": "annotation_num/score.txt",
              "non_spatial": "annotation_clip/score_avg.txt", "complex": "annotation_3_in_1/vqa_score.txt"}
    texts = {"color": "BLIP-VQA score:{}", "spatial": "score avg:{}", "3d_spatial": "avg score is {}",
             "numeracy": "total:{} num:20 avg:{}", "non_spatial": "score avg:{}", "complex": "score avg:{}"}
    for category, place in places.items():
        record, folder = records[category]
        results = json.loads((folder / place).with_name("vqa_result.json").read_text())
        assert [item["question_id"] for item in results] == list(range(20))
        values = [float(item["answer"]) for item in results]
        assert record["score"] == pytest.approx(sum(values) / 20)
        numbers = [sum(values), record["score"]][-texts[category].count("{}"):]
        assert (folder / place).read_text() == texts[category].format(*numbers)
        assert np.ptp(values) > 0 or category in ("spatial", "numeracy"), category
    color = json.loads((records["color"][1] / "annotation_blip" / "vqa_result.json").read_text())
    assert all(isinstance(item["answer"], str) and len(item["answer"]) == 6 for item in color)
    # The complex score is that of its parts, and every part is there.
    folder = records["complex"][1]
    parts = [[float(item["answer"]) for item in json.loads((folder / place / "vqa_result.json").read_text())]
             for place in ("annotation_blip", "labels/annotation_obj_detection_2d", "annotation_clip", "annotation_3_in_1")]
    keys = {"spatial_prompts": {"the red cup is near the blue dog"}, "action_prompts": {"the red dog is holding the cup"}}
    assert parts[3] == pytest.approx([
        three_in_one(PROMPTS["complex"][n // 10], attribute=a, spatial=s, similarity=c, **keys)
        for n, (a, s, c) in enumerate(zip(*parts[:3], strict=True))])
    assert json.loads((records["spatial"][1] / "labels/annotation_obj_detection_2d/mapping.json").read_text())[3] == {
        "image": "a cup on the left of a dog_000003.png", "question_id": 3}
    # Again: everything is kept, and nothing is asked.
    cached = (tmp_path / "images" / "scores.cache.jsonl").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "images" / "scores.cache.jsonl").read_bytes() == cached


def test_owlv2_looks_for_the_labels_of_a_file(tmp_path: Path, prompts: Path, checkpoints: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw(tmp_path / "set", "numeracy")
    base = ["score", "t2i-compbench", str(folder), "--category", "numeracy", "--prompts", str(prompts), "--own-prompts",
            "--min-score", "0.1", "--canary", str(tmp_path / "canary.json"), "--detector", str(checkpoints / "owlv2")]
    assert main(base) == 2
    assert "give --labels FILE" in capsys.readouterr().err
    (tmp_path / "labels.txt").write_text("dog\ncats\ncup\nwolf\n")
    labels = ["--labels", str(tmp_path / "labels.txt")]
    assert main(["score", "canary", "--record", str(tmp_path / "canary.json"), "--detector", str(checkpoints / "owlv2"),
                 *labels]) == 0
    assert main([*base, *labels, "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "unigrpo_score.json").read_text())
    assert record["name"] == "t2i_compbench_numeracy_owlv2_hf_4labels_above0.1_own_prompts"
    # "cat" is in "cats", by the official rule.
    assert record["detector_ceiling"] == 1
    assert (tmp_path / "out" / "annotation_num" / "score.txt").is_file()


def test_the_command_knows_every_category() -> None:
    assert score_compbench.CATEGORIES == CATEGORIES == tuple(PROMPTS)


def test_what_cannot_be_scored_is_refused_before_models_are_loaded(
        tmp_path: Path, prompts: Path, parses: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw(tmp_path / "set", "color")
    base = ["score", "t2i-compbench", str(folder), "--prompts", str(prompts), "--own-prompts"]
    one = [*base, "--category", "color", "--parses", str(parses)]
    (tmp_path / "few.json").write_text(parses.read_text())
    few = parse_prompts([PROMPTS["color"][0]], nlp, PARSER)
    save_parses(tmp_path / "few.json", few)
    blip = ["--blip", str(checkpoints / "blip"), "--blip-size", "64"]
    for arguments, message in {
            tuple(base): "say which with --category",
            (*base, "--category", "color", "shape"): "say which with --category",
            tuple(one): "give --blip",
            (*base, "--category", "color", *blip): "need the prompts' noun phrases",
            (*base, "--category", "color", *blip, "--parses", str(tmp_path / "few.json")): "lacks 1 prompts",
            (*one, *blip, "--batch", "0"): "--batch must be at least 1",
            (*one, *blip, "--canary", str(tmp_path / "none.json")): "no scorer is trusted unseen",
            (*one, "--blip", str(tmp_path)): "must hold config.json",
            (*one[:5], *one[6:], *blip): "must be T2I-CompBench's own file",
            ("score", "t2i-compbench", str(tmp_path / "no"), "--prompts", str(prompts)): "must be a folder",
            ("score", "t2i-compbench", str(tmp_path), "--prompts", str(prompts)): "must hold samples/",
            }.items():
        assert main(list(arguments)) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, error
    assert not list(folder.glob("t2i_compbench*"))
