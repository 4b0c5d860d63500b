"""Prompts for every split of a scale, without leakage; statistics and a leakage report beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unigrpo.evaluation.outcomes import write_metrics
from unigrpo.prompts.curate import SPLITS, curate
from unigrpo.stages.session import session


def run(scale: str, *, root: Path = Path("."), provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Generate and split the prompts of a scale. Returns its metrics. Raises ValueError where a prompt is in two splits."""
    with session("curate", scale, scale=scale, output=f"artifacts/{scale}/prompts", inputs=(), root=root,
                 provenance=provenance) as stage:
        config = stage.config
        metrics = curate(
            stage.output, seed=config.curate.seed, sizes={split: getattr(config.curate, split) for split in SPLITS},
            thinking_error=config.sft.thinking_error, systematic_share=config.sft.systematic_share,
            heldout_eval_share=config.curate.heldout_eval_share, shares=config.curate.shares.model_dump(),
            max_paraphrases=config.curate.max_paraphrases, **config.world.model_dump())
        write_metrics(metrics, root / f"artifacts/{scale}/curate.json")
        stage.tracker.log_metrics(0, metrics)
        for name in ("statistics.json", "leakage.json"):
            stage.tracker.log_artifacts(stage.output / name)
        return metrics
