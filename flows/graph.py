"""What the flow of the whole graph does between stages: names of branches, and one manifest of many."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import places
import remote
from common import free_port
from metaflow import Parameter, current
from store import Store

from unigrpo.stages import MAIN_RUN, read_experiment

HANDED_ON = ("scale", "item", "nodes", "package", "port", "training_names", "given_names", "report_names")


class GraphParameters:
    """Parameters of the whole graph."""

    manifest = Parameter("manifest", default=os.environ.get("UNIGRPO_MANIFEST", ""),
                         help="of the files that params name, as `flows/transfer.py send` stored them")


def plan(flow: Any) -> None:
    """The branches of the scale being launched; the files that params name."""
    flow.scale = flow.item = os.environ["UNIGRPO_SCALE"]
    names = branches(flow.scale)
    flow.training_names, flow.given_names, flow.report_names = names
    flow.nodes, flow.package = places.nodes(), remote.send_package(flow)
    flow.port = free_port() if flow.package else None
    flow.files = remote.read_manifest(Store.of(flow), flow.manifest)


def branches(scale: str) -> tuple[list[str], list[str], list[str]]:
    """(trainings, evaluations of base and sft, reports) of a scale. Raises ValueError where params list too little."""
    experiment = read_experiment(places.ROOT)
    of_scale = {part: {name: item for name, item in experiment[part].items() if item["scale"] == scale}
                for part in ("trainings", "evaluations")}
    trainings = {name: f"{item['run']}/{item['seed']}" for name, item in of_scale["trainings"].items()}
    evaluations = {name: str(item["checkpoint"]) for name, item in of_scale["evaluations"].items()}
    missing = [name for name, checkpoint in trainings.items() if evaluations.get(name) != checkpoint]
    given = [name for name, checkpoint in evaluations.items() if checkpoint in ("base", "sft")]
    if missing or not trainings or not given:
        raise ValueError(f"params/experiment.yaml must list trainings of scale {scale}, an evaluation of each under its name, "
                         f"and those of base and sft; got trainings {sorted(trainings)}, evaluations {sorted(evaluations)}; "
                         f"`unigrpo experiment write --scale {scale} ...` writes it")
    main = [f"{scale}-main"] if MAIN_RUN in trainings.values() else []
    return list(trainings), given, [*main, f"{scale}-experiments"]


def begin_branch(flow: Any) -> None:
    """The item of a branch is what the foreach gave it."""
    flow.item = flow.input
    flow.port = free_port() if flow.package else None


def merge_files(flow: Any, inputs: Iterable[Any]) -> None:
    """One manifest of the files of all branches, and what every step hands on."""
    parts = list(inputs)
    flow.files = {name: content for part in parts for name, content in part.files.items()}
    for name in HANDED_ON:
        setattr(flow, name, getattr(parts[0], name))
    if len({part.item for part in parts}) > 1:  # the end of several branches
        flow.item = flow.scale


def publish(flow: Any) -> None:
    """Keep the manifest under the run's name, from where it can be brought to a workspace."""
    run = f"{current.flow_name}/{current.run_id}"
    Store.of(flow).put_json(f"runs/{run}.json", flow.files)
    print(f"{len(flow.files)} files; `python flows/transfer.py fetch {flow.scale} {run}` fetches them", flush=True)
