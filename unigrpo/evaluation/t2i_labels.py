"""Which detections a noun means: the official string rules, and those that were meant.

Officially a noun is compared with labels as text, differently in every category: equal in 2D (so "cow" never meets the label
"cattle, cow"), contained in 3D and numeracy (so "pen" meets "penguin"). `official=False` reads a label as the names that
commas and slashes part ("cattle, cow" is cattle or cow), equal to the noun or to a synonym.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from unigrpo.evaluation.t2i_compbench import person_or

# Nouns of the benchmark and the names that common label spaces (COCO, Objects365, Open Images) have for the same thing.
SYNONYMS = {
    "airplane": ("aeroplane", "plane"), "bag": ("handbag",), "bicycle": ("bike",), "boat": ("ship",), "couch": ("sofa",),
    "cow": ("cattle",), "painting": ("picture",), "phone": ("cell phone", "mobile phone", "telephone"),
    "refrigerator": ("fridge",), "ship": ("boat",), "sofa": ("couch",), "table": ("dining table",), "television": ("tv",),
    "tv": ("television",), "turtle": ("tortoise",),
}


def names(label: str) -> list[str]:
    """The names that a label lists: "tortoise, tortoise/turtle" -> tortoise, turtle."""
    parts = (part.strip().lower() for part in re.split(r"[,/]", label))
    return list(dict.fromkeys(part for part in parts if part))


def means(noun: str, label: str) -> bool:
    """Whether a label is of what the noun says: one of its names is the noun or a synonym."""
    noun = person_or(noun)
    return not {noun, *SYNONYMS.get(noun, ())}.isdisjoint(names(label))


def known(noun: str, labels: Collection[str], *, contained: bool = False, official: bool = True) -> bool:
    """Whether a detector that has these labels can ever find the noun.

    Args:
        noun: with the official renames done. labels: all that the detector has.
        contained: a label need only contain the noun (3D, numeracy), which official=False does not ask.
    """
    if not official:
        return any(means(noun, label) for label in labels)
    return any(noun in label for label in labels) if contained else noun in labels
