"""OWLv2 from transformers: a detector that is asked for labels in words, so that any label space can be emulated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigrpo.digests import sha256_json
from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.weights import (
    check_complete,
    check_device,
    exact_float32,
    model_folder,
    weights_sha256,
)

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # OpenAI's, RGB in [0, 1]
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
TEMPLATE = "a photo of a {}"  # as OWLv2 is asked
GRAY = 128  # of the padding on the right and at the bottom


class Owlv2Detector:
    """An OWLv2 as a `Detector` of the labels that it is given.

    Each of its places in the picture gives one detection, of the label that fits best; overlaps are not suppressed. Its scores
    are not those of other detectors: a threshold that suits one does not suit the other.

    Args:
        model: transformers' Owlv2ForObjectDetection. tokenizer: its tokenizer. digest: sha256 of the weights.
        labels: what is looked for; "cattle, cow" is asked as one text.
        min_score: detections at or below it are not returned. batch: pictures that go through the model together.
    Raises: ValueError if there are no labels, or one twice.
    """

    name = "owlv2_hf"

    def __init__(self, model: Any, tokenizer: Any, digest: str, labels: Sequence[str], *, device: str = "cpu",
                 min_score: float = 0.0, batch: int = 4) -> None:
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"an OWLv2 needs distinct labels to look for, got {len(labels)} and {len(set(labels))} of them "
                             "distinct")
        self.model, self.tokenizer, self.device = model.to(check_device(device)).eval(), tokenizer, device
        self.labels, self.min_score, self.batch = tuple(labels), min_score, batch
        self.size = int(model.config.vision_config.image_size)
        self.identity = f"{self.name} {digest} labels {sha256_json([TEMPLATE, *labels])}"
        self.queries = self._queries()

    @classmethod
    def load(cls, name: str | Path, labels: Sequence[str], *, device: str = "cpu", min_score: float = 0.0,
             batch: int = 4) -> Owlv2Detector:
        """From a folder or a name on the hub. Raises ValueError for what is no OWLv2."""
        from transformers import CLIPTokenizer, Owlv2ForObjectDetection

        folder = model_folder(name)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if settings.get("model_type") != "owlv2":
            raise ValueError(f"an OWLv2 was wanted, and {folder} holds a model of the type {settings.get('model_type')!r}")
        loaded: Any = Owlv2ForObjectDetection.from_pretrained(folder, use_safetensors=True, dtype=torch.float32,
                                                              output_loading_info=True)
        model, info = loaded
        check_complete(model, info, folder)
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise ValueError(f"{folder} lacks its tokenizer: wanted tokenizer.json, or vocab.json with merges.txt")
        return cls(model, CLIPTokenizer.from_pretrained(folder), weights_sha256(folder), labels, device=device,
                   min_score=min_score, batch=batch)

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        """Per image its detections by falling score. Raises ValueError if a score is not finite."""
        results: list[list[Detected]] = []
        for start in range(0, len(images), self.batch):
            rows = images[start:start + self.batch]
            logits, boxes = self._forward(torch.stack([prepare(image, self.size) for image in rows]))
            if not bool(torch.isfinite(logits).all() and torch.isfinite(boxes).all()):
                raise ValueError(f"the detector's outputs must be finite, and they are not: it is broken on {self.device}")
            results += [self._detections(logits[row], boxes[row], image.shape[:2]) for row, image in enumerate(rows)]
        return results

    @torch.inference_mode()
    def _queries(self) -> Tensor:
        """(L, D) embeddings of the labels."""
        text = self.model.config.text_config
        rows = []
        for start in range(0, len(self.labels), 64):
            tokens = self.tokenizer([TEMPLATE.format(label) for label in self.labels[start:start + 64]],
                                    padding="max_length", truncation=True, max_length=text.max_position_embeddings,
                                    return_tensors="pt").to(self.device)
            with exact_float32():
                pooled = self.model.owlv2.text_model(input_ids=tokens["input_ids"],
                                                     attention_mask=tokens["attention_mask"]).pooler_output
                rows.append(self.model.owlv2.text_projection(pooled))
        return torch.cat(rows)  # the class head normalises them

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, places, L), and boxes (B, places, 4) as center, width and height in shares of the padded picture."""
        with exact_float32():
            grid, _ = self.model.image_embedder(pixel_values=pixels.to(self.device))
            places = grid.flatten(1, 2)
            logits, _ = self.model.class_predictor(places, self.queries[None].expand(len(pixels), -1, -1))
            return logits.float(), self.model.box_predictor(places, grid).float()

    def _detections(self, logits: Tensor, boxes: Tensor, shape: tuple[int, ...]) -> list[Detected]:
        """One picture's detections, boxes in its own pixels and cut at its edges."""
        best = logits.sigmoid().max(dim=-1)
        scores, labels = best.values.cpu().numpy(), best.indices.cpu().numpy()
        center, extent = boxes[:, :2], boxes[:, 2:]
        corners = (torch.cat([center - extent / 2, center + extent / 2], dim=-1) * max(shape)).cpu().numpy()
        height, width = shape[:2]
        corners = np.clip(corners, 0, np.array([width, height, width, height], dtype=np.float32))
        order = [index for index in np.argsort(-scores, kind="stable") if scores[index] > self.min_score]
        return [Detected(label=self.labels[labels[index]], score=float(scores[index]),
                         box=(float(corners[index, 0]), float(corners[index, 1]), float(corners[index, 2]),
                              float(corners[index, 3]))) for index in order]


def prepare(image: np.ndarray, size: int) -> Tensor:
    """A picture as OWLv2 takes it: padded to a square with gray, resized (bilinear, antialiased), normalised.

    Args:
        image: (H, W, 3) uint8 RGB. size: px of either side of the model's input.
    Returns: (3, size, size) float32.
    """
    side = max(image.shape[:2])
    square = np.full((side, side, 3), GRAY, dtype=np.uint8)
    square[:image.shape[0], :image.shape[1]] = image
    pixels = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).contiguous()
