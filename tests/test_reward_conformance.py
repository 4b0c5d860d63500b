"""`unigrpo doctor reward`: every clause is broken once by a reward that keeps the others."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unigrpo.cli import main
from unigrpo.prompts.records import write_records
from unigrpo.rewards import REWARDS
from unigrpo.rewards.conformance import CLAUSES, check_reward, example_batch
from unigrpo.rewards.pictures import encode_png, to_pictures
from unigrpo.types import PromptRecord, Reward

Prompts, Thinking = Sequence[PromptRecord], Sequence[str]


def light(images: np.ndarray) -> np.ndarray:
    return images.mean(axis=(1, 2, 3))


def good(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> list[Reward]:
    return [Reward("good", torch.from_numpy(light(images)))]


def raises(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    raise KeyError("color")


def one_record(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return Reward("one", torch.from_numpy(light(images)))


def same_names(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return [Reward("x", torch.from_numpy(light(images)))] * 2


def wrong_shape(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return light(images)[:, None]


def whole_numbers(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return (light(images) * 100).astype(np.int64)


def infinite(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return np.where(light(images) < np.median(light(images)), -np.inf, light(images))


def with_gradient(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return torch.from_numpy(images).mean(dim=(1, 2, 3)) * torch.ones((), requires_grad=True)


def writes(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    images *= 0.5
    return light(images) * 2


def drops_thinking(images: np.ndarray, prompts: Prompts, thinking: list[str]) -> Any:
    thinking[0] = thinking[0].strip() + " "
    return light(images)


def noisy(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return light(images) + 1e-3 * np.random.default_rng().random(len(images))


def noisy_but_seeded(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    random.seed(0)
    return light(images)


def ranked(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    """A value from the image's place in the batch."""
    return light(images) + np.arange(len(images)) * 0.1


def centred(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    """Normalised within the batch: the order does not matter, the company does."""
    return light(images) - light(images).mean()


def constant(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return np.full(len(images), 0.5)


def all_missing(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return np.full(len(images), np.nan)


def needs_words(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    return light(images) + np.array([1 / len(text.split()) for text in thinking])


def needs_finite(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
    assert np.isfinite(images).all()
    return light(images)


BROKEN: list[tuple[Callable[..., Any], str, str]] = [
    (raises, "runs", "it raised KeyError: 'color'"),
    (one_record, "records", "put it in a list"),
    (same_names, "records", r"different names, got \['x', 'x'\]"),
    (wrong_shape, "shape", r"\(8,\) wanted for 8 images, got \(8, 1\)"),
    (whole_numbers, "float", "got int64 on cpu"),
    (infinite, "finite", "it gave -inf to image"),
    (with_gradient, "gradient", "detach them"),
    (writes, "inputs", "changed its arguments"),
    (drops_thinking, "inputs", "changed its arguments"),
    (noisy, "deterministic", "in the second call image"),
    (noisy_but_seeded, "global", "changed Python's random generator"),
    (ranked, "order", "in the reversed batch image"),
    (centred, "batch", "in a batch of one image"),
    (constant, "constant", "all 8 images got 0.5"),
    (all_missing, "constant", r"all 8 values are missing \(NaN\)"),
    (needs_words, "thinking", "an empty thinking: it raised ZeroDivisionError"),
    (needs_finite, "bad_image", "an image with NaN: it raised AssertionError"),
]


@pytest.mark.parametrize(("reward", "clause", "words"), BROKEN)
def test_each_clause_is_found(reward: Callable[..., Any], clause: str, words: str) -> None:
    report = check_reward(reward)
    broken = {finding.clause: finding.broken or "" for finding in report.broken}
    # Who writes into its input gives another number the next time; who goes by the place in the batch, by the batch too.
    follows = {"inputs": {"deterministic"}, "order": {"batch"}}
    assert clause in broken, report.lines()
    assert set(broken) <= {clause} | follows.get(clause, set()), report.lines()
    assert re.search(words, broken[clause]), broken[clause]
    assert any(line.startswith(f"BROKEN     {clause}: ") for line in report.lines())


def test_every_clause_has_a_reward_that_breaks_it() -> None:
    assert {clause for _, clause, _ in BROKEN} == set(CLAUSES)


@pytest.mark.parametrize("reward", [good, *REWARDS.values()])
def test_a_right_reward_passes(reward: Callable[..., Any]) -> None:
    report = check_reward(reward)
    assert report.broken == []
    assert {finding.clause for finding in report.findings} == set(CLAUSES)
    assert (report.images_per_second or 0) > 0
    assert len(report.lines()) >= len(CLAUSES) + 1


def test_a_number_for_an_image_that_is_not_finite_is_noted() -> None:
    def silent_zero(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
        return np.nan_to_num(light(images))

    report = check_reward(silent_zero)
    assert report.broken == []
    assert any("NaN would say that it is missing" in note for note in report.notes)
    assert check_reward(good).notes == ()


def test_rounding_between_batch_sizes_is_allowed_up_to_the_tolerance() -> None:
    def rounded(images: np.ndarray, prompts: Prompts, thinking: Thinking) -> Any:
        return light(images) * (1 + 1e-5 * len(images))

    assert check_reward(rounded, tolerance=1e-3).broken == []
    assert [finding.clause for finding in check_reward(rounded, tolerance=1e-6).broken] == ["batch"]


def test_the_command_tells_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "reward", "shapes_graded"]) == 0
    assert "ok         batch: " in capsys.readouterr().out
    assert main(["doctor", "reward", "shapes_graded", "--size", "64"]) == 1
    out = capsys.readouterr()
    assert "BROKEN     runs: " in out.out
    assert "images must be (N, 32, 32, 3), got (8, 64, 64, 3)" in out.out
    assert "shapes_graded breaks 1 of the contract's clauses: runs" in out.err
    assert main(["doctor", "reward", "no_module_of_this_name:f"]) == 2
    assert main(["doctor", "reward", "shapes_graded", "--option", "x"]) == 2
    assert main(["doctor", "reward", "shapes_graded", "--images", str(tmp_path)]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    batch = example_batch()
    for row, picture in enumerate(to_pictures(batch.images)):
        (tmp_path / f"{row}.png").write_bytes(encode_png(picture))
    write_records(tmp_path / "prompts.jsonl", batch.prompts)
    images = ["--images", str(tmp_path), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert main(["doctor", "reward", "shapes_exact", *images]) == 0
    (tmp_path / "3.png").write_bytes(b"\x89PNG")
    assert main(["doctor", "reward", "shapes_exact", *images]) == 2
    assert "3.png: a complete image wanted" in capsys.readouterr().err


def test_a_function_of_the_users_from_the_shell(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\ndef leaks(images, prompts, thinking):\n"
                                      "    weight = torch.ones((), requires_grad=True)\n"
                                      "    return torch.from_numpy(images).mean((1, 2, 3)) * weight\n")
    done = subprocess.run([sys.executable, "-m", "unigrpo", "doctor", "reward", "mine:leaks"], cwd=tmp_path, text=True,
                          capture_output=True, env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1",
                                                    "PATH": "/usr/bin:/bin"}, check=False)
    assert done.returncode == 1, done.stderr
    assert "BROKEN     gradient: gives numbers without a gradient; its numbers carry one" in done.stdout
