"""The benchmarks' prompts as digests: what lets every clone check its training prompts without having the benchmarks.

    python -m unigrpo.prompts.shipped ../shared/benchmarks      writes unigrpo/prompts/digests/*.txt from the official files

One file a list. A line holds the digests of a prompt's forms (see canonical.forms): exact, canonical, reordered or "-"; sorted,
so that equal lists are equal bytes. A digest is the first 16 hex digits of a sha256: a million prompts make three million of
them, and that one meets any of the fewer than 20,000 shipped ones by accident has a probability of 4e-9.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from unigrpo.prompts.canonical import VERSION, forms
from unigrpo.prompts.importers import check_digest, official_digests, read_prompts

FOLDER = Path(__file__).parent / "digests"
LISTS: dict[str, str] = {  # our name -> official file
    "geneval": "geneval/evaluation_metadata.jsonl",
    "geneval_unseen_objects": "flow_grpo_geneval/test_metadata_unseen_objects.jsonl",
} | {name.removesuffix(".txt").replace("/", "_"): name for name in official_digests() if name.startswith("t2i_compbench/")}


def digest(form: str) -> str:
    """16 hex digits of a form's sha256."""
    return hashlib.sha256(form.encode()).hexdigest()[:16]


def digest_line(prompt: str) -> str:
    """A prompt's line."""
    return " ".join("-" if form is None else digest(form) for form in forms(prompt))


def digest_text(name: str, prompts: Iterable[str]) -> str:
    """A list's file."""
    lines = sorted({digest_line(prompt) for prompt in prompts})
    return "\n".join([f"# {name}: {len(lines)} prompts, digests of their exact, canonical, reordered form, version {VERSION}",
                      f"# source: {LISTS[name]}, sha256 {official_digests()[LISTS[name]]}; see official.sha256", *lines]) + "\n"


def write_digests(benchmarks: Path, folder: Path = FOLDER) -> list[Path]:
    """Write every list's file from a folder that holds the official files under their names in official.sha256.

    Raises: ValueError for a missing file or other bytes than the known ones.
    """
    texts = {}
    for name, official in LISTS.items():
        imported = read_prompts(benchmarks / official)
        check_digest(benchmarks / official, official)
        texts[folder / f"{name}.txt"] = digest_text(name, (record.prompt for record in imported.records))
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(texts)


@cache
def read_digests(name: str) -> tuple[tuple[str | None, ...], ...]:
    """The digests of a shipped list: per prompt those of its forms.

    Raises: ValueError if the file was made by other rules, is cut off or is missing (a broken installation).
    """
    path = FOLDER / f"{name}.txt"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the installation lacks package data; install unigrpo again")
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    entries = [row.split() for row in rows if not row.startswith("#")]
    if not head.startswith(f"# {name}: {len(entries)} prompts") or not head.endswith(f"version {VERSION}"):
        raise ValueError(f"{path}: wanted the number of prompts that its first line names, by version {VERSION} of the rules, "
                         f"got {head!r} and {len(entries)} prompts; install unigrpo again")
    return tuple(tuple(None if part == "-" else part for part in entry) for entry in entries)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m unigrpo.prompts.shipped BENCHMARKS")
    print("\n".join(f"wrote {path}" for path in write_digests(Path(sys.argv[1]))))
