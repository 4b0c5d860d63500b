"""Running one stage again in a temporary copy: the same bytes, or where the machine rounds differently the same intervals."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unigrpo.closure import CODE, write_digests
from unigrpo.dvcfiles import dvc_md5

COPIED = ("unigrpo", "flows", "params", "dvc.yaml", "dvc.lock", "pyproject.toml", "constraints.txt")
REMEDY = "restore it with `dvc checkout`, or make it with `dvc repro`"


def rerun(root: Path, name: str) -> int:
    """Run a stage of dvc.lock again and compare. Returns 0 for the same bytes or, where these differ, the same intervals.

    Raises: ValueError if the stage was never run, or one of its inputs is missing.
    """
    stages = read_lock(root)
    stage = entry(stages, name)
    with tempfile.TemporaryDirectory(prefix="unigrpo-rerun-") as folder:
        copy = Path(folder)
        copy_code(root, copy)
        copy_inputs(root, copy, stage)
        run_command(copy, stage["cmd"])
        same = compare_bytes(copy, stage["outs"])
        if same:
            print(f"{name}: the same bytes as dvc.lock names")
            return 0
        tables = [out["path"] for out in stage["outs"] if out["path"].endswith("outcomes.csv")]
        if not tables and (evaluation := evaluation_of(stages, stage)):
            print(f"{name}: other bytes; {evaluation} says whether its checkpoint is as good", flush=True)
            copy_inputs(root, copy, stages[evaluation], keep=True)
            run_command(copy, stages[evaluation]["cmd"])
            tables = [out["path"] for out in stages[evaluation]["outs"] if out["path"].endswith("outcomes.csv")]
        if not tables:
            print(f"{name}: other bytes than dvc.lock names, and no outcomes to compare", file=sys.stderr)
            return 1
        return compare_intervals(root / tables[0], copy / tables[0], root)


def read_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    import yaml

    path = root / "dvc.lock"
    if not path.is_file():
        raise ValueError(f"{path} is missing: `make repro` writes it")
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["stages"])


def entry(stages: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One stage. Raises ValueError listing those that are near, if it is not there."""
    import difflib

    if name not in stages:
        near = difflib.get_close_matches(name, stages, n=5, cutoff=0.3) or sorted(stages)
        raise ValueError(f"--rerun takes a stage of dvc.lock, got {name!r}; near it are {', '.join(near)}")
    return dict(stages[name])


def copy_code(root: Path, copy: Path) -> None:
    """What every stage reads beside its inputs."""
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".metaflow"))
        elif (root / name).is_file():
            shutil.copy2(root / name, copy / name)


def copy_inputs(root: Path, copy: Path, stage: Mapping[str, Any], *, keep: bool = False) -> None:
    """The stage's inputs, each checked against dvc.lock; `keep`: those that are in the copy already stay."""
    if any(dep["path"].startswith(CODE) for dep in stage["deps"]):
        write_digests(copy)  # of the code that will run
    for dep in stage["deps"]:
        path, target = (copy if dep["path"].startswith(CODE) else root) / dep["path"], copy / dep["path"]
        if not path.exists():
            raise ValueError(f"{path}, an input, is missing; {REMEDY}")
        if dvc_md5(path) != dep["md5"]:
            print(f"note: {dep['path']} is not what dvc.lock names, so other bytes may come", file=sys.stderr, flush=True)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy2(path, target)


def run_command(copy: Path, command: str) -> None:
    """The stage's own command in the copy. Raises ValueError if it fails."""
    words = shlex.split(command)
    env = {key: value for key, value in os.environ.items() if key not in ("DVC_STAGE", "DVC_ROOT", "PYTHONPATH")}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{copy}/mlflow.db"          # nothing of a rerun is a result
    print(f"running {command} in {copy}", flush=True)
    done = subprocess.run([sys.executable if words[0] == "python" else words[0], *words[1:]], cwd=copy, env=env,
                          stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"{command} exited {done.returncode} in the copy")


def compare_bytes(copy: Path, outs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every output has the bytes that dvc.lock names; a line each."""
    same = True
    for out in outs:
        path = copy / out["path"]
        found = dvc_md5(path) or "missing"
        same &= found == out["md5"]
        print(f"{'same ' if found == out['md5'] else 'OTHER'}  {out['path']}  {found}"
              + ("" if found == out["md5"] else f", dvc.lock names {out['md5']}"), flush=True)
    return same


def evaluation_of(stages: Mapping[str, Any], stage: Mapping[str, Any]) -> str | None:
    """The evaluation of the checkpoint that a stage makes."""
    made = {out["path"] for out in stage["outs"]}
    return next((name for name, other in stages.items() if name.startswith("evaluate@")
                 and made & {dep["path"] for dep in other["deps"] if dep["path"].endswith("/checkpoint")}), None)


def compare_intervals(published: Path, again: Path, root: Path) -> int:
    """Whether the main measures of the rerun lie in the published intervals over prompts; a line each."""
    from unigrpo.config import load_config
    from unigrpo.evaluation.outcomes import read_outcomes
    from unigrpo.evaluation.statistics import value_of
    from unigrpo.report.data import PREFIX, named_measures
    from unigrpo.report.resampling import Statistics
    from unigrpo.report.table import ROWS

    config = load_config(published.relative_to(root / "artifacts").parts[0], root=root)
    statistics = Statistics(seed=config.evaluate.seed, resamples=config.report.bootstrap)
    old, new = (named_measures(read_outcomes(path)) for path in (published, again))
    outside = 0
    for name, label in ROWS.items():
        if PREFIX + name not in old or PREFIX + name not in new:
            continue
        bounds, value = statistics.value(old[PREFIX + name]), value_of(new[PREFIX + name])
        inside = bounds["low"] is None or bounds["low"] <= value <= bounds["high"]
        outside += not inside
        print(f"{'inside ' if inside else 'OUTSIDE'}  {label}: {100 * value:.1f} again, published {100 * bounds['value']:.1f} "
              f"[{100 * (bounds['low'] or 0):.1f}, {100 * (bounds['high'] or 0):.1f}]")
    print("other bytes (another CPU, or another torch), " + ("and not the same numbers" if outside else "the same numbers"))
    return 1 if outside else 0
