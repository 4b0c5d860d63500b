"""The scripts of flows/ as modules, for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path):
    """A script of flows/ as a module."""
    spec = importlib.util.spec_from_file_location(f"flows_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
