"""Image files and the cache of scores: what is broken is named, what was scored is kept through a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unigrpo.evaluation.backends.cache import ScoreCache, score_key
from unigrpo.evaluation.images import PNG_END, digest, read_image


def save(path: Path, array: np.ndarray, **settings: object) -> Path:
    Image.fromarray(array).save(path, **settings)
    return path


def noise(height: int = 40, width: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_pixels_come_back_as_rgb(tmp_path: Path) -> None:
    assert (read_image(save(tmp_path / "a.png", noise())) == noise()).all()
    grey = read_image(save(tmp_path / "grey.png", noise()[..., 0]))
    assert grey.shape == (40, 30, 3)
    assert (grey == noise()[..., :1]).all()
    see_through = noise(channels=4)
    assert (read_image(save(tmp_path / "alpha.png", see_through)) == see_through[..., :3]).all(), "transparency is dropped"
    turned = Image.Exif()
    turned[0x0112] = 6
    assert read_image(save(tmp_path / "turned.png", noise(), exif=turned)).shape == (30, 40, 3)


def test_broken_files_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", noise()).read_bytes()
    broken = {"empty (0 bytes)": b"", "is no image": b"<html>not found</html>", "is truncated": good[:len(good) // 2],
              "without its end": good[:-len(PNG_END)], "damaged": good[:200] + bytes(100) + good[300:]}
    for words, data in broken.items():
        path = tmp_path / "broken.png"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"broken\.png") as error:
            read_image(path)
        assert words in str(error.value), words
    with pytest.raises(ValueError, match="No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="directory"):
        digest(tmp_path)
    with pytest.raises(ValueError, match="at most 1199 pixels, got 30 x 40"):
        read_image(tmp_path / "good.png", max_pixels=1199)
    with pytest.raises(ValueError, match="8 bits a channel, got mode I;16"):
        read_image(save(tmp_path / "deep.png", np.zeros((4, 4), dtype=np.uint16)))


def test_the_cache_outlives_its_process(tmp_path: Path) -> None:
    cache, path = ScoreCache(tmp_path / "new" / "scores.jsonl"), tmp_path / "new" / "scores.jsonl"
    key = score_key("00", "scorer a")
    assert (key in cache, cache.get(key), path.exists()) == (False, None, False)
    cache.put(key, {"score": 0.1 + 0.2})
    again = ScoreCache(path)
    assert again.get(key) == {"score": 0.1 + 0.2}, "floats come back to the bit"
    assert score_key("00", "scorer b") != key != score_key("01", "scorer a")


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}, None, {1, 2}])
def test_what_is_no_score_is_not_kept(tmp_path: Path, value: object) -> None:
    cache = ScoreCache(tmp_path / "scores.jsonl")
    with pytest.raises(ValueError, match="score"):
        cache.put("k", value)
    assert "k" not in cache
    assert not cache.path.exists()


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"cannot be written \(.*--cache"):
        ScoreCache(tmp_path / "file" / "scores.jsonl").put("k", 1)
    with pytest.raises(ValueError, match=r"cannot be read \("):
        ScoreCache(tmp_path / "folder")


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    cache = ScoreCache(path)
    for number in range(3):
        cache.put(f"k{number}", number)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        torn = ScoreCache(path)
        complete = whole[:cut + 1].count(b"\n") if whole[cut:cut + 1] == b"\n" else whole[:cut].count(b"\n")
        assert len(torn) == complete, cut  # a line that lacks its line end alone is whole
        torn.put("next", 9)
        assert ScoreCache(path).get("next") == 9, cut
        assert len(ScoreCache(path)) == complete + 1, cut


def test_processes_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    code = ("import sys; from unigrpo.evaluation.backends.cache import ScoreCache; c = ScoreCache(sys.argv[1])\n"
            "for i in range(200): c.put(f'{sys.argv[2]}-{i}', 'x' * 300)")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), name], env=environment) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    cache = ScoreCache(path)
    assert (len(cache), cache.damaged) == (600, 0)
    assert {json.loads(line)["value"] for line in path.read_text().splitlines()} == {"x" * 300}
