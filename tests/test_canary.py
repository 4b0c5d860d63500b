"""The gate before scoring: scorers that were broken on purpose do not pass it, sound ones do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scorer_models import save_clip, save_mask2former

from unigrpo.cli import main
from unigrpo.evaluation.backends import Detected, canary, clip, mask2former
from unigrpo.evaluation.backends.clip import ClipColors, ClipSimilarity
from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector
from unigrpo.evaluation.geneval import COLORS

Change = Callable[[np.ndarray], np.ndarray]
SWAPPED: dict[str, Change] = {"swapped channels": lambda image: image[..., ::-1], "upside down": lambda image: image[::-1],
                              "darkness": lambda image: image // 4}


@dataclass(frozen=True)
class Similarity:
    """The mean of red against the text's length: sound, and easy to break."""

    name: str = "toy"
    identity: str = "toy 1"
    change: Change = np.asarray
    answer: Callable[[np.ndarray], Any] = np.asarray

    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        values = [self.change(image)[:64, :, 0].mean() / 255 - len(text) / 99
                  for image, text in zip(images, texts, strict=True)]
        return np.asarray(self.answer(np.array(values)), dtype=np.float32)


@dataclass(frozen=True)
class Depth:
    name: str = "toy depth"
    identity: str = "toy depth 1"
    change: Change = np.asarray

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.change(image)[..., 0].astype(np.float32) / 255 for image in images]


@dataclass(frozen=True)
class Colors:
    """Names colours without logits."""

    name: str = "toy colors"
    identity: str = "toy colors 1"
    change: Change = np.asarray

    def __call__(self, image: np.ndarray, detections: Sequence[Detected], label: str) -> list[str]:
        red, _, blue = self.change(image)[64, 64].astype(int)
        return ["red" if red > blue + 20 else "blue" if blue > red + 20 else "white"] * len(detections)


SCORERS: dict[str, Any] = {"similarity": Similarity(), "yes": Similarity(), "depth": Depth(), "colors": Colors()}


def test_the_pictures_are_the_same_everywhere() -> None:
    images = canary.canary_images()
    assert {image.shape for image in images.values()} == {(128, 128, 3)}
    assert len({image.tobytes() for image in images.values()}) == len(images) == 9
    assert canary._pictures_digest() == "5e5ddd0fc0bb7e36", "other pictures make every record out of date: is that meant?"
    assert tuple(images["a red circle"][64, 64]) == canary.PAINTS["red"]


@pytest.mark.parametrize("kind", SCORERS)
def test_a_sound_scorer_passes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "canary.json"
    assert canary.record(path, {kind: SCORERS[kind]}, "cpu")
    assert canary.check(path, {kind: SCORERS[kind]}, "cpu")[kind] <= 1e-6


@pytest.mark.parametrize("kind", SCORERS)
def test_one_that_sees_other_pictures_does_not(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "canary.json"
    canary.record(path, {kind: SCORERS[kind]}, "cpu")
    broken = replace(SCORERS[kind], change=SWAPPED["swapped channels"])
    with pytest.raises(ValueError, match=rf"the {kind} toy.* is not itself on GPU 3: of '.*' it says .* recorded on cpu"):
        canary.check(path, {kind: broken}, "GPU 3")


@pytest.mark.parametrize(("answer", "words"), [
    (lambda values: values * np.nan, r"it says NaN or infinity of 'a red circle'"),
    (lambda values: np.where(np.arange(len(values)) == 8, np.inf, values), r"it says NaN or infinity of 'noise'"),
    (lambda values: values * 0 + 0.31, r"it says the same of every picture: 0\.31"),
])
def test_nan_and_constants_do_not_pass(answer: Callable[[np.ndarray], Any], words: str, tmp_path: Path) -> None:
    path, broken = tmp_path / "canary.json", Similarity(answer=answer)
    with pytest.raises(ValueError, match="the similarity toy is broken on cpu: " + words):
        canary.record(path, {"similarity": broken}, "cpu")
    assert not path.exists()
    canary.record(path, {"similarity": Similarity()}, "cpu")
    with pytest.raises(ValueError, match="is broken on cpu: " + words):
        canary.check(path, {"similarity": broken}, "cpu")


def test_differences_within_the_tolerance_pass(tmp_path: Path) -> None:
    path, allowed = tmp_path / "canary.json", canary.TOLERANCES["similarity"]
    canary.record(path, {"similarity": Similarity()}, "cpu")
    near = canary.check(path, {"similarity": Similarity(answer=lambda values: values + 0.9 * allowed)}, "cpu")
    assert near["similarity"] == pytest.approx(0.9 * allowed, rel=1e-3)
    with pytest.raises(ValueError, match="is not itself"):
        canary.check(path, {"similarity": Similarity(answer=lambda values: values + 1.1 * allowed)}, "cpu")


def test_a_scorer_without_a_record_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "canary.json"
    with pytest.raises(ValueError, match=r"record .*canary\.json is missing.*score canary --record"):
        canary.check(path, {"similarity": Similarity()}, "cpu")
    canary.record(path, {"similarity": Similarity()}, "cpu")
    with pytest.raises(ValueError, match="no record of the similarity 'toy 2'"):
        canary.check(path, {"similarity": Similarity(identity="toy 2")}, "cpu")
    canary.record(path, {"similarity": Similarity(identity="toy 2")}, "cpu")
    canary.check(path, {"similarity": Similarity()}, "cpu")  # a later record keeps the earlier ones
    entries = json.loads(path.read_text())
    entries["scorers"]["toy 1"]["pictures"] = "0" * 16
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="other canary pictures"):
        canary.check(path, {"similarity": Similarity()}, "cpu")
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        canary.check(path, {"similarity": Similarity()}, "cpu")
    with pytest.raises(ValueError, match="know the kinds"):
        canary.read_scorer("smell", Similarity())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_mask2former(root / "detector"), save_clip(root / "clip")


@pytest.mark.parametrize("change", SWAPPED)
def test_models_that_see_other_pictures_do_not_pass(change: str, models: tuple[Path, Path], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "canary.json"
    scorers = {"detector": Mask2FormerDetector.load(models[0], shorter=64, min_score=0.3), "colors": ClipColors.load(models[1]),
               "similarity": ClipSimilarity.load(models[1])}
    canary.record(path, scorers, "cpu")
    assert max(canary.check(path, scorers, "cpu").values()) < 1e-5
    for module in (mask2former, clip):
        sound = module.prepare
        monkeypatch.setattr(module, "prepare",
                            lambda image, *sizes, sound=sound: sound(np.ascontiguousarray(SWAPPED[change](image)), *sizes))
    for kind, scorer in scorers.items():
        with pytest.raises(ValueError, match=f"the {kind} .* is not itself on cpu"):
            canary.check(path, {kind: scorer}, "cpu")


def test_a_detectors_bound_does_not_blind_its_canaries(models: tuple[Path, Path]) -> None:
    strict = Mask2FormerDetector.load(models[0], shorter=64, min_score=0.999)
    plain = Mask2FormerDetector.load(models[0], shorter=64)
    assert not any(strict(list(canary.canary_images().values())))
    assert canary.read_scorer("detector", strict) == canary.read_scorer("detector", plain)


def test_a_detector_that_gives_nan_is_stopped(models: tuple[Path, Path]) -> None:
    import torch

    detector = Mask2FormerDetector.load(models[0], shorter=64)
    with torch.no_grad():
        detector.model.class_predictor.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        canary.read_scorer("detector", detector)

    class Toy:
        name = identity = "toy"
        labels = ("cup",)

        def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
            return [[Detected("cup", (0.0, 0.0, 1.0, 1.0), float("nan"))] for _ in images]

    with pytest.raises(ValueError, match="NaN"):
        canary.read_scorer("detector", Toy())


def test_colors_are_read_from_names_too() -> None:
    readings = canary.read_scorer("colors", Colors())
    assert readings["a red circle"] == [float(color == "red") for color in COLORS]


def test_the_command_records_and_checks(models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "canary.json"
    scorers = ["--detector", str(models[0]), "--color", str(models[1]), "--clip", str(models[1]), "--input-size", "64"]
    assert main(["score", "canary", "--record", str(path), *scorers]) == 0
    said = capsys.readouterr().out
    assert "names the colour of" in said
    assert "stop sign 0." in said
    assert main(["score", "canary", "--check", str(path), *scorers]) == 0
    assert capsys.readouterr().out.count("as recorded on cpu") == 3
    assert main(["score", "canary", "--check", str(path), *scorers[:2]]) == 2, "another input size is another scorer"
    assert "no record of the detector" in capsys.readouterr().err
    assert main(["score", "canary", "--check", str(path)]) == 2
    assert "name at least one scorer" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_gpu_says_what_the_cpu_said(models: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "canary.json"

    def scorers(device: str) -> dict[str, Any]:
        return {"detector": Mask2FormerDetector.load(models[0], shorter=64, device=device),
                "colors": ClipColors.load(models[1], device=device),
                "similarity": ClipSimilarity.load(models[1], device=device)}

    canary.record(path, scorers("cpu"), "cpu")
    canary.check(path, scorers("cuda"), canary.device_name("cuda"))
