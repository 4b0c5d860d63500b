"""The whole graph at scale smoke in a copy of this checkout: `python tests/pipeline_copy.py` runs it once and shows it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("unigrpo", "flows", "params", ".dvc", "dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml", "constraints.txt")


def copy_environment(**changes: str) -> dict[str, str]:
    """The environment of commands in a copy: this Python first on PATH, no tracker or backend of the caller's."""
    dropped = ("MLFLOW_TRACKING_URI", "UNIGRPO_BACKEND", "DVC_STAGE", "DVC_ROOT", "GIT_DIR", "GIT_WORK_TREE", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return env | {"DVC_NO_ANALYTICS": "1", **changes}


def run_in(folder: Path, *command: str, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy; its output comes back, and is in the error if it fails."""
    done = subprocess.run(command, cwd=folder, env=copy_environment(PYTHONPATH=str(folder), **changes), text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}")
    return done


def make_copy(folder: Path, *, scale: str = "smoke", runs: tuple[str, ...] = ("unigrpo",), seeds: tuple[int, ...] = (0,)
              ) -> Path:
    """A copy of the code, without results and state, as a git repository of its own that lists one scale's experiments."""
    for name in CODE:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local", ".metaflow")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    run_in(folder, "git", "init", "--quiet")
    run_in(folder, sys.executable, "-m", "unigrpo", "experiment", "write", "--scale", scale, "--run", *runs,
           "--seed", *map(str, seeds))
    run_in(folder, "git", "add", "-A")
    run_in(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "copy")
    return folder


def main() -> int:
    """One `dvc repro` of everything, its output and its seconds."""
    folder = Path(tempfile.mkdtemp(prefix="unigrpo-smoke-"))
    try:
        make_copy(folder)
        start = time.monotonic()
        status = subprocess.run(["dvc", "repro"], cwd=folder, env=copy_environment(), stdin=subprocess.DEVNULL).returncode
        print(f"the whole graph at scale smoke: {time.monotonic() - start:.0f} s, exit status {status}")
        return status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
