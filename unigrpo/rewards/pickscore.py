"""PickScore: a CLIP trained on people's choices between images of one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo.rewards.clip_score import similarity_reward
from unigrpo.rewards.gate import gate
from unigrpo.rewards.shapes import RewardFunction

if TYPE_CHECKING:
    from unigrpo.evaluation.backends.clip import ClipSimilarity

MODEL = "yuvalkirstain/PickScore_v1"


def pickscore(canaries: str | None, *, weights: str = MODEL, device: str = "cpu", batch: int = 32,
              divisor: float = 1.0) -> RewardFunction:
    """r = exp(logit_scale) * cosine(image, prompt) / divisor, the scale as it was learned: about 100, and r around 20.

    Args:
        weights: folder or hub name of a CLIP in Hugging Face format with its tokenizer. A repository that has the weights
            alone takes the tokenizer files of laion/CLIP-ViT-H-14-laion2B-s32B-b79K beside them.
        canaries: their record, or null to trust the model unseen; see `gate`.
        device: cpu or cuda. batch: images at once.
        divisor: brings scores near 1 (peers divide by 26); group advantages depend on it only by their epsilon.
    Raises: ValueError for a divisor that is not positive, or a folder that holds no CLIP.
    Source: Pick-a-Pic arXiv:2305.01569; the model card of yuvalkirstain/PickScore_v1 (score = logit_scale.exp() * cosine).
    """
    from unigrpo.evaluation.backends.clip import ClipSimilarity
    from unigrpo.evaluation.backends.weights import quiet_transformers

    quiet_transformers()
    # Trained from LAION's ViT-H-14, which has plain GELU.
    similarity = ClipSimilarity.load(weights, device=device, batch=batch, activation=None)
    gate({"similarity": similarity}, device, canaries)
    return pickscore_of(similarity, divisor=divisor)


def pickscore_of(similarity: ClipSimilarity, *, divisor: float = 1.0) -> RewardFunction:
    """`pickscore` of a loaded model."""
    if not divisor > 0:
        raise ValueError(f"divisor must be positive, got {divisor}")
    return similarity_reward(similarity, name="pickscore", scale=float(similarity.model.logit_scale.detach().exp()) / divisor)
