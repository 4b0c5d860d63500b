"""A category's score: prompts, images and models in; official files and a record that says what the number is out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo.evaluation import t2i_answers as answers
from unigrpo.evaluation import t2i_numeracy, t2i_spatial
from unigrpo.evaluation.backends import DepthEstimator, Detector, Similarity, YesProbability
from unigrpo.evaluation.backends.cache import ScoreCache
from unigrpo.evaluation.geneval_folder import write_atomically
from unigrpo.evaluation.images import check_image, read_bytes
from unigrpo.evaluation.parses import MODEL, Parse, Parses
from unigrpo.evaluation.t2i_compbench import ATTRIBUTES, CATEGORIES, IMAGES_PER_PROMPT, mean, person_or, three_in_one
from unigrpo.evaluation.t2i_labels import known
from unigrpo.evaluation.t2i_outputs import PLACES, SCORERS, write_results
from unigrpo.evaluation.t2i_prompts import Images, PromptFiles

RECORD = "unigrpo_score.json"
# Models by category, and the categories whose prompts are parsed.
NEEDS = {**dict.fromkeys(ATTRIBUTES, ("blip",)), "spatial": ("detector",), "3d_spatial": ("detector", "depth"),
         "numeracy": ("detector",), "non_spatial": ("clip",), "complex": ("blip", "detector", "clip")}
QUERIES = {"spatial": t2i_spatial.query_2d, "3d_spatial": t2i_spatial.query_3d, "complex": t2i_spatial.query_complex}
PARSED = (*ATTRIBUTES, "spatial", "3d_spatial", "complex")


@dataclass(frozen=True)
class Models:
    """The models at hand. A category needs those of NEEDS.

    Args:
        labels: the detector's labels that count, all by default.
        min_score: detections must score above this; the official detector's 0.5 is no other's.
    """

    blip: YesProbability | None = None
    clip: Similarity | None = None
    detector: Detector | None = None
    depth: DepthEstimator | None = None
    labels: frozenset[str] | None = None
    min_score: float = t2i_spatial.MIN_SCORE

    @property
    def label_space(self) -> frozenset[str]:
        """The labels that a detection can have."""
        assert self.detector is not None
        every = frozenset(self.detector.labels)
        return every if self.labels is None else every & self.labels


@dataclass(frozen=True)
class Checked:
    """Images whose files are whole: numbers, paths, sha256 and "<width>x<height>" each, and how many were not."""

    numbers: tuple[int, ...]
    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    sizes: dict[str, int]
    unreadable: int


def check_files(images: Images, *, partial: bool) -> Checked:
    """Read every file's header, end and digest before a model is asked.

    Raises: ValueError naming the files that are damaged, unless `partial` is True and one is whole: then they are counted.
    """
    numbers, paths, digests, problems = [], [], [], []
    sizes: Counter[str] = Counter()
    for number, path in zip(images.numbers, images.paths, strict=True):
        try:
            data = read_bytes(path)
            width, height = check_image(data, path)
        except ValueError as error:
            problems.append(str(error))
            continue
        numbers.append(number)
        paths.append(path)
        digests.append(hashlib.sha256(data).hexdigest())
        sizes[f"{width}x{height}"] += 1
    if problems and (not partial or not numbers):
        more = f"\n- and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{len(problems)} of {len(images.paths)} images cannot be read; make them again, or count them as "
                         "missing with --allow-partial:\n- " + "\n- ".join(problems[:10]) + more)
    return Checked(tuple(numbers), tuple(paths), tuple(digests), dict(sizes), len(problems))


@dataclass(frozen=True)
class Score:
    """A category's score.

    Args:
        record: what the number is and rests on: name, score, images, models, prompt files, parser, what limits it.
        answers: scorer -> one answer per image, the category's own last. file_names: of the images, by number.
    """

    record: dict[str, Any]
    answers: dict[str, Sequence[str | float]]
    file_names: tuple[str, ...]


def score_category(files: PromptFiles, images: Images, models: Models, parses: Parses | None, cache: ScoreCache, *,
                   official: bool = True, partial: bool = False, batch: int = 8,
                   progress: Callable[[str, int, int], None] | None = None) -> Score:
    """Score one category.

    Args:
        parses: of every prompt; needed by the categories of PARSED.
        official: the official rules, or those that were meant (`t2i_compbench`).
        partial: the set may be incomplete.
        progress: told what is asked, how many images are done and how many there are.
    Raises: ValueError if a model or a parse is missing, or an image is damaged.
    """
    category = files.category
    assert category in CATEGORIES
    missing = [role for role in NEEDS[category] if getattr(models, role) is None]
    if missing or (category in PARSED and parses is None):
        raise ValueError(f"category {category} needs {', '.join([*missing, *(['parses'] if parses is None else [])])}")
    checked = check_files(images, partial=partial)
    prompts = tuple(files.prompts[number // IMAGES_PER_PROMPT] for number in checked.numbers)
    parsed = [parses.of(prompt) for prompt in prompts] if category in PARSED and parses is not None else []
    work = answers.Work(prompts, checked.paths, checked.digests, cache, batch, progress)
    results, limits = _answers(work, files, models, parsed, official)
    complete = images.complete and not checked.unreadable
    other_parser = category in PARSED and parses is not None and parses.parser.get("model") != MODEL
    marks = [mark for mark, holds in (("partial", not complete), ("corrected", not official), ("other_parser", other_parser),
                                      ("own_prompts", not files.official)) if holds]
    record = {
        "name": "_".join(["t2i_compbench", category, *_model_names(category, models), *marks]),
        "category": category, "score": mean([float(answer) for answer in results[SCORERS[category]]]),
        "images": len(checked.numbers), "images_of_a_complete_set": images.wanted, "unreadable": checked.unreadable,
        "complete": complete, "official_rules": official, "official_prompts": files.official,
        "parts": {scorer: mean([float(answer) for answer in values]) for scorer, values in results.items()},
        **limits, "image_sizes": checked.sizes, "prompt_files": files.sha256,
        "parser": dict(parses.parser) if category in PARSED and parses is not None else None,
        "models": {role: getattr(models, role).identity for role in NEEDS[category]}}
    return Score(record, results, tuple(path.name for path in checked.paths))


def write_score(out: Path, score: Score) -> None:
    """Write the official files and the record into a folder.

    Raises: ValueError if it holds results that others wrote.
    """
    foreign = [path for place in PLACES.values() if (path := out / place.folder / "vqa_result.json").exists()]
    if foreign and not (out / RECORD).is_file():
        raise ValueError(f"{foreign[0]} is there, and no {RECORD} in {out}: results that `unigrpo score` did not write are not "
                         "overwritten; give another --output")
    # The record first, so that the files of an interrupted write are known as ours.
    write_atomically(out / RECORD, (json.dumps(score.record, indent=1) + "\n").encode())
    for scorer, values in score.answers.items():
        write_results(out, scorer, score.file_names, values)


def _wanted_names(wanted: t2i_numeracy.Wanted, official: bool) -> list[str]:
    """The names by which numeracy's objects are looked up."""
    return [t2i_numeracy.RENAMES.get(name, name) if official else person_or(name) for name, _ in wanted]


def _answers(work: answers.Work, files: PromptFiles, models: Models, parses: Sequence[Parse],
             official: bool) -> tuple[dict[str, Sequence[str | float]], dict[str, Any]]:
    """Every scorer's answers by number, the category's last; and what the detector's labels allow."""
    category = files.category
    results: dict[str, Sequence[str | float]] = {}
    limits: dict[str, Any] = {}
    found: list[list[answers.Object]] = []
    if models.detector is not None and "detector" in NEEDS[category]:
        found = answers.found_objects(work, models.detector, min_score=models.min_score, labels=models.labels)
    if models.blip is not None and "blip" in NEEDS[category]:
        results["blip"] = answers.attributes(work, models.blip, parses, official=official)
    if models.clip is not None and "clip" in NEEDS[category]:
        results["clip"] = answers.similarities(work, models.clip, parses if category == "complex" else None)
    if category == "numeracy":
        assert files.plurals is not None
        plurals = t2i_numeracy.read_plurals(files.plurals)
        wanted = [t2i_numeracy.wanted_objects(prompt, plurals) for prompt in work.prompts]
        results["numeracy"] = answers.numeracy(wanted, found, official=official)
        limits = _limits([t2i_numeracy.ceiling(objects, models.label_space, official=official) for objects in wanted],
                         [_wanted_names(objects, official) for objects in wanted], work.prompts, models, contained=True,
                         official=official)
    elif "detector" in NEEDS[category]:
        queries = [QUERIES[category](prompt, parse.tokens) for prompt, parse in zip(work.prompts, parses, strict=True)]
        deep = category == "3d_spatial"
        if deep:
            assert models.depth is not None
            results["3d_spatial"] = answers.spatial_depth(work, models.depth, queries, found, official=official)
        else:
            results["spatial"] = answers.spatial(queries, found, official=official)
        limits = _limits([t2i_spatial.ceiling(query, models.label_space, depth=deep, official=official) for query in queries],
                         [[name for name in query[1:] if name is not None] for query in queries], work.prompts, models,
                         contained=deep, official=official)
        limits["prompts_without_two_objects"] = len({prompt for prompt, query in zip(work.prompts, queries, strict=True)
                                                     if query.first is None or query.second is None})
    if category == "complex":
        results["complex"] = [
            three_in_one(prompt, attribute=float(attribute), spatial=float(spatial), similarity=float(similarity),
                         spatial_prompts=files.spatial_keys, action_prompts=files.action_keys)
            for prompt, attribute, spatial, similarity in zip(work.prompts, results["blip"], results["spatial"],
                                                              results["clip"], strict=True)]
    return results, limits


def _limits(ceilings: Sequence[float], nouns: Sequence[Sequence[str]], prompts: Sequence[str], models: Models, *,
            contained: bool, official: bool) -> dict[str, Any]:
    """What the labels allow: the best mean, and the prompts that name something the detector has no label for."""
    space = models.label_space
    lacking = {prompt: [noun for noun in names if not known(noun, space, contained=contained, official=official)]
               for prompt, names in zip(prompts, nouns, strict=True)}
    by_noun = Counter(noun for names in lacking.values() for noun in set(names))
    return {"detector_labels": len(space), "detector_ceiling": mean(ceilings), "min_score": models.min_score,
            "prompts_beyond_labels": sum(bool(names) for names in lacking.values()),
            "objects_beyond_labels": dict(sorted(by_noun.items(), key=lambda item: (-item[1], item[0])))}


def _model_names(category: str, models: Models) -> list[str]:
    """The models' part of a score's name: a detector comes with its number of labels, and a threshold that is not 0.5."""
    names = []
    for role in NEEDS[category]:
        names.append(getattr(models, role).name)
        if role == "detector":
            names.append(f"{len(models.label_space)}labels")
            if models.min_score != t2i_spatial.MIN_SCORE:
                names.append(f"above{models.min_score:g}")
    return names
