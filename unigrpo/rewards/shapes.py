"""Rewards of the shapes world, from its verifier.

`shapes_graded` and `shapes_exact` punish objects that nobody asked for. `shapes_tolerant` does not: policies learn within
minutes to draw more than was asked, and it is kept as the example of a reward that can be hacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from unigrpo.evaluation.geneval import Detection, keep, relative_position
from unigrpo.types import PromptRecord, Reward
from unigrpo.worlds.shapes.detect import detect
from unigrpo.worlds.shapes.scene import CELL_CENTERS, CELLS
from unigrpo.worlds.shapes.verify import verify

Images = npt.NDArray[np.float32]
RewardFunction = Callable[[Images, Sequence[PromptRecord], Sequence[str]], list[Reward]]


def shapes_graded(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
    """Partial credit per object, colour and relation, reduced by extra objects.

    Args:
        images: (B, 32, 32, 3) float32 in [0, 1].
        prompts: B records, one per image.
        thinking: B texts; the image alone is judged.
    Returns: one record (B,) in [0, 1] at the end of the trajectory; NaN where an image is not finite.
    """
    return [_reward("shapes_graded", images, lambda clean: verify(clean, prompts)["graded"])]


def shapes_exact(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
    """1 if the image shows the prompt and nothing else, else 0. Arguments and NaN as in `shapes_graded`."""
    return [_reward("shapes_exact", images, lambda clean: verify(clean, prompts)["exact"])]


def shapes_tolerant(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
    """GenEval's at-least rule with partial credit: extra objects cost nothing. Arguments and NaN as in `shapes_graded`."""
    return [_reward("shapes_tolerant", images, lambda clean: [
        tolerant_score(record, keep(found, record.tag)) for record, found in zip(prompts, detect(clean), strict=True)])]


def tolerant_score(record: PromptRecord, objects: Mapping[str, Sequence[Detection]]) -> float:
    """Share of what the include clauses want that is somewhere in the image.

        mean over the terms of all clauses:  min(n, count) / count  of the class;  the same of those in the colour;
            the same of those in the cell;   1 if one of them has the relation to one of the target clause's, else 0

    Args:
        record: the clauses; exclude clauses are ignored.
        objects: class -> detections, as `geneval.keep` returns them.
    Returns: in [0, 1]; adding objects never lowers it, which is what makes it hackable.
    """
    terms: list[float] = []
    groups: list[Sequence[Detection]] = []
    for clause in record.include:
        found = objects.get(clause["class"], ())
        terms.append(min(len(found), clause["count"]) / clause["count"])
        if "color" in clause:
            found = [item for item in found if item.color == clause["color"]]
            terms.append(min(len(found), clause["count"]) / clause["count"])
        if "cell" in clause:
            found = [item for item in found if cell_of(item.box) == clause["cell"]]
            terms.append(min(len(found), clause["count"]) / clause["count"])
        if "position" in clause:
            relation, target = clause["position"]
            terms.append(float(any(relation in relative_position(item.box, other.box)
                                   for item in found for other in groups[target])))
        groups.append(found)
    return sum(terms) / len(terms) if terms else 0.0


def cell_of(box: Sequence[float]) -> str:
    """The cell whose centre is nearest to the centre of a box x1, y1, x2, y2 in pixels."""
    column, row = (min(range(3), key=lambda k: abs(CELL_CENTERS[k] - (box[axis] + box[axis + 2]) / 2)) for axis in (0, 1))
    return CELLS[3 * row + column]


def _reward(name: str, images: Images, score: Callable[[Images], npt.ArrayLike]) -> Reward:
    """Scores of the finite images; the others are missing (NaN), which the trainer counts."""
    finite = np.isfinite(images.reshape(len(images), -1)).all(axis=1)
    clean = np.where(finite.reshape(-1, 1, 1, 1), images, np.float32(0))
    value = np.where(finite, np.asarray(score(clean), dtype=np.float32), np.float32(np.nan))
    return Reward(name=name, value=torch.from_numpy(value.astype(np.float32)))
