"""From image files to T2I-CompBench's answers: models asked in batches, every answer kept as it comes.

    attributes, similarities, found_objects   ask a model, through the cache
    spatial, spatial_depth, numeracy          rules on what was found

An answer is keyed by the image's bytes, the model's identity and what was asked, so that nothing is asked twice: not after a
kill, not for a second category, not when rules change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unigrpo.evaluation import t2i_numeracy, t2i_spatial
from unigrpo.evaluation.backends import DepthEstimator, Detector, Similarity, YesProbability
from unigrpo.evaluation.backends.cache import ScoreCache, score_key
from unigrpo.evaluation.images import read_checked
from unigrpo.evaluation.parses import Parse
from unigrpo.evaluation.t2i_compbench import attribute_score, questions, similarity_text

Pixels = npt.NDArray[np.uint8]
DEPTH_RULES = "3d rules 1"   # a new number where position_3d or find_3d changes, so that kept scores are made again


class Object(NamedTuple):
    """A detection in pixels of the official detector's input; `pixels` is its box in the image's own."""

    label: str
    box: tuple[float, ...]
    score: float
    pixels: tuple[float, ...]


@dataclass(frozen=True)
class Work:
    """The images of one category.

    Args:
        prompts, paths, digests: one per image, by number; digests are sha256 of the files.
        cache: of answers. batch: images a model sees at once.
        progress: told what is asked, how many images are done and how many there are.
    """

    prompts: tuple[str, ...]
    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    cache: ScoreCache
    batch: int
    progress: Callable[[str, int, int], None] | None = None

    def ask(self, name: str, keys: Sequence[Sequence[str]],
            run: Callable[[list[int], list[Pixels]], Sequence[Sequence[Any]]]) -> list[list[Any]]:
        """The values of all keys, those that the cache lacks made by `run`.

        Args:
            name: what is asked, for the progress. keys: per image, one for each of its values.
            run: (indices of images, their pixels) -> the values of these images, as many as each has keys.
        """
        pending = [index for index, wanted in enumerate(keys) if any(key not in self.cache for key in wanted)]
        done = len(keys) - len(pending)
        self._tell(name, done)
        for start in range(0, len(pending), self.batch):
            chunk = pending[start:start + self.batch]
            answers = run(chunk, [read_checked(self.paths[index], self.digests[index]) for index in chunk])
            for index, values in zip(chunk, answers, strict=True):
                for key, value in zip(keys[index], values, strict=True):
                    self.cache.put(key, value)
            self._tell(name, done + start + len(chunk))
        return [[self.cache.get(key) for key in wanted] for wanted in keys]

    def _tell(self, name: str, done: int) -> None:
        if self.progress is not None:
            self.progress(name, done, len(self.paths))

    def key(self, index: int, *parts: object) -> str:
        """The key of an answer about one image."""
        return score_key(self.digests[index], json.dumps(parts, ensure_ascii=False))


def attributes(work: Work, model: YesProbability, parses: Sequence[Parse], *, official: bool = True) -> list[str]:
    """BLIP-VQA's score of each image, with 4 decimals as the official file has it.

    Args:
        parses: of the prompt of each image.
    """
    texts = [questions(parse.noun_chunks, official=official) for parse in parses]
    asked = [list(dict.fromkeys(each)) for each in texts]  # a phrase that a prompt has twice is asked once, and counts twice
    keys = [[work.key(index, model.identity, text) for text in each] for index, each in enumerate(asked)]

    def run(indices: list[int], images: list[Pixels]) -> list[list[float]]:
        pairs = [(image, text) for index, image in zip(indices, images, strict=True) for text in asked[index]]
        values = iter(model([image for image, _ in pairs], [text for _, text in pairs]).tolist())
        return [[next(values) for _ in asked[index]] for index in indices]

    answers = [dict(zip(each, values, strict=True))
               for each, values in zip(asked, work.ask("BLIP-VQA", keys, run), strict=True)]
    return [attribute_score([known[text] for text in each]) for known, each in zip(answers, texts, strict=True)]


def similarities(work: Work, model: Similarity, parses: Sequence[Parse] | None = None) -> list[float]:
    """The cosine of each image with its prompt, or, where parses are given (complex), with the prompt less its adjectives."""
    texts = [similarity_text(prompt, None if parses is None else parses[index].tokens)
             for index, prompt in enumerate(work.prompts)]
    keys = [[work.key(index, model.identity, text)] for index, text in enumerate(texts)]
    return [float(values[0]) for values in work.ask("CLIPScore", keys, lambda indices, images: [
        [value] for value in np.asarray(model(images, [texts[index] for index in indices])).astype(float).tolist()])]


def found_objects(work: Work, model: Detector, *, min_score: float,
                  labels: frozenset[str] | None = None) -> list[list[Object]]:
    """What a detector sees in each image, by falling score, boxes scaled to the official input size.

    Args:
        min_score: detections must score above this, in float32. labels: those that count; all by default.
    """
    keys = [[work.key(index, model.identity, "detections", min_score)] for index in range(len(work.paths))]

    def run(indices: list[int], images: list[Pixels]) -> list[list[dict[str, Any]]]:
        return [[{"size": list(image.shape[:2]), "found": [
            [item.label, [float(value) for value in item.box], float(item.score)]
            for item in found if np.float32(item.score) > np.float32(min_score)]}]
            for image, found in zip(images, model(images), strict=True)]

    return [[_scaled(label, box, score, value[0]["size"]) for label, box, score in value[0]["found"]
             if labels is None or label in labels] for value in work.ask("detections", keys, run)]


def spatial(queries: Sequence[t2i_spatial.Query], found: Sequence[Sequence[Object]], *, official: bool) -> list[float]:
    """The 2D score of each image; `queries` as `query_2d` or `query_complex` gives them, one per image."""
    return [t2i_spatial.spatial_2d(query, items, official=official).score
            for query, items in zip(queries, found, strict=True)]


def spatial_depth(work: Work, model: DepthEstimator, queries: Sequence[t2i_spatial.Query],
                  found: Sequence[Sequence[Object]], *, official: bool) -> list[float]:
    """The 3D score of each image. Only images that show both objects need their depth.

    Depth maps are read at the image's own pixels; officially boxes and maps have some 480 pixels a side.
    """
    whole = [None not in t2i_spatial.find_3d(query, items, official=official)
             for query, items in zip(queries, found, strict=True)]
    keys = [[work.key(index, model.identity, DEPTH_RULES, official, query, found[index])] if whole[index] else []
            for index, query in enumerate(queries)]

    def run(indices: list[int], images: list[Pixels]) -> list[list[float]]:
        return [[t2i_spatial.spatial_3d(queries[index], [item._replace(box=item.pixels) for item in found[index]], depth,
                                        official=official).score]
                for index, depth in zip(indices, model(images), strict=True)]

    answers = work.ask("depth", keys, run)
    return [values[0] if values else t2i_spatial.spatial_3d(query, items, None, official=official).score
            for values, query, items in zip(answers, queries, found, strict=True)]


def numeracy(wanted: Sequence[t2i_numeracy.Wanted], found: Sequence[Sequence[Object]], *, official: bool) -> list[float]:
    """The numeracy score of each image; `wanted` is that of its prompt."""
    return [t2i_numeracy.numeracy_score(objects, items, official=official)
            for objects, items in zip(wanted, found, strict=True)]


def _scaled(label: str, box: Sequence[float], score: float, size: Sequence[int]) -> Object:
    """A detection of an image of this (height, width)."""
    height, width = t2i_spatial.input_size(size[0], size[1])
    factors = (width / size[1], height / size[0]) * 2
    return Object(label, tuple(value * factor for value, factor in zip(box, factors, strict=True)), score, tuple(box))
