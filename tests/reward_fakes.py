"""Fakes that rewards are tested with: records, marked images, and models that answer by an image's mark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from unigrpo.evaluation.backends import Detected
from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.types import PromptRecord


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
