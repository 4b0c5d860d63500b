"""T2I-CompBench(++)'s rules that need no boxes, as pure functions: no model, no image.

    attributes   noun chunks -> questions -> probability of yes each -> product          (`questions`, `attribute_score`)
    actions      prompt (complex: without its adjectives) -> cosine of image and text      (`similarity_text`)
    complex      attribute, 2D and similarity scores -> one score                        (`three_in_one`)

The rules on boxes are in t2i_spatial and t2i_numeracy. All are proven equal to golden cases made with the official scripts of
Karine-Huang/T2I-CompBench at 1b70949 (paper arXiv:2307.06350), from whose described behaviour they were written.
Where an official rule is an oversight, `official=False` asks for the one that was meant; published numbers use the default.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*ATTRIBUTES, "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
MAX_CHUNKS = 8           # questions to an image (`--np_num` officially)
IMAGES_PER_PROMPT = 10
FIRST_SEED = 42          # image n of every prompt is drawn with seed 42 + n
DROPPED_CHUNKS = frozenset({"top", "the side", "the left", "the right"})
PLACES = frozenset(f"{article}{place}" for article in ("", "the ") for place in (
    "top", "bottom", "left", "right", "side", "front", "back"))
PEOPLE = frozenset({"girl", "boy", "man", "woman"})

Box = Sequence[float]
Tokens = Sequence[tuple[str, str]]


class Found(Protocol):
    """What the rules read of a detected object: `box` is x1, y1, x2, y2 in pixels of the detector's input."""

    @property
    def label(self) -> str: ...
    @property
    def box(self) -> Box: ...
    @property
    def score(self) -> float: ...


def questions(noun_chunks: Sequence[str], limit: int = MAX_CHUNKS, *, official: bool = True) -> list[str]:
    """What the VQA model is asked about an image: one question per noun phrase, at most `limit`.

    Args:
        noun_chunks: of the prompt, in order.
        official: "top", "the side", "the left" and "the right" are no things and are left out, "the top" and others are not;
            False leaves out every such place.
    Returns: "<chunk>?" each.
    Source: `BLIPvqa_eval/BLIP_vqa.py`.
    """
    dropped = DROPPED_CHUNKS if official else PLACES
    return [f"{chunk}?" for chunk in noun_chunks if chunk not in dropped][:limit]


def attribute_score(probabilities: Sequence[float]) -> str:
    """The product of the probabilities of yes, each rounded to 4 decimals, in float32.

    Args:
        probabilities: one per question, in [0, 1]; a prompt without noun phrases has none and scores 1.
    Returns: the score with 4 decimals as official files have it; the category's mean is over these rounded values.
    Raises: ValueError if a probability is missing (NaN) or outside [0, 1]: no image is scored by a product without it.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"probabilities of yes must lie in [0, 1], got {list(probabilities)}")
    score = np.float32(1)
    for value in values:
        score *= np.float32(f"{value:.4f}")
    return f"{score:.4f}"


def similarity_text(prompt: str, tokens: Tokens | None = None) -> str:
    """The text that an image is compared with: the prompt, or, given its tokens, all of them but the adjectives.

    Args:
        tokens: (text, part of speech) of the prompt, for the category `complex`, whose attributes others score.
    Returns: the prompt itself, or the tokens that are not ADJ with single spaces between.
    """
    return prompt if tokens is None else " ".join(text for text, pos in tokens if pos != "ADJ")


def three_in_one(prompt: str, *, attribute: float, spatial: float, similarity: float, spatial_prompts: Collection[str],
                 action_prompts: Collection[str]) -> float:
    """The score of one image of the category `complex`.

        (spatial + attribute) / 2   if the prompt is one of the spatial ones,
        (similarity + attribute) / 2   of the action ones,   else the mean of all three

    Args:
        attribute, spatial, similarity: the image's scores; the latter two in complex mode.
        spatial_prompts, action_prompts: `prompt_key` of the lines of complex_val_spatial.txt and complex_val_action.txt.
    Source: `3_in_1_eval/3_in_1.py`.
    """
    key = prompt_key(prompt)
    if key in spatial_prompts:
        return (spatial + attribute) / 2
    if key in action_prompts:
        return (similarity + attribute) / 2
    return (attribute + spatial + similarity) / 3


def prompt_key(prompt: str) -> str:
    """What tells the prompts of the category `complex` apart: lower-case, up to the first full stop."""
    return prompt.split(".")[0].lower()


def mean(scores: Sequence[float]) -> float:
    """A category's score: the plain mean over its images, summed in order as the official files are.

    Raises: ValueError if there are none.
    """
    if not scores:
        raise ValueError("a mean needs at least one score, got none")
    return sum(scores) / len(scores)


def person_or(name: str) -> str:
    """The label that a noun is looked up by: detectors know persons only."""
    return "person" if name in PEOPLE else name
