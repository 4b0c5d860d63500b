"""What a file, a name, a request or a log could do that nobody asked for; see docs/security.md."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from audit import main as audit
from PIL import Image
from pipeline_copy import make_copy
from small import ROOT, small_prompts

from unigrpo.evaluation import t2i_prompts
from unigrpo.prompts.examples import load_image
from unigrpo.prompts.importers import read_prompts
from unigrpo.prompts.records import read_records, write_records
from unigrpo.stages import base, curate, session

SOURCES = sorted(path for part in ("unigrpo", "flows") for path in (ROOT / part).rglob("*.py"))
FORBIDDEN = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.load", "yaml.unsafe_load", "yaml.full_load",
             "numpy.load", "np.load", "pd.read_pickle", "joblib.load", "marshal.loads", "shelve.open", "os.system", "os.popen"}
BY_NAME = {"unigrpo/stages/__init__.py", "unigrpo/stages/evaluate.py", "unigrpo/stages/train.py",  # names of our own, in code
           "unigrpo/rewards/registry.py", "unigrpo/rewards/custom.py"}    # module:name, where the user's params name it


def called(node: ast.Call) -> str:
    """`a.b` of a.b(...)."""
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_runs(path: Path) -> None:
    """No pickle, no unsafe YAML, no code of a model's folder, no shell, and modules by name in a few places only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, keywords = called(call), {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in FORBIDDEN, f"{path}:{call.lineno} {name}"
        assert keywords.get("shell") in (None, "False"), f"{path}:{call.lineno}"
        assert keywords.get("trust_remote_code") in (None, "False"), f"{path}:{call.lineno}"
        assert keywords.get("allow_pickle") in (None, "False"), f"{path}:{call.lineno}"
        if name == "yaml.load":
            assert keywords.get("Loader") == "LOADER", f"{path}:{call.lineno}"  # CSafeLoader or SafeLoader, see config.py
        if name.startswith("Auto") and name.endswith("from_pretrained"):
            assert keywords.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
        if name.endswith("import_module"):
            assert path.relative_to(ROOT).as_posix() in BY_NAME, f"{path}:{call.lineno}"
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}, path


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "", "a\x00b", "a" * 65, "a b", "\u202eb"])
def test_an_id_that_would_leave_the_output_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Images are named by their prompt's id."""
    write_records(tmp_path / "x.jsonl", small_prompts(1))
    record = json.loads((tmp_path / "x.jsonl").read_text()) | {"id": name}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    for read in (read_records, read_prompts):
        with pytest.raises(ValueError, match="an id of letters"):
            read(tmp_path / "x.jsonl")


def test_a_prompt_that_would_leave_the_output_folder_is_refused(tmp_path: Path) -> None:
    """T2I-CompBench's images are named by their prompts."""
    (tmp_path / "color_val.txt").write_text("../../outside\n")
    with pytest.raises(ValueError, match="cannot be a file name"):
        t2i_prompts.read_prompts(tmp_path, "color", own=True)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"big\.png must be a picture that Pillow reads"):
        load_image(tmp_path / "big.png", (32, 32))


SECRETS = {"MLFLOW_TRACKING_TOKEN": "tok-5f1d2a", "MLFLOW_TRACKING_PASSWORD": "pass-9c3e7b", "HF_TOKEN": "hf_77ab1290cd",
           "AWS_SECRET_ACCESS_KEY": "aws-e4410f", "JUDGE_KEY": "judge-0b52d8",
           "MLFLOW_TRACKING_URI": "http://someone:uri-secret-3a@127.0.0.1:9/?key=uri-secret-4b"}
VALUES = [*(value for name, value in SECRETS.items() if name != "MLFLOW_TRACKING_URI"), "uri-secret-3a", "uri-secret-4b"]


def leaks(folder: Path, *texts: str) -> list[str]:
    """Secrets in any file of a folder, or in what was printed."""
    found = [f"{value} was printed" for value in VALUES for text in texts if value in text]
    for path in (p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        found += [f"{value} in {path}" for value in VALUES if value.encode() in content]
    return found


def test_no_secret_of_the_environment_is_written_or_said(tmp_path, monkeypatch, capsys) -> None:
    """By a stage that ends well, and by one that fails with a traceback."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    curate.run("smoke", root=tmp_path)
    monkeypatch.setattr(session.Session, "log", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        base.run("smoke", root=tmp_path)
    said = capsys.readouterr()
    assert "MLflow at http://127.0.0.1:9/ does not answer" in said.err
    assert leaks(tmp_path, said.out, said.err, str(raised.getrepr(style="long"))) == []


@pytest.mark.slow
def test_no_secret_is_in_a_card_or_in_metaflows_files(tmp_path: Path) -> None:
    """A stage through its launcher, that fails in its step with a traceback."""
    folder = make_copy(tmp_path / "copy")
    stage = folder / "unigrpo" / "stages" / "curate.py"
    stage.write_text(stage.read_text().replace("        config = stage.config\n", "        1 / 0\n", 1))
    done = subprocess.run([sys.executable, "flows/launch.py", "curate", "smoke"], cwd=folder, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, **SECRETS, "PYTHONPATH": str(folder), "UNIGRPO_TRACEBACK": "1"})
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stdout
    assert leaks(folder, done.stdout) == []


def test_an_audit_without_its_tool_or_a_network_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert audit("constraints.txt") == 0
    assert "nothing was checked: pip-audit is not installed" in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr("audit.reachable", lambda: False)
    assert audit("constraints.txt") == 0
    assert re.search("nothing was checked: no answer from https://", capsys.readouterr().out)
