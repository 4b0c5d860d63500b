"""The report stage: outcomes, metrics, curves and samples of the checkpoints in; report.html and report.json out.

The report of all experiments also keeps its figures as files, in figures/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unigrpo.config import load_config
from unigrpo.report.experiments import full_report
from unigrpo.report.page import figures, render_page
from unigrpo.report.reading import FOLDERS, read_inputs
from unigrpo.stages.session import writable
from unigrpo.tracking import track


def run(scale: str, *, which: str = "main", root: Path = Path("."),
        provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Write artifacts/<scale>/report/ (main) or artifacts/<scale>/experiments/.

    Args:
        scale: a file of params/scales/.
        which: main (base, sft, unigrpo seed 0) or experiments (every evaluation of the scale in params/experiment.yaml).
        root: the project's root. provenance: what the launcher knows, for the tracker.
    Returns: the headline metric of every arm, and of its differences.
    Raises: ValueError naming the file and the stage that makes it, if an input is missing or damaged.
    """
    config = load_config(scale, root=root)
    with track("report", f"{scale}-{which}", config.model_dump(mode="json"), provenance, root) as tracker:
        inputs = read_inputs(scale, which, root)
        report = full_report(inputs, config)
        pictures = figures(report)
        page = render_page(report, inputs, config, pictures)
        folder = writable(root / "artifacts" / scale / FOLDERS[which])
        write_json(folder / "report.json", report)
        (folder / "report.html").write_text(page, encoding="utf-8", newline="\n")
        if which == "experiments":
            write_figures(folder / "figures", pictures)
        metric = report["measured"]["headline_metric"]
        numbers = {f"{metric}/{arm}": found[metric]["value"]
                   for part in ("arms", "differences") for arm, found in report[part].items() if metric in found}
        tracker.log_metrics(0, numbers)
        tracker.log_artifacts(folder)
    return numbers


def write_figures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """<name>.png of each figure, and nothing that an earlier report left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)


def write_json(path: Path, value: Any) -> None:
    """Sorted JSON with a line end: equal values are equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8",
                    newline="\n")
