"""Mask2Former from transformers as GenEval's detector, with preparation and post-processing of our own.

The released preprocessor shrinks pictures to 384 x 384 and transformers' own post-processing thresholds masks at that size;
both cost accuracy. Here a picture is resized to shorter side 800 (longer at most 1333), and masks are judged at its own
resolution, as mmdet does for the official scorer. The weights differ from the official ones all the same, so scores made
with this detector carry its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from unigrpo.digests import sha256_json
from unigrpo.evaluation.backends import Detected
from unigrpo.evaluation.backends.coco import CLASSES, check_class_order
from unigrpo.evaluation.backends.weights import (
    check_complete,
    check_device,
    exact_float32,
    model_folder,
    weights_sha256,
)

MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)  # of ImageNet, RGB, for values of 0 to 255
STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)
DIVISOR = 32
SHORTER, LONGER = 800, 1333  # px
NAME = "mask2former_hf"
TOP = 100  # (query, class) pairs kept an image
CLASS_COUNTS = (80, 133)  # of a head: COCO's things; or its things and then 53 kinds of stuff


def resized_shape(height: int, width: int, shorter: int = SHORTER, longer: int = LONGER) -> tuple[int, int]:
    """The size that a picture is resized to: shorter side as wanted unless the longer one gets too long, aspect kept.

    Returns: height and width, at least 1 px, rounded half up.
    """
    scale = min(shorter / min(height, width), longer / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def prepare(image: np.ndarray, shorter: int = SHORTER, longer: int = LONGER) -> tuple[Tensor, tuple[int, int]]:
    """A picture as the model takes it: resized (bilinear), normalised, padded with zeros on the right and at the bottom.

    Args:
        image: (H, W, 3) uint8 RGB.
    Returns: (3, H', W') float32 with sides that 32 divides; height and width of the part that is picture.
    """
    height, width = resized_shape(image.shape[0], image.shape[1], shorter, longer)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    values = (np.asarray(picture, dtype=np.float32) - MEAN) / STD
    pixels = torch.from_numpy(values).permute(2, 0, 1)
    return pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR)).contiguous(), (height, width)


def detections(class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, int], resized: tuple[int, int],
               size: tuple[int, int], *, labels: Sequence[str] = CLASSES, min_score: float = 0.0,
               top: int = TOP) -> list[Detected]:
    """One image's model outputs as instances at the image's own resolution.

        score = softmax(class logits)_c * mean over the mask of sigmoid(mask logits),   mask = logits > 0

    for the `top` pairs (query, class) with the largest class probability, "no object" left out of the pairs and not of the
    softmax. Mask logits are interpolated to the padded input, cut to the picture and interpolated to its size (bilinear).
    The box is tight around the mask, right and bottom edge exclusive. There is no suppression of overlaps.

    Args:
        class_logits: (Q, C + 1), the last being "no object". mask_logits: (Q, h, w).
        padded, resized, size: height and width of the model's input, of the picture in it, of the picture as it was.
        labels: of the first classes; detections of classes beyond them are dropped, after the top pairs are chosen.
        min_score: only detections above it are returned. A pair whose class probability is not above it is left out before
            its mask is interpolated, which changes nothing but the time, as the mask's mean is at most 1.
    Returns: detections by falling score.
    Raises: ValueError if a logit is not finite.
    Source: mmdet 2.x `MaskFormerFusionHead.instance_postprocess`, from the description in GenEval's fact sheet.
    """
    if not (torch.isfinite(class_logits).all() and torch.isfinite(mask_logits).all()):
        raise ValueError("the detector's logits must be finite, and they are not: it is broken on this device")
    probabilities = class_logits.float().softmax(-1)[:, :-1]  # (Q, C)
    classes = probabilities.shape[1]
    best, index = probabilities.flatten().topk(min(top, probabilities.numel()))  # by falling probability
    kept = (best > min_score) & (index % classes < len(labels))
    best, index = best[kept], index[kept]
    if not len(index):
        return []
    queries, place = torch.unique(torch.div(index, classes, rounding_mode="floor"), return_inverse=True)
    masks = interpolate(mask_logits[queries][None].float(), size=padded, mode="bilinear", align_corners=False)
    masks = masks[:, :, :resized[0], :resized[1]]
    masks = interpolate(masks, size=size, mode="bilinear", align_corners=False)[0]  # (q, H, W)
    inside = masks > 0
    strength = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)  # (q,)
    scores = (best * strength[place]).cpu().numpy()
    shapes, places, classes_of = inside.cpu().numpy(), place.tolist(), (index % classes).tolist()
    boxes = [_tight_box(shape) for shape in shapes]
    order = np.argsort(-scores, kind="stable")
    return [Detected(label=labels[classes_of[i]], box=boxes[places[i]], score=float(scores[i]), mask=shapes[places[i]])
            for i in order if scores[i] > min_score]


class Mask2FormerDetector:
    """A Mask2Former with COCO's instance classes, as a `Detector` over GenEval's names; `name` tells another input size.

    Args:
        model: transformers' Mask2FormerForUniversalSegmentation.
        digest: sha256 of its weights.
        labels: names of the classes by index, COCO's order.
        shorter, longer: the size that pictures are resized to; 800 and 1333 officially.
        min_score: detections at or below it are not returned; 0 keeps the whole list of 100.
        batch: pictures of one padded size that go through the model together.
    """

    def __init__(self, model: Any, digest: str, *, device: str = "cpu", labels: Sequence[str] = CLASSES,
                 shorter: int = SHORTER, longer: int = LONGER, min_score: float = 0.0, batch: int = 8) -> None:
        if shorter < DIVISOR or longer < shorter:
            raise ValueError(f"the detector's input size must be at least {DIVISOR} px, longer side not below the shorter, "
                             f"got {shorter} and {longer}; set --input-size")
        self.model, self.device, self.labels = model.to(check_device(device)).eval(), device, tuple(labels)
        self.shorter, self.longer, self.min_score, self.batch = shorter, longer, min_score, batch
        self.name = NAME if (shorter, longer) == (SHORTER, LONGER) else f"{NAME}_{shorter}px"
        self.identity = f"{NAME} {digest} input {shorter} {longer} labels {sha256_json(self.labels)[:8]}"

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", labels: Sequence[str] = CLASSES, shorter: int = SHORTER,
             longer: int | None = None, min_score: float = 0.0, batch: int = 8) -> Mask2FormerDetector:
        """From a folder or a name on the hub.

        Args:
            longer: by default in proportion to `shorter`, as 1333 to 800.
        Raises: ValueError for what is no Mask2Former with COCO's classes in their order.
        """
        import json

        from transformers import Mask2FormerForUniversalSegmentation

        folder = model_folder(name)
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "mask2former":
            raise ValueError(f"--detector wants a Mask2Former, and {folder} holds a model of the type {kind!r}")
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        check_complete(model, info, folder)
        count = len(model.config.id2label)
        if count not in CLASS_COUNTS:
            raise ValueError(f"--detector wants COCO's 80 classes (or 133 with stuff), and {folder} has {count}: use "
                             "facebook/mask2former-swin-small-coco-instance")
        check_class_order([model.config.id2label[i] for i in range(len(CLASSES))], str(folder))
        return cls(model, weights_sha256(folder), device=device, labels=labels, shorter=shorter,
                   longer=longer or round(shorter * LONGER / SHORTER), min_score=min_score, batch=batch)

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detected]]:
        """Per image its detections by falling score."""
        return self.detect(images, min_score=self.min_score)

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray], *, min_score: float = 0.0) -> list[list[Detected]]:
        """The same with another bound than the detector's own.

        Only pictures of one padded size share a batch: the model ignores padding masks, so an input must not depend on its
        neighbours.
        """
        prepared = [prepare(image, self.shorter, self.longer) for image in images]
        results: list[list[Detected]] = [[] for _ in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (pixels, _) in enumerate(prepared):
            groups.setdefault(tuple(pixels.shape), []).append(index)
        for members in groups.values():
            for start in range(0, len(members), self.batch):
                rows = members[start:start + self.batch]
                with exact_float32():
                    out = self.model(pixel_values=torch.stack([prepared[i][0] for i in rows]).to(self.device))
                    for row, i in enumerate(rows):
                        pixels, resized = prepared[i]
                        results[i] = detections(
                            out.class_queries_logits[row], out.masks_queries_logits[row], (pixels.shape[1], pixels.shape[2]),
                            resized, (images[i].shape[0], images[i].shape[1]), labels=self.labels, min_score=min_score)
        return results


def _tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 around the true pixels, right and bottom exclusive; zeros for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
