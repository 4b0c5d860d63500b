"""GenEval and T2I-CompBench in the evaluate stage: drawn into their official folders, scored there, told as rows.

stages/evaluate.py reaches this module by name and only where such a benchmark is named: otherwise every edit of a scorer would
make every evaluation of the shapes world stale. DVC sees this code where it is used, by the digest that `unigrpo experiment
write` puts into params/experiment.yaml.

    files checked -> models loaded, canaries -> images drawn, chunk by chunk -> scored through a cache -> copied to the output

Images and scores lie in the stage's resume folder until all is done: after a kill no finished chunk is drawn again and nothing
is scored twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unigrpo.digests import sha256_json
from unigrpo.evaluate import draw_grid
from unigrpo.evaluation.backends import canary
from unigrpo.evaluation.backends.cache import ScoreCache
from unigrpo.evaluation.backends.weights import quiet_transformers
from unigrpo.evaluation.benchmark_table import make_table
from unigrpo.evaluation.geneval_folder import write_atomically
from unigrpo.evaluation.images import check_image, read_bytes
from unigrpo.rollout import BagelPolicy
from unigrpo.stages.benchmark_compbench import Compbench
from unigrpo.stages.benchmark_geneval import Geneval
from unigrpo.stages.loading import compute_device
from unigrpo.stages.session import Session
from unigrpo.types import PromptRecord

FOLDER = "benchmarks"  # of the images and scores, in the resume folder and in the output
SCORED = 8             # images that the scorers take at a time, at most

Cell = tuple[str, str]


class Benchmark(Protocol):
    """What a benchmark knows of itself. Its paths are those of one cell's folder."""

    name: str
    samples: int
    records: tuple[PromptRecord, ...]

    def missing(self) -> list[str]:
        """Files that params name and that are not there, in words."""

    def read(self) -> None:
        """Read and check prompts and what belongs to them. Raises ValueError."""

    def load(self, device: str, batch: int) -> dict[str, Any]:
        """Load the models; those that canaries know, kind -> scorer."""

    def place(self, record: PromptRecord, sample: int) -> str:
        """The file of an image, relative to a cell's folder."""

    def describe(self, folder: Path) -> None:
        """Write what the official layout has beside the images."""

    def score(self, folder: Path, cell: Cell, stage: Session, cache: ScoreCache, batch: int) -> list[dict[str, Any]]:
        """Score a cell's folder, write the results into it; rows of the benchmark table."""

    @property
    def canary(self) -> Path | None:
        """The record that models are compared with."""


class Benchmarks:
    """The benchmarks of one evaluation. Made before the policy is loaded, so that what is missing costs nothing.

    Args:
        stage: of the evaluate stage. root: the project's; paths in params are relative to it.
    Raises: ValueError naming every missing file, prompts that are not what they should be, and models that are not themselves.
    """

    def __init__(self, stage: Session, root: Path) -> None:
        self.stage, self.cells = stage, stage.config.evaluate.cells
        settings, self.items = stage.config.evaluate, list[Benchmark]()
        if settings.geneval is not None and "geneval" in settings.benchmarks:
            self.items.append(Geneval(settings.geneval, root))
        if settings.t2i_compbench is not None and "t2i_compbench" in settings.benchmarks:
            self.items.append(Compbench(settings.t2i_compbench, root))
        if missing := [line for item in self.items for line in item.missing()]:
            raise ValueError("these files of the section evaluate are not there, so that nothing was drawn:\n- "
                             + "\n- ".join(missing) + f"\nput them there, or change params/scales/{stage.config.scale}.yaml; "
                             "docs/scoring.md and docs/scoring_t2i.md say where they come from")
        for item in self.items:
            _named(item, item.read)
        self.batch = min(SCORED, settings.batch)
        device = compute_device(stage.config.compute.device).type
        quiet_transformers()
        for item in self.items if stage.world.main else ():
            scorers = _named(item, lambda item=item: item.load(device, self.batch))
            if scorers and item.canary is not None:
                _named(item, lambda item=item, scorers=scorers: canary.check(item.canary, scorers, canary.device_name(device)))

    def draw(self, policy: BagelPolicy) -> None:
        """Draw what is not drawn yet."""
        for item in self.items:
            policy.encode(item.records)  # words that the model cannot read are found here and not an hour later
            folder = self._folder(item)
            if self.stage.world.main:
                _same_prompts(folder, self.stage.folder / f"{item.name}.prompts", item)
                for cell in self.cells:
                    item.describe(folder / cell_name(cell))
            self.stage.world.wait()
            _with_memory(lambda item=item, folder=folder: draw_all(self.stage, policy, item, folder, self.cells))

    def score(self) -> pd.DataFrame:
        """Score every cell, and copy images and scores to the output. Returns the benchmark table."""
        cache, rows = ScoreCache(self.stage.folder / "scores.cache.jsonl"), list[dict[str, Any]]()
        for item in self.items:
            for cell in self.cells:
                folder = self._folder(item) / cell_name(cell)
                rows += _with_memory(lambda item=item, cell=cell, folder=folder: item.score(folder, cell, self.stage, cache,
                                                                                           self.batch))
        publish(self.stage.folder / FOLDER, self.stage.output / FOLDER)
        return make_table(rows)

    def _folder(self, item: Benchmark) -> Path:
        """A benchmark's folder of cells, in the resume folder."""
        return self.stage.folder / FOLDER / item.name


def cell_name(cell: Cell) -> str:
    """The folder of a cell."""
    return f"cfg_{cell[0]}-thinking_{cell[1]}"


def draw_all(stage: Session, policy: BagelPolicy, item: Benchmark, folder: Path, cells: Sequence[Cell]) -> None:
    """Draw a benchmark, a chunk of prompts in all cells at a time.

    Chunks do not depend on what is drawn already, so that a run that was killed ends with the same bytes: an image can move by
    a rounding step with its neighbours in a forward.
    """
    settings = stage.config.evaluate
    size = max(1, settings.batch // item.samples)
    chunks = [item.records[start:start + size] for start in range(0, len(item.records), size)]
    paths = [[folder / cell_name(cell) / item.place(record, sample) for cell in cells for record in chunk
              for sample in range(item.samples)] for chunk in chunks]
    todo = [chunk for chunk, files in zip(chunks, paths, strict=True) if not all(is_whole(file) for file in files)]
    stage.world.wait()  # all have looked before any draws
    total = len(item.records) * item.samples * len(cells)
    done = total - sum(map(len, todo)) * item.samples * len(cells)
    if not todo:
        return
    stage.begin(f"{item.name}, draw", total, start=done, unit="images")
    for chunk in stage.world.share(todo):
        for batch in draw_grid(policy, chunk, stage.config, cells, samples=item.samples, batch=settings.batch,
                               seed=settings.seed):
            for (record, sample), image, text in zip(batch.rows, batch.images, batch.texts, strict=True):
                write_picture(folder / cell_name((batch.cfg, batch.cell)) / item.place(record, sample), image, text)
            done += len(batch.rows) * stage.world.size  # the others are about as far
            if stage.progress is not None:
                stage.progress.step(min(done, total))


def write_picture(path: Path, image: np.ndarray, thinking: str) -> None:
    """Write (H, W, 3) float32 in [0, 1] as PNG at its own size, whole or not at all; its text `thinking` is the thinking."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if thinking:
        info.add_itxt("thinking", thinking)
    partial = path.with_name(f".{path.stem[-16:]}.partial")  # the official names may be as long as a file system allows
    Image.fromarray(np.round(image * 255).astype(np.uint8)).save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)


def is_whole(path: Path) -> bool:
    """Whether an image is there with its end: a power cut can leave a file shorter than it was written."""
    if not path.is_file():
        return False
    try:
        check_image(read_bytes(path), path)
    except ValueError:
        return False
    return True


def publish(source: Path, target: Path) -> None:
    """Copy images and scores to the output; as links where the file system has them, since they may take many GB."""
    def link(first: str, second: str) -> None:
        try:
            os.link(first, second)
        except OSError:
            shutil.copy2(first, second)

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns(".*.partial"))


def _same_prompts(folder: Path, marker: Path, item: Benchmark) -> None:
    """Start a benchmark's folder anew where it was drawn for other prompts: a file that params name may have changed."""
    digest = sha256_json([[record.id for record in item.records], item.samples])
    if not marker.is_file() or marker.read_text(encoding="utf-8") != digest:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(marker, digest.encode())


def _named(item: Benchmark, work: Any) -> Any:
    """Run a step of a benchmark; what the user can mend names the section."""
    try:
        return work()
    except ValueError as error:
        raise ValueError(f"evaluate.{item.name}: {error}") from error


def _with_memory(work: Any) -> Any:
    """Run what takes a GPU's memory."""
    try:
        return work()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise ValueError("the GPU's memory is full: lower evaluate.batch in params; finished images and scores are kept "
                         f"({error})") from error
