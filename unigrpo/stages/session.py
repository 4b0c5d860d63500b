"""What every stage has in common: its config, its place to resume from, its tracker, its progress line, its output."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from unigrpo.config import Config, load_config
from unigrpo.distributed import ALONE, Deserted, Place, World, join, leave, of_others
from unigrpo.evaluation.outcomes import significant, write_metrics
from unigrpo.preemption import PREEMPTED, Notice, Preempted, notice_of_sigterm
from unigrpo.progress import Progress
from unigrpo.resume import resume_folder, resume_path
from unigrpo.sealed import sync
from unigrpo.stages import SHARED
from unigrpo.tracking import SilentTracker, Tracker, track

ENLARGE = 4  # a 32-pixel picture is shown at 128 pixels


@dataclass
class Session:
    """One stage execution.

    Args:
        config: checked. output: the folder the stage writes into. folder: its resume folder, outside DVC's outputs.
        tracker, progress: where what happens is told.
        world: the processes that share the stage. All of them keep the curves; the main one alone writes and speaks.
        curves: rows of curves.csv so far. gallery: rows of gallery.json so far.
    """

    config: Config
    output: Path
    folder: Path
    tracker: Tracker
    name: str
    curves: list[dict[str, float]] = field(default_factory=list)
    gallery: list[dict[str, Any]] = field(default_factory=list)
    progress: Progress | None = None
    world: World = ALONE
    notice: Notice = field(default_factory=Notice)

    def begin(self, what: str, total: int, start: int = 0, unit: str = "steps", *, stepwise: bool = False) -> None:
        """Show progress towards `total` steps, or whatever `unit` says.

        Args:
            stepwise: from now on the stage looks at `asked_to_leave` after every step, and SIGTERM waits for that.
        """
        self.notice.stepwise = stepwise
        self.world.place.step = start if stepwise else None
        if self.world.main:
            self.progress = Progress(f"{self.name} {what}".strip(), total, start=start, unit=unit)

    def log(self, step: int, metrics: Mapping[str, float], **shown: float | str) -> None:
        """Keep a row of the curves and tell the tracker. Values are what the curves hold: 6 significant digits."""
        row = {name: significant(float(value)) for name, value in sorted(metrics.items()) if math.isfinite(float(value))}
        self.curves.append({"step": step, **row})
        self.tracker.log_metrics(step, row)
        if self.progress is not None:
            self.progress.step(step + 1, **shown)

    def asked_to_leave(self) -> bool:
        """Whether SIGTERM has asked for the stage's end, in any of its processes. Asked after every step, once."""
        given = self.world.max({"given": float(self.notice.given)})["given"] > 0
        self.world.place.step = (self.world.place.step or 0) + 1
        return given

    def leave(self, steps: int) -> None:
        """End the process with status 75; the state after `steps` steps must be saved."""
        self.world.wait()
        if not self.world.main:
            raise Preempted
        print(f"{self.name}: asked to leave (SIGTERM); the state after step {steps} is saved, and the same command goes on "
              f"from there (exit status {PREEMPTED})", file=sys.stderr, flush=True)
        raise Preempted

    @property
    def layout(self) -> dict[str, Any]:
        """How the weights lie: on how many processes, whole or spread."""
        return {"processes": self.world.size, "sharding": self.config.compute.sharding}

    def state(self) -> dict[str, Any]:
        """What a resumed session needs of this one. What the tracker was told so far is on the disk before it."""
        self.tracker.sync()
        return {"curves": self.curves, "gallery": self.gallery, "layout": self.layout}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier session's state. Raises ValueError naming a picture of its gallery that is not whole."""
        self.curves, self.gallery = list(state["curves"]), list(state["gallery"])
        before = state.get("layout", self.layout)
        if before != self.layout and self.world.main:
            print(f"{self.name}: the state was written with {describe_layout(before)}, and the run goes on with "
                  f"{describe_layout(self.layout)}; its numbers differ by rounding from either's alone", file=sys.stderr,
                  flush=True)
            self.tracker.set_tags({"resumed.layout": f"{describe_layout(before)} -> {describe_layout(self.layout)}"})
        for row in self.gallery:
            path = self.folder / "gallery" / row["image"]
            try:
                with Image.open(path) as picture:
                    picture.verify()
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{path} is a picture of an interrupted run and is damaged ({error}); remove {self.folder} to "
                                 "start that run again") from error

    def add_pictures(self, images: np.ndarray, rows: Sequence[dict[str, Any]]) -> None:
        """Keep pictures with their rows (step, prompt, thinking, ...) for the gallery.

        Args:
            images: (N, H, W, 3) float32 in [0, 1].
        """
        if not self.world.main:
            return
        pictures = self.folder / "gallery"
        pictures.mkdir(exist_ok=True)
        for image, row in zip(images, rows, strict=True):
            name = f"{len(self.gallery):05d}.png"
            save_picture(image, pictures / name)
            sync(pictures / name)
            self.gallery.append({**row, "image": name})

    def write(self, summary: Mapping[str, float]) -> dict[str, float]:
        """Write curves.csv, gallery/ (where there is one) and training.json, and log them as artifacts."""
        metrics = {name: significant(float(value)) for name, value in summary.items()}
        if not self.world.main:
            return metrics
        frame = pd.DataFrame(self.curves)
        frame.to_csv(self.output / "curves.csv", index=False, lineterminator="\n", float_format="%.6g")
        if self.gallery:
            shutil.rmtree(self.output / "gallery", ignore_errors=True)
            shutil.copytree(self.folder / "gallery", self.output / "gallery")
            (self.output / "gallery" / "gallery.json").write_text(json.dumps(self.gallery, indent=1) + "\n", encoding="utf-8")
            self.tracker.log_artifacts(self.output / "gallery", "gallery")
        write_metrics(metrics, self.output / "training.json")
        self.tracker.log_artifacts(self.output / "curves.csv")
        self.tracker.log_artifacts(self.output / "training.json")
        return metrics


@contextmanager
def session(stage: str, name: str, *, scale: str, output: str, inputs: Sequence[str], root: Path,
            provenance: Mapping[str, str] | None, run: str | None = None, seed: int | None = None) -> Iterator[Session]:
    """Everything around a stage's own work.

    Args:
        stage, name: as in dvc.yaml. output: the folder written into, inputs: what is read, relative to `root`.
    Raises: ValueError on bad params, a missing input or an output folder that cannot be written; Deserted where another
        process of the stage hangs or has died.
    """
    config = load_config(scale, run=run, seed=seed or 0, root=root)
    torch.set_num_threads(config.compute.threads)
    world = join(config.processes(stage), config.compute.device, key=config.processes_key(stage),
                 patience=60 * config.compute.patience_minutes, place=Place(f"{stage} {name}")) if stage in SHARED else ALONE
    folder, values = writable(root / output) if world.main else root / output, config.model_dump(mode="json")
    with notice_of_sigterm() as notice, together(world), held(world, root, stage, name, values, inputs) as resume, \
            told(world, stage, name, values, provenance, root, resume) as tracker, answered(world, resume):
        try:
            yield Session(config, folder, resume, tracker, f"{stage} {name}", world=world, notice=notice)
        except KeyboardInterrupt:
            if world.main:
                print(f"{stage} {name}: interrupted; the same command goes on where it was", file=sys.stderr, flush=True)
            raise


@contextmanager
def answered(world: World, resume: Path) -> Iterator[None]:
    """Inside, what fails because another process hangs or has died raises Deserted, whoever waited for it."""
    world.place.folder = resume
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, Deserted) or not of_others(error):
            raise
        raise Deserted(world.sentence("computing together", None, str(error))) from error


@contextmanager
def together(world: World) -> Iterator[None]:
    """Ends the processes' connection when the block has ended well; after an error there is nothing left to wait for."""
    yield
    if world.size > 1:
        world.wait()
        leave()


@contextmanager
def held(world: World, root: Path, stage: str, name: str, values: Mapping[str, Any], inputs: Sequence[str]) -> Iterator[Path]:
    """The resume folder: the main process holds its lock and removes it in the end, the others read in it."""
    if world.main:
        with resume_folder(root, stage, name, values, inputs) as folder:
            world.wait()
            yield folder
            world.wait()
        return
    world.wait()
    yield resume_path(root, stage, name, values, inputs)
    world.wait()


@contextmanager
def told(world: World, stage: str, name: str, values: Mapping[str, Any], provenance: Mapping[str, str] | None, root: Path,
         resume: Path) -> Iterator[Tracker]:
    """The main process's tracker; the others' says nothing."""
    if world.main:
        with track(stage, name, values, provenance, root, resume) as tracker:
            yield tracker
    else:
        yield SilentTracker()


def writable(folder: Path) -> Path:
    """The folder, made where it is missing. Raises ValueError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder} must be a folder that this user may write into ({error.strerror}); change its "
                         "permissions, or run from another checkout") from error
    # Root may write anywhere; a folder marked read-only is still a wish to keep it as it is.
    if not folder.stat().st_mode & 0o200 or not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} must be writable and is marked read-only; chmod u+w it, or run from another checkout")
    return folder


def save_picture(image: np.ndarray, path: Path) -> None:
    """(H, W, 3) float32 in [0, 1] as PNG, small pictures enlarged without smoothing."""
    pixels = np.round(image * 255).astype(np.uint8)
    if pixels.shape[0] <= 64:
        pixels = pixels.repeat(ENLARGE, axis=0).repeat(ENLARGE, axis=1)
    Image.fromarray(pixels).save(path)


def describe_layout(layout: Mapping[str, Any]) -> str:
    """"2 processes, sharding none"."""
    count = layout["processes"]
    return f"{count} process{'es' if count > 1 else ''}, sharding {layout['sharding']}"


def tail_mean(curves: Sequence[Mapping[str, float]], name: str, rows: int) -> float:
    """Mean of a curve over its last rows."""
    values = [row[name] for row in curves[-rows:] if name in row]
    return sum(values) / len(values) if values else 0.0


def last_tenth(curves: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Means over the last tenth of a run. What is measured in few steps only, and in none of these, is the mean over the last
    tenth of those that measured it; what no step measured is left out."""
    found = {}
    for name in names:
        measured = [row for row in curves if name in row]
        of = curves if any(name in row for row in curves[-max(1, len(curves) // 10):]) else measured
        if measured:
            found[name] = tail_mean(of, name, max(1, len(of) // 10))
    return found
