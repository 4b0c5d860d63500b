"""The table of docs/reliability.md with fewer repetitions: every row must end as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from costs import costs
from reliability import cost_table, measure, table
from undisturbed import Row


@pytest.mark.slow
def test_every_row_ends_as_it_says(tmp_path: Path) -> None:
    rows = measure(tmp_path, seed=1, number=8, faults=3, bytes_=50, inputs=300)
    assert [(row.what, row.bad) for row in rows if row.bad] == []
    disturbed = [row for row in rows if row.lost_steps is not None]
    assert len(disturbed) >= 12
    assert all(row.times >= 3 and (row.lost_steps, row.lost_metrics) == (0, 0) for row in disturbed)
    assert sum(row.times for row in rows if row.what.startswith("malformed")) >= 2000


def test_the_table_counts_what_was_lost() -> None:
    rows = [Row("one", 3, "well"), Row("two", 4, "not well"), Row("malformed x", 1000, "refused")]
    rows[0].lose(0, 0)
    rows[1].lose(2, 5)
    assert rows[1].bad == ["2 steps and 5 metrics lost"]
    shown = table(rows).splitlines()
    assert shown[2:5] == ["| one | 3 | well | 0 | 0 | 0 |", "| two | 4 | not well | 2 | 5 | 1 |",
                          "| malformed x | 1,000 | refused | – | – | 0 |"]
    assert shown[-1] == ("7 runs disturbed: lost steps 2, lost metrics 5. 1,000 malformed inputs in all. Ended otherwise than "
                         "the table says: 1.")


@pytest.mark.slow
def test_checkpoints_and_keys_cost_a_training_little(tmp_path: Path) -> None:
    found = costs(tmp_path / "costs", 2)
    assert len(cost_table(found).splitlines()) == 2 + len(found) == 6
    assert all(0.8 < cost.cpu < 1.5 for cost in found)
