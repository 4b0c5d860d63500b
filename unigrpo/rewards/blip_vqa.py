"""BLIP-VQA as a reward: the probability of "yes" to a question for each thing the prompt names (attribute binding)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from unigrpo.rewards.gate import gate
from unigrpo.rewards.pictures import Picture, score_pictures
from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.types import PromptRecord, Reward

if TYPE_CHECKING:
    from unigrpo.evaluation.backends import YesProbability

LOG = logging.getLogger("unigrpo.rewards")
MAX_PHRASES = 8  # T2I-CompBench asks about the first eight noun phrases
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
Phrases = Callable[[PromptRecord], Sequence[str] | None]


def blip_vqa_reward(answers: YesProbability, *, phrases: Phrases, combine: Literal["mean", "product"] = "product",
                    batch: int = 32, name: str = "blip_vqa") -> RewardFunction:
    """r = mean or product over the phrases of P(yes | image, "<phrase>?"), in [0, 1].

    Args:
        answers: (images, questions) -> (B,) probabilities.
        phrases: of a prompt, at most eight are asked; None or none at all: the image has no reward (NaN).
        combine: product is T2I-CompBench's; mean is denser where a single phrase is hopeless.
        batch: questions at once; those about one image are neighbours, so that it is encoded once.
        name: of the record.
    Raises: ValueError for another `combine`, or a batch below 1.
    Source: T2I-CompBench arXiv:2307.06350 (BLIP-VQA).
    """
    if combine not in ("mean", "product"):
        raise ValueError(f"combine must be mean or product, got {combine!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    warned: set[str] = set()

    def reward(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        def score(pictures: list[Picture], rows: list[int]) -> dict[str, list[float]]:
            asked = [list(phrases(prompts[row]) or ())[:MAX_PHRASES] for row in rows]
            for row in (row for row, found in zip(rows, asked, strict=True) if not found and prompts[row].id not in warned):
                warned.add(prompts[row].id)
                LOG.warning("%s: no reward for the prompt %r, as no phrase of it is known", name, prompts[row].prompt)
            flat = [(picture, f"{phrase}?") for picture, found in zip(pictures, asked, strict=True) for phrase in found]
            chunks = [flat[start:start + batch] for start in range(0, len(flat), batch)]
            given = iter([value for chunk in chunks for value in answers([p for p, _ in chunk], [q for _, q in chunk])])
            combined = []
            for found in asked:
                values = np.array([next(given) for _ in found], dtype=np.float32)
                value = (values.mean() if combine == "mean" else values.prod()) if found else np.nan
                combined.append(float(value))
            return {name: combined}

        return score_pictures(images, score)

    return reward


def clause_phrases(record: PromptRecord) -> list[str]:
    """What the include clauses name: "a red bench", "three clocks". Relations are not asked about."""
    return [f"{_article(words) if clause['count'] == 1 else _number(clause['count'])} {words}"
            for clause in record.include for words in [_words(clause)]]


def phrases_from_file(path: Path) -> Phrases:
    """Noun phrases parsed before: a JSON object, prompt -> list of phrases.

    Raises: ValueError if the file holds something else.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: a JSON object, prompt -> list of phrases, wanted: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(found, list) and all(isinstance(phrase, str) for phrase in found)
                                              for found in table.values()):
        raise ValueError(f"{path}: a JSON object, prompt -> list of phrases, wanted, got {type(table).__name__}")
    return lambda record: table.get(record.prompt)


def blip_vqa(weights: str, canaries: str | None, *, device: str = "cpu", batch: int = 32,
             combine: Literal["mean", "product"] = "product", phrases: str | None = None) -> RewardFunction:
    """BLIP-VQA by a model in Hugging Face format.

    Args:
        weights: folder or hub name; T2I-CompBench's counterpart is Salesforce/blip-vqa-capfilt-large.
        canaries: their record, or null to trust the model unseen; see `gate`.
        device: cpu or cuda. batch: questions at once. combine: see `blip_vqa_reward`.
        phrases: a JSON file, prompt -> phrases; the prompts' clauses by default.
    """
    from unigrpo.evaluation.backends.blip import BlipYes
    from unigrpo.evaluation.backends.weights import quiet_transformers

    quiet_transformers()
    answers = BlipYes.load(weights, device=device, batch=batch)
    gate({"yes": answers}, device, canaries)
    return blip_vqa_reward(answers, combine=combine, batch=batch,
                           phrases=phrases_from_file(Path(phrases)) if phrases else clause_phrases)


def _words(clause: Mapping[str, object]) -> str:
    """Colour and class, the class in the plural where several are wanted."""
    label = str(clause["class"])
    if clause["count"] != 1:
        label = _plural(label)
    return f"{clause['color']} {label}" if "color" in clause else label


def _plural(label: str) -> str:
    """The plural of the last word; irregular COCO classes by name."""
    irregular = {"person": "people", "mouse": "mice", "computer mouse": "computer mice", "sheep": "sheep", "knife": "knives",
                 "scissors": "scissors", "skis": "skis"}
    if label in irregular:
        return irregular[label]
    return label + ("es" if label.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _article(words: str) -> str:
    """The indefinite article by the first letter."""
    return "an" if words[0].lower() in "aeiou" else "a"


def _number(count: int) -> str:
    """A small number as a word."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)
