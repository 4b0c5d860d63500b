"""What the commands answer to bad input: one line that names it, exit status 2, and nothing lost or half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from official import linked, quiet, release
from PIL import Image
from small import ROOT, reading_policy, small_config, small_policy

from unigrpo.adapters import add_lora
from unigrpo.cli import main
from unigrpo.generate import UnifiedPipeline
from unigrpo.interchange import import_release
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.stages.loading import load_policy, save_policy

__all__ = ["release"]  # pytest finds the fixture by name

PROMPT = "one red circle"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Everything that a folder may hold: autoencoder, adapters, vision tower."""
    policy = reading_policy(["one", "red", "circle"], latent_channels=4, latent_patch_size=2, latent_downsample=2,
                            image_size=(16, 16))
    policy.autoencoder = Autoencoder({"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1,
                                      "norm_num_groups": 4, "sample_size": 16})
    add_lora(policy.model, rank=2, alpha=2, targets=("mlp",), experts=("generation",))
    folder = tmp_path_factory.mktemp("bad") / "checkpoint"
    save_policy(folder, policy)
    return folder


def generate(folder: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "--checkpoint", str(folder), "--output", str(output), "--steps", "2", "--device", "cpu", *more]


def refused(capsys, *arguments: str) -> str:
    """What the command says, once: it must exit with 2 and print nothing of Python's."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"unigrpo {arguments[0]}: ")
    assert "Traceback" not in said
    return said


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "autoencoder/config.json",
         "autoencoder/diffusion_pytorch_model.safetensors", "adapter/adapter_config.json",
         "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("content", [b"", b"{\"a\": "])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_checkpoint_is_named(checkpoint, tmp_path, capsys, name, content):
    folder = linked(checkpoint, tmp_path / "checkpoint")
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    assert str(folder / name) in refused(capsys, *generate(folder, tmp_path / "out", "--prompt", PROMPT))
    assert str(folder / name) in refused(capsys, "export", str(folder), str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):  # as the stages load it
        load_policy(folder, small_config())


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refused(capsys, *generate(nowhere, tmp_path / "out", "--prompt", PROMPT))
    assert str(nowhere) in refused(capsys, "export", str(nowhere), str(tmp_path / "out"))
    assert "must be a folder, or a hub repository" in refused(capsys, "import-bagel", str(nowhere))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"\n  \n", "is empty"), (b"\xff\xfe\x00", "must be text in UTF-8"),
    (b'one\n{"promt": "red"}\n', r":2 must have a text under the key prompt, got None"),
    (b'{"prompt": null}\n', "got None"), (b'{"prompt": 3}\n', "got 3"), (b'{"prompt": "red"\n', ":1 must be a JSON object")])
def test_prompts_that_are_none(checkpoint, tmp_path, capsys, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert message in refused(capsys, *generate(checkpoint, tmp_path / "out", "--prompts", str(path)))
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_none(checkpoint, tmp_path, capsys):
    for name, content in (("empty.png", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(content)
        more = ("--prompt", PROMPT, "--image", str(tmp_path / name))
        assert "must be a readable image" in refused(capsys, *generate(checkpoint, tmp_path / "out", *more))
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    more = ("--prompt", PROMPT, "--image", str(tmp_path / "cut.png"))
    assert "must be a readable image" in refused(capsys, *generate(checkpoint, tmp_path / "out", *more))


def test_an_output_that_cannot_be_written(checkpoint, release, tmp_path, capsys, monkeypatch):
    """A file in the way, no permission (root has it always, so the answer of the system is given here), a full disk."""
    (tmp_path / "file").write_text("keep")
    commands = {"generate": lambda out: generate(checkpoint, out, "--prompt", PROMPT),
                "import-bagel": lambda out: ["import-bagel", str(release), "--output", str(out)]}
    exported = tmp_path / "imported"
    import_release(release, exported, report=quiet)
    commands["export"] = lambda out: ["export", str(exported), str(out)]
    for command in commands.values():
        assert f"{tmp_path / 'file'} is a file" in refused(capsys, *command(tmp_path / "file" / "out"))
    assert f"{tmp_path / 'file'} is a file" in refused(capsys, *commands["generate"](tmp_path / "file"))
    monkeypatch.setattr("unigrpo.checks.os.access", lambda *_: False)
    for command in commands.values():
        assert f"no permission in {tmp_path}" in refused(capsys, *command(tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setattr("unigrpo.checks.shutil.disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    for name in ("import-bagel", "export"):
        assert "its disk has 0.0 GB left" in refused(capsys, *commands[name](tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "imported"]
    assert (tmp_path / "file").read_text() == "keep"


def test_a_damaged_record_of_a_run_is_another_run(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "generate.json").write_text("")
    (tmp_path / "out" / "00000.json").write_text("{}")
    command = generate(checkpoint, tmp_path / "out", "--prompt", PROMPT)
    assert "holds another run" in refused(capsys, *command)
    assert main([*command, "--overwrite"]) == 0


def test_sources_and_digests_of_an_import(release, tmp_path, capsys):
    said = refused(capsys, "import-bagel", str(release / "ema.safetensors"))
    assert "is a file; give the folder it lies in" in said
    (tmp_path / "digests").write_text("\n")
    said = refused(capsys, "import-bagel", str(release), "--output", str(tmp_path / "out"), "--digests",
                   str(tmp_path / "digests"))
    assert "it holds none" in said
    assert "nowhere" in refused(capsys, "import-bagel", str(release), "--digests", str(tmp_path / "nowhere"))
    empty = linked(release, tmp_path / "release")
    (empty / "ema.safetensors").unlink()
    (empty / "ema.safetensors").touch()
    assert "must be a readable safetensors file" in refused(capsys, "import-bagel", str(empty), "--output",
                                                            str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder of params alone, entered."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plans_of_what_is_not_there(project, capsys):
    assert "['bagel_7b', 'small', 'smoke', 'tiny']" in refused(capsys, "plan", "--scale", "big")
    assert "run must be one of ['cfg_rollout', " in refused(capsys, "plan", "--run", "grpo")
    assert "must not be negative" in refused(capsys, "plan", "--scale", "bagel_7b", "--price", "-3")
    scale = project / "params" / "scales" / "smoke.yaml"
    scale.write_text(scale.read_text().replace("group_size:", "groupsize:"))
    assert "rollout.groupsize is not a key" in refused(capsys, "plan", "--scale", "smoke")
    scale.write_text("")
    assert "must hold a mapping of sections" in refused(capsys, "plan", "--scale", "smoke")


@pytest.mark.parametrize(("content", "message"), [("", "must be JSON"), ("[]", "must be a JSON object"),
                                                  ("{}", "must have a number under vocab_size")])
def test_a_plan_with_a_damaged_checkpoint(project, capsys, content, message):
    folder = project / "checkpoints" / "BAGEL-7B-MoT"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    assert message in refused(capsys, "plan", "--scale", "bagel_7b")


def test_outside_a_project(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "run this inside the project" in refused(capsys, "plan")


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def hears_ctrl_c():
    """A process that a shell started in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    """generate goes on behind the prompts it has finished, whose files are left alone."""
    save_policy(tmp_path / "checkpoint", small_policy(small_config()))
    (tmp_path / "prompts.txt").write_text("one red circle\n" * 400)
    command = generate(tmp_path / "checkpoint", tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt"), "--batch", "1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "unigrpo", *command], env=env, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True,
                          preexec_fn=hears_ctrl_c) as process:
        end = time.monotonic() + 600
        while not (tmp_path / "out" / "00001.json").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "unigrpo generate: interrupted"
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*.json")}
    assert 2 <= len(finished) < 400
    assert all(json.loads(p.read_text())["images"] for p in finished)
    call, drawn = UnifiedPipeline.__call__, []

    def twice(self, *args, **kwargs):
        drawn.append(args[0])
        return interrupt() if len(drawn) > 2 else call(self, *args, **kwargs)

    monkeypatch.setattr(UnifiedPipeline, "__call__", twice)
    assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "unigrpo generate: interrupted"
    assert len(list((tmp_path / "out").glob("0*.json"))) == len(finished) + 2
    assert all(p.stat().st_mtime_ns == time_ns for p, time_ns in finished.items())


def test_ctrl_c_leaves_nothing_half_written(release, tmp_path, monkeypatch, capsys):
    """An import and an export that are interrupted while they write the weights, and a plan while it times steps."""
    imported = tmp_path / "imported"
    import_release(release, imported, report=quiet)
    monkeypatch.setattr("unigrpo.interchange.write_tensors", lambda path, *_: path.write_bytes(b"half") and interrupt())
    monkeypatch.setattr("unigrpo.probe.measure", interrupt)
    monkeypatch.chdir(ROOT)
    for command in (["import-bagel", str(release), "--output", str(tmp_path / "out")],
                    ["export", str(imported), str(tmp_path / "out")], ["plan", "--scale", "smoke"]):
        assert main(command) == 130
        assert capsys.readouterr().err.splitlines()[-1] == f"unigrpo {command[0]}: interrupted"
        assert [p.name for p in tmp_path.iterdir()] == ["imported"]
