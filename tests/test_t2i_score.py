"""`unigrpo score t2i-compbench`: prompts, images, parses and models in, official files out; killed, broken, partial."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compbench_sets import PARSER, PROMPTS, draw, number_images, write_parses, write_prompts
from PIL import Image
from scorer_models import save_clip, save_mask2former
from vqa_models import nlp, save_blip, save_dpt, save_owlv2

from unigrpo.cli import main
from unigrpo.commands import score_compbench
from unigrpo.evaluation import t2i_outputs as outputs
from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.cache import ScoreCache
from unigrpo.evaluation.parses import load_parses, parse_prompts, save_parses
from unigrpo.evaluation.t2i_compbench import CATEGORIES, three_in_one
from unigrpo.evaluation.t2i_prompts import find_images, read_prompts
from unigrpo.evaluation.t2i_score import Models, check_files, score_category, write_score


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def parses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parses(tmp_path_factory.mktemp("parses") / "parses.json")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_blip(folder / "blip")
    save_dpt(folder / "depth")
    save_clip(folder / "clip")
    save_mask2former(folder / "detector")
    save_owlv2(folder / "owlv2")
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


def test_an_image_that_changes_under_way_is_noticed(tmp_path: Path, prompts: Path) -> None:
    """Its score would be kept under the digest of the image that was there before."""
    folder = number_images(tmp_path / "set", "numeracy")
    last = folder / "samples" / outputs.file_name(PROMPTS["numeracy"][1], 19)

    def answer(number: int) -> list[Detected]:
        Image.new("RGB", (64, 64), (99, 7, 7)).save(last)
        return []

    with pytest.raises(ValueError, match=r"_000019\.png changed while"):
        score(folder, prompts, None, "numeracy", Models(detector=Sees(answer)), tmp_path / "cache")
    assert len(ScoreCache(tmp_path / "cache")) == 16, "the batches before it are kept"


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
