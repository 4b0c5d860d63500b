"""A stage on another machine, or as if: inputs come from the datastore, progress and outputs go there.

One step does it all: it fetches and checks the inputs, fetches what an earlier attempt left, starts the stage's processes,
copies their progress while they work, and sends what they wrote. The stage itself knows nothing of it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import surroundings
from mirror import Mirror, progress_files
from places import ROOT, backend
from process import end_with_parent
from store import Files, Store, files_below

from unigrpo.config import Config, load_config
from unigrpo.digests import sha256_code, sha256_inputs, sha256_json
from unigrpo.experiment import words
from unigrpo.resume import STATE, deciding
from unigrpo.stages import Job, parse_name
from unigrpo.tracking import JOURNAL

PACKAGE = "code.tgz"
MADE = ("artifacts/", f"{STATE}/")   # what stages write
LEAVE = 60.0               # seconds that processes have to leave after SIGTERM
# Sections of params in which a stage's files may be named, beside those that DVC knows.
NAMING = {"curate": ("curate", "sft"), "base": ("base",), "sft": ("sft",), "train": ("reward", "train"),
          "evaluate": ("evaluate", "reward"), "report": ()}
_workspace: Path | None = None


def workspace() -> Path:
    """Where this step's stage works: the unpacked code on a cluster, the project itself where nothing moves."""
    return _workspace or ROOT


# ------------------------------------------------------------------------------------------------------- before and after

def send_inputs(flow: Any, stage: str, name: str) -> Files:
    """Store what a stage reads, the files of its params too. Returns the manifest."""
    job = parse_name(stage, name, ROOT)
    config = load_config(job.scale, run=job.run, seed=job.seed or 0, root=ROOT)
    return Store.of(flow).send(ROOT, [*job.inputs, *named_files(job, config)])


def named_files(job: Job, config: Config) -> list[str]:
    """Files and folders of the project that params name and a stage reads: prompt files, pictures, weights, own rewards.

    A path outside the project must be on the other machine: in the image, or on a volume.
    """
    def is_there(path: Path) -> bool:
        if path.is_absolute() or ".." in path.parts or not path.parts:
            return False
        try:
            return (ROOT / path).exists()
        except OSError:  # too long for a name: a text that is no path
            return False

    found = []
    for text in words({part: config.model_dump(mode="json")[part] for part in NAMING[job.stage]}):
        own = re.fullmatch(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*", text)  # module:name, a reward of the user's
        candidates = [Path(*own[1].split(".")).with_suffix(".py"), Path(*own[1].split("."))] if own else [
            Path(text)] if "/" in text or "." in text else []
        found += [path.as_posix() for path in candidates if is_there(path)]
    if job.stage == "sft" and config.sft.data in found:
        from unigrpo.prompts.examples import read_examples

        found += [example.image.relative_to(ROOT).as_posix() for example in read_examples(ROOT / config.sft.data)]
    return sorted(set(found))


def read_manifest(store: Store, digest: str) -> Files:
    """A manifest that a launcher stored; {} where it named none. Raises ValueError if it is not that one."""
    found = store.get_json(f"manifests/{digest}.json") if digest else {}
    if digest and sha256_json(found) != digest:
        raise ValueError(f"the manifest {digest} is {'missing' if found is None else 'another one'} in the datastore; store it "
                         "again with `python flows/transfer.py send`")
    return {name: (str(sha), int(size)) for name, (sha, size) in found.items()}


def put_outputs(store: Store, files: Files) -> None:
    """Put a stage's outputs into the project, all or none, and tell MLflow what happened there."""
    store.receive(ROOT, files)
    if any(name.startswith(f"{STATE}/tracking/") for name in files):
        from unigrpo.journal import open_client, send_pending

        try:
            send_pending(ROOT, open_client(ROOT), without="")
        except Exception as error:  # whatever a tracker does, the outputs are here
            print(f"tracking: MLflow does not answer ({type(error).__name__}); records stay in {STATE}/tracking and are sent "
                  "by the next stage that finds it up", file=sys.stderr, flush=True)


def send_package(flow: Any) -> str | None:
    """For a rehearsal: store the flow's code package, as Metaflow makes it for a cluster. Returns its sha256."""
    if backend() in ("kubernetes", "batch"):
        return None
    folder = Path(tempfile.mkdtemp(prefix="unigrpo-package-"))
    try:
        subprocess.run([sys.executable, sys.argv[0], "--quiet", "--no-pylint", "package", "save", str(folder / PACKAGE)],
                       check=True, capture_output=True, text=True)
        return Store.of(flow).send(folder, [PACKAGE])[PACKAGE][0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(store: Store, package: str) -> Path:
    """An empty folder with the code package in it, removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="unigrpo-rehearsal-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store.receive(folder, {PACKAGE: (package, 0)})
    with tarfile.open(folder / PACKAGE) as archive:
        archive.extractall(folder, filter="data")
    (folder / PACKAGE).unlink()
    return folder


# -------------------------------------------------------------------------------------------------------------- the step

def run_elsewhere(flow: Any, stage: str, name: str, files: Files, known: Mapping[str, str], *, node: int = 0, nodes: int = 1,
                  address: str = "127.0.0.1") -> Files:
    """Run a stage on its inputs.

    Args:
        files: a manifest that holds the inputs, and may hold more. known: provenance.
        node, nodes, address: this machine among those that work on the stage, and the first one's address.
    Returns: the manifest of what the stage wrote; empty on any machine but the first.
    Raises: SystemExit with the stage's own status if it fails.
    """
    global _workspace
    store = Store.of(flow)
    root = _workspace = unpack(store, flow.package) if getattr(flow, "package", None) else ROOT
    job = parse_name(stage, name, root)
    config = load_config(job.scale, run=job.run, seed=job.seed or 0, root=root)
    reads = tuple(f"{path}/" for path in job.inputs)
    inputs = {path: sha for path, sha in files.items() if f"{path}/".startswith(reads) or not path.startswith(MADE)}
    store.receive(root, inputs)
    known = complete(dict(known), root, job, config)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or JOURNAL
    sent = uri.startswith("http")
    params = deciding(config.model_dump(mode="json"))  # as the resume folder is keyed
    digest = sha256_json({"params": params, "inputs": sorted(inputs.items()), "code": sha256_code()})[:24]
    mirror = Mirror(store, f"{stage}/{name}/{digest}", root, sent=sent)
    if mirror.restore():
        print(f"{stage} {name}: an earlier attempt's progress came from the datastore", flush=True)
    env = surroundings.environment(config, os.environ, root) | surroundings.told(known)
    env |= {"MLFLOW_TRACKING_URI": uri if sent else JOURNAL}
    line = surroundings.command(stage, name, processes=surroundings.processes(config, stage), nodes=nodes, node=node,
                                address=address, port=getattr(flow, "port", None) or surroundings.PORT)
    seconds = config.compute.remote.mirror_seconds
    status = supervise(line, env, root, mirror if node == 0 else None, seconds, f"{stage} {name}")
    if status:
        sys.exit(status if status > 0 else 128 - status)
    if node:
        return {}
    written = store.send(root, new_files(root, inputs, sent=sent))
    mirror.clear()
    return written


def complete(known: dict[str, str], root: Path, job: Job, config: Config) -> dict[str, str]:
    """Provenance with the digests of params and inputs, where nobody passed them in. They follow from what lies here."""
    if known.get("params_sha256", "unknown") == "unknown":
        known["params_sha256"] = sha256_json(config.model_dump(mode="json"))
    if known.get("inputs_sha256", "unknown") == "unknown":
        known["inputs_sha256"] = sha256_json(sha256_inputs(root, job.inputs))
    return known


def supervise(line: list[str], env: Mapping[str, str], root: Path, mirror: Mirror | None, seconds: float, what: str) -> int:
    """Run a stage's processes to their end, copying their progress; a SIGTERM is passed on. Returns their exit status."""
    child = subprocess.Popen(line, cwd=root, env=dict(env), stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    down = False
    try:
        while True:
            try:
                status = child.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                down = save_progress(mirror, what, down)
        if status:
            save_progress(mirror, what, False)
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:  # a time limit of Metaflow, or Ctrl-C
            child.terminate()
            try:
                child.wait(LEAVE)
            except subprocess.TimeoutExpired:
                child.kill()
            save_progress(mirror, what, False)


def save_progress(mirror: Mirror | None, what: str, down: bool) -> bool:
    """Copy progress; a datastore that does not answer is told once and stops nothing. Returns whether it did not."""
    try:
        if mirror is not None:
            mirror.save()
        return False
    except Exception as error:
        if not down:
            print(f"{what}: the datastore does not take the checkpoint ({type(error).__name__}: {str(error)[:200]}); the stage "
                  "goes on, and it is tried again", file=sys.stderr, flush=True)
        return True


def new_files(root: Path, inputs: Files, *, sent: bool) -> list[str]:
    """What a stage wrote: outputs, the good weights that the sentinel kept, and the records for MLflow."""
    wrote = [name for name in files_below(root, "artifacts") if name not in inputs] if (root / "artifacts").is_dir() else []
    kept = [path.relative_to(root).as_posix() for path in progress_files(root, sent=sent)]
    return wrote + [name for name in kept if not name.startswith(f"{STATE}/resume/")]


def metrics_of(folder: Path) -> dict[str, float]:
    """What a stage measured, from the file it wrote; {} for one without."""
    for path in (folder / "metrics.json", folder / "training.json", folder.parent / "curate.json"):
        if path.is_file() and (path.name != "curate.json" or folder.name == "prompts"):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}
