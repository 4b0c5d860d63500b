"""`unigrpo verify`: what is published follows from the outcomes, a wrong digit is found, a stage gives its bytes again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from report_inputs import write_artifacts

from unigrpo.cli import main
from unigrpo.commands.rerun import compare_intervals
from unigrpo.dvcfiles import dvc_md5
from unigrpo.evaluation.outcomes import read_outcomes, write_outcomes
from unigrpo.report.blocks import BLOCKS, marks
from unigrpo.report.readme import write_readme
from unigrpo.report.verify import Check, is_shown_as, leaves, verify
from unigrpo.stages.report import run

PROJECT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ("base", "sft", *(f"unigrpo/{seed}" for seed in range(3)))


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with both reports and a README; tests copy it."""
    root = tmp_path_factory.mktemp("published")
    write_artifacts(root, checkpoints=CHECKPOINTS, shown=1, steps=30)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "docs").mkdir()
    blocks = {name: "\n".join(marks(name)) for name in BLOCKS}
    (root / "README.md").write_text("\n\n".join(["# Title", blocks["main"], "12.5 % of nothing", blocks["seeds"]]) + "\n")
    others = [blocks[name] for name in BLOCKS if name not in ("main", "seeds")]
    (root / "docs" / "experiments.md").write_text("\n\n".join(["# Page", *others]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unigrpo.tracking.Tracker.send", lambda self, **_: None)
        for which in ("main", "experiments"):
            run("smoke", which=which, root=root)
    assert len(write_readme(root, "smoke")) == 4
    assert write_readme(root, "smoke") == []
    return root


@pytest.fixture
def clone(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What git holds of it: no samples, no prompts."""
    root = tmp_path / "clone"
    shutil.copytree(published, root, ignore=shutil.ignore_patterns("samples", "prompts"))
    monkeypatch.chdir(root)
    return root


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def verified(*arguments: str) -> int:
    return main(["verify", *arguments, "--scale", "smoke"])


def test_a_clone_verifies(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified("all") == 0
    out = capsys.readouterr().out
    assert "0 wrong" in out
    assert "block claims" in out
    checks = verify(clone, "smoke")
    files = {check.file for check in checks}
    assert {"README.md", "docs/experiments.md", "artifacts/smoke/report/report.json"} <= files
    assert sum(check.path.endswith("/low") for check in checks) > 300


def planted_json(root: Path) -> str:
    path = root / "artifacts" / "smoke" / "report" / "report.json"
    report = json.loads(path.read_text())
    entry = report["differences"]["unigrpo-sft"]["bench/shapes/exact"]
    entry["high"] = round(entry["high"] + 1e-6, 6)                        # the sixth digit
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return "differences/unigrpo-sft/bench/shapes/exact/high"


def planted_outcome(root: Path) -> str:
    path = root / "artifacts" / "smoke" / "sft" / "outcomes.csv"
    table = read_outcomes(path).astype({"graded_sum": "float64"})
    row = table.index[table["exact"].between(1, 3)][0]
    table.loc[row, "graded_sum"] += 0.5                                   # one image's partial credit, in one cell
    write_outcomes(table, path)
    return "artifacts/smoke/sft/outcomes.csv"


def planted_readme(root: Path) -> str:
    path = root / "README.md"
    lines = path.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if line.startswith("| exact accuracy"))
    digit = next(c for c in reversed(lines[place]) if c.isdigit())
    cut = lines[place].rindex(digit)
    lines[place] = lines[place][:cut] + str((int(digit) + 1) % 10) + lines[place][cut + 1:]
    path.write_text("".join(lines))
    return "README.md: block main, number"


def planted_claim(root: Path) -> str:
    change(root / "docs" / "experiments.md", "| Thinking helps | supported |", "| Thinking helps | not supported |")
    return "docs/experiments.md: block claims"


def planted_verdict(root: Path) -> str:
    path = root / "artifacts" / "smoke" / "experiments" / "report.json"
    report = json.loads(path.read_text())
    report["claims"][0]["verdict"] = "supported"
    path.write_text(json.dumps(report))
    return "claims/0:joint/verdict is supported, the outcomes give not run"


@pytest.mark.parametrize("plant", [planted_json, planted_outcome, planted_readme, planted_claim, planted_verdict])
def test_a_wrong_digit_is_found(clone: Path, capsys: pytest.CaptureFixture[str], plant) -> None:
    named = plant(clone)
    assert verified("all") == 1
    assert named in capsys.readouterr().err


def test_missing_and_unclosed_blocks_are_wrong(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(clone / "README.md", marks("seeds")[1], "")
    assert verified("README") == 1
    assert "must hold one line" in capsys.readouterr().err
    (clone / "artifacts" / "smoke" / "sft" / "training.json").unlink()
    assert verified("all") == 1
    assert "training.json is missing" in capsys.readouterr().err


def test_one_number(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((clone / "artifacts" / "smoke" / "report" / "report.json").read_text())
    value = report["arms"]["unigrpo"]["bench/shapes/exact"]["value"]
    for wanted in ("arms/unigrpo/bench/shapes/exact/value", f"{100 * value:.1f}", f"{100 * value:.1f} %"):
        assert verified(wanted) == 0
        assert f"arms/unigrpo/bench/shapes/exact/value = {value}" in capsys.readouterr().out
    assert verified("987.65") == 2
    assert "nothing published is called or reads '987.65'" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text", "wanted"), [
    (0.190123, "19.0", True), (0.190123, "+19.0", True), (0.190123, "19.1", False), (-0.571, "-57.1", True),
    (-0.571, "57.1", True), (0.571, "-57.1", False), (True, "1", False), ("+19.0", "19.0", True), ("sft", "19.0", False)])
def test_numbers_as_people_read_them(value, text, wanted) -> None:
    assert is_shown_as(value, text) is wanted


def test_leaves_and_types() -> None:
    assert dict(leaves({"a": [{"name": "x", "b": 1}, {"b": 2}], "c": {}, "d": [None]})) == {
        "a/0:x/name": "x", "a/0:x/b": 1, "a/1/b": 2, "c": {}, "d/0": None}
    assert not Check("f", "p", 1, True).right                             # 1 == True in Python
    assert Check("f", "p", 1.0, 1.0).right


# ---------------------------------------------------------------------------------------------------------------- rerun

def locked(root: Path, code: str) -> None:
    """A project of one stage that writes a file, with its dvc.lock."""
    (root / "params").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "flows").mkdir()
    (root / "flows" / "make.py").write_text(code)
    (root / "in").mkdir()
    (root / "in" / "a.txt").write_text("1\n")
    digest = hashlib.md5(b"12\n").hexdigest()
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"make@x": {
        "cmd": "python flows/make.py", "deps": [{"path": "in", "md5": dvc_md5(root / "in")}],
        "outs": [{"path": "out.txt", "md5": digest}]}}}))


def test_a_rerun_compares_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    locked(tmp_path, "open('out.txt', 'w').write(open('in/a.txt').read().strip() + '2\\n')\n")
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--rerun", "make@x"]) == 0
    assert "the same bytes" in capsys.readouterr().out
    assert not (tmp_path / "out.txt").exists()                            # it ran in a copy
    (tmp_path / "flows" / "make.py").write_text("open('out.txt', 'w').write('13')\n")
    assert main(["verify", "--rerun", "make@x"]) == 1
    assert "OTHER  out.txt" in capsys.readouterr().out
    (tmp_path / "in" / "a.txt").write_text("2\n")
    main(["verify", "--rerun", "make@x"])
    assert "in is not what dvc.lock names" in capsys.readouterr().err
    assert main(["verify", "--rerun", "make@y"]) == 2
    assert "near it are make@x" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "in")
    assert main(["verify", "--rerun", "make@x"]) == 2
    assert "an input, is missing; restore it with `dvc checkout`" in capsys.readouterr().err


def test_other_bytes_are_judged_by_intervals(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, again = published / "artifacts" / "smoke" / "sft" / "outcomes.csv", tmp_path / "outcomes.csv"
    table = read_outcomes(path)
    row = table.index[(table["exact"].between(1, 3)) & (table["exact"] > table["exact_and_plan_right"])][0]
    table.loc[row, "exact"] -= 1
    write_outcomes(table, again)
    assert compare_intervals(path, again, published) == 0
    write_outcomes(table.assign(exact=0, exact_and_plan_right=0), again)
    assert compare_intervals(path, again, published) == 1
    assert "OUTSIDE  exact accuracy: 0.0 again" in capsys.readouterr().out


def test_digests_are_dvcs() -> None:
    """The committed lock names the digests of files that are in git."""
    lock = yaml.safe_load((PROJECT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    outs = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    path = "artifacts/tiny/curate.json"
    assert dvc_md5(PROJECT / path) == outs[path]


# -------------------------------------------------------------------------------------------------- what is committed

def test_what_is_committed_verifies(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number that this repository publishes, from its committed outcomes."""
    monkeypatch.chdir(PROJECT)
    assert main(["verify", "all"]) == 0, capsys.readouterr().err
