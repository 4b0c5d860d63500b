"""CLIP from transformers: the cosine of images and texts, and GenEval's colour classifier on top of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.weights import (
    check_complete,
    check_device,
    exact_float32,
    model_folder,
    weights_sha256,
)
from unigrpo.evaluation.geneval_color import (
    color_logits,
    color_names,
    color_prompts,
    color_weights,
    crop_object,
)

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # OpenAI's, RGB in [0, 1]
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
ARCHITECTURES = {(768, 12, 32, 224): "vit_b_32", (768, 12, 16, 224): "vit_b_16", (1024, 24, 14, 224): "vit_l_14",
                 (1024, 24, 14, 336): "vit_l_14_336"}  # width, layers, patch and picture in px
OPENAI_ACTIVATION = "quick_gelu"


def prepare(image: np.ndarray, size: int) -> Tensor:
    """A picture as CLIP takes it: shorter side resized to `size` (bicubic), the centre cut out, normalised.

    Args:
        image: (H, W, 3) uint8 RGB.
    Returns: (3, size, size) float32.
    Source: OpenAI CLIP's preprocessing; the longer side is rounded down and the cut's corner rounded, as torchvision does.
    """
    height, width = image.shape[:2]
    if height <= width:
        height, width = size, int(size * width / height)
    else:
        height, width = int(size * height / width), size
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).contiguous()


class ClipSimilarity:
    """The cosine of images and texts: a `Similarity`.

    Args:
        model: transformers' CLIPModel. tokenizer: its tokenizer. digest: sha256 of the weights.
        batch: pictures, or texts, that go through the model together.
    """

    name = "clip_hf"

    def __init__(self, model: Any, tokenizer: Any, digest: str, *, device: str = "cpu", batch: int = 32) -> None:
        self.model, self.tokenizer, self.device, self.batch = model.to(check_device(device)).eval(), tokenizer, device, batch
        vision = model.config.vision_config
        self.size = int(vision.image_size)
        self.architecture = ARCHITECTURES.get((vision.hidden_size, vision.num_hidden_layers, vision.patch_size, self.size),
                                              "other")
        self.identity = f"{self.name} {digest}"

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", batch: int = 32,
             activation: str | None = OPENAI_ACTIVATION) -> ClipSimilarity:
        """From a folder or a name on the hub.

        Args:
            activation: that the config must name, so that OpenAI's weights never run with plain GELU; None takes any (weights
                that others trained with plain GELU).
        Raises: ValueError for what is no CLIP, or has another activation.
        """
        model, tokenizer, digest = load_clip(name, activation)
        return cls(model, tokenizer, digest, device=device, batch=batch)

    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """(B,) float32 cosine of each image with its text. Raises ValueError if the numbers differ."""
        if len(images) != len(texts):
            raise ValueError(f"every image needs its text, got {len(images)} images and {len(texts)} texts")
        if not images:
            return np.zeros(0, dtype=np.float32)
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        words = self.text_embeddings(list(rows))[[rows[text] for text in texts]]
        pictures = self.image_embeddings(images)
        norms = np.linalg.norm(words, axis=1) * np.linalg.norm(pictures, axis=1)
        return ((words * pictures).sum(axis=1) / norms).astype(np.float32)

    @torch.inference_mode()
    def image_embeddings(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(B, D) float32, not normalised."""
        rows = []
        for start in range(0, len(images), self.batch):
            pixels = torch.stack([prepare(image, self.size) for image in images[start:start + self.batch]])
            with exact_float32():
                out = self.model.vision_model(pixel_values=pixels.to(self.device))
                rows.append(self.model.visual_projection(out.pooler_output).float().cpu().numpy())
        return np.concatenate(rows)

    @torch.inference_mode()
    def text_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32, not normalised; texts are cut at the model's context, whose last token then is the end's."""
        rows = []
        for start in range(0, len(texts), self.batch):
            tokens = self.tokenizer(list(texts[start:start + self.batch]), padding=True, truncation=True,
                                    max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt")
            with exact_float32():
                out = self.model.text_model(input_ids=tokens["input_ids"].to(self.device),
                                            attention_mask=tokens["attention_mask"].to(self.device))
                rows.append(self.model.text_projection(out.pooler_output).float().cpu().numpy())
        return np.concatenate(rows)


class ClipColors:
    """GenEval's colour classifier: a `ColorClassifier`. Officially with ViT-L/14 of OpenAI; `name` says the architecture.

    Args:
        similarity: the CLIP. background, crop: see `geneval_color.crop_object`.
    """

    def __init__(self, similarity: ClipSimilarity, *, background: str = "#999", crop: bool = True) -> None:
        self.similarity, self.background, self.crop = similarity, background, crop
        self.name = f"clip_{similarity.architecture}"
        self.identity = f"{similarity.identity} colors background {background} crop {crop}"
        self._weights: dict[str, np.ndarray] = {}

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", batch: int = 32, background: str = "#999",
             crop: bool = True) -> ClipColors:
        """From a folder or a name on the hub. Raises ValueError for what is no CLIP with OpenAI's activation."""
        return cls(ClipSimilarity.load(name, device=device, batch=batch), background=background, crop=crop)

    def __call__(self, image: np.ndarray, detections: Sequence[Detected], label: str) -> list[str]:
        """Per detection the likeliest of `geneval.COLORS`."""
        return color_names(self.logits(image, detections, label))

    def logits(self, image: np.ndarray, detections: Sequence[Detected], label: str) -> np.ndarray:
        """(N, 10) float32, 100 times the cosine with each colour of this class."""
        weights = self.weights(label)
        if not detections:
            return np.zeros((0, len(weights)), dtype=np.float32)
        crops = [crop_object(image, item.box, item.mask, background=self.background, crop=self.crop) for item in detections]
        return color_logits(weights, self.similarity.image_embeddings(crops))

    def weights(self, label: str) -> np.ndarray:
        """(10, D) unit vectors of the colours of a class, computed once."""
        if label not in self._weights:
            texts = color_prompts(label)
            embeddings = self.similarity.text_embeddings([text for row in texts for text in row])
            self._weights[label] = color_weights(embeddings.reshape(len(texts), len(texts[0]), -1))
        return self._weights[label]


def load_clip(name: str | Path, activation: str | None) -> tuple[Any, Any, str]:
    """CLIPModel, its tokenizer and the weights' digest. Raises ValueError as `ClipSimilarity.load` does."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = model_folder(name)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") != "clip":
        raise ValueError(f"a CLIP was wanted, and {folder} holds a model of the type {settings.get('model_type')!r}")
    loaded: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    check_complete(model, info, folder)
    found = {part: getattr(model.config, part).hidden_act for part in ("text_config", "vision_config")}
    if activation is not None and set(found.values()) != {activation}:
        raise ValueError(f"{folder} says {found['text_config']} for the texts and {found['vision_config']} for the images, and "
                         f"{activation} was wanted: OpenAI's weights were trained with quick_gelu, and with plain gelu they "
                         "give other embeddings without any error (open_clip's ViT-L-14 does just that); use "
                         "openai/clip-vit-large-patch14, or correct hidden_act in config.json if these are OpenAI's weights")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{folder} lacks its tokenizer: wanted tokenizer.json, or vocab.json with merges.txt")
    tokenizer, end = CLIPTokenizer.from_pretrained(folder), model.config.text_config.eos_token_id
    if end not in (2, tokenizer.eos_token_id):  # 2: a slip of the first released configs, which transformers knows about
        raise ValueError(f"{folder}: its config.json ends texts with token {end} and its tokenizer with "
                         f"{tokenizer.eos_token_id}, so that every text would have one embedding; correct eos_token_id")
    return model, tokenizer, weights_sha256(folder)
