"""Stages on other machines, without one: the files that move, the progress that is kept, and what steps ask for."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from flow_scripts import ROOT, load

from unigrpo import tracking
from unigrpo.config import Config, load_config
from unigrpo.digests import sha256_path
from unigrpo.stages import SHARED, parse_name


@pytest.fixture(scope="module", autouse=True)
def flows_on_path():
    """Scripts of flows/ import one another by name, and Metaflow wants a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "flows"))
        patch.setenv("METAFLOW_USER", "test")
        yield


@pytest.fixture
def store(tmp_path):
    """A store on Metaflow's local datastore."""
    from metaflow.plugins.datastores.local_storage import LocalStorage
    from store import Store

    return Store(LocalStorage(str(tmp_path / "datastore")))


def write(root: Path, files: dict[str, str]) -> Path:
    """Files below a folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# ------------------------------------------------------------------------------------------------------------- the store

def test_files_travel_by_content(store, tmp_path):
    root = write(tmp_path / "here", {"a/x": "one", "a/b/y": "one", "z": "two", "a/__pycache__/no": "no"})
    files = store.send(root, ["a", "z"])
    assert sorted(files) == ["a/b/y", "a/x", "z"]
    assert files["a/x"] == files["a/b/y"] == (sha256_path(root / "a" / "x"), 3)
    stored = [path for path in (tmp_path / "datastore" / "unigrpo" / "files").rglob("*") if path.is_file()]
    assert len(stored) == 2  # equal content lies there once
    store.receive(tmp_path / "there", files)
    assert {name: (tmp_path / "there" / name).read_text() for name in files} == {"a/x": "one", "a/b/y": "one", "z": "two"}
    assert not list((tmp_path / "there" / ".unigrpo" / "incoming").iterdir())


@pytest.mark.parametrize("damage", ["another text", None])
def test_one_wrong_file_and_none_is_put_in_place(store, tmp_path, damage):
    root = write(tmp_path / "here", {"a": "first", "b": "second"})
    files = store.send(root, ["a", "b"])
    place = tmp_path / "datastore" / "unigrpo" / "files" / files["b"][0][:2] / files["b"][0]
    place.unlink() if damage is None else place.write_text(damage)
    there = write(tmp_path / "there", {"a": "as it was"})
    with pytest.raises(ValueError, match=rf"{files['b'][0]} must have sha256.*{'missing' if damage is None else 'got'}"):
        store.receive(there, files)
    assert (there / "a").read_text() == "as it was"
    assert not (there / "b").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", ""])
def test_a_manifest_cannot_leave_the_project(store, tmp_path, name):
    files = store.send(write(tmp_path / "here", {"a": "x"}), ["a"])
    with pytest.raises(ValueError, match="below the project"):
        store.receive(tmp_path / "deep" / "there", {name: files["a"]})
    assert not list(tmp_path.rglob("outside"))


def test_a_file_cut_off_in_the_store_is_sent_again(store, tmp_path):
    root = write(tmp_path / "here", {"a": "content"})
    files = store.send(root, ["a"])
    place = tmp_path / "datastore" / "unigrpo" / "files" / files["a"][0][:2] / files["a"][0]
    place.write_text("cont")
    assert store.send(root, ["a"]) == files
    assert place.read_text() == "content"


# ------------------------------------------------------------------------------------------------------------- progress

def resume_state(root: Path, step: int, pictures: int = 0) -> None:
    """A training state as stages keep it: renamed into place; pictures beside it, and a journal."""
    folder = root / ".unigrpo" / "resume" / "key"
    write(folder, {"state.partial/state.json": json.dumps({"step": step}), "state.partial/model": f"weights {step}",
                   "tracking.key": "train-1"})
    if (folder / "state").exists():
        shutil.rmtree(folder / "state.old", ignore_errors=True)
        (folder / "state").rename(folder / "state.old")
    (folder / "state.partial").rename(folder / "state")
    for i in range(pictures):
        write(folder / "gallery", {f"{i}.png": f"picture {i}"})
    with write(root / ".unigrpo" / "tracking", {"train-1.sent": "1"}).joinpath("train-1.jsonl").open("a") as journal:
        journal.write(f"{step}\n")


def seen_by_another(store, tmp_path, key="train/x/1"):
    """The step, the files and the journal that another machine would find."""
    from mirror import Mirror

    root = tmp_path / f"machine-{len(list(tmp_path.glob('machine-*')))}"
    if not Mirror(store, key, root).restore():
        return None
    folder = root / ".unigrpo" / "resume" / "key"
    step = json.loads((folder / "state" / "state.json").read_text())["step"]
    assert (folder / "state" / "model").read_text() == f"weights {step}"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return step, files, (root / ".unigrpo" / "tracking" / "train-1.jsonl").read_text().split()


def test_another_machine_goes_on_where_this_one_was(store, tmp_path):
    from mirror import Mirror

    root = tmp_path / "root"
    mirror = Mirror(store, "train/x/1", root)
    assert not mirror.restore()
    assert not mirror.save()  # nothing yet
    for step in range(1, 5):
        resume_state(root, step, pictures=step)
        assert mirror.save()
        assert not mirror.save()  # nothing new
        found, files, journal = seen_by_another(store, tmp_path)
        assert (found, journal) == (step, [str(n) for n in range(1, step + 1)])
        assert files == {"state/state.json", "state/model", "tracking.key", *(f"gallery/{i}.png" for i in range(step))}
    kept = {path.parent.name for path in (tmp_path / "datastore").rglob("model")}
    assert len(list((tmp_path / "datastore").rglob("model"))) == 2, kept  # the newest two and no more
    assert seen_by_another(store, tmp_path, key="train/x/other") is None
    shutil.rmtree(root / ".unigrpo" / "resume")  # the stage ended well, and its outputs are on their way
    assert not mirror.save()
    assert seen_by_another(store, tmp_path)[0] == 4
    mirror.clear()
    assert seen_by_another(store, tmp_path) is None


def test_damaged_progress_is_refused_and_the_one_before_is_used(store, tmp_path, capsys):
    from mirror import Mirror

    root = tmp_path / "root"
    mirror = Mirror(store, "train/x/1", root)
    for step in (1, 2):
        resume_state(root, step)
        mirror.save()
    newest = next(path for path in (tmp_path / "datastore").rglob("model") if path.read_text() == "weights 2")
    newest.write_text("weights 3")
    assert seen_by_another(store, tmp_path)[0] == 1
    assert "damaged and not used" in capsys.readouterr().err
    for path in (tmp_path / "datastore").rglob("model"):
        path.unlink()
    assert seen_by_another(store, tmp_path) is None


def test_a_save_cut_off_anywhere_leaves_progress_that_is_whole(store, tmp_path, monkeypatch):
    """The datastore dies after every possible number of writes; then another machine looks."""
    from mirror import Mirror

    root = tmp_path / "root"
    resume_state(root, 1, pictures=2)
    Mirror(store, "train/x/1", root).save()
    writes = {"left": 0}
    whole = store.storage.save_bytes

    def dying(*args, **kwargs):
        writes["left"] -= 1
        if writes["left"] < 0:
            raise OSError("the datastore is gone")
        return whole(*args, **kwargs)

    monkeypatch.setattr(store.storage, "save_bytes", dying)
    last = 1
    for step in range(2, 9):
        writes["left"] = (step - 2) * 2
        resume_state(root, step, pictures=3)
        mirror = Mirror(store, "train/x/1", root)
        mirror.restore()  # brings the older state back; the newer one is made again, as a stage would
        resume_state(root, step, pictures=3)
        try:
            mirror.save()
            last = step
        except OSError:
            pass
        assert seen_by_another(store, tmp_path)[0] == last
    assert last > 1


def test_a_state_replaced_while_it_is_copied_is_left_for_the_next_look(store, tmp_path, monkeypatch):
    import mirror as module

    root = tmp_path / "root"
    resume_state(root, 1)
    progress = module.Mirror(store, "train/x/1", root)
    look = progress.look

    def late():
        seen = look()
        resume_state(root, 2)  # a training step ends right after
        return seen

    monkeypatch.setattr(progress, "look", late)
    assert not progress.save()
    monkeypatch.undo()
    assert progress.save()
    assert seen_by_another(store, tmp_path)[0] == 2


# ------------------------------------------------------------------------------------------------------ what is asked for

@pytest.fixture
def places(monkeypatch):
    """flows/places.py as it is in the launcher of a scale on a backend."""
    def loaded(backend: str, scale: str):
        monkeypatch.setenv("UNIGRPO_BACKEND", backend)
        monkeypatch.setenv("UNIGRPO_SCALE", scale)
        return load(ROOT / "flows" / "places.py")

    return loaded


def test_resources_come_from_params(places):
    compute = load_config("bagel_7b", root=ROOT).compute
    found = places("kubernetes", "bagel_7b")
    asked = compute.resources
    for stage in ("sft", "train", "evaluate"):
        assert found.wanted(stage) == {"gpu": asked.gpu, "cpu": asked.cpu, "memory": asked.memory_mb,
                                       "shared_memory": asked.shared_memory_mb}
    small = {"cpu": compute.remote.small.cpu, "memory": compute.remote.small.memory_mb}
    assert [found.wanted(stage) for stage in ("curate", "report", "small", "base")] == [small] * 4  # an imported base is linked
    assert places("kubernetes", "smoke").wants_gpus("base")
    assert places("local", "smoke").nodes() == 1


def test_only_what_means_something_elsewhere_is_passed_on(places, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.delenv("UNIGRPO_STAGE", raising=False)

    from metaflow import step as as_step

    def passed() -> dict[str, str]:
        worn = places("rehearsal", "smoke").where("train")(as_step(lambda self: None))
        return next(deco.attributes["vars"] for deco in worn.decorators if deco.name == "environment")

    assert passed() == {"UNIGRPO_BACKEND": "rehearsal", "UNIGRPO_SCALE": "smoke"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert passed()["MLFLOW_TRACKING_URI"] == "https://mlflow.example"


@pytest.mark.parametrize(("processes", "nodes", "wanted"), [
    (1, 1, "{python} -m unigrpo.stages.run train x"),
    (8, 1, "{python} -m torch.distributed.run --standalone --nproc-per-node 8 --shutdown-timeout 600 "
           "-m unigrpo.stages.run train x"),
    (16, 2, "{python} -m torch.distributed.run --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500 "
            "--nproc-per-node 8 --shutdown-timeout 600 -m unigrpo.stages.run train x"),
])
def test_the_command_that_starts_a_stage(processes, nodes, wanted):
    from surroundings import command

    line = command("train", "x", processes=processes, nodes=nodes, node=nodes - 1, address="10.0.0.1")
    assert " ".join(line) == wanted.format(python=sys.executable)
    with pytest.raises(ValueError, match=r"multiple of compute.remote.nodes=3.*\[6, 9\]"):
        command("train", "x", processes=8, nodes=3)


def test_processes_that_the_machines_cannot_share_are_refused_before_anything_starts(monkeypatch, capsys, tmp_path):
    """Of the stage that is asked for, under the key that says so; a stage with numbers of its own hinders no other."""
    launch = load(ROOT / "flows" / "launch.py")
    values = load_config("smoke", root=ROOT).model_dump()
    values["compute"]["processes"] = values["compute"]["remote"]["nodes"] = 2
    values["evaluate"]["processes"] = 1
    config = Config(**values)
    monkeypatch.setenv("UNIGRPO_BACKEND", "rehearsal")
    launch.check_remote(config, "train")
    for stages in (("evaluate",), SHARED):
        with pytest.raises(ValueError, match=r"evaluate\.processes=1 must be a multiple of .*nodes=2.* are \[2\]"):
            launch.check_remote(config, *stages)


def test_files_that_params_name_travel(tmp_path, monkeypatch):
    import remote

    config = load_config("bagel_7b", root=ROOT)
    named = ["checkpoints/clip-vit-large-patch14", "data/geneval/evaluation_metadata.jsonl"]
    write(tmp_path, {f"{named[0]}/config.json": "", named[1]: "", "my_rewards/warm.py": "", "outside.txt": ""})
    monkeypatch.setattr(remote, "ROOT", tmp_path)
    evaluate = parse_name("evaluate", "tiny-sft", ROOT)
    assert remote.named_files(evaluate, config) == named
    weights = {"my_rewards.warm:warm": 1.0, "../outside.txt:y": 1.0}
    own = config.model_copy(update={"reward": config.reward.model_copy(update={"weights": weights})})
    assert remote.named_files(parse_name("train", "tiny-unigrpo-0", ROOT), own) == ["my_rewards/warm.py"]
    assert remote.named_files(parse_name("curate", "tiny", ROOT), config) == []


@pytest.mark.parametrize(("backend", "wanted"), [("kubernetes", r"compute\.remote\.image"),
                                                 ("batch", r"compute\.remote\.image.* and compute\.remote\.queue"),
                                                 ("cloud", r"must be one of \['local', 'rehearsal', 'kubernetes', 'batch'\]")])
def test_what_a_cluster_lacks_is_named_before_anything_starts(monkeypatch, capsys, backend, wanted):
    launch = load(ROOT / "flows" / "launch.py")
    monkeypatch.setenv("UNIGRPO_BACKEND", backend)
    for name in ("KUBERNETES_CONTAINER_IMAGE", "BATCH_CONTAINER_IMAGE", "BATCH_JOB_QUEUE"):
        monkeypatch.setattr(f"metaflow.metaflow_config.{name}", None)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert launch.main(["base", "smoke"]) == 2
    assert re.search(wanted, capsys.readouterr().err)


def test_records_that_travel_back_are_sent_by_nobody_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.JOURNAL)
    tracking.start_courier(tmp_path)
    assert tmp_path.resolve() not in tracking.COURIERS
    with tracking.track("curate", "x", {"scale": "smoke"}, root=tmp_path) as tracker:
        tracker.log_metrics(0, {"a/b": 1.0})
    journal = next((tmp_path / ".unigrpo" / "tracking").glob("*.jsonl"))
    kinds = [json.loads(line)["kind"] for line in journal.read_text().splitlines()]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert not journal.with_suffix(".sent").exists()
    assert not (tmp_path / "mlflow.db").exists()
