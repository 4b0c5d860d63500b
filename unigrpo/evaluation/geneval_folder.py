"""GenEval's folders: NNNNN/metadata.jsonl with NNNNN/samples/NNNN.png, read with every doubt told, and written.

The official script scores what it finds: a missing picture, a class that the detector does not know or half of the prompts
give a number all the same. Here they are errors, unless a partial set was asked for, and then the result says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unigrpo.digests import sha256_json
from unigrpo.evaluation.geneval import COLORS, RELATIONS, TAGS
from unigrpo.evaluation.images import MAX_PIXELS, check_image, read_bytes
from unigrpo.prompts.records import parse_record, record_id
from unigrpo.types import PromptRecord

PROMPTS, SAMPLES = 553, 4  # of the official set
OFFICIAL_SET = "010f2e9a62a68a9069150764f9736bb5063b869f799ba1a6239e35e561f75aa0"  # sha256_json of its records, in order
KEYS = ("tag", "include", "exclude", "prompt")
RESULT_KEYS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")


@dataclass(frozen=True)
class Sample:
    """One image of one prompt: its record, the official record as it was read, the file and, once checked, its sha256."""

    record: PromptRecord
    metadata: dict[str, Any]
    path: Path
    digest: str = ""


@dataclass(frozen=True)
class ImageSet:
    """What a folder holds.

    Args:
        samples: by prompt and number.
        prompts: how many prompts have images.
        prompt_set: "official", the metadata file's `prompts_<8 hex digits>`, or "unknown".
        sha256: `sha256_json` of the set's records; "" where the set is unknown.
        missing: what a complete set would hold and this one does not, in words.
        samples_per_prompt: how many images a prompt should have.
    """

    samples: tuple[Sample, ...]
    prompts: int
    prompt_set: str
    sha256: str
    missing: tuple[str, ...]
    samples_per_prompt: int

    @property
    def suffix(self) -> str:
        """What the score's name must add: nothing for the complete official set."""
        parts = [self.prompt_set] if self.prompt_set != "official" else []
        parts += [f"{self.samples_per_prompt}_samples"] if self.samples_per_prompt != SAMPLES else []
        return "".join(f"_{part}" for part in [*parts, *(["partial"] if self.missing else [])])


def parse_metadata(metadata: Any, where: str, labels: Sequence[str]) -> PromptRecord:
    """A prompt of GenEval's format, checked against what the rules and the detector know.

    Args:
        metadata: the JSON value. where: file and line, for the error. labels: of the detector.
    Raises: ValueError for a missing key or a wrong type, and for a tag, class, colour or relation that nobody could ever score.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: wanted an object with tag, include and prompt, got {metadata!r:.80}")
    content = {key: metadata[key] for key in KEYS if key in metadata}
    record = parse_record(json.dumps({"id": "none", **content}), where)
    if record.tag not in TAGS:
        raise ValueError(f"{where}: unknown tag {record.tag!r}; GenEval's are {', '.join(TAGS)}")
    known = set(labels)
    for number, clause in enumerate([*record.include, *record.exclude]):
        if clause["class"] not in known:
            raise ValueError(f"{where}: unknown class {clause['class']!r}, which the detector never finds, so that its prompts "
                             "would score zero; --class-names gives the detector other names")
        if clause.get("color") not in (None, *COLORS):
            raise ValueError(f"{where}: unknown colour {clause['color']!r}; GenEval's are {', '.join(COLORS)}")
        relation, target = clause.get("position") or (RELATIONS[0], -1)
        if relation not in RELATIONS or target >= number:
            raise ValueError(f"{where}: 'position' must be one of {', '.join(RELATIONS)} and name an earlier clause, got "
                             f"{clause['position']!r} in clause {number}")
    identity = record_id(record.tag, record.prompt, record.include, record.exclude)
    return PromptRecord(**{**vars(record), "id": identity})


def metadata_of(record: PromptRecord) -> dict[str, Any]:
    """A record as the official files have it: keys in their order, no empty `exclude`."""
    exclude = {"exclude": list(record.exclude)} if record.exclude else {}
    return {"tag": record.tag, "include": list(record.include), **exclude, "prompt": record.prompt}


def read_metadata_file(path: Path) -> tuple[list[dict[str, Any]], str]:
    """A prompt set in the official format, one record a line, and the file's sha256. Raises ValueError naming a bad line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the prompt set {path} cannot be read ({error.strerror or error})") from error
    records = []
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            records.append(_parse_json(line, f"{path}, line {number}"))
    if not records:
        raise ValueError(f"the prompt set {path} is empty; wanted one record a line")
    return records, hashlib.sha256(data).hexdigest()


def read_image_set(folder: Path, labels: Sequence[str], *, samples: int = SAMPLES, metadata: Path | None = None,
                   allow_partial: bool = False) -> ImageSet:
    """List a folder's images with their prompts and check that it is the set it should be; images are not opened.

    Args:
        folder: in the official layout. Folders whose names are not all digits are none of it, as officially.
        labels: of the detector.
        samples: images a prompt; 4 officially.
        metadata: the prompt set's file; without it the set must be the official one.
        allow_partial: missing prompts, images, or the lack of a known set are told in `missing` instead of being refused.
    Raises: ValueError for what is missing, unreadable, doubled, unknown or not as the prompt set says.
    """
    if samples < 1:
        raise ValueError(f"--samples must be at least 1, got {samples}")
    wanted, sha256, prompt_set = None, OFFICIAL_SET, "official"
    if metadata is not None:
        wanted, _ = read_metadata_file(metadata)
        sha256 = sha256_json(wanted)
        prompt_set = "official" if sha256 == OFFICIAL_SET else f"prompts_{sha256[:8]}"
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for name in sorted(name for name in _listing(folder) if name.isascii() and name.isdigit()):
        if int(name) in found:
            raise ValueError(f"{folder} holds prompt {int(name)} twice: {found[int(name)][0].name} and {name}; remove one")
        found[int(name)] = (folder / name, _read_metadata(folder / name))
    if not found:
        raise ValueError(f"{folder} holds no prompts: wanted folders 00000, 00001, ..., each with metadata.jsonl and samples/")
    missing = _check_prompts(folder, found, wanted, metadata)
    if wanted is None and (len(found) != PROMPTS or sha256_json([found[i][1] for i in sorted(found)]) != OFFICIAL_SET):
        prompt_set, sha256 = "unknown", ""
        missing = [f"the folder's {len(found)} prompts are not GenEval's {PROMPTS}, and no --metadata says what they should be"]
    images = []
    prompts = 0
    for index in sorted(found):
        place, content = found[index]
        record = parse_metadata(content, str(place / "metadata.jsonl"), labels)
        numbers = _sample_numbers(place / "samples", samples)
        missing += [f"{place.name}/samples/{number:04d}.png" for number in range(samples) if number not in numbers]
        images += [Sample(record, content, numbers[number]) for number in sorted(numbers)]
        prompts += bool(numbers)
    if missing and not allow_partial:
        raise ValueError(f"{folder} is no complete set: {len(missing)} missing, first {'; '.join(missing[:3])}. Make what is "
                         "missing, or score what is there with --allow-partial, which marks the result as partial")
    if not images:
        raise ValueError(f"{folder} holds {len(found)} prompts and no image")
    return ImageSet(tuple(images), prompts, prompt_set, sha256, tuple(missing), samples)


def check_files(images: ImageSet, *, mixed_sizes: bool = False, max_pixels: int = MAX_PIXELS,
                progress: Callable[[int], None] | None = None) -> ImageSet:
    """Read every file once before any is scored: none is damaged, all have one size. Returns the set with its digests.

    Raises: ValueError naming the first damaged file, or the first of another size than most.
    """
    sizes: list[tuple[int, int]] = []
    checked = []
    for done, sample in enumerate(images.samples, start=1):
        data = read_bytes(sample.path)
        sizes.append(check_image(data, sample.path, max_pixels=max_pixels))
        checked.append(Sample(sample.record, sample.metadata, sample.path, hashlib.sha256(data).hexdigest()))
        if progress is not None:
            progress(done)
    usual, count = Counter(sizes).most_common(1)[0]
    odd = [(sample.path, size) for sample, size in zip(checked, sizes, strict=True) if size != usual]
    if odd and not mixed_sizes:
        path, size = odd[0]
        raise ValueError(f"{path} is {size[0]} x {size[1]} where {count} of {len(sizes)} images are {usual[0]} x {usual[1]} "
                         f"({len(odd)} differ); make it again, or say --mixed-sizes if the sizes are meant")
    return ImageSet(tuple(checked), images.prompts, images.prompt_set, images.sha256, images.missing, images.samples_per_prompt)


def write_metadata(folder: Path, index: int, metadata: dict[str, Any]) -> None:
    """Write one prompt's NNNNN/metadata.jsonl."""
    place = folder / f"{index:05d}"
    (place / "samples").mkdir(parents=True, exist_ok=True)
    write_atomically(place / "metadata.jsonl", json.dumps(metadata).encode())


def write_sample(folder: Path, index: int, number: int, image: np.ndarray) -> Path:
    """Write one image, (H, W, 3) uint8 RGB, as NNNNN/samples/NNNN.png: whole or not at all. Returns its path."""
    path = folder / f"{index:05d}" / "samples" / f"{number:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # the official script takes every name that begins like a sample's
    Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8)).save(partial, format="PNG")
    os.replace(partial, path)
    return path


def write_results(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write results.jsonl, keys in the official order, whole or not at all."""
    lines = [json.dumps({key: row[key] for key in RESULT_KEYS}) for row in rows]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: wanted one JSON object, got {text[:60]!r} ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: wanted an object with tag, include and prompt, got {value!r:.80}")
    return value


def _listing(folder: Path) -> list[str]:
    """Names in a folder; ValueError if it cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror or error}); wanted a folder") from error


def _read_metadata(place: Path) -> dict[str, Any]:
    """One prompt's record."""
    path = place / "metadata.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({why}); wanted the prompt's record") from error
    return _parse_json(text.strip(), str(path))


def _check_prompts(folder: Path, found: dict[int, tuple[Path, dict[str, Any]]], wanted: list[dict[str, Any]] | None,
                   source: Path | None) -> list[str]:
    """The prompts that are not there; ValueError for doubled ones and for ones that the prompt set has otherwise."""
    if wanted is not None:
        for index, (place, content) in found.items():
            if index >= len(wanted):
                raise ValueError(f"{place} is prompt {index}, and {source} has {len(wanted)}, from 0 on")
            if content != wanted[index]:
                raise ValueError(f"{place / 'metadata.jsonl'} is not line {index + 1} of {source}: wanted "
                                 f"{json.dumps(wanted[index])}, got {json.dumps(content)}")
        return [f"prompt {index:05d}" for index in range(len(wanted)) if index not in found]
    seen: dict[str, Path] = {}
    for place, content in found.values():
        first = seen.setdefault(sha256_json(content), place)
        if first != place:
            raise ValueError(f"{folder} holds a prompt twice: {first.name} and {place.name} are both "
                             f"{content.get('prompt')!r}; remove one, or give the set with --metadata if that is meant")
    return []


def _sample_numbers(folder: Path, samples: int) -> dict[int, Path]:
    """The images of one prompt by number; other files are none, unless the official script would take them."""
    if not folder.exists():
        return {}
    numbers: dict[int, Path] = {}
    for name in sorted(_listing(folder)):
        if not re.match(r"\d+\.png", name):
            continue
        if not re.fullmatch(r"\d+\.png", name):
            raise ValueError(f"{folder / name} begins like a sample, so that the official script would score it; remove it")
        number = int(name.removesuffix(".png"))
        if number in numbers or number >= samples:
            what = f"twice ({numbers[number].name})" if number in numbers else f"where a prompt has {samples}, from 0000.png on"
            raise ValueError(f"{folder / name} is sample {number}, {what}; remove it, or set --samples")
        numbers[number] = folder / name
    return numbers
