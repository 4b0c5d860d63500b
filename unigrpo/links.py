"""What leads from an MLflow run to the commit, the DVC stage, the Metaflow run and the checkpoint, as tags of the run.

Digests of outputs are DVC's own, so that a run can be held against dvc.lock: the lock is written after the stage ended and
names no run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from unigrpo.digests import sha256_code, sha256_path
from unigrpo.dvcfiles import dvc_md5, stage_address, stage_outputs
from unigrpo.stages import parse_name

OUT, IN = "dvc.out.", "dvc.in."  # tag prefixes; what follows is the path below artifacts/<scale>/
WEIGHTS = "model.safetensors"
UNKNOWN = "unknown"


def address_of(tags: Mapping[str, str], stage: str, name: str) -> str:
    """How DVC names the execution: as it said itself, or as dvc.yaml would name it."""
    said = tags.get("dvc.stage", UNKNOWN)
    return said if said != UNKNOWN else stage_address(stage, name)


def below(path: str) -> str:
    """A path below artifacts/<scale>/ as the rest of a tag's name."""
    return "/".join(Path(path).parts[2:])


def input_tags(root: Path, stage: str, name: str) -> dict[str, str]:
    """The digests of the checkpoints that an execution starts from."""
    found = {f"{IN}{below(path)}": dvc_md5(root / path) for path in parse_name(stage, name, root).inputs
             if path.endswith("/checkpoint")}
    return {key: value for key, value in found.items() if value is not None}


def output_tags(root: Path, address: str) -> dict[str, str]:
    """The digests of what an execution made; of a checkpoint also the sha256 of its weights."""
    paths = stage_outputs(root, address)
    found = {f"{OUT}{below(path)}": dvc_md5(root / path) for path in paths}
    for path in paths:
        if path.endswith("/checkpoint") and (root / path / WEIGHTS).is_file():
            found["checkpoint.sha256"] = sha256_path(root / path / WEIGHTS)
    return {key: value for key, value in found.items() if value is not None}


def source_tags(stage: str, name: str, tags: Mapping[str, str]) -> dict[str, str]:
    """MLflow's own names for what ran, which its pages show in their columns; the digest of the code that moves numbers."""
    known = {"mlflow.source.name": f"flows/launch.py {stage} {name}", "mlflow.source.type": "LOCAL",
             "code.sha256": sha256_code()}
    if user := os.environ.get("METAFLOW_USER"):
        known["mlflow.user"] = user
    if tags.get("git.commit", UNKNOWN) != UNKNOWN:
        known["mlflow.source.git.commit"] = tags["git.commit"]
    return known


def note(run_id: str, stage: str, name: str, tags: Mapping[str, str]) -> str:
    """The run's description on MLflow's page, in Markdown: every link of the chain, and the commands that follow them."""
    commit, pathspec = tags.get("git.commit", UNKNOWN), tags.get("metaflow.pathspec", UNKNOWN)
    address = address_of(tags, stage, name)
    dirty = {"true": ", changed", "false": ""}.get(tags.get("git.dirty", UNKNOWN), ", changes unknown")
    shown = f"`{commit[:12]}`{dirty}" if commit != UNKNOWN else "unknown"
    metaflow = f"`{pathspec}`" if pathspec != UNKNOWN else "unknown"
    lines = [f"DVC `{address}` · commit {shown} · Metaflow {metaflow} · `unigrpo doctor run {run_id[:12]}`", "",
             f"    dvc status {address}"]
    if commit != UNKNOWN:
        lines.append(f"    git show {commit[:12]}")
    if stage in ("train", "evaluate") and pathspec.count("/") == 3:
        lines.append(f"    python flows/{stage}_flow.py card view {pathspec.partition('/')[2]}")
    if tags.get("dvc.exp", "none") not in ("none", UNKNOWN):
        lines.append(f"    dvc exp diff HEAD {tags['dvc.exp']}")
    return "\n".join(lines)
