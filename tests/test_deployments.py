"""The whole graph as a definition for Argo Workflows and AWS Step Functions, compiled offline: what each step asks for."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml
from flow_scripts import ROOT
from moto_cloud import cloud, make_queue
from pipeline_copy import copy_environment, make_copy

IMAGE = "registry.example/unigrpo:1"
STAGE_STEPS = {"sft", "train", "evaluate", "evaluate_given"}   # that compute; a base that is imported is only linked


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """A function: the whole graph of bagel_7b compiled for a cluster, offline; what Metaflow printed as JSON."""
    folder = make_copy(tmp_path_factory.mktemp("deployment") / "copy", scale="bagel_7b", seeds=(0, 1))
    path = folder / "params" / "scales" / "bagel_7b.yaml"
    before = yaml.safe_load(path.read_text())

    with cloud() as env:
        for name in ("gpus", "cpus"):
            make_queue(env, name)

        def compiled(deployer: str, nodes: int = 1):
            remote = {"image": IMAGE, "queue": "gpus", "small_queue": "cpus", "nodes": nodes, "node_selector": {"gpu": "h200"},
                      "labels": {"queue": "research"}, "secrets": ["tokens"] if deployer == "argo-workflows" else []}
            compute = before["compute"] | {"processes": 8 * nodes, "remote": remote}
            path.write_text(yaml.safe_dump(before | {"compute": compute}))
            line = [sys.executable, "flows/launch.py", "experiment", "bagel_7b", deployer, "create", "--only-json"]
            done = subprocess.run(line, cwd=folder, env=copy_environment(PYTHONPATH=str(folder), **env), text=True,
                                  stdin=subprocess.DEVNULL, capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout)

        yield compiled


def test_argo_is_asked_for_eight_gpus_where_they_compute_and_none_elsewhere(deployment):
    definition = deployment("argo-workflows")
    steps = {part["name"].replace("-", "_"): part for part in definition["spec"]["templates"]
             if part.get("container") and part["name"] != "error-msg-capture-hook"}
    assert set(steps) > STAGE_STEPS | {"start", "curate", "base", "prepared", "trainings", "report", "end"}
    for name, part in steps.items():
        container = part["container"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert (part["retryStrategy"]["limit"], part["activeDeadlineSeconds"]) == (3, 48 * 3600), name
        assert container["image"] == IMAGE
        assert container["envFrom"][0]["secretRef"]["name"] == "tokens"
        assert part["metadata"]["labels"]["queue"] == "research"
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert (variables["UNIGRPO_BACKEND"], variables["UNIGRPO_SCALE"]) == ("kubernetes", "bagel_7b")
        if name in STAGE_STEPS:
            assert limits == {"nvidia.com/gpu": "8"}, name
            assert (requests["cpu"], requests["memory"], requests["ephemeral-storage"]) == ("96.0", "1000000.0M", "512000.0M")
            assert part["nodeSelector"] == {"gpu": "h200"}
            assert {"name": "dhsm", "emptyDir": {"medium": "Memory", "sizeLimit": "65536Mi"}} in part["volumes"]
        else:
            assert limits == {}, name
            assert (requests["cpu"], requests["memory"]) == ("4.0", "16000.0M")
            assert not part["nodeSelector"]
    parameters = json.loads(definition["metadata"]["annotations"]["metaflow/parameters"])
    assert len(json.loads(parameters["git_commit"]["value"])) == 40  # provenance is passed in


def test_argo_starts_a_group_of_machines_where_params_say_so(deployment):
    parts = deployment("argo-workflows", nodes=2)["spec"]["templates"]
    groups = [part for part in parts if "JobSet" in json.dumps(part.get("resource") or {})]
    assert {part["name"].replace("-", "_") for part in groups} == STAGE_STEPS
    for part in groups:
        manifest = part["resource"]["manifest"]
        assert "nvidia.com/gpu" in manifest
        assert IMAGE in manifest


def batch_steps(states: dict) -> dict:
    """Every task of a state machine, however deep."""
    found = {}
    for name, state in states.items():
        if state["Type"] == "Task" and "batch" in state["Resource"]:
            found[name] = state["Parameters"]
        for branch in [*state.get("Branches", []), *([state["Iterator"]] if "Iterator" in state else [])]:
            found |= batch_steps(branch["States"])
    return found


def test_step_functions_ask_batch_for_eight_gpus_where_they_compute_and_none_elsewhere(deployment):
    steps = batch_steps(deployment("step-functions")["States"])
    assert set(steps) > STAGE_STEPS | {"start", "curate", "base", "prepared", "trainings", "report", "end"}
    for name, parameters in steps.items():
        wants = {item["Type"]: item["Value"] for item in parameters["ContainerOverrides"]["ResourceRequirements"]}
        variables = {item["Name"]: item.get("Value") for item in parameters["ContainerOverrides"]["Environment"]}
        assert (variables["UNIGRPO_BACKEND"], variables["UNIGRPO_SCALE"]) == ("batch", "bagel_7b")
        assert (parameters["RetryStrategy"]["Attempts"], parameters["Timeout"]["AttemptDurationSeconds"]) == (4, 48 * 3600)
        if name in STAGE_STEPS:
            assert (wants, parameters["JobQueue"]) == ({"GPU": "8", "VCPU": "96", "MEMORY": "1000000"}, "gpus"), name
        else:
            assert (wants, parameters["JobQueue"]) == ({"VCPU": "4", "MEMORY": "16000"}, "cpus"), name


def test_a_container_installs_what_the_constraints_say():
    """The recipe takes the packages of pyproject.toml as constraints.txt pins them, and no code: that travels with the step."""
    recipe = (ROOT / "Dockerfile").read_text()
    assert "pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r requirements.txt" in recipe
    copied = [name for line in recipe.splitlines() if line.startswith("COPY") for name in line.split()[1:-1]]
    assert set(copied) == {"constraints.txt", "pyproject.toml"}
    assert (ROOT / ".dockerignore").read_text().split() == ["*", "!constraints.txt", "!pyproject.toml"]
    assert recipe.index("USER unigrpo") > recipe.index("pip install")  # not root
    script = re.search(r"python -c '(.+?)' > requirements.txt", recipe)[1]
    listed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in listed}
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"torch", "metaflow", "kubernetes", "boto3", "scikit-image"} <= names <= pinned
