"""T2I-CompBench's prompt files, imported by path and checked by digest, and the images that a folder has for them.

The files are the user's: `<folder>/<category>_val.txt`, with complex_val_{spatial,action}.txt for the complex score and
new_objects.txt for numeracy, as examples/dataset of the official repository holds them (MIT). Only their digests are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unigrpo.evaluation.t2i_compbench import IMAGES_PER_PROMPT, prompt_key
from unigrpo.evaluation.t2i_outputs import file_name, split_name

PLURALS_FILE = "new_objects.txt"
# sha256 of the official files at 1b70949; line ends differ between them and belong to the digest.
OFFICIAL_SHA256 = {
    "3d_spatial_val.txt": "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
    "color_val.txt": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "complex_val.txt": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
    "complex_val_action.txt": "d49ee4c7f99e3f3379fb8704a54ff5288b83bb412971edf616a4721c2473308e",
    "complex_val_spatial.txt": "6c7ac0ab75c7c9080cfc7b421fb059b9b0febb98471707aeedf58771088abc02",
    "new_objects.txt": "f39a3d2ff6067d7738673cbf465dc659ccc750776162989a5d9916f1d5f3e231",
    "non_spatial_val.txt": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    "numeracy_val.txt": "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
    "shape_val.txt": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "spatial_val.txt": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    "texture_val.txt": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
}


@dataclass(frozen=True)
class PromptFiles:
    """A category's prompts and what its score needs beside them.

    Args:
        prompts: in the file's order, which numbers the images. official: every file read is the official one.
        spatial_keys, action_keys: of the category complex: `prompt_key` of the prompts of either kind.
        plurals: of the category numeracy: the table's path.
        sha256: of each file read, by its name.
    """

    category: str
    prompts: tuple[str, ...]
    sha256: dict[str, str]
    spatial_keys: frozenset[str] = frozenset()
    action_keys: frozenset[str] = frozenset()
    plurals: Path | None = None

    @property
    def official(self) -> bool:
        """Whether every file is byte for byte the official one."""
        return all(OFFICIAL_SHA256.get(name) == digest for name, digest in self.sha256.items())


def read_prompts(folder: Path, category: str, *, own: bool = False) -> PromptFiles:
    """Read a category's files.

    Args:
        own: take files that are not the official ones; the score is then named so.
    Raises: ValueError if a file is missing, empty, holds a prompt twice or one that no file name can hold, or is not the
        official one and `own` is False.
    """
    sha256: dict[str, str] = {}

    def lines(name: str) -> tuple[str, ...]:
        sha256[name] = _digest(folder / name)
        text = (folder / name).read_text(encoding="utf-8")
        return tuple(line.strip() for line in text.splitlines() if line.strip())

    prompts = lines(f"{category}_val.txt")
    keys = [frozenset(prompt_key(line) for line in lines(f"complex_val_{part}.txt")) if category == "complex" else frozenset()
            for part in ("spatial", "action")]
    plurals = folder / PLURALS_FILE if category == "numeracy" else None
    if plurals is not None:
        sha256[PLURALS_FILE] = _digest(plurals)
    files = PromptFiles(category, prompts, sha256, keys[0], keys[1], plurals)
    _check(folder / f"{category}_val.txt", prompts)
    if not files.official and not own:
        other = [name for name, digest in sha256.items() if OFFICIAL_SHA256.get(name) != digest]
        raise ValueError(f"{folder}: {', '.join(other)} must be T2I-CompBench's own file (sha256 of examples/dataset at "
                         "1b70949), and is another; fetch it unchanged, line ends included, or score your prompts with "
                         "--own-prompts, which the score's name then says")
    return files


@dataclass(frozen=True)
class Images:
    """The images to score, by number.

    Args:
        numbers, paths: one each. wanted: how many a complete set has. missing: numbers without an image.
    """

    numbers: tuple[int, ...]
    paths: tuple[Path, ...]
    wanted: int
    missing: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether every image is there."""
        return not self.missing


def find_images(out: Path, files: PromptFiles, *, partial: bool = False) -> Images:
    """The images of `<out>/samples`, checked against the prompts.

    Args:
        partial: accept a set that lacks images; what is there is scored, and marked.
    Raises: ValueError if there are none, if names do not fit the prompts, if two files have one number, or if images are
        missing and `partial` is False.
    """
    samples = out / "samples"
    if not samples.is_dir():
        raise ValueError(f"{samples} is missing: images are expected there as <prompt>_<NNNNNN>.png, image n of prompt i "
                         f"(of {files.category}_val.txt, from 0) being number {IMAGES_PER_PROMPT} i + n")
    wanted = len(files.prompts) * IMAGES_PER_PROMPT
    found: dict[int, Path] = {}
    problems: list[str] = []
    for path in sorted(samples.iterdir()):
        if path.suffix.lower() != ".png" or path.name.startswith("."):
            continue
        parts = split_name(path.name)
        if parts is None:
            problems.append(f"{path.name} is not named <prompt>_<NNNNNN>.png")
        elif parts[1] >= wanted:
            problems.append(f"{path.name} has number {parts[1]}; {len(files.prompts)} prompts have 0 to {wanted - 1}")
        elif parts[1] in found:
            problems.append(f"{path.name} and {found[parts[1]].name} have one number")
        elif path.name != file_name(prompt := files.prompts[parts[1] // IMAGES_PER_PROMPT], parts[1]):
            problems.append(f"{path.name} should be of prompt {parts[1] // IMAGES_PER_PROMPT}, {prompt!r}")
        else:
            found[parts[1]] = path
    if problems:
        raise ValueError(_listed(f"{samples} does not fit {files.category}_val.txt", problems))
    missing = tuple(number for number in range(wanted) if number not in found)
    if not found:
        raise ValueError(f"{samples} holds no images <prompt>_<NNNNNN>.png")
    if missing and not partial:
        names = [file_name(files.prompts[number // IMAGES_PER_PROMPT], number) for number in missing[:3]]
        raise ValueError(f"{samples} lacks {len(missing)} of {wanted} images, the first ones {', '.join(names)}; a score is of "
                         "a complete set. --allow-partial scores what is there, and marks the score")
    numbers = tuple(sorted(found))
    return Images(numbers, tuple(found[number] for number in numbers), wanted, missing)


def _check(path: Path, prompts: Sequence[str]) -> None:
    """Refuse what cannot be told apart by its file name."""
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    twice = {prompt for prompt in prompts if prompts.count(prompt) > 1}
    unfit = [prompt for prompt in prompts if "_" in prompt or "/" in prompt or len(file_name(prompt, 0).encode()) > 255]
    problems = [f"{prompt!r} stands there twice" for prompt in sorted(twice)]
    problems += [f"{prompt!r} cannot be a file name of this layout (no \"_\" or \"/\", at most 244 bytes)" for prompt in unfit]
    if problems:
        raise ValueError(_listed(f"{path} must hold one prompt a line, each once", problems))


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing: --prompts takes a folder with T2I-CompBench's files (examples/dataset of "
                         "github.com/Karine-Huang/T2I-CompBench)")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _listed(what: str, problems: list[str]) -> str:
    more = f"\n- and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"{what}:\n- " + "\n- ".join(problems[:10]) + more
