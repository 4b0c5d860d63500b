"""What leads from an MLflow run to commit, DVC stage, Metaflow run and checkpoint; `unigrpo doctor run` follows it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unigrpo import cli
from unigrpo.commands.doctor_run import chain, find_runs, search
from unigrpo.config import load_config
from unigrpo.digests import sha256_inputs, sha256_json
from unigrpo.dvcfiles import cache_folder, dvc_md5, lock_entry, missing_in_cache, stage_address, stage_outputs
from unigrpo.gallery import gallery_page
from unigrpo.journal import Journal, open_client, recorded_run
from unigrpo.resume import STATE, home
from unigrpo.stages import parse_name
from unigrpo.tracking import track

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = "artifacts/tiny/unigrpo/0"
PATHSPEC = "TrainFlow/17/train/2"


# ------------------------------------------------------------------------------------------------------------ DVC's files

def test_a_stage_has_the_outputs_that_the_lock_lists():
    """For every entry of the committed dvc.lock that dvc.yaml still expands."""
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    experiment = yaml.safe_load((ROOT / "params" / "experiment.yaml").read_text())
    known = {f"train@{name}" for name in experiment["trainings"]} | {f"evaluate@{name}" for name in experiment["evaluations"]}
    seen = 0
    for address, entry in lock.items():
        if address in known or address in ("curate@tiny", "base@tiny", "sft@tiny", "report@tiny-main", "experiments@tiny"):
            assert set(stage_outputs(ROOT, address)) == {out["path"] for out in entry["outs"]}, address
            seen += 1
    assert seen >= 9


def test_an_unknown_stage_lists_the_choices():
    with pytest.raises(ValueError, match=r"curate.*evaluate"):
        stage_outputs(ROOT, "traim@tiny-unigrpo-0")
    with pytest.raises(ValueError, match="train@tiny-unigrpo-0"):
        stage_outputs(ROOT, "train@tiny-unigrpo-77")


def test_digests_are_dvc_s_own(tmp_path):
    """A file in git has the md5 that dvc.lock gives it; a folder the md5 of DVC's listing, sorted by the whole path."""
    assert dvc_md5(ROOT / "artifacts/tiny/curate.json") == lock_entry(ROOT, "curate@tiny").outs["artifacts/tiny/curate.json"]
    (tmp_path / "a").mkdir()
    for name in ("a/x", "a.b"):  # "a.b" < "a/x" as texts, the other way round as parts of paths
        (tmp_path / name).write_text(name)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "z").write_text("not seen")
    md5 = {name: hashlib.md5(name.encode()).hexdigest() for name in ("a/x", "a.b")}
    listing = f'[{{"md5": "{md5["a.b"]}", "relpath": "a.b"}}, {{"md5": "{md5["a/x"]}", "relpath": "a/x"}}]'
    assert dvc_md5(tmp_path) == hashlib.md5(listing.encode()).hexdigest() + ".dir"
    assert dvc_md5(tmp_path / "nothing") is None


def test_the_cache_is_looked_through(tmp_path):
    assert cache_folder(tmp_path) == tmp_path / ".dvc" / "cache"
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config.local").write_text("[cache]\n    dir = ../elsewhere\n")
    cache = cache_folder(tmp_path)
    assert cache == tmp_path / "elsewhere"

    def put(digest: str, text: str) -> None:
        path = cache / "files" / "md5" / digest[:2] / digest[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert missing_in_cache(cache, "aa11.dir") == 1
    put("aa11.dir", json.dumps([{"md5": "bb22", "relpath": "x"}, {"md5": "cc33", "relpath": "y"}]))
    assert missing_in_cache(cache, "aa11.dir") == 2
    put("bb22", "x")
    assert missing_in_cache(cache, "aa11.dir") == 1


@pytest.mark.parametrize(("stage", "name", "address"), [("train", "tiny-unigrpo-0", "train@tiny-unigrpo-0"),
                                                        ("report", "tiny-main", "report@tiny-main"),
                                                        ("report", "tiny-experiments", "experiments@tiny")])
def test_dvc_has_its_own_name_for_the_experiments_report(stage, name, address):
    assert stage_address(stage, name) == address


@pytest.mark.parametrize("name", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "params").rglob("*.yaml")))
def test_params_survive_an_experiment_of_dvc(tmp_path, name):
    """`dvc exp run -S FILE:key=value` rewrites the file in its own style, without quotes; every value must stay what it is."""
    from dvc.utils.serialize import modify_yaml

    copy = shutil.copy2(ROOT / name, tmp_path / "copy.yaml")
    with modify_yaml(str(copy)) as content:
        content["of_a_test"] = 1
    assert yaml.safe_load(copy.read_text()) == yaml.safe_load((ROOT / name).read_text()) | {"of_a_test": 1}


# -------------------------------------------------------------------------------------------------------------- galleries

def test_a_gallery_becomes_one_page(tmp_path):
    """Pictures inside, large ones scaled down, text escaped, the latest first; nothing where there is no listing."""
    assert gallery_page(tmp_path) is None
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    Image.new("RGB", (1024, 512), "blue").save(tmp_path / "1.png")
    (tmp_path / "gallery.json").write_text(json.dumps([
        {"step": 0, "prompt": "a <red> square", "thinking": "red & square", "reward": 0.5, "image": "0.png"},
        {"step": 7, "prompt": "the sky", "thinking": "", "reward": 1.0, "image": "1.png"},
        {"step": 8, "prompt": "lost", "thinking": "x", "reward": 0.0, "image": "2.png"}]))
    page = gallery_page(tmp_path)
    assert page.count("<figure>") == 3
    assert page.count("data:image/png;base64,") == page.count("data:image/jpeg;base64,") == 1
    assert page.index("lost") < page.index("the sky") < page.index("a &lt;red&gt; square")
    assert "red &amp; square" in page
    assert "step 7 · reward 1.0" in page
    assert len(page) < 20_000  # the large picture is not in it as it was
    (tmp_path / "gallery.json").write_text("[]")
    assert gallery_page(tmp_path) is None


# ----------------------------------------------------------------------------------------------- an experiment in a copy

def test_an_experiment_in_a_copy_is_told_to_the_project(tmp_path):
    """`dvc exp run --temp` and its queue run in a copy that goes away: run, journal and artifacts stay in the project."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    copy.mkdir(parents=True)
    assert home(copy) == home(tmp_path) == tmp_path
    (copy / "gallery").mkdir()
    Image.new("RGB", (8, 8)).save(copy / "gallery" / "0.png")
    (copy / "gallery" / "gallery.json").write_text(json.dumps([{"prompt": "p", "thinking": "t", "image": "0.png"}]))
    (copy / "curves.csv").write_text("step\n0\n")
    with track("train", "x", {"scale": "smoke"}, {"dvc_exp": "brave-one", "metaflow_pathspec": PATHSPEC}, copy) as tracker:
        tracker.log_artifacts(copy / "gallery", "gallery")
        tracker.log_artifacts(copy / "curves.csv")
        shutil.rmtree(copy)  # before anything was sent
    assert not (copy / STATE).exists()
    run, = search(open_client(tmp_path), "tags.`dvc.exp` = 'brave-one'")
    kept = tmp_path / "mlartifacts" / "smoke" / run.info.run_id / "artifacts"
    assert {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()} == {
        "curves.csv", "gallery.html", "gallery/0.png", "gallery/gallery.json"}
    assert recorded_run(copy, PATHSPEC) == run.info.run_id
    assert recorded_run(copy, "TrainFlow/18/train/2") is None


# ------------------------------------------------------------------------------------------------------- doctor run

def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def write_lock(root: Path, address: str) -> None:
    """The stage's outputs as they lie there, into dvc.lock and DVC's cache."""
    path = root / "dvc.lock"
    lock = yaml.safe_load(path.read_text()) if path.is_file() else {"schema": "2.0", "stages": {}}
    outs = [{"path": out, "hash": "md5", "md5": dvc_md5(root / out)} for out in stage_outputs(root, address)]
    lock["stages"][address] = {"cmd": "x", "deps": [], "outs": outs}
    path.write_text(yaml.safe_dump(lock))
    for out in outs:
        files = {dvc_md5(p): p.read_bytes() for p in [root / out["path"], *(root / out["path"]).rglob("*")] if p.is_file()}
        if (root / out["path"]).is_dir():
            files[out["md5"]] = json.dumps([{"md5": digest, "relpath": digest} for digest in files]).encode()
        for digest, content in files.items():
            place = root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project in which sft and one training ended: files made up, recorded as stages record them."""
    root = tmp_path_factory.mktemp("links") / "project"
    shutil.copytree(ROOT / "params", root / "params")
    shutil.copy2(ROOT / "dvc.yaml", root / "dvc.yaml")
    (root / ".gitignore").write_text("*\n!/params/**\n!/dvc.yaml\n!*/\n")
    git(root, "init", "--quiet")
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "-m", "Made up")
    (root / "artifacts" / "tiny" / "prompts").mkdir(parents=True)
    (root / "artifacts" / "tiny" / "prompts" / "train.jsonl").write_text("{}\n")
    for stage, name, output in (("sft", "tiny", "artifacts/tiny/sft"), ("train", "tiny-unigrpo-0", OUTPUT)):
        job = parse_name(stage, name, root)
        if stage == "sft":
            (root / "artifacts" / "tiny" / "base" / "checkpoint").mkdir(parents=True)
        config = load_config("tiny", run=job.run, seed=0, root=root).model_dump(mode="json")
        known = {"git_commit": git(root, "rev-parse", "HEAD"), "git_dirty": "false", "dvc_stage": f"{stage}@{name}",
                 "params_sha256": sha256_json(config), "inputs_sha256": sha256_json(sha256_inputs(root, job.inputs))}
        if stage == "train":
            known["metaflow_pathspec"] = PATHSPEC
        with track(stage, name, config, known, root) as tracker:
            (root / output / "checkpoint").mkdir(parents=True)
            (root / output / "checkpoint" / "model.safetensors").write_text(f"weights of {stage}")
            (root / output / "gallery").mkdir()
            for file in ("gallery/gallery.json", "training.json", "curves.csv"):
                (root / output / file).write_text(f"{file} of {stage}")
            tracker.log_metrics(0, {"reward/mean": 0.5})
        write_lock(root, f"{stage}@{name}")
    task = root / ".metaflow" / PATHSPEC
    task.mkdir(parents=True)
    (task / "0.DONE.lock").touch()
    return root


@pytest.fixture
def project(made, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "project", symlinks=True))


def links(root: Path, *words: str) -> dict[str, tuple[str, str]]:
    """{"<link>": (state, text)}; of links of one name the worst."""
    client = open_client(root)
    found: dict[str, tuple[str, str]] = {}
    for link in chain(root, find_runs(client, words)[0], lambda tag, value: search(client, f"tags.`{tag}` = '{value}'")):
        if found.get(link.name.strip(), ("ok", ""))[0] == "ok":
            found[link.name.strip()] = (link.state, link.text)
    return found


def test_a_whole_chain(project, monkeypatch, capsys):
    assert {name: state for name, (state, _) in links(project, "train", "tiny-unigrpo-0").items()} == dict.fromkeys(
        ("commit", "code", "params", "inputs", "stage", "output", "checkpoint", "Metaflow"), "ok")
    monkeypatch.chdir(project / "params")
    assert cli.main(["doctor", "run", "train@tiny-unigrpo-0"]) == 0
    said = capsys.readouterr().out
    run, = find_runs(open_client(project), ["train/tiny-unigrpo-0"])
    for words in (run.info.run_id, "Made up (HEAD), nothing changed", "its entry in dvc.lock has this run's outputs",
                  "made by sft/tiny", f"python flows/train_flow.py card view {PATHSPEC.partition('/')[2]}"):
        assert words in said
    assert "differs" not in said
    assert f"DVC `train@tiny-unigrpo-0` · commit `{run.data.tags['git.commit'][:12]}` · Metaflow `{PATHSPEC}`" in run.data.tags[
        "mlflow.note.content"]
    assert run.data.tags["mlflow.source.git.commit"] == run.data.tags["git.commit"]


@pytest.mark.parametrize("words", [("train", "tiny-unigrpo-0"), ("train@tiny-unigrpo-0",), ("tiny-unigrpo-0",),
                                   ("TrainFlow/17",), (PATHSPEC,), ("TrainFlow/17/",)])
def test_a_run_has_many_names(made, words):
    client = open_client(made)
    run, = find_runs(client, words)
    assert run.info.run_name == "train/tiny-unigrpo-0"
    assert [found.info.run_id for found in find_runs(client, [run.info.run_id[:8]])] == [run.info.run_id]


@pytest.mark.parametrize(("words", "wanted"), [(("TrainFlow/99",), "no run has"), (("x'; drop",), "letters, digits")])
def test_a_name_that_means_no_run_is_refused(made, words, wanted):
    with pytest.raises(ValueError, match=wanted):
        find_runs(open_client(made), words)


def test_a_name_that_means_two_stages_lists_both(project):
    with track("evaluate", "tiny-unigrpo-0", {"scale": "tiny"}, {}, project):
        pass
    with pytest.raises(ValueError, match=r"means 2 runs; name one: (evaluate|train)/tiny-unigrpo-0 \("):
        find_runs(open_client(project), ["tiny-unigrpo-0"])
    assert len(find_runs(open_client(project), ["train", "tiny-unigrpo-0"])) == 1


def change_output(root: Path) -> None:
    (root / OUTPUT / "curves.csv").write_text("changed by hand")


def remove_from_cache(root: Path) -> None:
    digest = dvc_md5(root / OUTPUT / "checkpoint" / "model.safetensors")
    (root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]).unlink()


def change_param(root: Path) -> None:
    path = root / "params" / "scales" / "tiny.yaml"
    content = yaml.safe_load(path.read_text())
    content["train"]["num_steps"] = 7
    path.write_text(yaml.safe_dump(content))


def forget_the_commit(root: Path) -> None:
    shutil.rmtree(root / ".git")
    git(root, "init", "--quiet")


def train_again(root: Path) -> None:
    """Another execution made other bytes, and the lock has them."""
    (root / OUTPUT / "checkpoint" / "model.safetensors").write_text("other weights")
    with track("train", "tiny-unigrpo-0", {"scale": "tiny"}, {"dvc_stage": "train@tiny-unigrpo-0"}, root):
        pass
    write_lock(root, "train@tiny-unigrpo-0")


@pytest.mark.parametrize(("change", "wanted"), [
    (change_output, {"output": "changed in the workspace"}),
    (remove_from_cache, {"output": "1 objects missing in the cache"}),
    (change_param, {"params": f"train.num_steps {load_config('tiny', root=ROOT).train.num_steps} -> 7"}),
    (forget_the_commit, {"commit": "is not in this repository"}),
    (lambda root: shutil.rmtree(root / ".metaflow"), {"Metaflow": "is not in .metaflow"}),
    (lambda root: (root / "artifacts" / "tiny" / "prompts" / "train.jsonl").write_text("other"), {"inputs": "then, "}),
    (lambda root: (root / "dvc.lock").unlink(), {"stage": "dvc.lock has no train@tiny-unigrpo-0"}),
    (train_again, {"stage": "dvc.lock has other outputs, those of run", "checkpoint": "the run made"}),
], ids=["output", "cache", "params", "commit", "metaflow", "inputs", "lock", "superseded"])
def test_a_link_that_does_not_hold_is_named(project, monkeypatch, capsys, change, wanted):
    run, = find_runs(open_client(project), ["train/tiny-unigrpo-0"])
    change(project)
    found = links(project, run.info.run_id)
    broken = {name for name, (state, _) in found.items() if state != "ok"}
    assert broken == set(wanted), found
    for name, words in wanted.items():
        assert words in found[name][1]
    monkeypatch.chdir(project)
    assert cli.main(["doctor", "run", run.info.run_id[:12]]) == 1
    said = capsys.readouterr().out
    assert "\ndiffers: " in said or "\nunknown: " in said


def test_what_a_run_did_not_record_is_unknown(tmp_path):
    """A stage called by hand in a project without git: nothing is guessed."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    shutil.copy2(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    with track("train", "tiny-other-0", {"scale": "tiny"}, {}, tmp_path):
        pass
    found = links(tmp_path, "train/tiny-other-0")
    unknown = {name for name, (state, _) in found.items() if state == "unknown"}
    assert unknown == {"commit", "params", "inputs", "stage", "Metaflow"}


def test_records_that_wait_are_sent_by_the_store_command(tmp_path, monkeypatch):
    """The last stage of a day found no tracker: `unigrpo store`, and with it `make ui`, sends its run."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with track("train", "x", {"scale": "smoke"}, {}, tmp_path) as tracker:
        tracker.log_metrics(0, {"reward/mean": 0.5})
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["store"]) == 0
    run, = search(open_client(tmp_path), "attributes.run_name = 'train/x'")
    assert (run.info.status, run.data.metrics["reward/mean"]) == ("FINISHED", 0.5)
    note, = (tmp_path / STATE / "tracking").glob("*.sent")
    assert Journal(tmp_path, note.stem).sent()["closed"]
