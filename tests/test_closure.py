"""The code that a stage depends on: its import closure, the digests of it that are committed, and who compares them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flow_scripts import ROOT, load

from unigrpo.closure import CODE, closure, stage_digests
from unigrpo.digests import RECORDERS, sha256_path
from unigrpo.dvcfiles import dvc_md5
from unigrpo.stages import STAGES


@pytest.mark.parametrize("stage", ["train", "report"])
def test_a_stages_code_is_its_import_closure(stage):
    """An independent look: what Python really loads, in a fresh process, against the listed files."""
    listed = set(stage_digests(ROOT, stage))
    code = f"import sys, unigrpo.stages.{stage}; print('\\n'.join(m.__file__ for n, m in sys.modules.items() " \
           "if n.split('.')[0] == 'unigrpo' and m.__file__))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout.split()
    files = {Path(file).relative_to(ROOT).as_posix() for file in loaded}
    recorders = {f"{name.replace('.', '/')}{end}" for name in RECORDERS for end in (".py", "/__init__.py")}
    needed = {file for file in files - recorders if (ROOT / file).read_text().strip()}
    assert needed <= listed  # the others are imported inside a function, or for the type checker
    assert len(listed - needed) < len(needed)
    assert {file: sha256_path(ROOT / file) for file in listed} == stage_digests(ROOT, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_committed_digests_are_those_of_the_code(stage):
    committed = json.loads((ROOT / CODE / f"{stage}.json").read_text())
    assert committed == stage_digests(ROOT, stage), "dvc.lock is behind: run `dvc repro code` (and what is stale then)"


def test_the_lock_is_of_this_code():
    """The committed results are those of the committed digests: no stage was left stale by a change of its modules."""
    lock = yaml.load((ROOT / "dvc.lock").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
    files = {f"{CODE}/{stage}.json": dvc_md5(ROOT / CODE / f"{stage}.json") for stage in STAGES}
    for name, entry in lock.items():
        found = {dep["path"]: dep["md5"] for dep in entry["deps"] if dep["path"] in files}
        assert len(found) == (name != "code"), name
        assert found.items() <= files.items(), f"{name} is stale: run it"


def test_every_stage_depends_on_its_code_and_code_on_the_whole_package():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert stages["code"]["deps"] == ["unigrpo"]
    files = {stage: f"{CODE}/{stage}.json" for stage in STAGES}
    assert [next(iter(out)) for out in stages["code"]["outs"]] == list(files.values())
    for stage, content in stages.items():
        if stage != "code":
            assert files["report" if stage == "experiments" else stage] in content["do"]["deps"], stage


def test_writing_digests_changes_what_changed_and_names_what_cannot_be_read(tmp_path):
    """An edit moves the digests of the stages that import the module, a recorder's none; half an edit is named."""
    shutil.copytree(ROOT / "unigrpo", tmp_path / "unigrpo", ignore=shutil.ignore_patterns("__pycache__"))

    def write():
        return subprocess.run([sys.executable, "-m", "unigrpo.closure"], cwd=tmp_path, text=True, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})

    def texts():
        return {stage: (tmp_path / CODE / f"{stage}.json").read_text() for stage in STAGES}

    assert write().returncode == 0
    before = texts()
    for module, changed in (("journal", set()), ("objectives", {"train"}), ("config", set(STAGES))):
        path = tmp_path / "unigrpo" / f"{module}.py"
        path.write_text(path.read_text() + "# another\n")
        assert write().returncode == 0
        assert {stage for stage, text in texts().items() if text != before[stage]} == changed, module
        before = texts()
    path.write_text(path.read_text() + "def half(:\n")
    done = write()
    assert done.returncode == 1
    assert re.fullmatch(r"unigrpo/config.py, line \d+: invalid syntax\n", done.stderr), done.stderr
    assert texts() == before


def test_a_closure_follows_imports_inside_functions_and_packages(tmp_path):
    for name, text in {"__init__": "", "a": "def f():\n    from unigrpo.p import b\n", "p/__init__": "from .c import x\n",
                       "p/b": "import unigrpo.d\n", "p/c": "x = 1\n", "d": "", "e": "x = 2\n"}.items():
        path = tmp_path / "unigrpo" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert closure(tmp_path, "unigrpo.a") == {"unigrpo", *(f"unigrpo.{m}" for m in ("a", "p", "p.b", "p.c", "d"))}


def test_a_stage_of_other_code_than_was_digested_is_refused(monkeypatch, tmp_path):
    """Edited between `dvc repro code` and the stage: dvc.lock would name code that did not run. Without DVC it runs."""
    shutil.copytree(ROOT / "unigrpo", tmp_path / "unigrpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / CODE, tmp_path / CODE)
    launch = load(ROOT / "flows" / "launch.py")
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train@tiny-unigrpo-0")
    launch.check_code("train")
    module = tmp_path / "unigrpo" / "objectives.py"
    module.write_text(module.read_text() + "# another\n")
    with pytest.raises(ValueError, match=r"other code: unigrpo/objectives.py changed since; run `dvc repro code`"):
        launch.check_code("train")
    launch.check_code("report")  # which does not reach that module
    shutil.rmtree(tmp_path / CODE)
    with pytest.raises(ValueError, match=r"unigrpo/adapters.py, .* and \d\d more changed"):
        launch.check_code("train")
    monkeypatch.delenv("DVC_STAGE")
    launch.check_code("train")
