"""The verifier of the shapes world: sees what is there, and lets nothing else through."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from unigrpo.evaluation.geneval import keep, verdict
from unigrpo.seeding import generator
from unigrpo.worlds.shapes import COLORS, SHAPES, Object, random_scene, render, sample_record, sample_scene, wrong_plan
from unigrpo.worlds.shapes.detect import UNKNOWN, detect, detect_arrays
from unigrpo.worlds.shapes.prompts import make_record
from unigrpo.worlds.shapes.render import coverage
from unigrpo.worlds.shapes.scene import BACKGROUND, CELL_CENTERS, CELLS, PALETTE, Scene
from unigrpo.worlds.shapes.specification import Clause, Specification
from unigrpo.worlds.shapes.verify import verify

RNG = generator(0, "verifier")
RECORDS = [sample_record(generator(0, "verifier", i)) for i in range(1500)]
IMAGES = render([sample_scene(r, RNG) for r in RECORDS], RNG)
GROUND = np.array(BACKGROUND)
COLOR_VALUES = np.array([PALETTE[name] for name in COLORS])


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


def lone_shapes(count: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Shapes in the middle: (shape, colour, alpha, x, y), x and y in px from their centre."""
    rng = generator(1, "lone")
    shape, color = rng.integers(len(SHAPES), size=count), rng.integers(len(COLORS), size=count)
    center = rng.uniform(12, 20, size=(2, count, 1, 1))
    grid, full = np.arange(32) + 0.5, (count, 32, 32)
    x, y = np.broadcast_to(grid - center[0], full), np.broadcast_to(grid[:, None] - center[1], full)
    return shape, color, coverage(shape[:, None, None], x, y, np.full((count, 1, 1), scale)), x, y


def paint(alpha: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Colours over the background; color is an index (N,) or RGB (N, H, W, 3)."""
    rgb = COLOR_VALUES[color][:, None, None] if color.ndim == 1 else color
    return (GROUND * (1 - alpha[..., None]) + alpha[..., None] * rgb).astype(np.float32)


def all_known(images: np.ndarray) -> float:
    """Share of images that consist of recognised things only, and of at least one."""
    return float(np.mean([bool(found) and all(UNKNOWN not in (d.label, d.color) for d in found) for found in detect(images)]))


@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.995), (0.05, 0.98), (0.1, 0.85)])
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
        shape, color, alpha, _, _ = lone_shapes(300, scale)
        found = detect(paint(alpha, color))
        assert all(len(f) == 1 and (f[0].label, f[0].color) == (SHAPES[s], COLORS[c])
                   for f, s, c in zip(found, shape, color, strict=True))


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


def test_partial_shapes_are_unknown() -> None:
    _, color, alpha, x, y = lone_shapes(1500)
    angle = generator(2, "cut").uniform(0, 2 * np.pi, size=(len(alpha), 1, 1))
    order = np.argsort(-(np.cos(angle) * x + np.sin(angle) * y).reshape(len(alpha), -1), axis=1)
    for missing in (0.3, 0.4, 0.5, 0.7):
        flat = np.take_along_axis(alpha.reshape(len(alpha), -1), order, axis=1)
        flat = np.where(flat.cumsum(1) < missing * flat.sum(1, keepdims=True), 0.0, flat)
        cut = np.zeros_like(flat)
        np.put_along_axis(cut, order, flat, axis=1)
        assert all_known(paint(cut.reshape(alpha.shape), color)) <= 0.005, missing


def test_faint_shapes_are_unknown_and_never_overlooked() -> None:
    _, color, alpha, _, _ = lone_shapes(600)
    for strength in (0.2, 0.3, 0.5, 0.7):
        images = paint(strength * alpha, color)
        assert all_known(images) <= 0.005, strength
        assert np.mean([len(found) > 0 for found in detect(images)]) >= 0.995, strength


@pytest.mark.parametrize("distance", [4.5, 5.5, 6.5])
def test_merged_shapes_are_unknown(distance: float) -> None:
    shape, color, alpha, x, y = lone_shapes(1500)
    angle = generator(3, "merge").uniform(0, 2 * np.pi, size=(len(alpha), 1, 1))
    other = coverage(np.roll(shape, 1)[:, None, None], x + distance * np.cos(angle), y + distance * np.sin(angle),
                     np.ones((len(alpha), 1, 1)))
    touching = np.minimum(alpha, other).reshape(len(alpha), -1).max(1) > 0.5  # at some angles pointed shapes stay apart
    assert touching.mean() > 0.5
    same = paint(np.maximum(alpha, other), color)
    assert all_known(same[touching]) <= 0.005
    two = paint(alpha, color) * (1 - other[..., None]) + other[..., None] * COLOR_VALUES[(color + 1) % 6][:, None, None]
    assert all_known(two[touching].astype(np.float32)) <= 0.005


def test_two_coloured_and_wrongly_coloured_shapes_are_unknown() -> None:
    _, color, alpha, x, _ = lone_shapes(900)
    other = COLOR_VALUES[(color + 1 + np.arange(900) % 5) % 6]
    halves = np.where((x > 0)[..., None], other[:, None, None], COLOR_VALUES[color][:, None, None])
    assert all_known(paint(alpha, halves)) <= 0.02  # halves of red and orange, or orange and yellow, come closest
    for rgb in ((0.1, 0.1, 0.1), (0.0, 0.9, 0.9), (1.0, 0.55, 0.75), (0.5, 0.35, 0.2)):  # black, cyan, pink, brown
        assert all_known(paint(alpha, np.broadcast_to(np.array(rgb), (*alpha.shape, 3)))) == 0.0


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
