"""The verifier of the shapes world: sees what is there, and lets nothing else through."""

from __future__ import annotations

import time

import numpy as np
import pytest
from defects import COLOR_VALUES, FAMILIES, LIMITS, Lone, accepted, faint, paint, wrong_attributes
from scipy.ndimage import gaussian_filter, shift

from unigrpo.evaluation.geneval import keep, verdict
from unigrpo.seeding import generator
from unigrpo.worlds.shapes import COLORS, SHAPES, Object, random_scene, render, sample_record, sample_scene, wrong_plan
from unigrpo.worlds.shapes.detect import detect, detect_arrays
from unigrpo.worlds.shapes.prompts import make_record
from unigrpo.worlds.shapes.scene import BACKGROUND, CELL_CENTERS, CELLS, Scene
from unigrpo.worlds.shapes.specification import Clause, Specification
from unigrpo.worlds.shapes.verify import verify

RNG = generator(0, "verifier")
RECORDS = [sample_record(generator(0, "verifier", i)) for i in range(1500)]
IMAGES = render([sample_scene(r, RNG) for r in RECORDS], RNG)


def read(images: np.ndarray) -> list[list[tuple[str, str, str]]]:
    """What each image shows, as sorted (colour, shape, cell)."""
    centers = np.array(CELL_CENTERS)
    return [sorted((d.color, d.label, CELLS[3 * int(np.abs(centers - (d.box[1] + d.box[3]) / 2).argmin())
                                            + int(np.abs(centers - (d.box[0] + d.box[2]) / 2).argmin())]) for d in found)
            for found in detect(images)]


def read_right(images: np.ndarray, scenes: list[Scene]) -> float:
    """Share of images read without any mistake in colour, shape, place or number."""
    wanted = [sorted((o.color, o.shape, o.cell) for o in scene) for scene in scenes]
    return float(np.mean([a == b for a, b in zip(read(images), wanted, strict=True)]))


@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.998), (0.05, 0.985), (0.075, 0.97), (0.1, 0.55)])
def test_scenes_are_read_exactly_under_pixel_noise(noise: float, least: float) -> None:
    rng = generator(0, "noise")
    scenes = [random_scene(rng) for _ in range(1500)]
    images = render(scenes, rng)
    assert read_right((images + noise * rng.standard_normal(images.shape)).astype(np.float32), scenes) >= least


def test_soft_and_slightly_off_pictures_are_read() -> None:
    """What a flow model draws: blurred edges, noise, colours and sizes a little off."""
    rng = generator(0, "soft")
    scenes = [random_scene(rng) for _ in range(600)]
    images = gaussian_filter(render(scenes, rng), (0, 0.5, 0.5, 0))
    images = images + rng.uniform(-0.05, 0.05, size=(600, 1, 1, 3)) + 0.03 * rng.standard_normal(images.shape)
    assert read_right(images.astype(np.float32), scenes) >= 0.98
    for scale in (0.92, 1.08):
        lone = Lone(300, generator(1, "lone"), scale)
        assert all(len(f) == 1 and (f[0].label, f[0].color) == (SHAPES[s], COLORS[c])
                   for f, s, c in zip(detect(lone.paint()), lone.shape, lone.color, strict=True))


def test_clean_to_the_eye_is_read() -> None:
    """Half a pixel of blur or of shift, with noise: what keeps the thresholds from growing harder than a policy can meet."""
    rng = generator(0, "eye")
    scenes = [random_scene(rng) for _ in range(600)]
    images = render(scenes, rng)
    noise = rng.standard_normal(images.shape)
    blurred = gaussian_filter(images, (0, 0.4, 0.4, 0)) + 0.04 * noise
    shifted = shift(images, (0, 0.5, 0.5, 0), order=1, mode="nearest") + 0.03 * noise
    assert read_right(blurred.astype(np.float32), scenes) >= 0.99
    assert read_right(shifted.astype(np.float32), scenes) >= 0.97


def test_right_scenes_are_exact_by_our_rule_and_by_genevals() -> None:
    result = verify(IMAGES, RECORDS)
    assert result["exact"].mean() >= 0.995
    assert result["graded"].dtype == np.float32
    assert np.array_equal(result["exact"], result["graded"] == 1.0)
    official = [verdict(r, keep(found, r.tag)).correct for r, found in zip(RECORDS, detect(IMAGES), strict=True)]
    assert np.mean(official) >= 0.995


def test_one_wrong_attribute_is_refused() -> None:
    """Wrong inferences, an extra object, a missing one, another prompt's picture: accepted at most where it is also right."""
    rng = generator(0, "wrong")
    reasoning = [r for r in RECORDS if r.needs_reasoning]
    wrong = verify(render([wrong_plan(r, rng, systematic=bool(i % 2)) for i, r in enumerate(reasoning)], rng), reasoning)
    assert wrong["exact"].mean() <= 0.005
    assert 0.4 < wrong["graded"].mean() < 0.8
    plain = [(r, sample_scene(r, rng)) for r in RECORDS]
    missing = verify(render([scene[1:] for _, scene in plain], rng), RECORDS)
    assert missing["exact"].mean() <= 0.005
    free = [next(c for c in CELLS if c not in {o.cell for o in scene}) for _, scene in plain]
    extra = verify(render([(*scene, Object("blue", "cross", cell)) for (_, scene), cell in zip(plain, free, strict=True)], rng),
                   RECORDS)
    assert extra["exact"].mean() <= 0.005
    assert extra["graded"].max() < 1.0


@pytest.mark.parametrize("attribute", ["color", "shape", "cell"])
def test_every_attribute_counts(attribute: str) -> None:
    rng = generator(0, "attribute", attribute)
    records, scenes = [], []
    for _ in range(400):
        scene = random_scene(rng, 1)
        spec = Specification((Clause(scene[0].shape, 1, scene[0].color, scene[0].cell),))
        records.append(make_record(spec, "x"))
        choices = {"color": COLORS, "shape": SHAPES, "cell": CELLS}[attribute]
        others = [c for c in choices if c != getattr(scene[0], attribute)]
        scenes.append((Object(**{**vars(scene[0]), attribute: others[int(rng.integers(len(others)))]}),))
    assert verify(render(scenes, rng), records)["exact"].mean() <= 0.005


@pytest.mark.parametrize("family", FAMILIES)
def test_defects_are_refused(family: str) -> None:
    for noise in (0.0, 0.04):
        rng = generator(3, "defect", family)
        images = FAMILIES[family](400, rng)
        images = (images + noise * rng.standard_normal(images.shape)).astype(np.float32)
        assert accepted(images) <= max(LIMITS.get(family, 0.005), 4 / len(images)), noise  # 0.5 % is 2 of 400


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_defects_are_refused_in_large_numbers(family: str) -> None:
    assert accepted(FAMILIES[family](4000, generator(4, "defect", family))) <= LIMITS.get(family, 0.005)


def test_what_is_faint_is_never_overlooked() -> None:
    for strength in (0.2, 0.3, 0.5, 0.7, 0.8):
        images = faint(400, generator(3, "overlooked"), strength)
        assert accepted(images) <= 0.005, strength
        assert np.mean([len(found) > 0 for found in detect(images)]) >= 0.995, strength


def test_every_single_wrong_attribute_is_refused() -> None:
    shares, right = wrong_attributes(300, generator(0, "single"))
    assert right >= 0.998
    assert max(shares.values()) <= 0.005, shares


@pytest.mark.slow
def test_every_single_wrong_attribute_is_refused_in_large_numbers() -> None:
    shares, right = wrong_attributes(4000, generator(1, "single"))
    assert right >= 0.998
    assert max(shares.values()) <= 0.005, shares


def test_wrongly_coloured_shapes_are_unknown() -> None:
    lone = Lone(900, generator(0, "colours"))
    halves = np.where((lone.x > 0)[..., None], COLOR_VALUES[lone.other_color()][:, None, None],
                      COLOR_VALUES[lone.color][:, None, None])
    assert accepted(paint(lone.alpha, halves)) <= 0.005
    for rgb in ((0.1, 0.1, 0.1), (0.0, 0.9, 0.9), (1.0, 0.55, 0.75), (0.5, 0.35, 0.2)):  # black, cyan, pink, brown
        assert accepted(paint(lone.alpha, np.broadcast_to(np.array(rgb), (*lone.alpha.shape, 3)))) == 0.0


def test_noise_and_empty_images_are_not_shapes() -> None:
    rng = generator(0, "nothing")
    assert detect(np.full((2, 32, 32, 3), BACKGROUND, np.float32)) == [[], []]
    assert not verify(rng.random((200, 32, 32, 3)).astype(np.float32), RECORDS[:200])["exact"].any()
    smooth = gaussian_filter(rng.random((400, 32, 32, 3)), (0, 2, 2, 0))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    assert not verify(smooth.astype(np.float32), RECORDS[:400])["exact"].any()
    with pytest.raises(ValueError, match="finite"):
        detect_arrays(np.full((1, 32, 32, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="32"):
        detect_arrays(np.zeros((1, 24, 24, 3), np.float32))


def test_a_batch_never_changes_an_image() -> None:
    rng = generator(0, "batch")
    images = (IMAGES[:128] + 0.08 * rng.standard_normal(IMAGES[:128].shape)).astype(np.float32)
    together, alone = detect(images), [detect(images[i : i + 1])[0] for i in range(128)]
    assert together == alone  # labels, colours, boxes and scores, to the bit
    whole = verify(images, RECORDS[:128])
    for i in range(128):
        single = verify(images[i : i + 1], RECORDS[i : i + 1])
        assert (single["exact"][0], single["graded"][0]) == (whole["exact"][i], whole["graded"][i])


def test_graded_by_hand() -> None:
    two = make_record(Specification((Clause("circle", 1, "red"), Clause("square", 1, "blue"))), "x")
    related = make_record(Specification((Clause("circle"), Clause("square")), ("left of", 0, 1)), "x")
    red, blue = Object("red", "circle", "left"), Object("blue", "square", "right")
    cases = [((red, blue), two, 1.0),
             ((red,), two, 2 / 3),                                              # F1 of one hit, two wanted, one found
             ((red, Object("green", "square", "right")), two, 3 / 4),           # the right shape only: one half
             ((red, Object("blue", "cross", "right")), two, 3 / 4),             # the right colour only: one half
             ((red, blue, Object("green", "cross", "top")), two, 4 / 5),        # an extra object
             ((), two, 0.0),
             ((red, blue), related, 1.0)]
    images = render([scene for scene, _, _ in cases], generator(0, "g"))
    result = verify(images, [record for _, record, _ in cases])
    assert result["graded"] == pytest.approx([value for _, _, value in cases], abs=1e-6)
    scene = (Object("red", "circle", "right"), Object("blue", "square", "left"))
    turned = verify(render([scene], generator(0, "t")), [related])
    assert 0.5 <= turned["graded"][0] < 0.6
    assert not turned["exact"][0]


def test_records_that_cannot_be_decided_are_refused() -> None:
    twice = make_record(Specification((Clause("circle", 1, "red"), Clause("circle", 1, "blue"))), "x")
    with pytest.raises(ValueError, match="shape of its own"):
        verify(IMAGES[:1], [twice])
    with pytest.raises(ValueError, match="as many records"):
        verify(IMAGES[:2], RECORDS[:1])


def test_the_verifier_is_fast() -> None:
    images, records = IMAGES[:128], RECORDS[:128]
    verify(images, records)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        detect_arrays(images)
        seconds.append(time.process_time() - start)
    assert min(seconds) / 128 < 0.3e-3, f"{min(seconds) / 128 * 1e3:.2f} ms an image"
