"""A pytest plugin of one option, `--golden-dir DIR`.

It is a plugin and not a line of conftest.py because pytest takes an unknown option's value for a test path: the folder
would become the root, and tests/conftest.py, which knew the option, would never load.
"""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Add the option; tests/conftest.py reads it."""
    parser.addoption("--golden-dir", action="append", default=[], metavar="DIR",
                     help="a further folder of golden data; may be given several times")
