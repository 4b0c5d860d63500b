"""Prompts of all splits; the warm-up's carry their thinking, a stated share of it wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from unigrpo.config import load_config
from unigrpo.evaluation.outcomes import significant, write_metrics
from unigrpo.prompts.curate import SPLITS, curate
from unigrpo.prompts.records import read_records, write_records
from unigrpo.resume import resume_folder
from unigrpo.seeding import generator
from unigrpo.tracking import track
from unigrpo.worlds.shapes import sft_thinking


def run(scale: str, *, root: Path = Path("."), provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Write artifacts/<scale>/prompts/ and curate.json. Returns the metrics. Raises ValueError naming a leaking pair."""
    config = load_config(scale, root=root)
    world, settings, values = config.world, config.curate, config.model_dump(mode="json")
    output = root / "artifacts" / scale
    with resume_folder(root, "curate", scale, values) as resume, \
            track("curate", scale, values, provenance, root, resume) as tracker:
        metrics = curate(output / "prompts", seed=settings.seed, sizes={split: getattr(settings, split) for split in SPLITS},
                         shares=settings.shares.model_dump(), reasoning_kinds=world.reasoning_kinds,
                         reasoning_share=world.reasoning_share, heldout_share=world.heldout_share,
                         eval_heldout_share=settings.heldout_eval_share, max_paraphrases=settings.max_paraphrases,
                         reasoning_difficulty=world.reasoning_difficulty, max_objects=world.max_objects,
                         four_share=world.four_share, cell_share=world.cell_share)
        wrong = write_thinking(output / "prompts" / "sft.jsonl", settings.seed, config.sft.thinking_error,
                               config.sft.systematic_share)
        metrics = {key: significant(float(value)) for key, value in (metrics | {"curate/sft_wrong_plans": wrong}).items()}
        write_metrics(metrics, output / "curate.json")
        tracker.log_metrics(0, metrics)
        for name in ("statistics.json", "leakage.json"):
            tracker.log_artifacts(output / "prompts" / name)
    return metrics


def write_thinking(path: Path, seed: int, error_share: float, systematic_share: float) -> int:
    """Give every record of a file its thinking, drawn by the prompt's id. Returns how many plans are wrong."""
    records, wrong = [], 0
    for record in read_records(path):
        text, right = sft_thinking(record, generator(seed, "thinking", record.id), error_share, systematic_share)
        records.append(replace(record, thinking=text))
        wrong += not right
    write_records(path, records)
    return wrong
