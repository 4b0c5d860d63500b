"""Token sampling, log-probs and weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unigrpo.text import sample_tokens, sampling_probs, sequence_weights, token_log_probs

THIRDS = torch.tensor([[0.5, 0.3, 0.2]]).log()


def test_log_probs_by_hand() -> None:
    # p = (.5, .3, .2); at temperature .5 p^2 / sum = (.25, .09, .04) / .38
    tokens = torch.tensor([1])
    assert token_log_probs(THIRDS, tokens, 1.0).item() == pytest.approx(math.log(0.3))
    assert token_log_probs(THIRDS, tokens, 0.5).item() == pytest.approx(math.log(0.09 / 0.38))
    assert token_log_probs(THIRDS.bfloat16(), tokens, 1.0).dtype == torch.float32
    assert token_log_probs(THIRDS.double(), tokens, 1.0).dtype == torch.float64


def test_sampling_and_replay_agree_and_ignore_truncation() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(1))
    tokens, log_probs, _ = sample_tokens(logits, uniforms, temperature=0.7, top_k=5)
    assert torch.equal(log_probs, token_log_probs(logits, tokens, 0.7))
    padded = token_log_probs(logits.view(8, 8, 50), tokens.view(8, 8), 0.7)  # another batch shape, as in replay
    torch.testing.assert_close(padded.flatten(), log_probs)
    assert (sampling_probs(logits, 0.7, 5).gather(1, tokens[:, None]) > 0).all()


def test_inverse_cdf_by_hand() -> None:
    # cdf (.5, .8, 1): u in [0, .5) -> 0, [.5, .8) -> 1, [.8, 1) -> 2
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999999])
    tokens, log_probs, entropy = sample_tokens(THIRDS.expand(6, 3), uniforms, temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(log_probs, torch.tensor([0.5, 0.5, 0.3, 0.3, 0.2, 0.2]).log())
    assert entropy[0].item() == pytest.approx(-(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)))


def test_entropy_is_of_the_truncated_distribution_and_greedy_takes_the_largest() -> None:
    tokens, log_probs, entropy = sample_tokens(THIRDS, torch.tensor([0.99]), temperature=1.0, top_k=1)
    assert tokens.item() == 0
    assert entropy.item() == 0
    assert log_probs.item() == pytest.approx(math.log(0.5))
    tokens, log_probs, _ = sample_tokens(THIRDS, torch.tensor([0.99]), temperature=1.0, greedy=True)
    assert tokens.item() == 0
    assert log_probs.item() == pytest.approx(math.log(0.5))


@given(st.integers(0, 10_000), st.integers(2, 300), st.integers(0, 20),
       st.sampled_from([0.0, 1e-30, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0]), st.floats(0.05, 3))
def test_a_token_of_probability_zero_is_never_drawn(seed: int, size: int, top_k: int, edge: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 10 * torch.randn(4, size, generator=generator)
    forbidden = torch.rand(4, size, generator=generator) < 0.5
    forbidden[:, int(torch.randint(size, (), generator=generator))] = False
    logits = logits.masked_fill(forbidden, -torch.inf)
    tokens, log_probs, entropy = sample_tokens(logits, torch.full((4,), edge, dtype=torch.float64),
                                               temperature=temperature, top_k=top_k)
    assert (sampling_probs(logits, temperature, top_k).gather(1, tokens[:, None]) > 0).all()
    assert log_probs.isfinite().all()
    assert entropy.isfinite().all()


def test_frequencies_match_the_probabilities() -> None:
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    tokens, _, _ = sample_tokens(THIRDS.expand(20_000, 3), uniforms, temperature=1.0, top_k=2)
    share = tokens.bincount(minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.625, 0.375, 0.0]), rtol=0, atol=0.015)  # 4 standard errors


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(16, generator=torch.Generator().manual_seed(1))
    together = sample_tokens(logits, uniforms, temperature=1.0)[0]
    alone = [sample_tokens(logits[i:i + 1], uniforms[i:i + 1], temperature=1.0)[0].item() for i in range(16)]
    assert together.tolist() == alone


def test_ties_at_the_kth_logit_are_kept() -> None:
    torch.testing.assert_close(sampling_probs(torch.tensor([1.0, 1.0, 0.0]), 1.0, 1), torch.tensor([0.5, 0.5, 0.0]))


def test_text_refuses() -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(THIRDS, torch.tensor([0]), 0.0)
    with pytest.raises(ValueError, match="top_k"):
        sampling_probs(THIRDS, 1.0, -1)
    with pytest.raises(ValueError, match="sequence_mean, token_mean, sequence_sum_norm"):
        sequence_weights(torch.ones(1, 1, dtype=torch.bool), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="horizon"):
        sequence_weights(torch.ones(1, 1, dtype=torch.bool), "sequence_sum_norm")


MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)


def test_weights_by_hand() -> None:
    mean = sequence_weights(MASK)
    torch.testing.assert_close(mean, torch.tensor([[0.25, 0.25, 0, 0], [0.125] * 4, [0] * 4]))  # the empty row is not counted
    torch.testing.assert_close(sequence_weights(MASK, "token_mean"), MASK / 6)
    torch.testing.assert_close(sequence_weights(MASK, "sequence_sum_norm", horizon=10), MASK / 20)
    assert (sequence_weights(torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8), st.integers(1, 4),
       st.sampled_from(["sequence_mean", "token_mean", "sequence_sum_norm"]))
def test_micro_batches_carry_slices_of_the_whole(rows: list, size: int, aggregation: str) -> None:
    mask = torch.tensor(rows)
    whole = sequence_weights(mask, aggregation, horizon=7)
    totals = {"num_sequences": int(mask.any(1).sum()), "num_tokens": int(mask.sum())}
    parts = [sequence_weights(part, aggregation, horizon=7, **totals) for part in mask.split(size)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert aggregation == "sequence_sum_norm" or not mask.any() or whole.sum().item() == pytest.approx(1, abs=1e-6)
    assert (whole[~mask] == 0).all()
