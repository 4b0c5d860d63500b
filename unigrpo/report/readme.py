"""The README's results and those of docs/: blocks and picture, rewritten from the report.json of artifacts/<scale>/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unigrpo.report.blocks import fill, names_in, pages
from unigrpo.report.claims_figures import frontier_figure
from unigrpo.report.figures import results_figure
from unigrpo.report.reading import FOLDERS
from unigrpo.report.table import read_report

PICTURE, FRONTIER = Path("docs/images/results.png"), Path("docs/images/frontier.png")
SHOWN = 4                                    # prompts drawn before and after in the picture


def read_reports(root: Path, scale: str) -> dict[str, dict[str, Any]]:
    """main and experiments, those that are there."""
    folder = root / "artifacts" / scale
    return {which: read_report(folder / name / "report.json") for which, name in FOLDERS.items()
            if (folder / name / "report.json").is_file()}


def write_readme(root: Path, scale: str) -> list[Path]:
    """Rewrite README.md and docs/*.md between their marks, and two figures of docs/images. Returns the files that changed.

    The pictures in results.png are those of the first evaluation prompts, not chosen; without the samples, which DVC holds, it
    has none.

    Raises: ValueError if a report is missing, or a mark is.
    """
    folder = root / "artifacts" / scale
    reports = read_reports(root, scale)
    main = read_report(folder / "report" / "report.json")
    new = {path: fill(text, reports, path.relative_to(root).as_posix()).encode() for path in pages(root)
           if names_in(text := path.read_text(encoding="utf-8"))}
    new[root / PICTURE] = results_figure(main, sample_pairs(folder))
    if frontier := frontier_figure(reports.get("experiments", {}).get("frontier", ())):
        new[root / FRONTIER] = frontier
    changed = [path for path, content in new.items() if not path.is_file() or path.read_bytes() != content]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(new[path])
    return changed


def sample_pairs(folder: Path) -> list[tuple[str, list[tuple[str, Path]]]]:
    """(prompt, [(arm, picture)]) of the first prompts in the headline cell; empty if the samples are not here."""
    drawn: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, name in (("sft", "sft"), ("unigrpo", "unigrpo/0")):
        listing = folder / name / "samples" / "samples.json"
        if not listing.is_file():
            return []
        drawn[arm] = {sample["prompt_id"]: sample | {"path": listing.parent / sample["image"]}
                      for sample in json.loads(listing.read_text(encoding="utf-8"))
                      if (sample["cfg"], sample["cell"]) == ("off", "on")}
    shared = [key for key in drawn["sft"] if key in drawn["unigrpo"]][:SHOWN]
    return [(drawn["sft"][key]["prompt"], [(arm, found[key]["path"]) for arm, found in drawn.items()]) for key in shared]
