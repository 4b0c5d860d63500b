"""What the flows share: their parameters, the resources of a remote step, and the cards."""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

from metaflow import FlowSpec, Parameter, current

ROOT = Path(os.environ.get("UNIGRPO_ROOT") or Path(__file__).resolve().parent.parent)
PROVENANCE = ("git_commit", "git_dirty", "dvc_stage", "dvc_exp", "dvc_lock_sha256", "params_sha256", "inputs_sha256")


class StageFlow(FlowSpec):
    """Parameters of every stage's flow: the stage's name, and what the launcher knows about its execution. A step on
    another machine has no git and not our environment, so provenance comes as Parameters."""

    item = Parameter("item", help="the stage's item in dvc.yaml, such as tiny-unigrpo-0", required=True)
    git_commit = Parameter("git_commit", default="unknown", help="of the checkout that launched")
    git_dirty = Parameter("git_dirty", default="unknown", help="true, false or unknown")
    dvc_stage = Parameter("dvc_stage", default="unknown", help="as DVC names it")
    dvc_exp = Parameter("dvc_exp", default="none", help="the experiment's name under `dvc exp run`")
    dvc_lock_sha256 = Parameter("dvc_lock_sha256", default="unknown", help="of dvc.lock as the stage started")
    params_sha256 = Parameter("params_sha256", default="unknown", help="of the resolved config")
    inputs_sha256 = Parameter("inputs_sha256", default="unknown", help="of the input files")


def call_stage(flow: StageFlow, stage: str) -> dict[str, float]:
    """The one thing a step does: call the stage function of the library. A user's mistake ends as one line, not as a
    traceback through Metaflow."""
    from unigrpo.stages import run_stage
    from unigrpo.tracking import recorded_run, start_courier

    known = {field: str(getattr(flow, field)) for field in PROVENANCE} | {"metaflow_pathspec": current.pathspec}
    try:
        if (processes := processes_of(stage, str(flow.item))) > 1:
            metrics = run_together(stage, str(flow.item), known, processes)
        else:
            start_courier(ROOT)
            metrics = run_stage(stage, str(flow.item), ROOT, known)
        flow.mlflow_run = recorded_run(ROOT, current.pathspec) or "unknown"  # the way back: Task(...).data.mlflow_run
        return metrics
    except ValueError as error:
        if os.environ.get("UNIGRPO_TRACEBACK"):
            raise
        print(f"{stage} {flow.item}: {error}\n(UNIGRPO_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def processes_of(stage: str, item: str) -> int:
    """How many processes share a stage, where it is one of those that can be shared."""
    from unigrpo.config import load_config
    from unigrpo.stages import SHARED, parse_name

    job = parse_name(stage, item, ROOT)
    return load_config(job.scale, run=job.run, root=ROOT).processes(stage) if stage in SHARED else 1


def run_together(stage: str, item: str, known: dict[str, str], processes: int) -> dict[str, float]:
    """The stage function in several processes of this machine, under torch.distributed.run's agent. Returns its metrics.

    Ends this process with the status of the first that failed: they have said why, and the agent has ended the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from unigrpo.preemption import PREEMPTED
    from unigrpo.stages import parse_name
    from unigrpo.stages.run import PROVENANCE as KNOWN

    os.environ[KNOWN] = json.dumps(known)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, start_method="spawn",
                          monitor_interval=0.1)
    try:
        elastic_launch(config, sys.executable)("-m", "unigrpo.stages.run", stage, item)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        status = next((code for code in codes if code > 0), 1)
        if status not in (2, 130):
            print(f"{stage} {item}: one of {processes} processes ended with status {codes[0]}; its own words are above",
                  file=sys.stderr, flush=True)
        sys.exit(status)
    except SignalException as error:
        sys.exit(130 if error.sigval == signal.SIGINT else PREEMPTED)
    output = ROOT / parse_name(stage, item, ROOT).output / ("metrics.json" if stage == "evaluate" else "training.json")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def resources() -> dict[str, int]:
    """Arguments of @resources for a step that wants GPUs: compute.resources of the scale being launched."""
    import yaml

    def read(path: Path) -> dict[str, Any]:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return dict((content.get("compute") or {}).get("resources") or {})

    values = read(ROOT / "params" / "base.yaml") | read(ROOT / "params" / "scales" / f"{os.environ.get('UNIGRPO_SCALE')}.yaml")
    names = {"gpu": "gpu", "cpu": "cpu", "memory_mb": "memory", "shared_memory_mb": "shared_memory"}
    return {names[key]: int(value) for key, value in values.items()}


def curves_figure(path: Path) -> Any:
    """Every column of a curves.csv against its step, one small plot each."""
    import matplotlib.pyplot as plt
    import pandas as pd

    curves = pd.read_csv(path)
    columns = [column for column in curves.columns if column != "step"][:24]
    rows = max(1, -(-len(columns) // 4))
    figure, axes = plt.subplots(rows, 4, figsize=(14, 2.2 * rows), squeeze=False, constrained_layout=True)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns, strict=False):
        points = curves[["step", column]].dropna()
        axis.set_visible(True)
        axis.plot(points["step"], points[column], linewidth=1)
        axis.set_title(column, fontsize=8)
        axis.tick_params(labelsize=7)
    return figure


def gallery_rows(folder: Path, limit: int) -> list[list[Any]]:
    """[image, prompt, thinking, score] of a gallery.json or samples.json, its last `limit` entries."""
    from metaflow.cards import Image

    listing = next((path for path in (folder / "gallery.json", folder / "samples.json") if path.is_file()), None)
    entries = json.loads(listing.read_text(encoding="utf-8")) if listing is not None else []
    rows = []
    for entry in entries[-limit:]:
        image = folder / str(entry.get("image", ""))
        shown = Image(image.read_bytes()) if image.is_file() else ""
        score = entry.get("reward", entry.get("exact", ""))
        rows.append([shown, str(entry.get("prompt", "")), str(entry.get("thinking", "")), str(score)])
    return rows


def fill_card(flow: StageFlow, stage: str, gallery: str, limit: int = 24) -> None:
    """The card of train or evaluate: metrics, curves, and (image, prompt, thinking)."""
    from metaflow.cards import Image, Markdown, Table

    from unigrpo.stages import parse_name

    folder = ROOT / parse_name(stage, str(flow.item), ROOT).output
    current.card.append(Markdown(f"# {stage} {flow.item}\n\ncommit {flow.git_commit}, dirty: {flow.git_dirty}; MLflow run "
                                 f"{flow.mlflow_run}"))
    if stage == "train" and (folder / "curves.csv").is_file():
        current.card.append(Image.from_matplotlib(curves_figure(folder / "curves.csv")))
    rows = gallery_rows(folder / gallery, limit)
    if rows:
        current.card.append(Table(rows, headers=["image", "prompt", "thinking", "score"]))
    metrics = flow.metrics or {}
    current.card.append(Table([[key, f"{value:.6g}"] for key, value in sorted(metrics.items())], headers=["metric", "value"]))
