"""Mask2Former's preparation and post-processing by hand, and tiny random checkpoints through the whole detector."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scorer_models import picture, rewrite_config, save_mask2former
from torch.nn.functional import interpolate

from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.coco import CLASSES, check_class_order, read_class_names
from unigrpo.evaluation.backends.mask2former import (
    MEAN,
    STD,
    Mask2FormerDetector,
    detections,
    prepare,
    resized_shape,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mask2former(tmp_path_factory.mktemp("mask2former"))


def sigmoid(*values: float) -> float:
    """The mean."""
    return sum(1 / (1 + math.exp(-value)) for value in values) / len(values)


def test_sizes() -> None:
    assert resized_shape(512, 512) == (800, 800)
    assert resized_shape(480, 640) == (800, 1067)  # 1066.67, rounded
    assert resized_shape(500, 1000) == (667, 1333), "the longer side binds"
    assert resized_shape(1000, 500) == (1333, 667)
    assert resized_shape(1024, 1024, 64, 107) == (64, 64)


def test_preparation_normalises_then_pads() -> None:
    image = np.full((20, 30, 3), (10, 20, 30), dtype=np.uint8)
    pixels, size = prepare(image, shorter=40, longer=100)
    assert (tuple(pixels.shape), size) == ((3, 64, 64), (40, 60))
    expected = (torch.tensor([10.0, 20.0, 30.0]) - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
    torch.testing.assert_close(pixels[:, :40, :60], expected[:, None, None].expand(3, 40, 60))
    assert not pixels[:, 40:].any()
    assert not pixels[:, :, 60:].any(), "padding is zero after the normalisation"


def test_score_mask_and_box_by_hand() -> None:
    # One query: softmax(0, log 2, log 5) = (1, 2, 5) / 8. Two mask columns (2, -2) at 8 px: 2, 2, 1.5, 0.5, -0.5, -1.5, -2, -2.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    masks = torch.tensor([[[2.0, -2.0], [2.0, -2.0]]])
    found = detections(logits, masks, (8, 8), (8, 8), (8, 8), labels=("a", "b"))
    inside = sigmoid(2, 2, 1.5, 0.5)
    assert [(item.label, item.box) for item in found] == [("b", (0, 0, 4, 8)), ("a", (0, 0, 4, 8))]
    assert [item.score for item in found] == pytest.approx([inside / 4, inside / 8], abs=1e-6)
    assert found[0].mask is not None
    assert found[0].mask.tolist() == [[True] * 4 + [False] * 4] * 8


def test_padding_is_cut_before_the_picture_gets_its_own_size() -> None:
    # The picture is the left half of the input: 2, 2, 1.5, 0.5 in 4 px; at 8 px 2, 2, 2, 1.875, 1.625, 1.25, 0.75, 0.5.
    logits, masks = torch.tensor([[8.0, 0.0]]), torch.tensor([[[2.0, -2.0], [2.0, -2.0]]])
    item, = detections(logits, masks, (8, 8), (8, 4), (8, 8), labels=("a",))
    assert item.box == (0, 0, 8, 8)
    p = 1 / (1 + math.exp(-8))
    assert item.score == pytest.approx(p * sigmoid(2, 2, 2, 1.875, 1.625, 1.25, 0.75, 0.5), abs=1e-6)


def test_masks_are_judged_at_full_resolution() -> None:
    # A logit map whose zero crossing lies between input pixels: 4 columns of 1, 1, -3, -3 seen at 16 px.
    logits, masks = torch.tensor([[9.0, 0.0]]), torch.tensor([[[1.0, 1.0, -3.0, -3.0]] * 4])
    item, = detections(logits, masks, (4, 4), (4, 4), (16, 16), labels=("a",))
    # From column 6 on: 1 at 5.5 px falls by 1 a pixel: 0.5, -0.5: column 6 is in, column 7 is out; nearest would give 8.
    assert item.box == (0, 0, 7, 16)


def test_an_empty_mask_is_no_object() -> None:
    assert detections(torch.tensor([[9.0, 0.0]]), torch.full((1, 2, 2), -1.0), (4, 4), (4, 4), (4, 4), labels=("a",)) == []


def test_classes_beyond_the_things_are_dropped_after_the_top() -> None:
    logits = torch.log(torch.tensor([[1.0, 6.0, 2.0, 1.0]]))  # a thing, two kinds of stuff, no object
    masks = torch.full((1, 2, 2), 3.0)
    assert detections(logits, masks, (2, 2), (2, 2), (2, 2), labels=("a",), top=2) == [], "the stuff took both places"
    item, = detections(logits, masks, (2, 2), (2, 2), (2, 2), labels=("a",), top=3)
    assert item.score == pytest.approx(0.1 * sigmoid(3), abs=1e-6)


def slow_detections(logits: torch.Tensor, masks: torch.Tensor, padded: tuple[int, int], resized: tuple[int, int],
                    size: tuple[int, int], labels: tuple[str, ...]) -> list[tuple[str, tuple[float, ...], float]]:
    """The same by loops over all pairs, everything interpolated."""
    big = interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)[:, :, :resized[0], :resized[1]]
    big = interpolate(big, size=size, mode="bilinear", align_corners=False)[0]
    pairs = [(float(p), q, c) for q, row in enumerate(logits.softmax(-1)[:, :-1]) for c, p in enumerate(row)]
    found = []
    for p, q, c in sorted(pairs, reverse=True)[:100]:
        ys, xs = np.nonzero((big[q] > 0).numpy())
        if len(ys):
            score = p * float(big[q][big[q] > 0].sigmoid().mean())
            found.append((labels[c], (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), score))
    return sorted(found, key=lambda item: -item[2])


@pytest.mark.parametrize("seed", range(3))
def test_shortcuts_change_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, masks = torch.randn(9, 14, generator=generator) * 3, torch.randn(9, 5, 6, generator=generator) * 2
    labels, shape = tuple("abcdefghijklm"), ((40, 48), (37, 41), (30, 33))
    expected = slow_detections(logits, masks, *shape, labels)
    for bound in (0.0, 0.05, 0.3):
        found = detections(logits, masks, *shape, labels=labels, min_score=bound)
        wanted = [item for item in expected if item[2] > bound]
        assert [(item.label, item.box) for item in found] == [item[:2] for item in wanted]
        assert [item.score for item in found] == pytest.approx([item[2] for item in wanted], abs=1e-5)
    assert len(expected) > len(wanted) > 0


def test_logits_that_are_not_finite_stop_it() -> None:
    with pytest.raises(ValueError, match="finite"):
        detections(torch.tensor([[math.nan, 0.0]]), torch.ones(1, 2, 2), (2, 2), (2, 2), (2, 2), labels=("a",))


def test_a_batch_of_several_sizes_equals_one_by_one(checkpoint: Path) -> None:
    detector = Mask2FormerDetector.load(checkpoint, shorter=64, batch=2)
    images = [picture(0), picture(1, 64, 40), picture(2), picture(3, 30, 80), picture(4)]
    together = detector(images)
    for image, found in zip(images, together, strict=True):
        alone, = detector([image])
        assert [(item.label, item.box) for item in found] == [(item.label, item.box) for item in alone]
        assert [item.score for item in found] == pytest.approx([item.score for item in alone], abs=1e-6)
        assert all(item.mask is not None and item.mask.shape == image.shape[:2] for item in found)
    assert len({tuple((item.label, item.box) for item in found[:5]) for found in together}) == 5


def test_the_order_of_neighbours_moves_no_bit(checkpoint: Path) -> None:
    detector = Mask2FormerDetector.load(checkpoint, shorter=64, batch=4)
    images = [picture(seed) for seed in range(4)]
    assert detector(images[::-1])[::-1] == detector(images) == detector(images)


def test_the_detector_speaks_of_genevals_names_by_index(checkpoint: Path) -> None:
    names = tuple(f"thing {index}" for index in range(80))
    named = Mask2FormerDetector.load(checkpoint, shorter=64, labels=names)([picture(0)])[0]
    plain = Mask2FormerDetector.load(checkpoint, shorter=64)([picture(0)])[0]
    assert [names.index(item.label) for item in named] == [CLASSES.index(item.label) for item in plain]
    assert (CLASSES.index("computer mouse"), CLASSES.index("tv remote"), CLASSES.index("computer keyboard")) == (64, 65, 66)


def test_its_name_and_identity_tell_what_moves_a_number(checkpoint: Path, tmp_path: Path) -> None:
    detector = Mask2FormerDetector.load(checkpoint)
    assert (detector.name, detector.shorter, detector.longer) == ("mask2former_hf", 800, 1333)
    small = Mask2FormerDetector.load(checkpoint, shorter=64)
    other = Mask2FormerDetector.load(save_mask2former(tmp_path, seed=1))
    assert (small.name, small.longer) == ("mask2former_hf_64px", 107)
    assert len({detector.identity, small.identity, other.identity}) == 3
    assert Mask2FormerDetector.load(checkpoint, batch=2, min_score=0.3).identity == detector.identity


def test_min_score_leaves_the_weak_ones_out(checkpoint: Path) -> None:
    detector = Mask2FormerDetector.load(checkpoint, shorter=64, min_score=0.2)
    everything = detector.detect([picture(0)])[0]
    assert detector([picture(0)])[0] == [item for item in everything if item.score > 0.2]
    assert 0 < len(detector([picture(0)])[0]) < len(everything)
    assert all(isinstance(item, Detected) for item in everything)


def test_wrong_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a model"):
        Mask2FormerDetector.load(tmp_path / "nothing here")
    with pytest.raises(ValueError, match=r"config\.json"):
        Mask2FormerDetector.load(tmp_path)
    few = save_mask2former(tmp_path / "few", labels=3)
    with pytest.raises(ValueError, match=r"80 classes .* has 3"):
        Mask2FormerDetector.load(few)
    rewrite_config(few, model_type="detr")
    with pytest.raises(ValueError, match="'detr'"):
        Mask2FormerDetector.load(few)
    (few / "model.safetensors").rename(few / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"safetensors.*not read"):
        Mask2FormerDetector.load(few)
    with pytest.raises(ValueError, match="--input-size"):
        Mask2FormerDetector.load(checkpoint, shorter=16)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_mask2former(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["class_predictor.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors .* class_predictor\.weight"):
        Mask2FormerDetector.load(folder)


def test_class_order(tmp_path: Path) -> None:
    spelled = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
               "tv": "tvmonitor", "dining table": "diningtable", "computer mouse": "mouse", "tv remote": "remote",
               "computer keyboard": "keyboard"}
    check_class_order([spelled.get(name, name) for name in CLASSES], "here")
    check_class_order([f"LABEL_{index}" for index in range(80)], "here")
    with pytest.raises(ValueError, match="class 0 where 'person'"):
        check_class_order(["background", *CLASSES[:-1]], "here")
    (tmp_path / "names.txt").write_text("person\n")
    with pytest.raises(ValueError, match="80 distinct class names"):
        read_class_names(tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    assert read_class_names(tmp_path / "names.txt") == CLASSES
