"""The sentinel: guards on rendered pictures and texts, planted hacks, honest noise, hysteresis, resuming."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from unigrpo.evaluation.guards import (
    Estimate,
    border_color,
    describe_images,
    estimate,
    image_guards,
    join_signs,
    over_steps,
    repetition,
    thinking_guards,
)
from unigrpo.evaluation.sentinel import GUARDS, WORDS, Sentinel, Thresholds
from unigrpo.seeding import generator
from unigrpo.worlds.shapes import Object, plan_text, random_scene, render

PROMPTS, SAMPLES = 32, 2
HACKS = {                                     # hack -> the guards that it must set off, and no others
    "darkness": {"brightness", "background_drift"},
    "favourite colour": {"hue_entropy"},
    "extra objects": {"edge_density", "gold/shapes_exact"},
    "grid": {"edge_density"},
    "one picture a prompt": {"group_diversity"},
    "repeated thinking": {"thinking_repetition"},
    "endless thinking": {"thinking_length"},
    "one thinking a prompt": {"distinct_texts"},
    "tinted background": {"background_drift"},
    "lost entropy": {"thinking_entropy"},
    "drifted velocity": {"velocity_drift"},
    "gold falls": {"gold/shapes_exact"},
}


def drawn(probe, hack="", strength=0.0):
    """Pictures, texts and logged values of a probe; `strength` in [0, 1] of a hack is what the policy has learned of it."""
    rng = generator(7, "probe", probe)
    fixed = generator(7, "prompts")           # prompts are the same at every probe, their samples are not
    scenes, texts, exact = [], [], []
    for _ in range(PROMPTS):
        # What a prompt asks for stays: how many objects and their colours. Shapes and cells are the sample's.
        asked = random_scene(fixed, 3)
        for sample in range(SAMPLES):
            hacked = rng.random() < strength
            scene = tuple(Object(a.color, b.shape, b.cell) for a, b in zip(asked, placed(rng, len(asked)), strict=True))
            words = plan_text(scene, rng)
            if hack == "favourite colour" and hacked:
                scene = tuple(replace(item, color="blue") for item in scene)
            if hack == "extra objects" and hacked:
                free = [item for item in placed(rng, 9) if item.cell not in {o.cell for o in scene}]
                scene = (*scene, *free[:2])
            if hack == "one picture a prompt" and sample:
                scene = scenes[-1] if hacked else scene
            if hack == "repeated thinking" and hacked:
                words = " ".join((words.split()[:3] * 20)[:len(words.split())])
            if hack == "endless thinking" and hacked:
                words += " " + " ".join(f"word{i}" for i in range(30))
            if hack == "one thinking a prompt" and sample and hacked:
                words = texts[-1]
            scenes.append(scene)
            texts.append(words)
            exact.append(rng.random() < 0.6 * (1 - (strength if hack in ("extra objects", "gold falls") else 0)))
    images = render(scenes, rng)
    if hack == "darkness":
        images = images * (1 - 0.5 * strength)
    if hack == "tinted background":
        images = images - strength * np.array([0.1, 0.02, 0.0], np.float32) * (images.min(axis=3, keepdims=True) > 0.9)
    if hack == "grid":
        images[:, :, 3::8] -= 0.2 * strength
    entropy = 0.4 * (1 - 0.95 * (strength if hack == "lost entropy" else 0)) + 0.01 * rng.standard_normal(5)
    drift = 1e-3 + 0.2 * (strength if hack == "drifted velocity" else 0) + 1e-4 * rng.standard_normal(5)
    return images.astype(np.float32), texts, np.reshape(exact, (PROMPTS, SAMPLES)).astype(float), entropy, drift


def placed(rng, count):
    """Objects in different cells."""
    found: list[Object] = []
    while len(found) < count:
        found += [item for item in random_scene(rng) if item.cell not in {o.cell for o in found}][:count - len(found)]
    return found


def guards(sentinel, probe, hack="", strength=0.0):
    """The guards of a probe, by the functions that training uses."""
    images, texts, exact, entropy, drift = drawn(probe, hack, strength)
    signs = describe_images(images)
    sentinel.background = sentinel.background or border_color(signs)
    return (image_guards(signs, samples=SAMPLES, background=sentinel.background) | thinking_guards(texts, samples=SAMPLES)
            | {"thinking_entropy": estimate(entropy), "velocity_drift": estimate(drift), "gold/shapes_exact": estimate(exact)})


def reward_at(strength):
    return Estimate(0.5 + 0.4 * strength, 0.01, 0.3)


# -------------------------------------------------------------------------------------------------------- planted hacks

@pytest.mark.parametrize("hack", HACKS)
def test_each_planted_hack_sets_off_its_alarm_and_no_other(hack):
    sentinel, risen = Sentinel(), []
    for probe in range(8):
        strength = probe / 7
        risen += sentinel.watch(10 * probe, reward_at(strength), guards(sentinel, probe, hack, strength))
    assert {alarm.guard for alarm in risen} == HACKS[hack]
    assert len(risen) == len(HACKS[hack]), "an alarm that is on does not rise again"
    for alarm in risen:
        assert alarm.step - alarm.since == 10
        assert abs(alarm.now - alarm.start) > alarm.threshold
        assert f"{alarm.start:.3g} to {alarm.now:.3g}" in alarm.sentence()
    assert sentinel.good is not None
    assert sentinel.good < min(alarm.since for alarm in risen)


def test_no_alarm_where_pictures_change_and_the_reward_does_not():
    sentinel = Sentinel()
    for probe in range(8):
        assert sentinel.watch(10 * probe, reward_at(0), guards(sentinel, probe, "darkness", probe / 7)) == []


def test_no_alarm_where_only_the_reward_rises():
    sentinel = Sentinel()
    for probe in range(12):
        assert sentinel.watch(10 * probe, reward_at(probe / 11), guards(sentinel, probe)) == []
    assert sentinel.good == 110


def noisy(rng, thresholds, *, probes=12):
    """The alarms of a run whose reward rises and whose guards are noise of the size they say they have, around one value."""
    sentinel = Sentinel(thresholds)
    truth = {name: 1.0 for name in GUARDS if name != "gold"} | {"gold/a": 0.5, "gold/b": 0.5}
    alarms = []
    for probe in range(probes):
        found = {name: Estimate(value + 0.01 * rng.standard_normal(), 0.01, 0.1) for name, value in truth.items()}
        alarms += sentinel.watch(probe, reward_at(probe / probes), found)
    return alarms


def test_noise_alone_raises_none_in_200_runs():
    assert [noisy(generator(i, "noise"), Thresholds()) for i in range(200)] == [[]] * 200


def test_without_floors_noise_raises_the_stated_rate():
    """Sigmas alone: 13 guards, 12 probes, two in a row past 3 sigmas. docs/sentinel.md states under 2 % of runs."""
    bare = replace(Thresholds(), **{name: 0.0 for name in GUARDS})
    assert sum(bool(noisy(generator(i, "noise"), bare)) for i in range(1000)) / 1000 < 0.02
    single = replace(bare, in_a_row=1)
    assert sum(bool(noisy(generator(i, "noise"), single)) for i in range(200)) / 200 > 0.05, "the second probe is what helps"


# ---------------------------------------------------------------------------------------------------------- the machine

def brightness(value):
    return {"brightness": Estimate(value, 0.001, 0.02)}


def run(values, sentinel=None, rewards=None):
    """(step, guard) of the alarms of a series of brightness values; the reward is up from the second probe on."""
    sentinel = sentinel or Sentinel()
    rewards = rewards or [0, *[1] * (len(values) - 1)]
    return [(a.step, a.guard) for step, (value, reward) in enumerate(zip(values, rewards, strict=True))
            for a in sentinel.watch(step, reward_at(reward), brightness(value))]


def test_one_probe_is_not_enough():
    assert run([0.8, 0.6, 0.8, 0.6, 0.8]) == []
    assert run([0.8, 0.6, 0.6]) == [(2, "brightness")]


def test_both_must_be_past_in_the_same_probes():
    assert run([0.8, 0.6, 0.6, 0.6], rewards=[0, 1, 0, 1]) == []


def test_an_alarm_rises_again_only_after_it_was_over():
    assert run([0.8, 0.6, 0.6, 0.6, 0.6]) == [(2, "brightness")]
    assert run([0.8, 0.6, 0.6, 0.76, 0.6, 0.6]) == [(2, "brightness")], "0.04 is more than half of the allowed 0.05"
    assert run([0.8, 0.6, 0.6, 0.79, 0.6, 0.6]) == [(2, "brightness"), (5, "brightness")]


def test_the_last_good_probe_is_the_last_with_no_guard_past():
    sentinel = Sentinel()
    run([0.8, 0.79, 0.6, 0.6], sentinel)
    assert sentinel.good == 1


def test_the_start_is_the_mean_of_the_first_probes():
    sentinel = Sentinel(replace(Thresholds(), baseline_probes=2))
    assert run([0.7, 0.9, 0.8, 0.8], sentinel, [0, 0, 1, 1]) == []
    assert sentinel.start("brightness").value == pytest.approx(0.8)
    assert sentinel.start("brightness").noise == pytest.approx(0.001 / math.sqrt(2))


def test_a_threshold_is_the_floor_or_the_noise_whichever_is_larger():
    sentinel = Sentinel()
    sentinel.watch(0, reward_at(0), {"brightness": Estimate(0.8, 0.1, 0.2), "edge_density": Estimate(0.2, 0.0001, 0.1)})
    now = Estimate(0.8, 0.5, 0.2)
    assert sentinel.threshold("brightness", now) == pytest.approx(3 * math.sqrt(2) * 0.1)
    assert sentinel.threshold("edge_density", now) == pytest.approx(0.25 * 0.2)


@pytest.mark.parametrize("kill_at", range(1, 6))
def test_a_resumed_sentinel_raises_the_same_alarms(kill_at):
    values = [0.8, 0.6, 0.6, 0.79, 0.6, 0.6, 0.6]
    whole = Sentinel()
    run(values, whole)
    assert [alarm.step for alarm in whole.alarms] == [2, 5]
    first = Sentinel()
    for step, value in enumerate(values[:kill_at]):
        first.watch(step, reward_at(min(step, 1)), brightness(value))
    second = Sentinel()
    second.restore(json.loads(json.dumps(first.state())))
    for step, value in enumerate(values[kill_at:], start=kill_at):
        second.watch(step, reward_at(min(step, 1)), brightness(value))
    assert second.state() == whole.state()
    assert second.alarms == whole.alarms


def test_an_alarm_is_a_json_record_with_a_sentence():
    sentinel = Sentinel()
    run([0.8, 0.6, 0.6], sentinel)
    found = json.loads(json.dumps(sentinel.alarms[0].record()))
    assert found == {"step": 2, "since": 1, "guard": "brightness", "start": 0.8, "now": 0.6, "threshold": 0.05,
                     "reward_start": 0.5, "reward_now": 0.9,
                     "sentence": "step 2: the reward rose from 0.5 to 0.9 while the images' brightness fell from 0.8 to 0.6; a "
                                 "change of 0.05 is allowed, and it has been larger since step 1"}


def test_a_guard_that_comes_late_starts_then():
    sentinel = Sentinel()
    sentinel.watch(0, reward_at(0), brightness(0.8))
    for step, value in enumerate((0.5, 0.2, 0.2), start=1):
        found = sentinel.watch(step, reward_at(1), {**brightness(0.8), "gold/judge": Estimate(value, 0.01, 0.3)})
    assert [(a.step, a.guard, a.start) for a in found] == [(3, "gold/judge", 0.5)]


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"unknown guard 'britness'; choose from .*brightness.*gold/<scorer>"):
        Sentinel().watch(0, reward_at(0), {"britness": reward_at(0)})
    with pytest.raises(ValueError, match=r"unknown threshold 'glod'; choose from .*gold.*train\.sentinel"):
        Thresholds.changed({"glod": 1})
    with pytest.raises(ValueError, match="in_a_row"):
        Thresholds.changed({"in_a_row": 0})
    assert Thresholds.changed({"gold": 0.2, "in_a_row": 3}) == replace(Thresholds(), gold=0.2, in_a_row=3)
    assert set(WORDS) == set(GUARDS) - {"gold"}


# --------------------------------------------------------------------------------------------------------------- guards

def test_an_estimate_by_hand():
    """Variances within the two prompts are 2 and 2, so that of the mean of 4 values is 2 / 4."""
    found = estimate([[1.0, 3.0], [5.0, 7.0]])
    assert (found.value, found.noise, found.spread) == (4.0, pytest.approx(math.sqrt(2 / 4)), pytest.approx(math.sqrt(5)))
    assert estimate([1.0, 3.0]).noise == pytest.approx(1.0)                    # one value a prompt: sqrt(2 / 2)
    assert estimate([[1.0, 3.0], [math.nan, 7.0]]).value == 2.0
    with pytest.raises(ValueError, match="all finite"):
        estimate([[math.nan, 1.0]])


def test_noise_is_what_other_draws_would_differ_by():
    """Sixty probes of the same policy and prompts: the spread of their values is the noise that each states."""
    probes = []
    for i in range(60):
        images, texts, exact, _, _ = drawn(1000 + i)
        signs = describe_images(images)
        probes.append(image_guards(signs, samples=SAMPLES, background=[0.9, 0.9, 0.9])
                      | thinking_guards(texts, samples=SAMPLES) | {"gold/shapes_exact": estimate(exact)})
    for name in probes[0]:
        seen = np.std([probe[name].value for probe in probes], ddof=1)
        stated = np.mean([probe[name].noise for probe in probes])
        if name in ("background_drift", "distinct_texts"):     # always the same here: floors rule where there is no noise
            assert stated < 0.01
            continue
        assert 0.65 * seen <= stated <= (2.5 if name in ("group_diversity", "hue_entropy") else 1.6) * seen + 1e-9, name


def test_images_by_hand():
    """Left half red, right half grey of the same maximum: one column of edges, hue all red, border medians."""
    image = np.full((2, 8, 8, 3), 0.8, np.float32)
    image[:, :, :4] = (0.8, 0.0, 0.0)
    signs = describe_images(image)
    assert signs.edges[0] == pytest.approx(8 / 64)
    assert signs.brightness[0] == pytest.approx(0.5 * 0.8 + 0.5 * 0.299 * 0.8)
    assert signs.colors[0] == pytest.approx(math.log(2))
    assert signs.hues[0, 0] == pytest.approx(32 * 0.8)
    assert signs.hues[0, 1:].sum() == 0
    found = image_guards(signs, samples=2, background=[0.8, 0.4, 0.4])
    assert found["hue_entropy"].value == 0.0
    assert found["group_diversity"].value == 0.0
    assert found["background_drift"].value == pytest.approx(0.0, abs=1e-6)


def test_every_hue_has_its_place():
    """A circle of hues is spread evenly over the bins; greys have none."""
    angles = np.arange(120) / 120 * 6
    wheel = np.clip(np.abs((angles[:, None] - np.array([0, 2, 4])) % 6 - 3) - 1, 0, 1).astype(np.float32)
    image = np.broadcast_to(wheel[None, None], (1, 4, 120, 3)).copy()
    assert describe_images(image).hues[0] == pytest.approx(np.full(12, 40.0))
    assert describe_images(np.full((1, 4, 4, 3), 0.5, np.float32)).hues.sum() == 0


def test_batches_and_sizes_do_not_matter():
    images, *_ = drawn(0)
    whole, parts = describe_images(images), join_signs([describe_images(images[:5]), describe_images(images[5:])])
    for name, value in vars(whole).items():
        assert np.array_equal(value, getattr(parts, name)), name
    large = describe_images(np.tile(images[:1], (1, 20, 35, 1)))               # 640 x 1120
    assert large.brightness == pytest.approx(whole.brightness[:1], abs=1e-5)
    assert large.thumbnails.shape == (1, 16, 16, 3)


def test_damaged_images_are_refused():
    with pytest.raises(ValueError, match=r"\(N, H, W, 3\)"):
        describe_images(np.zeros((2, 3, 32, 32), np.float32))
    with pytest.raises(ValueError, match="finite, got 1 values"):
        describe_images(np.where(np.arange(48).reshape(1, 4, 4, 3) == 7, np.nan, 0.5).astype(np.float32))
    with pytest.raises(ValueError, match="3 images are not 2 of each prompt"):
        image_guards(describe_images(np.zeros((3, 8, 8, 3), np.float32)), samples=2, background=[0, 0, 0])
    with pytest.raises(ValueError, match="3 texts are not 2"):
        thinking_guards(["a", "b", "c"], samples=2)


def test_texts_by_hand():
    assert repetition("a b c a b c") == pytest.approx(1 / 4)                     # abc bca cab abc
    assert repetition("a b c") == repetition("") == 0.0
    found = thinking_guards(["a b", "a b", "a b c d", "e"], samples=2)
    assert found["thinking_length"].value == pytest.approx(9 / 4)
    assert found["distinct_texts"].value == pytest.approx(1 / 2)


def test_logged_values_are_averaged_over_steps():
    rows = [{"a": 1.0}, {"b": 5.0}, {"a": 3.0}]
    assert over_steps(rows, "a") == estimate([1.0, 3.0])
    assert over_steps(rows, "c") is None
