"""What the flows share: their parameters, how a step calls its stage, and the cards."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import uuid
from pathlib import Path
from typing import Any

import places
from metaflow import FlowSpec, Parameter, current, package_sources

PROVENANCE = ("git_commit", "git_dirty", "dvc_stage", "dvc_exp", "dvc_lock_sha256", "params_sha256", "inputs_sha256")
CODE, SUFFIXES = ("unigrpo", "params"), (".py", ".yaml", ".txt", ".sha256")  # what travels with flows/ to other machines
FIRST = ("reward/mean", "reward/zero_std_groups", "probe/", "thinking/length", "text/entropy", "text/clip_fraction",
         "image/clip_fraction", "image/velocity_mse", "sentinel/alarms", "mismatch/")  # what a card shows before other metrics
KNOWN = json.loads(os.environ.get("UNIGRPO_PROVENANCE") or "{}")  # set by the launcher where a flow is deployed


def known(field: str) -> str:
    """What the launcher knew of an execution, or "unknown"."""
    return str(KNOWN.get(field) or "unknown")


@package_sources([(str(places.ROOT / name), name) for name in CODE], suffixes=SUFFIXES)
class ProvenanceFlow(FlowSpec):
    """What the launcher knows about an execution. A step on another machine has no git and not our environment, so provenance
    comes as Parameters."""

    git_commit = Parameter("git_commit", default=known("git_commit"), help="of the checkout that launched")
    git_dirty = Parameter("git_dirty", default=known("git_dirty"), help="true, false or unknown")
    dvc_stage = Parameter("dvc_stage", default=known("dvc_stage"), help="as DVC names it")
    dvc_exp = Parameter("dvc_exp", default=known("dvc_exp"), help="the experiment's name under `dvc exp run`")
    dvc_lock_sha256 = Parameter("dvc_lock_sha256", default=known("dvc_lock_sha256"), help="of dvc.lock as the stage started")


class StageFlow(ProvenanceFlow):
    """Parameters of every stage's flow: the stage's name, and what the launcher knows about its execution."""

    item = Parameter("item", help="the stage's item in dvc.yaml, such as tiny-unigrpo-0", required=True)
    params_sha256 = Parameter("params_sha256", default="unknown", help="of the resolved config")
    inputs_sha256 = Parameter("inputs_sha256", default="unknown", help="of the input files")


def send_inputs(flow: StageFlow, stage: str) -> None:
    """Before a stage that runs elsewhere: its inputs go to the datastore. The launcher has checked name, params and inputs."""
    import remote

    flow.nodes = places.nodes()
    flow.files, flow.package = remote.send_inputs(flow, stage, str(flow.item)), remote.send_package(flow)
    flow.port = free_port() if flow.package else None


def call_stage(flow: ProvenanceFlow, stage: str) -> dict[str, float]:
    """The one thing a step does: call the stage function of the library on the flow's item, here or in processes of its own. A
    user's mistake ends as one line, not as a traceback through Metaflow."""
    item = str(flow.item)
    facts = {field: str(getattr(flow, field, "unknown")) for field in PROVENANCE} | {"metaflow_pathspec": current.pathspec}
    if places.backend() != "local":
        import remote

        several = {"node": current.parallel.node_index, "nodes": current.parallel.num_nodes,
                   "address": current.parallel.main_ip} if getattr(current, "is_parallel", False) else {}
        flow.outputs = remote.run_elsewhere(flow, stage, item, flow.files, facts, **several)
        flow.files = {**flow.files, **flow.outputs}
        return remote.metrics_of(folder_of(stage, item))
    from unigrpo.journal import recorded_run
    from unigrpo.stages import run_stage
    from unigrpo.tracking import start_courier

    try:
        if (processes := processes_of(stage, item)) > 1:
            metrics = run_together(stage, item, facts, processes)
        else:
            start_courier(places.ROOT)
            metrics = run_stage(stage, item, places.ROOT, facts)
        flow.mlflow_run = recorded_run(places.ROOT, current.pathspec) or "unknown"  # the way back: Task(...).data.mlflow_run
        return metrics
    except ValueError as error:
        if os.environ.get("UNIGRPO_TRACEBACK"):
            raise
        print(f"{stage} {item}: {error}\n(UNIGRPO_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def processes_of(stage: str, item: str) -> int:
    """How many processes share a stage, where it is one of those that can be shared."""
    from unigrpo.config import load_config
    from unigrpo.stages import SHARED, parse_name

    job = parse_name(stage, item, places.ROOT)
    return load_config(job.scale, run=job.run, root=places.ROOT).processes(stage) if stage in SHARED else 1


def run_together(stage: str, item: str, known: dict[str, str], processes: int) -> dict[str, float]:
    """The stage function in several processes of this machine, under torch.distributed.run's agent. Returns its metrics.

    Ends this process with the status of the first that failed: they have said why, and the agent has ended the others.
    """
    import surroundings
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from unigrpo.preemption import PREEMPTED
    from unigrpo.stages.run import PROVENANCE as KNOWN

    os.environ[KNOWN] = json.dumps(known)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, start_method="spawn",
                          monitor_interval=0.1, shutdown_timeout=surroundings.SHUTDOWN)
    try:
        elastic_launch(config, sys.executable)("-m", "unigrpo.stages.run", stage, item)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        status = status_of(codes)
        if status == 1:
            ends = " and ".join(f"{rank} was killed by signal {-code}" if code < 0 else f"{rank} ended with status {code}"
                                for rank, code in zip(error.failures, codes, strict=True))
            print(f"{stage} {item}: of {processes} processes, {ends}; their own words are above, and the same command goes on "
                  "where it was", file=sys.stderr, flush=True)
        sys.exit(status)
    except SignalException as error:
        sys.exit(130 if error.sigval == signal.SIGINT else PREEMPTED)
    output = folder_of(stage, item) / ("metrics.json" if stage == "evaluate" else "training.json")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def status_of(codes: list[int]) -> int:
    """The status of a stage whose processes ended with these, negative for a signal: of who knew why, not of who missed the
    others. After a crash the agent asks the others to leave, and theirs is then no preemption, which would be tried again."""
    from unigrpo.preemption import PREEMPTED

    if PREEMPTED in codes and set(codes) <= {PREEMPTED, -signal.SIGTERM}:
        return PREEMPTED
    return next((code for code in (2, 130) if code in codes), 1)


def receive_outputs(flow: StageFlow) -> None:
    """After a stage that ran elsewhere: its outputs come to the workspace, where DVC takes them from."""
    import remote
    from store import Store

    remote.put_outputs(Store.of(flow), flow.outputs)


def resources() -> dict[str, int]:
    """Arguments of @resources for a step with GPUs: compute.resources of the scale being launched. Ignored on this machine."""
    return places.wanted("train")


def folder_of(stage: str, item: str) -> Path:
    """The folder that a stage has written into, where it ran."""
    from unigrpo.stages import parse_name

    root = places.ROOT
    if places.backend() != "local":
        import remote

        root = remote.workspace()
    return root / parse_name(stage, item, root).output


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def curves_figure(path: Path) -> Any:
    """The columns of a curves.csv that move against their step, a small plot each: 24 of them, FIRST before others."""
    import matplotlib.pyplot as plt
    import pandas as pd

    curves = pd.read_csv(path)
    columns = [column for column in curves.columns if column != "step" and curves[column].nunique() > 1]
    columns.sort(key=lambda column: next((i for i, part in enumerate(FIRST) if column.startswith(part)), len(FIRST)))
    columns = columns[:24]
    rows = max(1, -(-len(columns) // 4))
    # Fixed margins: constrained_layout draws everything once more to find them, which took as long as all the rest.
    figure, axes = plt.subplots(rows, 4, figsize=(14, 2.2 * rows), squeeze=False)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.3 / (2.2 * rows), top=1 - 0.3 / (2.2 * rows), wspace=0.2, hspace=0.4)
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


def fill_card(flow: ProvenanceFlow, stage: str, gallery: str, limit: int = 24) -> None:
    """The card of train or evaluate: metrics, curves, and (image, prompt, thinking)."""
    from metaflow.cards import Image, Markdown, Table

    item = str(flow.item)
    folder = folder_of(stage, item)
    run = getattr(flow, "mlflow_run", "unknown")
    current.card.append(Markdown(f"# {stage} {item}\n\ncommit {flow.git_commit}, dirty: {flow.git_dirty}; MLflow run {run}"))
    if stage == "train" and (folder / "curves.csv").is_file():
        current.card.append(Image.from_matplotlib(curves_figure(folder / "curves.csv")))
    rows = gallery_rows(folder / gallery, limit)
    if rows:
        current.card.append(Table(rows, headers=["image", "prompt", "thinking", "score"]))
    metrics = flow.metrics or {}
    current.card.append(Table([[key, f"{value:.6g}"] for key, value in sorted(metrics.items())], headers=["metric", "value"]))
