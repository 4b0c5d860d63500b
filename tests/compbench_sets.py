"""T2I-CompBench sets of our own for the tests: prompt files, parses by word list, complete sets of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from scorer_models import picture
from vqa_models import nlp

from unigrpo.evaluation import t2i_outputs as outputs
from unigrpo.evaluation.parses import parse_prompts, save_parses

PARSER = {"spacy": "0.0.0", "model": "en_core_web_sm", "model_version": "0"}
PROMPTS = {
    "color": ["a red cup and a blue book", "a blue dog and a red cat"],
    "shape": ["a round cup and a wooden book", "a small dog"],
    "texture": ["a wooden cup", "a red cat"],
    "spatial": ["a cup on the left of a dog", "a boy near a girl"],
    "3d_spatial": ["a cup behind a dog", "a cat in front of a bench"],
    "numeracy": ["two cups", "a dog and three cats"],
    "non_spatial": ["A dog is holding a cup.", "A cat is on the bench."],
    "complex": ["The red cup is near the blue dog.", "The red dog is holding the cup."],
}


def write_prompts(folder: Path) -> Path:
    """Prompt files of our own, with line ends as various as the official ones."""
    for place, (name, lines) in enumerate(PROMPTS.items()):
        end = ("\n", "\r\n")[place % 2]
        (folder / f"{name}_val.txt").write_bytes((end.join(lines) + end * (place % 3 > 0)).encode())
    (folder / "complex_val_spatial.txt").write_bytes(PROMPTS["complex"][0].upper().encode())
    (folder / "complex_val_action.txt").write_bytes((PROMPTS["complex"][1] + "\r\n").encode())
    (folder / "new_objects.txt").write_bytes(b"cup - cups\ndog - dogs\ncat - cats\n")
    return folder


def write_parses(path: Path) -> Path:
    """Parses of all of PROMPTS."""
    save_parses(path, parse_prompts([prompt for lines in PROMPTS.values() for prompt in lines], nlp, PARSER))
    return path


def draw(folder: Path, category: str, *, size: int = 32) -> Path:
    """A complete set of images, all different."""
    return _write_images(folder, category, lambda number: Image.fromarray(picture(number, size, size)))


def number_images(folder: Path, category: str, size: tuple[int, int] = (64, 64)) -> Path:
    """A complete set whose images are their own numbers; `size` is (width, height)."""
    return _write_images(folder, category, lambda number: Image.new("RGB", size, (number, 7, 7)))


def _write_images(folder: Path, category: str, image: Callable[[int], Image.Image]) -> Path:
    """Ten images of each prompt, under the official names."""
    (folder / "samples").mkdir(parents=True)
    for number in range(10 * len(PROMPTS[category])):
        image(number).save(folder / "samples" / outputs.file_name(PROMPTS[category][number // 10], number))
    return folder
