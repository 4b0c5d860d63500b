"""The documentation names files, functions, keys and metrics that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from unigrpo.report.blocks import block_of, names_in

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "docs/algorithm.md", "docs/pipeline.md", "docs/curves.md", "docs/scales.md",
         "docs/checkpoints.md", "docs/generation.md", "docs/prompts.md", "docs/rewards.md", "docs/scoring.md",
         "docs/scoring_t2i.md", "docs/sentinel.md", "docs/mlflow.md", "docs/reliability.md", "docs/security.md",
         "docs/experiments.md", "docs/cluster.md"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page: str) -> None:
    text = text_of(page)
    named = re.findall(r"`((?:unigrpo|flows|tests|params|docs)/[\w/.]*)`", text)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not ((ROOT / page).parent / name).exists() and name != "docs/images/results.png"]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_functions_are_where_they_are_said_to_be(page: str) -> None:
    found = re.findall(r"`(\w+)`\s+in\s+`(unigrpo/[\w/]+\.py)`", text_of(page))
    assert found or page != "docs/algorithm.md"
    for name, file in found:
        assert re.search(rf"^(?:def|class) {name}\b", text_of(file), re.MULTILINE), f"{page}: {file} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_keys_are_in_params(page: str) -> None:
    keys = yaml.safe_load(text_of("params/base.yaml"))
    for name in set(re.findall(r"`((?:rollout|reward|credit|objective|optim|train|sft|evaluate)\.[a-z0-9_.]+)", text_of(page))):
        value = keys
        for part in name.rstrip(".").split("."):
            assert part in value, f"{page} names the key {name}, which params/base.yaml lacks"
            value = value[part]


def test_curves_are_logged() -> None:
    """Every metric of docs/curves.md is written somewhere: its quantity stands in the code that logs."""
    code = "".join((ROOT / "unigrpo" / name).read_text(encoding="utf-8") for name in (
        "train.py", "update.py", "credit.py", "mismatch.py", "sft.py", "objectives.py", "stages/train.py", "stages/watch.py",
        "stages/sft.py"))
    parts = "reward|probe|advantage|mismatch|text|image|understanding|generation|optim|thinking|drift|sentinel"
    metrics = set(re.findall(rf"`((?:{parts})/[a-z_]+)", text_of("docs/curves.md")))
    assert len(metrics) > 25
    assert [name for name in sorted(metrics) if not re.search(rf"\b{name.split('/')[1]}\b", code)] == []


def test_no_target_is_promised_that_make_lacks() -> None:
    makefile = text_of("Makefile")
    for page in PAGES:
        for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", text_of(page), re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} names `make {target}`, which the Makefile lacks"


@pytest.mark.parametrize("page", PAGES)
def test_results_stand_between_marks(page: str) -> None:
    """Outside the marked blocks no page states an accuracy or a gain; those blocks are written by `unigrpo report --readme`."""
    text = text_of(page)
    for name in names_in(text):
        block = block_of(text, name)
        assert block, f"{page}: the block {name} is not closed"
        text = text.replace(block, "")
    found = re.findall(r"[+−-]\d+(?:\.\d+)? points|\d+\.\d points", text)
    if page in ("README.md", "docs/experiments.md"):
        found += re.findall(r"\d+\.\d %", text)
    assert found == [], f"{page} states results outside marks; see unigrpo/report/blocks.py"
