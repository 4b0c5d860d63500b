"""Rewards by models (small fakes and tiny random checkpoints), sums, functions of the user's, and rewards by name."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scorer_models import save_clip, save_mask2former
from vqa_models import save_blip

from unigrpo.credit import assign_credit
from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.geneval import keep
from unigrpo.rewards import REWARDS
from unigrpo.rewards.blip_vqa import blip_vqa_reward, clause_phrases, phrases_from_file
from unigrpo.rewards.clip_score import similarity_reward
from unigrpo.rewards.conformance import CLAUSES, check_reward, example_batch
from unigrpo.rewards.custom import custom
from unigrpo.rewards.geneval import geneval_reward
from unigrpo.rewards.mixture import weighted_sum
from unigrpo.rewards.pictures import decode_png, encode_png, to_pictures
from unigrpo.rewards.registry import FACTORIES, make_reward
from unigrpo.rewards.shapes import Images, RewardFunction, shapes_exact, shapes_graded
from unigrpo.types import PromptRecord, Reward


def record(name: str, tag: str, *include: dict, prompt: str = "a prompt") -> PromptRecord:
    return PromptRecord(id=name, tag=tag, prompt=prompt, include=include)


def values(reward: RewardFunction, images: Images, prompts: Sequence[PromptRecord]) -> dict[str, list[float]]:
    records = reward(images, prompts, [""] * len(prompts))
    assert all(item.value.shape == (len(prompts),) and item.value.dtype == torch.float32 for item in records)
    return {item.name: item.value.tolist() for item in records}


def marked(*marks: int) -> Images:
    """One image per mark: its top left pixel says which answer a fake gives."""
    images = np.zeros((len(marks), 4, 4, 3), dtype=np.float32)
    images[:, 0, 0, 0] = np.array(marks) / 255
    return images


class FakeDetector:
    """Answers by an image's mark."""

    name, identity, labels = "fake", "fake", ("cat", "dog")

    def __init__(self, *answers: list[Detected]) -> None:
        self.answers = answers

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        assert all(image.dtype == np.uint8 and image.ndim == 3 for image in images)
        return [self.answers[image[0, 0, 0]] for image in images]


class FakeColors:
    """Red left of x = 50, blue right of it; counts what it is asked."""

    name = identity = "fake"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, image: np.ndarray, detections: Sequence[Detected], label: str) -> list[str]:
        self.asked.append(label)
        return ["red" if item.box[0] < 50 else "blue" for item in detections]


def thing(label: str, x: float, score: float = 0.95) -> Detected:
    return Detected(label=label, box=(x, 0.0, x + 10, 10.0), score=score)


BESIDE = record("p", "position", {"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]})
TWO = record("n", "counting", {"class": "cat", "count": 2})
RED = record("c", "colors", {"class": "cat", "count": 1, "color": "red"})


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


# ------------------------------------------------------------------------------------------------------------------ sums

def test_a_mixture_is_the_weighted_sum_of_reward_weights() -> None:
    batch = example_batch()
    batch.images[2, 0, 0, 0] = np.nan
    weights = {"shapes_graded": 1.0, "shapes_exact": 0.5}
    parts: dict[str, RewardFunction] = {"shapes_graded": shapes_graded, "shapes_exact": shapes_exact}
    records = weighted_sum("both", parts, weights, threads=2)(batch.images, batch.prompts, batch.thinking)
    assert [item.name for item in records] == ["both", "both/shapes_graded", "both/shapes_exact"]
    direct = [part(batch.images, batch.prompts, batch.thinking)[0] for part in parts.values()]
    mixed, metrics = assign_credit(records, ["text", "image"], group_size=4, weights={"both": 1.0})  # type: ignore[list-item]
    summed, expected = assign_credit(direct, ["text", "image"], group_size=4, weights=weights)  # type: ignore[list-item]
    assert torch.equal(mixed[0], summed[0])
    assert metrics["reward/mean"] == expected["reward/mean"]
    assert metrics["reward/missing"] == 1 / 8
    assert metrics["reward/both/shapes_exact"] == expected["reward/shapes_exact"]


def test_a_part_of_weight_0_is_logged_and_its_gaps_do_not_matter() -> None:
    def gaps(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        return [Reward("gaps", torch.full((len(images),), torch.nan))]

    batch = example_batch()
    total, *parts = weighted_sum("m", {"gaps": gaps, "x": shapes_exact}, {"gaps": 0.0, "x": 2.0})(
        batch.images, batch.prompts, batch.thinking)
    assert torch.equal(total.value, 2 * parts[1].value)
    assert parts[0].value.isnan().all()


def test_a_mixture_by_name() -> None:
    batch = example_batch()
    reward = make_reward("mixture", {"weights": {"shapes_graded": 1, "shapes_exact": 1}, "name": "sum"})
    assert reward(batch.images, batch.prompts, batch.thinking)[0].name == "sum"
    with pytest.raises(ValueError, match="options for judge, which has no weight"):
        make_reward("mixture", {"weights": {"shapes_exact": 1}, "options": {"judge": {}}})
    with pytest.raises(ValueError, match="one that is not 0"):
        make_reward("mixture", {"weights": {"shapes_exact": 0}})


# --------------------------------------------------------------------------------------------------------------- by name

USER = '''
import numpy as np, torch
from unigrpo.types import Reward
imported = True
def brightness(images, prompts, thinking): return images.mean(axis=(1, 2, 3))
def records(images, prompts, thinking):
    value = torch.as_tensor(images.mean(axis=(1, 2, 3)))
    return [Reward("light", value), Reward("dark", 1 - value)]
def factory(gain): return lambda images, prompts, thinking: gain * images.mean(axis=(1, 2, 3))
def infinite(images, prompts, thinking): return np.full(len(images), np.inf)
def short(images, prompts, thinking): return [1.0]
number = 3
'''


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_rewards_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_functions_of_the_users(user_module: str) -> None:
    batch = example_batch()
    light = batch.images.mean(axis=(1, 2, 3)).tolist()
    assert user_module not in sys.modules
    make_reward("shapes_exact")
    assert user_module not in sys.modules, "imported only when it is named"
    name = f"{user_module}:brightness"
    assert values(make_reward(name), batch.images, batch.prompts)[name] == pytest.approx(light)
    found = values(make_reward(f"{user_module}:records"), batch.images, batch.prompts)
    assert list(found) == [f"{user_module}:records", f"{user_module}:records/dark"]
    twice = values(make_reward(f"{user_module}:factory", {"gain": 2}), batch.images, batch.prompts)
    assert twice[f"{user_module}:factory"] == pytest.approx([2 * value for value in light])


@pytest.mark.parametrize(("name", "message"), [
    ("os.path", r"is named module:name, as in my_rewards:brightness, got 'os.path'"),
    ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
    ("MODULE:absent", "has no 'absent'"),
    ("MODULE:number", r"must be a function \(images, prompts, thinking\), got int"),
    ("a b:c", "is named module:name"),
])
def test_a_wrong_name_says_what_is_wrong(user_module: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        custom(name.replace("MODULE", user_module))


@pytest.mark.parametrize(("name", "message"), [("infinite", "it is infinite for image 0"), ("short", r"\(8,\), got \(1,\)")])
def test_a_users_wrong_values_stop_the_run(user_module: str, name: str, message: str) -> None:
    batch = example_batch()
    with pytest.raises(ValueError, match=message):
        make_reward(f"{user_module}:{name}")(batch.images, batch.prompts, batch.thinking)


def test_rewards_by_name_are_made_once_and_wrong_options_are_named(clip_folder: Path) -> None:
    options = {"weights": str(clip_folder), "canaries": None, "batch": 8}
    assert make_reward("clip_score", options) is make_reward("clip_score", dict(reversed(options.items())))
    with pytest.raises(ValueError, match=r"takes the options weights, canaries, device, batch, hessel, openai: .*'size'"):
        make_reward("clip_score", {**options, "size": 3})
    with pytest.raises(ValueError, match="missing a required argument: 'canaries'"):
        make_reward("clip_score", {"weights": str(clip_folder)})
    with pytest.raises(ValueError, match="the reward shapes_exact takes no options"):
        make_reward("shapes_exact", {"a": 1})
    with pytest.raises(ValueError, match="unknown reward 'beauty'; choose from blip_vqa, clip_score"):
        make_reward("beauty")
    with pytest.raises(ValueError, match="must be JSON values"):
        make_reward("clip_score", {"weights": clip_folder})
    with pytest.raises(ValueError, match="the others belong to `unigrpo serve-rewards`"):
        make_reward("clip_score", {"server": {"url": "http://127.0.0.1:1"}, "batch": 3})


def test_every_factory_exists() -> None:
    for path in FACTORIES.values():
        module, _, name = path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_every_reward_by_name_says_whose_weights_it_loads() -> None:
    licences = json.loads((Path(__file__).parents[1] / "docs" / "licences.json").read_text())
    named = {name for row in licences["weights"] for name in row["rewards"]}
    assert named.isdisjoint(licences["no_model"])
    assert named | set(licences["no_model"]) == {*REWARDS, *FACTORIES}
    for row in licences["weights"]:
        assert set(row) == {"weights", "rewards", "licence", "commercial_use", "source"}
        assert row["commercial_use"] in ("yes", "no", "not checked")
        assert all(row.values())


def test_the_docs_name_every_reward_and_what_is_there() -> None:
    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    assert [name for name in (*REWARDS, *FACTORIES) if f"`{name}`" not in text] == []
    assert [clause for clause in CLAUSES if f"`{clause}`" not in text] == []
    options = {name: set(inspect.signature(getattr(importlib.import_module(path.partition(":")[0]),
                                                   path.partition(":")[2])).parameters) for name, path in FACTORIES.items()}
    rows = {name: line.split("|")[-2] for line in text.splitlines() if line.startswith("| `") for name in FACTORIES
            if f"`{name}`" in line.split("|")[1]}
    for name in ("pickscore", "clip_score", "blip_vqa", "mixture"):
        assert set(re.findall(r"`(\w+)`", rows[name])) == options[name]
