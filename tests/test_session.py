"""A stage's output folder is checked before any work is done."""

from __future__ import annotations

import pytest

from unigrpo.stages.session import last_tenth, writable


def test_a_read_only_output_folder_is_refused_before_work(tmp_path):
    folder = tmp_path / "artifacts" / "tiny" / "sft"
    assert writable(folder).is_dir()
    assert not list(folder.iterdir())
    folder.chmod(0o500)
    try:
        with pytest.raises(ValueError, match=r"sft must be .*(read-only|may write into).*another checkout"):
            writable(folder)
    finally:
        folder.chmod(0o700)


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "artifacts").write_text("in the way")
    with pytest.raises(ValueError, match=r"artifacts/tiny must be a folder that this user may write into"):
        writable(tmp_path / "artifacts" / "tiny")


def test_a_tail_without_a_measurement_is_no_zero():
    """Forty steps: the last tenth has four; b is measured at 0, 10, 20 and 30 only, c at no step."""
    curves = [{"a": float(i), **({"b": float(i)} if i % 10 == 0 else {})} for i in range(40)]
    assert last_tenth(curves, ("a", "b", "c")) == {"a": 37.5, "b": 30.0}
    curves[37]["b"] = 5.0  # a measurement in the last tenth is what counts
    assert last_tenth(curves, ("b",)) == {"b": 5.0}
