"""CLIP's image-text similarity as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from unigrpo.rewards.gate import gate
from unigrpo.rewards.pictures import Picture, score_pictures
from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.types import PromptRecord, Reward

if TYPE_CHECKING:
    from unigrpo.evaluation.backends import Similarity


def similarity_reward(similarity: Similarity, *, name: str, scale: float = 1.0, floor: float | None = None) -> RewardFunction:
    """r = scale * max(cosine(image, prompt), floor).

    Args:
        similarity: (images, texts) -> (B,) cosines.
        name: of the record.
        scale: factor; group advantages do not depend on it, weighted sums do.
        floor: lowest cosine; None keeps negative ones.
    """
    def reward(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        def score(pictures: list[Picture], rows: list[int]) -> dict[str, npt.ArrayLike]:
            texts = [prompts[row].prompt for row in rows]
            cosine = np.asarray(similarity(pictures, texts) if pictures else [], dtype=np.float32)
            return {name: np.float32(scale) * (cosine if floor is None else np.maximum(cosine, np.float32(floor)))}

        return score_pictures(images, score)

    return reward


def clip_score(weights: str, canaries: str | None, *, device: str = "cpu", batch: int = 32, hessel: bool = False,
               openai: bool = True) -> RewardFunction:
    """CLIPScore by a CLIP in Hugging Face format.

    Args:
        weights: folder or hub name; T2I-CompBench's is openai/clip-vit-base-patch32.
        canaries: their record, or null to trust the model unseen; see `gate`.
        device: cpu or cuda. batch: images at once.
        hessel: 2.5 * max(cosine, 0) as in the CLIPScore paper (arXiv:2104.08718); otherwise the plain cosine, as
            T2I-CompBench has it.
        openai: the weights are OpenAI's, which must run with quick GELU; false for CLIPs that others trained.
    """
    from unigrpo.evaluation.backends.clip import OPENAI_ACTIVATION, ClipSimilarity
    from unigrpo.evaluation.backends.weights import quiet_transformers

    quiet_transformers()
    similarity = ClipSimilarity.load(weights, device=device, batch=batch, activation=OPENAI_ACTIVATION if openai else None)
    gate({"similarity": similarity}, device, canaries)
    return similarity_reward(similarity, name="clip_score", scale=2.5 if hessel else 1.0, floor=0.0 if hessel else None)
