"""A copy of a project that ran here, to run once more as on a cluster: S3 of moto, and an empty folder a stage."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from moto_cloud import BUCKET, client
from pipeline_copy import copy_environment

LEFT = ("artifacts", "cache", "tmp", ".unigrpo", ".metaflow", "mlflow.db*", "mlartifacts", "dvc.lock", "__pycache__")
QUICK = {"retries": 1, "retry_minutes": 0, "mirror_seconds": 0.05}


def without_results(project: Path, folder: Path, **compute: Any) -> Path:
    """The project's code and params, neither results nor caches; `compute` changes keys of params/base.yaml."""
    shutil.copytree(project, folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT))
    path = folder / "params" / "base.yaml"
    params = yaml.safe_load(path.read_text())
    remote = params["compute"]["remote"] | QUICK | compute.get("remote", {})
    params["compute"] |= compute | {"remote": remote}
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


def start(folder: Path, env: dict[str, str], *command: str) -> subprocess.Popen[str]:
    """Start a command in the copy, as a rehearsal on that cloud; rehearsals' folders lie beside the copy."""
    (folder.parent / "rehearsals").mkdir(exist_ok=True)
    return subprocess.Popen(command, cwd=folder, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=copy_environment(
                                PYTHONPATH=str(folder), TMPDIR=str(folder.parent / "rehearsals"),
                                **{"UNIGRPO_BACKEND": "rehearsal", **env}))


def workers(folder: Path, *words: str) -> list[psutil.Process]:
    """The processes of a rehearsed stage."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if "unigrpo.stages.run" in line and set(words) <= set(line) and str(folder.parent / "rehearsals") in process.cwd():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill_after_a_checkpoint(running: subprocess.Popen[str], folder: Path, env: dict[str, str], stage: str, name: str,
                            seconds: float = 300) -> None:
    """kill -9 of a stage's process, once its first checkpoint is in the datastore."""
    deadline = time.monotonic() + seconds

    def wait(what: str, condition: Any) -> Any:
        while not (found := condition()):
            assert running.poll() is None, f"ended before {what}: {running.stdout.read() if running.stdout else ''}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s"
            time.sleep(0.02)
        return found

    process = wait("process", lambda: workers(folder, stage, name))[0]
    place = Path(process.cwd()) / ".unigrpo" / "resume"
    wait("state", lambda: list(place.glob("*/state/state.json")))
    process.suspend()  # so that it cannot end before its checkpoint has been copied
    prefix = f"metaflow/unigrpo/states/{stage}/{name}/"
    s3 = client(env, "s3")
    wait("copy of it", lambda: [item for item in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
                                if item["Key"].endswith("/head.json")])
    process.kill()


def lock_of(folder: Path) -> dict[str, Any]:
    """dvc.lock's entries."""
    return dict(yaml.safe_load((folder / "dvc.lock").read_text())["stages"])
