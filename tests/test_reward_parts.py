"""Rewards by models, on small fakes and tiny random checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reward_fakes import BESIDE, RED, TWO, FakeColors, FakeDetector, marked, record, thing, values
from scorer_models import save_clip, save_mask2former
from vqa_models import save_blip

from unigrpo.evaluation.geneval import keep
from unigrpo.rewards.blip_vqa import blip_vqa_reward, clause_phrases, phrases_from_file
from unigrpo.rewards.clip_score import similarity_reward
from unigrpo.rewards.conformance import check_reward, example_batch
from unigrpo.rewards.geneval import geneval_reward
from unigrpo.rewards.pictures import decode_png, encode_png, to_pictures
from unigrpo.rewards.registry import make_reward
from unigrpo.rewards.shapes import shapes_exact


def test_geneval_rules_by_hand() -> None:
    """Right; mirrored (1 + 1 + 0) / 3; too many cats: verdict forgives, the others do not."""
    detector = FakeDetector([thing("cat", 0), thing("dog", 60)], [thing("dog", 0), thing("cat", 60)],
                            [thing("cat", 20 * i) for i in range(5)], [])
    images, prompts = marked(0, 1, 2, 3), [BESIDE, BESIDE, TWO, TWO]
    found = values(geneval_reward(detector), images, prompts)
    assert list(found) == ["geneval_soft_fake", "geneval_soft_fake/strict", "geneval_soft_fake/verdict"]
    assert found["geneval_soft_fake"] == pytest.approx([1, 2 / 3, 1 - 3 / 2, 0])
    assert found["geneval_soft_fake/strict"] == [1, 0, 0, 0]
    assert found["geneval_soft_fake/verdict"] == [1, 0, 1, 0]
    bugged = values(geneval_reward(detector, official_position_bug=True, clamp=True), images, prompts)
    assert bugged["geneval_soft_fake"] == pytest.approx([1, 3 / 4, 0, 0])
    strict = values(geneval_reward(detector, rule="strict"), images, prompts)
    assert strict["geneval_strict_fake"] == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="unknown rule 'kind'; choose one of soft, strict, verdict"):
        geneval_reward(detector, rule="kind")  # type: ignore[arg-type]


def test_geneval_asks_for_colours_only_where_the_prompt_does() -> None:
    colors = FakeColors()
    reward = geneval_reward(FakeDetector([thing("cat", 0), thing("dog", 60)], [thing("cat", 60), thing("cat", 0, score=0.2)]),
                            colors)
    found = values(reward, marked(0, 1, 0), [RED, RED, BESIDE])
    assert found["geneval_soft_fake"] == [1, 0.5, 1]
    assert colors.asked == ["cat", "cat"], "not for dogs, and not for prompts without a colour"


def test_geneval_refuses_a_class_that_the_detector_lacks() -> None:
    with pytest.raises(ValueError, match=r"prompt x .* wants the class 'zebra', which the detector fake does not know"):
        geneval_reward(FakeDetector([]))(marked(0), [record("x", "colors", {"class": "zebra", "count": 1})], [""])


def test_images_that_are_not_finite_never_reach_a_model() -> None:
    images = marked(0, 1, 2)
    images[1, 0, 0, 1] = np.inf
    found = values(geneval_reward(FakeDetector([thing("cat", 0)] * 2, [], [thing("cat", 0)])), images, [TWO] * 3)
    assert found["geneval_soft_fake"] == pytest.approx([1, np.nan, 0.5], nan_ok=True)
    images[:] = np.nan
    everything = values(geneval_reward(FakeDetector([])), images, [TWO] * 3)
    assert np.isnan(list(everything.values())).all()


def test_similarity_scale_and_floor() -> None:
    def fake(images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        return np.array([0.3 if text == "good" else -0.2 for text in texts], dtype=np.float32)

    prompts = [record("a", "colors", {"class": "cat", "count": 1}, prompt=text) for text in ("good", "bad")]
    assert values(similarity_reward(fake, name="c"), marked(0, 0), prompts)["c"] == pytest.approx([0.3, -0.2])
    hessel = similarity_reward(fake, name="c", scale=2.5, floor=0.0)
    assert values(hessel, marked(0, 0), prompts)["c"] == pytest.approx([0.75, 0])


def test_blip_vqa_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    def fake(images: Sequence[np.ndarray], questions: Sequence[str]) -> np.ndarray:
        asked.extend(questions)
        assert len(questions) <= 2
        return np.array([{"a red cat?": 0.5, "two dogs?": 0.4}.get(question, 1.0) for question in questions])

    both = record("b", "two_object", {"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 2})
    other = record("o", "two_object", {"class": "orange", "count": 1}, {"class": "mouse", "count": 3, "color": "orange"})
    assert clause_phrases(both) == ["a red cat", "two dogs"]
    assert clause_phrases(other) == ["an orange", "three orange mice"]
    assert values(blip_vqa_reward(fake, phrases=clause_phrases, batch=2), marked(0, 0), [both, other]) == {
        "blip_vqa": pytest.approx([0.2, 1.0])}
    assert asked == ["a red cat?", "two dogs?", "an orange?", "three orange mice?"]
    mean = blip_vqa_reward(fake, phrases=clause_phrases, combine="mean", batch=2)
    assert values(mean, marked(0), [both])["blip_vqa"] == pytest.approx([0.45])
    (tmp_path / "phrases.json").write_text(json.dumps({"a prompt": ["phrase"] * 9, "none": []}))
    table = phrases_from_file(tmp_path / "phrases.json")
    asked.clear()
    unknown = [record(name, "colors", {"class": "cat", "count": 1}, prompt=name) for name in ("none", "absent")]
    found = values(blip_vqa_reward(fake, phrases=table, batch=2), marked(0, 0, 0), [both, *unknown])
    assert len(asked) == 8
    assert found["blip_vqa"] == pytest.approx([1, np.nan, np.nan], nan_ok=True)
    assert "no reward for the prompt 'absent'" in caplog.text
    (tmp_path / "phrases.json").write_text("[]")
    with pytest.raises(ValueError, match="a JSON object, prompt -> list of phrases, wanted, got list"):
        phrases_from_file(tmp_path / "phrases.json")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_clip_and_pickscore_from_a_folder(clip_folder: Path) -> None:
    """PickScore is the same CLIP's cosine times its own scale; both keep the contract."""
    from unigrpo.evaluation.backends.clip import ClipSimilarity

    batch = example_batch()
    cosine = ClipSimilarity.load(clip_folder)(to_pictures(batch.images), [prompt.prompt for prompt in batch.prompts])
    clip = make_reward("clip_score", {"weights": str(clip_folder), "canaries": None})
    plain = values(clip, batch.images, batch.prompts)["clip_score"]
    assert plain == pytest.approx(cosine.tolist(), abs=1e-6)
    hessel = make_reward("clip_score", {"weights": str(clip_folder), "canaries": None, "hessel": True})
    assert values(hessel, batch.images, batch.prompts)["clip_score"] == pytest.approx((2.5 * cosine.clip(0)).tolist(), abs=1e-6)
    scale = float(ClipSimilarity.load(clip_folder).model.logit_scale.detach().exp())
    assert scale > 10
    picked = make_reward("pickscore", {"weights": str(clip_folder), "canaries": None, "divisor": 26})
    assert values(picked, batch.images, batch.prompts)["pickscore"] == pytest.approx((cosine * scale / 26).tolist(), rel=1e-5)
    assert check_reward(picked).broken == []


def test_blip_vqa_from_a_folder(tmp_path: Path) -> None:
    """The product of what the model says, asked one by one; it keeps the contract."""
    from unigrpo.evaluation.backends.blip import BlipYes

    folder = save_blip(tmp_path / "blip")
    images = example_batch(size=48).images[:3]
    two = record("t", "two_object", {"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1})
    reward = make_reward("blip_vqa", {"weights": str(folder), "canaries": None, "batch": 2})
    answers = BlipYes.load(folder)
    expected = [float(answers([picture], ["a red cat?"])[0] * answers([picture], ["a dog?"])[0])
                for picture in to_pictures(images)]
    assert values(reward, images, [two] * 3)["blip_vqa"] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) > 1


def test_a_model_that_is_not_as_recorded_scores_nothing(clip_folder: Path, tmp_path: Path,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    from unigrpo.evaluation.backends import canary
    from unigrpo.evaluation.backends.clip import ClipSimilarity

    record_file = tmp_path / "canaries.json"
    canary.record(record_file, {"similarity": ClipSimilarity.load(clip_folder)}, "cpu")
    options = {"weights": str(clip_folder), "canaries": str(record_file)}
    make_reward("clip_score", options)
    make_reward("pickscore", options)
    assert "trusted unseen" not in caplog.text
    data = json.loads(record_file.read_text())
    for entry in data["scorers"].values():
        entry["readings"]["darkness"][0] += 0.1
    record_file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="the similarity clip_hf is not itself on cpu: of 'darkness'"):
        make_reward("pickscore", {**options, "divisor": 26})
    with pytest.raises(ValueError, match="no scorer is trusted unseen"):
        make_reward("clip_score", {**options, "canaries": str(tmp_path / "none.json")})
    make_reward("clip_score", {**options, "canaries": None, "batch": 7})
    assert "the models clip_hf are trusted unseen on cpu" in caplog.text


def test_geneval_from_folders(clip_folder: Path, tmp_path: Path) -> None:
    """The whole path on tiny random models: its numbers are those of the rules on the detector's own output."""
    from unigrpo.evaluation.backends.clip import ClipColors
    from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector
    from unigrpo.evaluation.geneval import flow_grpo_reward
    from unigrpo.rewards.geneval import OFFICIAL, kept_objects

    folder = save_mask2former(tmp_path / "detector", spread=8.0)
    images = example_batch(size=64).images[:4]
    detector, colors = Mask2FormerDetector.load(folder, shorter=64), ClipColors.load(clip_folder)
    found = detector(to_pictures(images))
    labels = [next(iter(keep(items, "two_object")), "cat") for items in found]
    prompts = [record(str(row), "two_object", {"class": label, "count": 2, "color": "red"})
               for row, label in enumerate(labels)]
    assert any(keep(items, "two_object") for items in found), "the random detector must find something"
    reward = make_reward("geneval_soft_mask2former_hf_64px", {"detector": str(folder), "clip": str(clip_folder),
                                                            "canaries": None})
    expected = [flow_grpo_reward(prompt, kept_objects(picture, items, prompt, colors, OFFICIAL)).score
                for prompt, items, picture in zip(prompts, found, to_pictures(images), strict=True)]
    assert values(reward, images, prompts)["geneval_soft_mask2former_hf_64px"] == pytest.approx(expected)


def test_geneval_over_the_shapes_world() -> None:
    """The strict rule and the world's own exact reward agree on right and wrong pictures of it."""
    batch = example_batch()
    strict = values(make_reward("geneval_strict_shapes"), batch.images, batch.prompts)["geneval_strict_shapes"]
    exact = values(shapes_exact, batch.images, batch.prompts)["shapes_exact"]
    assert set(exact) == {0.0, 1.0}
    assert all(geneval >= ours for geneval, ours in zip(strict, exact, strict=True)), "what is exact is strictly right"
    assert check_reward(make_reward("geneval_soft_shapes")).broken == []


def test_pictures_survive_png_and_floats_again() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert (to_pictures(levels[None].astype(np.float32) / np.float32(255))[0] == levels).all()
    assert (decode_png(encode_png(levels), max_pixels=256) == levels).all()
    with pytest.raises(ValueError, match="at most 255 pixels wanted, got 16 x 16"):
        decode_png(encode_png(levels), max_pixels=255)
    for broken in (b"", b"rubbish", encode_png(levels)[:-30]):
        with pytest.raises(ValueError, match="a complete PNG wanted"):
            decode_png(broken, max_pixels=256)
