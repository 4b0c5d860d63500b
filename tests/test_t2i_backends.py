"""BLIP-VQA, DPT and OWLv2 as scorers, on tiny random checkpoints in the official formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scorer_models import picture
from vqa_models import WORDS, save_blip, save_dpt, save_owlv2

from unigrpo.evaluation.backends import blip, depth, owlv2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_blip(folder / "blip")
    save_dpt(folder / "dpt")
    save_dpt(folder / "dpt_plain", hybrid=False)
    save_owlv2(folder / "owlv2")
    return folder


def test_blip_is_the_first_step_of_the_answer(models: Path) -> None:
    """Against transformers' own forward pass, put together by hand for one question without padding."""
    scorer = blip.BlipYes.load(models / "blip", size=64)
    image = picture(0)
    ids = scorer.tokenizer("a red cup?", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [WORDS.index(word) for word in ("[CLS]", "a", "red", "cup", "?", "[SEP]")]
    ids[0, 0] = len(WORDS) + 1                                                               # [ENC] stands after [DEC]
    with torch.no_grad():
        seen = scorer.model.vision_model(blip.prepare(image, 64)[None], interpolate_pos_encoding=True).last_hidden_state
        asked = scorer.model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        logits = scorer.model.text_decoder(input_ids=torch.tensor([[len(WORDS)]]), encoder_hidden_states=asked).logits[0, 0]
    yes, no = logits.softmax(-1)[[WORDS.index("yes"), WORDS.index("no")]].tolist()
    assert scorer([image], ["A red cup?"])[0] == pytest.approx(yes / (yes + no), abs=1e-5)


def test_blip_does_not_see_neighbours_or_padding(models: Path) -> None:
    scorer = blip.BlipYes.load(models / "blip", size=64)
    images = [picture(1), picture(2, 40, 70)]
    pairs = [(images[0], "a cup?"), (images[0], "is there a red book and the blue cup?"), (images[1], "a dog?")]
    alone = [scorer([image], [question])[0] for image, question in pairs]
    together = scorer([image for image, _ in pairs], [question for _, question in pairs])
    assert together == pytest.approx(alone, abs=1e-6)
    assert np.ptp(alone) > 1e-3, "a model that says one thing of everything tests nothing"
    in_small_batches = blip.BlipYes.load(models / "blip", size=64, batch=1)([image for image, _ in pairs],
                                                                            [question for _, question in pairs])
    assert in_small_batches == pytest.approx(alone, abs=1e-6)
    # What the question's words are, and what the picture shows, both matter.
    assert abs(scorer([images[0]], ["a dog?"])[0] - scorer([images[1]], ["a dog?"])[0]) > 1e-4
    assert scorer([], []).shape == (0,)


def test_blip_questions_are_cleaned_and_cut() -> None:
    assert blip.clean('The "Red" Cup (on: the *top*)#; ~!?') == "the red cup on the top ?"
    assert blip.clean("a cup. ") == "a cup"


def test_blip_refuses_what_is_no_blip_vqa(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type 'dpt'"):
        blip.BlipYes.load(models / "dpt")
    with pytest.raises(ValueError, match="multiple of its patches of 16 px, got 50"):
        blip.BlipYes.load(models / "blip", size=50)
    with pytest.raises(ValueError, match="lacks its tokenizer"):
        blip.BlipYes.load(save_blip(tmp_path / "bare", tokenizer=False))
    words = tuple(word for word in WORDS if word != "yes")
    with pytest.raises(ValueError, match="must know 'yes' as one token"):
        blip.BlipYes.load(save_blip(tmp_path / "mute", words=words))
    lost = save_blip(tmp_path / "lost")
    tensors = load_file(lost / "model.safetensors")
    name = next(name for name in tensors if "text_encoder" in name and name.endswith("query.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, lost / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors .*query.weight"):
        blip.BlipYes.load(lost)
    scorer = blip.BlipYes.load(models / "blip", size=64)
    with pytest.raises(ValueError, match="2 images and 1 questions"):
        scorer([picture(0), picture(1)], ["a cup?"])
    with torch.no_grad():
        scorer.model.text_decoder.cls.predictions.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="broken on cpu"):
        scorer([picture(0)], ["a cup?"])


def test_blip_ids_are_those_of_the_released_vocabulary(tmp_path: Path) -> None:
    words = [*WORDS[:5], *(f"w{n}" for n in range(30522 - 5))]
    words[2748], words[2053] = "yes", "no"
    scorer = blip.BlipYes.load(save_blip(tmp_path / "right", words=tuple(words)), size=64)
    assert (scorer.start, scorer.encode, scorer.yes, scorer.no) == (30522, 30523, 2748, 2053)
    words[2748], words[2749] = "w", "yes"
    with pytest.raises(ValueError, match="tokenizer is not the checkpoint's"):
        blip.BlipYes.load(save_blip(tmp_path / "wrong", words=tuple(words)), size=64)


def test_names_tell_other_sizes(models: Path) -> None:
    small = blip.BlipYes.load(models / "blip", size=64)
    full = blip.BlipYes.load(models / "blip")
    assert (small.name, full.name) == ("blip_hf_64px", "blip_hf")
    assert small.identity != full.identity
    assert depth.DptDepth.load(models / "dpt", size=64).name == "dpt_hf_64px"
    assert depth.DptDepth.load(models / "dpt").name == "dpt_hf"
    assert full.size == depth.DptDepth.load(models / "dpt").size == 480


@pytest.mark.parametrize("kind", ["dpt", "dpt_plain"])
def test_depth_is_normalised_at_the_pictures_size(models: Path, kind: str) -> None:
    scorer = depth.DptDepth.load(models / kind, size=96, batch=2)                            # trained at 64
    images = [picture(0), picture(1, 30, 50), picture(2, 64, 40)]
    maps = scorer(images)
    for image, values in zip(images, maps, strict=True):
        assert values.shape == image.shape[:2]
        assert values.dtype == np.float32
        assert (values.min(), values.max()) == (0.0, 1.0)
        assert np.allclose(values * 255, np.round(values * 255), atol=1e-4), "8 bits"
    for image, values in zip(images, maps, strict=True):
        assert np.abs(scorer([image])[0] - values).max() <= 1 / 255 + 1e-6, "neighbours do not matter"
    assert np.abs(maps[0] - scorer([picture(5)])[0]).max() > 0.1
    assert scorer([]) == []


def test_depth_keeps_the_networks_order() -> None:
    """Larger stays larger: MiDaS gives inverse depth, so near is 1. A flat map is 0 everywhere."""
    ramp = torch.arange(12.0).reshape(3, 4)
    levels = depth._levels(ramp, (3, 4))
    assert levels.argmax() == 11
    assert levels.argmin() == 0
    assert depth._levels(torch.full((3, 4), 7.0), (6, 8)).tolist() == np.zeros((6, 8)).tolist()


def test_depth_reads_the_checkpoints_mean(models: Path, tmp_path: Path) -> None:
    folder = save_dpt(tmp_path / "dpt")
    plain = depth.DptDepth.load(folder, size=64)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}))
    other = depth.DptDepth.load(folder, size=64)
    assert other.identity != plain.identity
    assert plain.mean.tolist() == [0.5, 0.5, 0.5]
    assert np.abs(other([picture(0)])[0] - plain([picture(0)])[0]).max() > 1 / 255
    with pytest.raises(ValueError, match="type 'blip'"):
        depth.DptDepth.load(models / "blip")
    with pytest.raises(ValueError, match="twice its patches of 16 px, got 80"):
        depth.DptDepth.load(models / "dpt", size=80)
    with torch.no_grad():
        next(iter(plain.model.head.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="broken on cpu"):
        plain([picture(0)])


def test_owlv2_agrees_with_transformers(models: Path) -> None:
    """Logits and boxes against the whole forward pass, with text queries given beside each picture."""
    labels = ["cup", "cattle, cow", "dog"]
    scorer = owlv2.Owlv2Detector.load(models / "owlv2", labels, batch=2)
    images = [picture(0), picture(1, 30, 60), picture(2, 60, 30)]
    tokens = scorer.tokenizer([owlv2.TEMPLATE.format(label) for label in labels], padding="max_length", max_length=16,
                              truncation=True, return_tensors="pt")
    for image, found in zip(images, scorer(images), strict=True):
        with torch.no_grad():
            out = scorer.model(pixel_values=owlv2.prepare(image, 32)[None], input_ids=tokens["input_ids"],
                               attention_mask=tokens["attention_mask"])
        best = out.logits[0].sigmoid().max(-1)
        order = torch.sort(best.values, descending=True).indices
        assert [item.score for item in found] == pytest.approx(best.values[order].tolist(), abs=1e-5)
        assert [item.label for item in found] == [labels[index] for index in best.indices[order].tolist()]
        height, width = image.shape[:2]
        x, y, w, h = (out.pred_boxes[0, order[0]] * max(height, width)).tolist()
        wanted = [max(x - w / 2, 0), max(y - h / 2, 0), min(x + w / 2, width), min(y + h / 2, height)]
        assert list(found[0].box) == pytest.approx(np.clip(wanted, 0, [width, height, width, height]).tolist(), abs=1e-3)
    assert len({item.label for found in scorer(images) for item in found}) > 1


def test_owlv2_pads_to_a_square_on_the_right_and_bottom() -> None:
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels = owlv2.prepare(image, 40).permute(1, 2, 0).numpy() * owlv2.STD + owlv2.MEAN
    assert pixels[:18].max() < 1e-6
    assert pixels[22:] == pytest.approx(owlv2.GRAY / 255, abs=1e-6)


def test_owlv2_needs_labels(models: Path) -> None:
    for labels in ([], ["cup", "cup"]):
        with pytest.raises(ValueError, match="needs distinct labels"):
            owlv2.Owlv2Detector.load(models / "owlv2", labels)
    with pytest.raises(ValueError, match="type 'dpt'"):
        owlv2.Owlv2Detector.load(models / "dpt", ["cup"])
    one, other = (owlv2.Owlv2Detector.load(models / "owlv2", labels) for labels in (["cup"], ["dog"]))
    assert one.identity != other.identity
    strict = owlv2.Owlv2Detector.load(models / "owlv2", ["cup"], min_score=0.5)
    assert [item for item in one([picture(0)])[0] if item.score > 0.5] == strict([picture(0)])[0]
