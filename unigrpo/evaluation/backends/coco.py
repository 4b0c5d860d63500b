"""COCO's 80 object classes by index, under the names that GenEval's prompts use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush")
MAX_STRANGE = 12  # names of a checkpoint that may differ: COCO's three and VOC's spellings ("sofa") come to nine


def check_class_order(names: Sequence[str], where: str) -> None:
    """Refuse a model whose classes are not COCO's in COCO's order; one that does not name them passes.

    Args:
        names: the first 80 names of the model's config, by index. where: the model, for the error.
    Raises: ValueError. Classes are mapped by index, so another order would answer for other objects.
    """
    plain = [_plain(name) for name in names]
    if all(name == f"label{index}" for index, name in enumerate(plain)):
        return
    strange = [(index, name) for index, name in enumerate(names) if plain[index] != _plain(CLASSES[index])]
    if len(names) != len(CLASSES) or len(strange) > MAX_STRANGE:
        index, name = strange[0] if strange else (len(names), "nothing")
        raise ValueError(f"a detector's classes must be COCO's 80 in COCO's order, and {where} has {name!r} as class {index} "
                         f"where {CLASSES[min(index, 79)]!r} was wanted ({len(strange)} differ)")


def read_class_names(path: Path) -> tuple[str, ...]:
    """GenEval's object_names.txt: one name a line, COCO's order. Raises ValueError if it does not hold 80 distinct names."""
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the class names {path} cannot be read: {error}") from error
    if len(set(names)) != len(CLASSES):
        raise ValueError(f"{path} must hold {len(CLASSES)} distinct class names in COCO's order, got {len(set(names))}")
    check_class_order(names, str(path))
    return names


def _plain(name: str) -> str:
    """Letters and digits in lower case."""
    return "".join(character for character in name.lower() if character.isalnum())
