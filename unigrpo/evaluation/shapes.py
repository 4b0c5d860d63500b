"""Verdicts on images of the shapes world: the exact verifier, GenEval's rules on its detections, and the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from unigrpo.evaluation import geneval
from unigrpo.evaluation.outcomes import VERDICT_COLUMNS, significant
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes.detect import detect
from unigrpo.worlds.shapes.scene import IMAGE_SIZE, SHAPES
from unigrpo.worlds.shapes.thinking import parse_plan, plan_satisfies
from unigrpo.worlds.shapes.verify import verify


def verdict_rows(images: npt.NDArray[np.float32], records: Sequence[PromptRecord], thinking: Sequence[str], *,
                 samples: Sequence[int], cfg: str, cell: str, paths: Sequence[str] | None = None) -> pd.DataFrame:
    """Verdict rows of one batch of one cell.

    Args:
        images: (B, 32, 32, 3) float32 in [0, 1].
        records: B prompts, one per image.
        thinking: B texts that conditioned the images, "" without thinking.
        samples: B sample indices within the prompt.
        cfg: guidance, off or on.
        cell: which thinking, of outcomes.THINKING.
        paths: B relative paths of saved images, "" where none was saved; None if none was.
    Returns: one row an image (VERDICT_COLUMNS): `exact` and `graded` by the verifier (no extra objects), `geneval` and
        `reason` by GenEval's rules at their official thresholds, `plan_right` if the thinking plans a scene that satisfies
        the prompt exactly.
    Raises: ValueError if the lengths differ or an image is not finite.
    """
    lengths = {"images": len(images), "records": len(records), "thinking": len(thinking), "samples": len(samples),
               "paths": len(images if paths is None else paths)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"one record, text, sample and path per image wanted, got {lengths}")
    damaged = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if damaged.size:
        at = int(damaged[0])
        raise ValueError(f"sample {samples[at]} of prompt {records[at].id} has values that are not finite; "
                         "the checkpoint is damaged or diverged")
    detections, scores = detect(images), verify(images, records)
    rows = []
    for index, (record, found, text) in enumerate(zip(records, detections, thinking, strict=True)):
        verdict = geneval.verdict(record, geneval.keep(found, record.tag))
        rows.append({
            "prompt_id": record.id, "tag": record.tag, "reasoning": record.reasoning or "",
            "needs_reasoning": record.needs_reasoning, "sample": samples[index], "cfg": cfg, "thinking": cell,
            "thinking_text": text, "image": "" if paths is None else paths[index],
            "exact": bool(scores["exact"][index]), "geneval": verdict.correct, "graded": float(scores["graded"][index]),
            "plan_right": is_plan_right(text, record), "reason": verdict.reason,
            "detections": json.dumps([[item.label, item.color, *map(significant, item.box), significant(item.score)]
                                      for item in found], separators=(",", ":")),
        })
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS))


def are_shapes(images: npt.NDArray[np.float32], records: Sequence[PromptRecord]) -> bool:
    """Whether the verifier can read these (B, H, W, 3) pictures: they have the world's size and prompts about its shapes."""
    return images.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE) and all(
        clause["class"] in SHAPES for record in records for clause in (*record.include, *record.exclude))


def is_plan_right(text: str, record: PromptRecord) -> bool:
    """Whether a thinking text plans a scene that satisfies the prompt exactly; malformed plans do not."""
    plan = parse_plan(text)
    return plan is not None and plan_satisfies(plan, record)
