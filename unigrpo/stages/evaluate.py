"""Evaluation of one checkpoint: every image of the benchmark, its verdict, and what follows from the counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from unigrpo.evaluate import GRID, draw_grid
from unigrpo.evaluation.outcomes import (
    compute_metrics,
    count_outcomes,
    join_verdicts,
    write_metrics,
    write_outcomes,
    write_verdicts,
)
from unigrpo.evaluation.shapes import verdict_rows
from unigrpo.prompts.records import read_records
from unigrpo.stages.loading import load_policy
from unigrpo.stages.session import save_picture, session


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
        shown = {record.id for record in records[:settings.gallery]}
        pictures = stage.output / "samples"
        shutil.rmtree(pictures, ignore_errors=True)
        pictures.mkdir()
        samples, frames, drawn = [], [], 0
        stage.begin("", len(GRID) * len(records) * settings.images_per_prompt)
        for batch in draw_grid(policy, records, config, samples=settings.images_per_prompt, batch=settings.batch,
                               seed=settings.seed):
            kept = [i for i, (record, sample) in enumerate(batch.rows) if record.id in shown and sample == 0]
            paths = [""] * len(batch.rows)
            for i in kept:
                paths[i] = f"{batch.rows[i][0].id}-cfg_{batch.cfg}-thinking_{batch.cell}.png"
                save_picture(batch.images[i], pictures / paths[i])
            frame = verdict_rows(batch.images, [record for record, _ in batch.rows], batch.texts,
                          samples=[sample for _, sample in batch.rows], cfg=batch.cfg, cell=batch.cell, paths=paths)
            frames.append(frame)
            samples += [{"prompt_id": batch.rows[i][0].id, "prompt": batch.rows[i][0].prompt, "thinking": batch.texts[i],
                         "cfg": batch.cfg, "cell": batch.cell, "sample": 0, "image": paths[i],
                         "exact": bool(frame["exact"][i]), "graded": round(float(frame["graded"][i]), 4)} for i in kept]
            drawn += len(batch.rows)
            if stage.progress is not None:
                stage.progress.step(drawn, exact=float(frame["exact"].mean()))
        verdicts = join_verdicts(frames)
        write_verdicts(verdicts, stage.output / "verdicts.parquet")
        outcomes = count_outcomes(verdicts)
        write_outcomes(outcomes, stage.output / "outcomes.csv")
        metrics = compute_metrics(outcomes)
        write_metrics(metrics, stage.output / "metrics.json")
        (pictures / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
        stage.tracker.log_metrics(0, metrics)
        for name in ("metrics.json", "outcomes.csv", "samples"):
            stage.tracker.log_artifacts(stage.output / name)
        return metrics
