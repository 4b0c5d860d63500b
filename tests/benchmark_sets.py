"""GenEval and T2I-CompBench sets in words that scale smoke knows, made models and their canaries, below a project's root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compbench_sets import PARSER
from geneval_sets import clause
from scorer_models import save_clip, save_mask2former
from vqa_models import nlp, save_blip, save_dpt

from unigrpo.cli import main
from unigrpo.evaluation.parses import parse_prompts, save_parses

RECORDS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [clause("banana")], "prompt": "a banana"},
    {"tag": "single_object", "include": [clause("truck")], "prompt": "a truck"},
    {"tag": "two_object", "include": [clause("carrot"), clause("truck")], "prompt": "a carrot and a truck"},
    {"tag": "counting", "include": [clause("truck", 2)], "exclude": [clause("truck", 3)], "prompt": "two truck"},
    {"tag": "colors", "include": [clause("banana", color="green")], "prompt": "a green banana"},
    {"tag": "position", "include": [clause("carrot"), clause("banana", position=["above", 0])],
     "prompt": "a banana above a carrot"},
]
SHAPES_RECORDS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [clause("circle")], "prompt": "one circle"},
    {"tag": "colors", "include": [clause("square", color="red")], "prompt": "a red square"},
    {"tag": "counting", "include": [clause("circle", 2)], "exclude": [clause("circle", 3)], "prompt": "two circles"},
]
PROMPTS = {
    "color": ["a red truck and a green banana", "a blue whale"],
    "shape": ["a square leaf and a straight carrot", "an opposite circle"],
    "texture": ["a banana and a leaf", "a grass square"],
    "spatial": ["a banana left of a truck", "a carrot at the right of a banana"],
    "3d_spatial": ["a banana in the center of a truck", "a whale and a leaf"],
    "numeracy": ["two banana and a truck", "three carrot"],
    "non_spatial": ["a tiger shows a banana", "a whale is like a truck"],
    "complex": ["the red truck is above the green banana", "the blue whale shows a leaf"],
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "?", *sorted({
    word for lines in PROMPTS.values() for line in lines for word in line.split()}), "is", "there", "clock", "wall", "circle",
    "square", "triangle", "red", "green", "blue", "plain", "grey", "stop", "sign", "yellow", "black", "darkness", "noise")


def write_sets(root: Path) -> None:
    """data/: the prompts of both benchmarks, and parses by word list."""
    folder = root / "data" / "t2i"
    folder.mkdir(parents=True)
    for name, records in (("geneval", RECORDS), ("shapes", SHAPES_RECORDS)):
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, lines in PROMPTS.items():
        (folder / f"{name}_val.txt").write_text("\n".join(lines) + "\n")
    (folder / "complex_val_spatial.txt").write_text(PROMPTS["complex"][0] + "\n")
    (folder / "complex_val_action.txt").write_text(PROMPTS["complex"][1] + "\n")
    (folder / "new_objects.txt").write_text("truck - trucks\n")
    save_parses(folder / "parses.json", parse_prompts([line for lines in PROMPTS.values() for line in lines], nlp, PARSER))


def write_models(root: Path) -> None:
    """checkpoints/: tiny random models of every kind, and data/canary.json, what they say of the canary pictures."""
    folder = root / "checkpoints"
    for name, save in (("detector", save_mask2former), ("clip", save_clip), ("depth", save_dpt)):
        save(folder / name)
    save_blip(folder / "blip", words=tuple(dict.fromkeys(WORDS)))
    (root / "data").mkdir(exist_ok=True)
    given = {"detector": "detector", "color": "clip", "clip": "clip", "blip": "blip", "depth": "depth"}
    assert main(["score", "canary", "--record", str(root / "data" / "canary.json"), *sizes(),
                 *(text for kind, name in given.items() for text in (f"--{kind}", str(folder / name)))]) == 0


def sizes() -> list[str]:
    """Sizes at which the made models run."""
    return ["--input-size", "64", "--blip-size", "32", "--depth-size", "64"]


def geneval(**changes: Any) -> dict[str, Any]:
    """A section evaluate.geneval with the made models."""
    return {"metadata": "data/geneval.jsonl", "own_prompts": True, "images_per_prompt": 2, "limit": None,
            "allow_partial": False, "detector": "checkpoints/detector", "input_size": 64, "colors": "checkpoints/clip",
            "canary": "data/canary.json", **changes}


def t2i_compbench(**changes: Any) -> dict[str, Any]:
    """A section evaluate.t2i_compbench with the made models."""
    return {"prompts": "data/t2i", "own_prompts": True, "categories": list(PROMPTS), "images_per_prompt": 10, "limit": None,
            "allow_partial": False, "parses": "data/t2i/parses.json", "blip": "checkpoints/blip", "blip_size": 32,
            "clip": "checkpoints/clip", "detector": "checkpoints/detector", "labels": None, "min_score": 0.1, "input_size": 64,
            "depth": "checkpoints/depth", "depth_size": 64, "canary": "data/canary.json", **changes}


def shapes_geneval(**changes: Any) -> dict[str, Any]:
    """A section evaluate.geneval judged by the shapes world's verifier: no model at all."""
    return geneval(metadata="data/shapes.jsonl", detector="shapes", colors=None, canary=None, **changes)
