"""Golden folders, and settings that make every test repeatable.

Golden tests are parametrised over the files of tests/golden/data, of each folder given with --golden-dir, and, for files
that neither has, of ../shared/golden next to the checkout where that exists. A folder may hold algorithm.json,
geneval.json, t2i_compbench.json and a sub-folder bagel/, or be a bagel folder itself (config.json and manifest.json).
What no folder has is not collected. The option itself comes from the package's pytest plugin (unigrpo.pytest_golden).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

DATA = Path(__file__).parent / "golden" / "data"
NEIGHBOUR = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN_NAMES = ("algorithm.json", "geneval.json", "t2i_compbench.json", "bagel/manifest.json")

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    for folder in _given(config):
        if not any(_in_folder(folder, name) for name in GOLDEN_NAMES):
            raise pytest.UsageError(f"--golden-dir {folder} holds no golden data: expected one of "
                                    f"{', '.join(GOLDEN_NAMES)}, or a bagel folder with config.json and manifest.json")


def golden_files(config: pytest.Config, name: str) -> list[Path]:
    """Every golden file of that name ("algorithm.json", "bagel/manifest.json"), the repository's own first.

    Use it in pytest_generate_tests. An empty list collects nothing.
    """
    found = [path for folder in (DATA, *_given(config)) if (path := _in_folder(folder, name))]
    if not found and (path := _in_folder(NEIGHBOUR, name)):
        found = [path]
    return list(dict.fromkeys(path.resolve() for path in found))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Golden tests without data are left out; pytest would show them as skipped."""
    items[:] = [item for item in items
                if not (item.path.name.startswith("test_golden_") and item.name.endswith("[NOTSET]"))]


def _given(config: pytest.Config) -> list[Path]:
    return [(config.invocation_params.dir / folder).resolve() for folder in config.getoption("--golden-dir")]


def _in_folder(folder: Path, name: str) -> Path | None:
    """The file in a golden folder, or in a folder that is itself the bagel sub-folder."""
    if (path := folder / name).is_file():
        return path
    if name.startswith("bagel/") and (folder / "config.json").is_file() and (folder / "manifest.json").is_file():
        path = folder / name.removeprefix("bagel/")
        return path if path.is_file() else None
    return None
