"""Evaluation of one checkpoint: every image of its benchmarks, their verdicts or scores, and what follows from them."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from unigrpo.evaluate import GRID, GRIDS, DrawnBatch, draw_grid, grid_images, text_losses
from unigrpo.evaluation.benchmark_table import make_table, table_metrics, write_table
from unigrpo.evaluation.controls import COLUMNS, understanding_metrics, understanding_table, write_understanding
from unigrpo.evaluation.guards import ImageSigns, describe_images, join_signs
from unigrpo.evaluation.outcomes import (
    HEADLINE,
    VERDICT_COLUMNS,
    compute_metrics,
    count_outcomes,
    join_verdicts,
    significant,
    write_metrics,
    write_outcomes,
    write_verdicts,
)
from unigrpo.evaluation.sentinel import standing
from unigrpo.evaluation.shapes import verdict_rows
from unigrpo.prompts.records import read_records
from unigrpo.rollout import BagelPolicy
from unigrpo.schema_benchmarks import SHAPES
from unigrpo.seeding import generator
from unigrpo.stages.loading import load_policy
from unigrpo.stages.session import Session, save_picture, session
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.thinking import sft_thinking

# By name and not by import: a stage depends on what it imports, and an evaluation on the shapes world on no scorer. What this
# module reaches is tracked by digest where it is used (unigrpo.experiment).
OTHERS = "unigrpo.stages.benchmarks"
FILES = ("metrics.json", "outcomes.csv", "understanding.csv", "benchmarks.csv", "samples")


def run(scale: str, *, checkpoint: str, cells: str = "all", root: Path = Path("."),
        provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Evaluate artifacts/<scale>/<checkpoint>/checkpoint on evaluate.benchmarks. Returns its metrics.

    Args:
        cells: a key of GRIDS. Without the whole grid there are no other cells in the outcomes, and understanding.csv, which
            needs the greedy one, is empty.
    """
    prompts, folder = f"artifacts/{scale}/prompts", f"artifacts/{scale}/{checkpoint}"
    with session("evaluate", f"{scale}-{checkpoint.replace('/', '-')}", scale=scale, output=folder,
                 inputs=(prompts, f"{folder}/checkpoint"), root=root, provenance=provenance) as stage:
        stage.tracker.set_tags({"evaluate.cells": cells})
        if cells != "all":
            without = "no controls, no guidance" if cells == "headline" else "no controls"
            print(f"{stage.name}: cells {cells}, so {without} and no understanding", file=sys.stderr, flush=True)
            stage.config = stage.config.model_copy(update={"evaluate": stage.config.evaluate.model_copy(update={
                "cells": GRIDS[cells]})})
        settings = stage.config.evaluate
        records = read_prompts(root / prompts / "eval.jsonl", stage) if SHAPES in settings.benchmarks else []
        others: Any = None
        if set(settings.benchmarks) - {SHAPES}:
            others = importlib.import_module(OTHERS).Benchmarks(stage, root)
        policy = load_policy(root / folder / "checkpoint", stage.config)
        metrics = evaluate_shapes(stage, policy, records, GRIDS[cells]) if records else no_shapes(stage)
        if others is not None:
            others.draw(policy)
            stage.world.wait()
        del policy
        if not stage.world.main:
            return {}
        pictures = fresh_folder(stage.output / "benchmarks")
        table = make_table() if others is None else others.score()
        # What the folder holds, and a file in it where that is nothing: DVC warns of an empty one.
        drawn = [name for name in settings.benchmarks if name != SHAPES]
        (pictures / "index.json").write_text(json.dumps(drawn) + "\n", encoding="utf-8")
        write_table(table, stage.output / "benchmarks.csv")
        metrics = metrics | table_metrics(table)
        write_metrics(metrics, stage.output / "metrics.json")
        stage.tracker.log_metrics(0, metrics)
        for name in FILES:
            stage.tracker.log_artifacts(stage.output / name)
        return metrics


def read_prompts(path: Path, stage: Session) -> list[PromptRecord]:
    """The prompts of the shapes world. Raises ValueError where there are too few."""
    wanted, scale = stage.config.evaluate.prompts, stage.config.scale
    records = read_records(path)[:wanted]
    if len(records) < wanted:
        raise ValueError(f"evaluate.prompts={wanted} but eval.jsonl holds {len(records)}; a partial set is "
                         f"refused: lower evaluate.prompts in params/scales/{scale}.yaml or rerun curate")
    return records


def no_shapes(stage: Session) -> dict[str, float]:
    """The files of the shapes world's benchmark where it is not asked for: every one there and empty."""
    output = stage.output
    if not stage.world.main:
        return {}
    fresh_folder(output / "samples")
    (output / "samples" / "samples.json").write_text("[]\n", encoding="utf-8")
    verdicts = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in VERDICT_COLUMNS.items()})
    write_verdicts(verdicts, output / "verdicts.parquet")
    write_outcomes(count_outcomes(verdicts), output / "outcomes.csv")
    write_understanding(pd.DataFrame(columns=list(COLUMNS)), output / "understanding.csv")
    return {}


def evaluate_shapes(stage: Session, policy: BagelPolicy, records: Sequence[PromptRecord],
                    grid: Sequence[tuple[str, str]] = GRID) -> dict[str, float]:
    """Draw and judge the records in every cell of a grid; verdicts, outcomes, understanding and samples as files.

    Returns: what follows from them, and the sentinel's statistics of the headline cell, as flat metrics.
    """
    settings, world = stage.config.evaluate, stage.world
    shown = {record.id for record in records[:settings.gallery]}
    pictures = stage.output / "samples"
    if world.main:
        fresh_folder(pictures)
    world.wait()
    samples, frames, drawn = [], [], 0
    signs: dict[tuple[str, int], tuple[ImageSigns, str]] = {}
    stage.begin("", grid_images(stage.config, grid), unit="images")
    for batch in draw_grid(policy, records, stage.config, grid, samples=settings.images_per_prompt, batch=settings.batch,
                           seed=settings.seed, control_samples=settings.control_images, world=world):
        paths = save_samples(batch, pictures, shown)
        frame = verdict_rows(batch.images, [record for record, _ in batch.rows], batch.texts,
                             samples=[sample for _, sample in batch.rows], cfg=batch.cfg, cell=batch.cell, paths=paths)
        frames.append(frame)
        samples += sample_rows(batch, frame, paths)
        if (batch.cfg, batch.cell) == HEADLINE:
            signs |= {(record.id, sample): (describe_images(batch.images[i:i + 1]), batch.texts[i])
                      for i, (record, sample) in enumerate(batch.rows)}
        drawn += len(batch.rows) * world.size  # the others are about as far
        if stage.progress is not None:
            stage.progress.step(min(drawn, stage.progress.total), exact=float(frame["exact"].mean()))
    understood = any(thinking == "greedy" for _, thinking in grid)
    losses = plan_losses(policy, world.share(records), seed=settings.seed, batch=settings.batch) if understood else {}
    parts = world.gather((samples, frames, signs, losses))
    if not world.main:
        return {}
    for more_samples, more_frames, more_signs, more_losses in parts[1:]:
        samples += more_samples
        frames += more_frames
        signs |= more_signs
        losses |= more_losses
    (pictures / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    verdicts = join_verdicts(frames)
    write_verdicts(verdicts, stage.output / "verdicts.parquet")
    outcomes = count_outcomes(verdicts)
    write_outcomes(outcomes, stage.output / "outcomes.csv")
    table = understanding_table(outcomes, losses) if understood else pd.DataFrame(columns=list(COLUMNS))
    write_understanding(table, stage.output / "understanding.csv")
    seen = [signs[record.id, sample] for record in records for sample in range(settings.images_per_prompt)]
    watched = standing(join_signs(part for part, _ in seen), [text for _, text in seen], samples=settings.images_per_prompt)
    return {**compute_metrics(outcomes), **(understanding_metrics(table) if len(table) else {}),
            **{name: significant(value) for name, value in watched.items()}}


def fresh_folder(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def save_samples(batch: DrawnBatch, folder: Path, shown: set[str]) -> list[str]:
    """Save the first sample of the prompts that are shown. Returns a file name an image, "" where it was not saved."""
    paths = [""] * len(batch.rows)
    for i, (record, sample) in enumerate(batch.rows):
        if record.id in shown and sample == 0:
            paths[i] = f"{record.id}-cfg_{batch.cfg}-thinking_{batch.cell}.png"
            save_picture(batch.images[i], folder / paths[i])
    return paths


def sample_rows(batch: DrawnBatch, frame: pd.DataFrame, paths: Sequence[str]) -> list[dict[str, Any]]:
    """What samples.json says of the saved images."""
    return [{"prompt_id": record.id, "prompt": record.prompt, "thinking": batch.texts[i], "cfg": batch.cfg,
             "cell": batch.cell, "sample": sample, "image": paths[i], "exact": bool(frame["exact"][i]),
             "graded": round(float(frame["graded"][i]), 4)} for i, (record, sample) in enumerate(batch.rows) if paths[i]]


def plan_losses(policy: BagelPolicy, records: Sequence[PromptRecord], *, seed: int, batch: int) -> dict[str, tuple[int, float]]:
    """The loss on one right plan in words for every prompt, the same for every checkpoint; see `text_losses`."""
    plans = [sft_thinking(record, generator(seed, "understanding", record.id), 0.0, 0.0)[0] for record in records]
    return text_losses(policy, records, plans, batch=batch)
