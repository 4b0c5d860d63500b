"""CLIP's preparation against a slow one, its cosines against transformers', and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scorer_models import picture, rewrite_config, save_clip

from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.clip import MEAN, STD, ClipColors, ClipSimilarity, prepare
from unigrpo.evaluation.geneval import COLORS
from unigrpo.evaluation.geneval_color import color_prompts, crop_object

TEXTS = ["a photo of a red cat", "a dog", "two black birds left of a cup"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_preparation_cuts_the_centre() -> None:
    # 20 x 50 px with size 20: nothing is resized, columns 15 to 34 are left.
    image = picture(0, 20, 50)
    pixels = prepare(image, 20).permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
    np.testing.assert_allclose(pixels * 255, image[:, 15:35], atol=1e-3)
    tall = prepare(np.ascontiguousarray(image.transpose(1, 0, 2)), 20)
    torch.testing.assert_close(tall, prepare(image, 20).transpose(1, 2))


def test_preparation_resizes_the_shorter_side_bicubically() -> None:
    image = picture(1, 37, 53)
    whole = Image.fromarray(image).resize((22, 16), Image.Resampling.BICUBIC)  # 16 * 53 / 37 = 22.9, rounded down
    pixels = prepare(image, 16).permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
    np.testing.assert_allclose(pixels * 255, np.asarray(whole)[:, 3:19], atol=1e-3)


def test_cosines_are_those_of_the_model(checkpoint: Path) -> None:
    clip = ClipSimilarity.load(checkpoint)
    images = [picture(0), picture(1, 64, 40), picture(2)]
    tokens = clip.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip.model(**tokens, pixel_values=torch.stack([prepare(image, 32) for image in images]))
    expected = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    np.testing.assert_allclose(clip(images, TEXTS), expected, atol=1e-6)
    assert clip(images, TEXTS).dtype == np.float32
    assert np.ptp(expected) > 0.01, "a model that answers alike would hide mistakes"


def test_batches_and_padding_move_nothing(checkpoint: Path) -> None:
    clip, images = ClipSimilarity.load(checkpoint, batch=2), [picture(seed) for seed in range(5)]
    texts = [*TEXTS, TEXTS[0], "x " * 100]
    together = clip(images, texts)
    alone = np.concatenate([clip([image], [text]) for image, text in zip(images, texts, strict=True)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert clip([], []).shape == (0,)
    with pytest.raises(ValueError, match="5 images and 1 texts"):
        clip(images, ["a"])


def test_colors_are_the_official_question(checkpoint: Path) -> None:
    # The golden files hold the head; this holds what is fed to it: the masked crop and the class's own texts.
    clip = ClipSimilarity.load(checkpoint)
    colors, image = ClipColors(clip), picture(3)
    mask = np.zeros((48, 48), dtype=bool)
    mask[10:40, 5:30] = True
    items = [Detected("cat", (5, 10, 30, 40), 0.9, mask=mask), Detected("cat", (0, 0, 48, 48), 0.5, mask=~mask)]
    crops = [crop_object(image, item.box, item.mask) for item in items]
    names = []
    for crop in crops:
        means = [np.mean([unit(clip.text_embeddings([text])[0]) for text in row], axis=0) for row in color_prompts("cat")]
        names.append(COLORS[int(np.argmax([unit(mean) @ clip.image_embeddings([crop])[0] for mean in means]))])
    assert colors(image, items, "cat") == names
    assert (colors.logits(image, items, "cat") != colors.logits(image, items, "dog")).any()
    assert colors(image, [], "cat") == []
    bare = ClipColors(clip).logits(image, [Detected("cat", (0, 0, 48, 48), 0.5)], "cat")
    np.testing.assert_allclose(ClipColors(clip, background="original").logits(image, items[1:], "cat"), bare, atol=1e-4)
    assert np.abs(colors.logits(image, items[1:], "cat") - bare).max() > 0.1, "the background is covered"


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_weights_for_quick_gelu_do_not_run_with_gelu(tmp_path: Path) -> None:
    folder = save_clip(tmp_path, activation="gelu")
    with pytest.raises(ValueError, match=r"gelu for the texts .* quick_gelu was wanted: OpenAI's weights"):
        ClipColors.load(folder)
    any_activation = ClipSimilarity.load(folder, activation=None)
    assert ClipSimilarity.load(folder, activation="gelu").identity == any_activation.identity


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="lacks its tokenizer"):
        ClipSimilarity.load(folder)
    rewrite_config(folder, model_type="siglip")
    with pytest.raises(ValueError, match="'siglip'"):
        ClipSimilarity.load(folder)


def test_a_config_that_ends_texts_elsewhere_is_refused(tmp_path: Path) -> None:
    import json

    folder = save_clip(tmp_path)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rewrite_config(folder, text_config={**text, "eos_token_id": 50})
    with pytest.raises(ValueError, match="every text would have one embedding"):
        ClipSimilarity.load(folder)


def test_names_tell_the_architecture(checkpoint: Path) -> None:
    clip = ClipSimilarity.load(checkpoint)
    assert (ClipColors(clip).name, clip.name) == ("clip_other", "clip_hf")
    assert ClipColors(clip).identity != ClipColors(clip, crop=False).identity
    with pytest.raises(ValueError, match="cpu or cuda"):
        ClipSimilarity.load(checkpoint, device="tpu")
