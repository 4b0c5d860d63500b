"""The table of docs/reliability.md with fewer repetitions: every row must end as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from reliability import measure


@pytest.mark.slow
def test_every_row_ends_as_it_says(tmp_path: Path) -> None:
    rows = measure(tmp_path, seed=1, number=8, faults=3, bytes_=50, inputs=300)
    assert [(row.what, row.bad) for row in rows if row.bad] == []
    assert sum(row.times for row in rows if row.what.startswith("malformed")) >= 2000
