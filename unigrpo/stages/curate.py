"""Prompts for every split of a scale, without leakage; statistics and a leakage report beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from unigrpo.config import Config
from unigrpo.evaluation.outcomes import write_metrics
from unigrpo.prompts.curate import SPLITS, curate
from unigrpo.prompts.examples import read_examples
from unigrpo.prompts.firewall import Firewall, refuse_overlap, shipped_firewall
from unigrpo.prompts.importers import read_prompts, text_record
from unigrpo.schema import PromptFile
from unigrpo.stages.session import session
from unigrpo.types import PromptRecord


def run(scale: str, *, root: Path = Path("."), provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Generate and split the prompts of a scale. Returns its metrics.

    Raises: ValueError where a prompt is in two splits, or one that trains asks for what a benchmark asks for.
    """
    with session("curate", scale, scale=scale, output=f"artifacts/{scale}/prompts", inputs=(), root=root,
                 provenance=provenance) as stage:
        config = stage.config
        firewall = shipped_firewall(against=[checked(root, file, "curate.protected") for file in config.curate.protected],
                                    allow=config.curate.allow)
        check_examples(config, firewall, root)
        files: dict[str, list[PromptRecord]] = {split: read_prompts(checked(root, file, f"curate.files.{split}")).records
                 for split, file in config.curate.files.items()}
        metrics = curate(
            stage.output, seed=config.curate.seed, sizes={split: getattr(config.curate, split) for split in SPLITS},
            thinking_error=config.sft.thinking_error, systematic_share=config.sft.systematic_share,
            heldout_eval_share=config.curate.heldout_eval_share, shares=config.curate.shares.model_dump(),
            max_paraphrases=config.curate.max_paraphrases, files=files, firewall=firewall, **config.world.model_dump())
        write_metrics(metrics, root / f"artifacts/{scale}/curate.json")
        stage.tracker.log_metrics(0, metrics)
        for name in ("statistics.json", "leakage.json"):
            stage.tracker.log_artifacts(stage.output / name)
        return metrics


def checked(root: Path, file: PromptFile, key: str) -> Path:
    """The path of a file that params name. Raises ValueError naming the key, if it is missing or has other bytes."""
    path = root / file.path
    if not path.is_file():
        raise ValueError(f"{key} names {file.path}, and there is no such file; put it there, or change the key in params")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != file.sha256:
        raise ValueError(f"{key} wants {file.path} with sha256 {file.sha256}, got {found}; put the right file there, or the "
                         "new digest into params if you trust it")
    return path


def check_examples(config: Config, firewall: Firewall, root: Path) -> None:
    """Refuse warm-up examples (sft.data) that ask for what a benchmark asks for."""
    if config.sft.data is not None:
        examples = read_examples(root / config.sft.data)
        refuse_overlap((text_record(example.prompt, tag="text", split="sft", source=config.sft.data) for example in examples),
                       firewall)
