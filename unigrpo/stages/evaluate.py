"""Evaluation of one checkpoint: every image of the benchmark, its verdict, and what follows from the counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from unigrpo.evaluate import DrawnBatch, draw_grid, grid_images, text_losses
from unigrpo.evaluation.controls import understanding_metrics, understanding_table, write_understanding
from unigrpo.evaluation.guards import ImageSigns, describe_images, join_signs
from unigrpo.evaluation.outcomes import (
    HEADLINE,
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
from unigrpo.seeding import generator
from unigrpo.stages.loading import load_policy
from unigrpo.stages.session import Session, save_picture, session
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.thinking import sft_thinking


def run(scale: str, *, checkpoint: str, root: Path = Path("."),
        provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Evaluate artifacts/<scale>/<checkpoint>/checkpoint. Returns its metrics."""
    prompts, folder = f"artifacts/{scale}/prompts", f"artifacts/{scale}/{checkpoint}"
    with session("evaluate", f"{scale}-{checkpoint.replace('/', '-')}", scale=scale, output=folder,
                 inputs=(prompts, f"{folder}/checkpoint"), root=root, provenance=provenance) as stage:
        config, settings = stage.config, stage.config.evaluate
        records = read_records(root / prompts / "eval.jsonl")[:settings.prompts]
        if len(records) < settings.prompts:
            raise ValueError(f"evaluate.prompts={settings.prompts} but eval.jsonl holds {len(records)}; a partial set is "
                             f"refused: lower evaluate.prompts in params/scales/{scale}.yaml or rerun curate")
        policy = load_policy(root / folder / "checkpoint", config)
        metrics = shapes(stage, policy, records)
        write_metrics(metrics, stage.output / "metrics.json")
        stage.tracker.log_metrics(0, metrics)
        for name in ("metrics.json", "outcomes.csv", "understanding.csv", "samples"):
            stage.tracker.log_artifacts(stage.output / name)
        return metrics


def shapes(stage: Session, policy: BagelPolicy, records: Sequence[PromptRecord]) -> dict[str, float]:
    """The world's own benchmark: verdicts, outcomes, understanding and samples as files; all of them as flat metrics."""
    settings = stage.config.evaluate
    shown = {record.id for record in records[:settings.gallery]}
    pictures = stage.output / "samples"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    samples, frames, drawn = [], [], 0
    signs: dict[tuple[str, int], tuple[ImageSigns, str]] = {}
    stage.begin("", grid_images(stage.config))
    for batch in draw_grid(policy, records, stage.config, samples=settings.images_per_prompt, batch=settings.batch,
                           seed=settings.seed, control_samples=settings.control_images):
        paths = save_samples(batch, pictures, shown)
        frame = verdict_rows(batch.images, [record for record, _ in batch.rows], batch.texts,
                             samples=[sample for _, sample in batch.rows], cfg=batch.cfg, cell=batch.cell, paths=paths)
        frames.append(frame)
        samples += sample_rows(batch, frame, paths)
        if (batch.cfg, batch.cell) == HEADLINE:
            signs |= {(record.id, sample): (describe_images(batch.images[i:i + 1]), batch.texts[i])
                      for i, (record, sample) in enumerate(batch.rows)}
        drawn += len(batch.rows)
        if stage.progress is not None:
            stage.progress.step(drawn, exact=float(frame["exact"].mean()))
    (pictures / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    verdicts = join_verdicts(frames)
    write_verdicts(verdicts, stage.output / "verdicts.parquet")
    outcomes = count_outcomes(verdicts)
    write_outcomes(outcomes, stage.output / "outcomes.csv")
    table = understanding_table(outcomes, plan_losses(policy, records, seed=settings.seed, batch=settings.batch))
    write_understanding(table, stage.output / "understanding.csv")
    seen = [signs[record.id, sample] for record in records for sample in range(settings.images_per_prompt)]
    watched = standing(join_signs(part for part, _ in seen), [text for _, text in seen], samples=settings.images_per_prompt)
    return {**compute_metrics(outcomes), **understanding_metrics(table),
            **{name: significant(value) for name, value in watched.items()}}


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
