"""The whole graph as one Metaflow flow, and a stage on two machines: rehearsed on this one, with moto's S3 between."""

from __future__ import annotations

import re

import pytest
from moto_cloud import cloud
from pipeline_copy import make_copy, run_in
from rehearsal import lock_of, start, without_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The main job and the experiments' report at scale smoke, run here by DVC, with two processes a stage."""
    folder = make_copy(tmp_path_factory.mktemp("whole") / "project")
    path = folder / "params" / "scales" / "smoke.yaml"
    path.write_text(path.read_text().replace("processes: 1", "processes: 2"))
    assert "processes: 2" in path.read_text()
    run_in(folder, "dvc", "repro")
    return folder


def finish(running) -> str:
    """The output of a command that must succeed."""
    output, _ = running.communicate(timeout=900)
    assert running.returncode == 0, output
    return output


def test_the_whole_graph_as_one_flow_leaves_the_same_lock(project, tmp_path):
    folder = without_results(project, tmp_path / "copy")
    with cloud() as env:
        output = finish(start(folder, env, "python", "flows/launch.py", "experiment", "smoke"))
        run = re.search(r"transfer.py fetch smoke (ExperimentFlow/\d+)", output)[1]
        finish(start(folder, env, "python", "flows/transfer.py", "fetch", "smoke", run))
        unknown = start(folder, env, "python", "flows/transfer.py", "fetch", "smoke", "ExperimentFlow/1")
        assert "must be a finished run" in unknown.communicate(timeout=60)[0]
    run_in(folder, "dvc", "commit", "--force")
    assert lock_of(folder) == lock_of(project)


def test_two_machines_leave_the_lock_of_one(project, tmp_path):
    """@parallel starts two nodes with one process each, which meet over gloo."""
    folder = without_results(project, tmp_path / "copy", remote={"nodes": 2})
    with cloud() as env:
        output = finish(start(folder, env, "dvc", "repro", "train@smoke-unigrpo-0", "evaluate@smoke-sft"))
    assert "ParallelUBF" not in output
    here, there = lock_of(project), lock_of(folder)
    assert set(there) == {"curate@smoke", "base@smoke", "sft@smoke", "train@smoke-unigrpo-0", "evaluate@smoke-sft"}
    assert there == {name: here[name] for name in there}


def test_the_whole_graph_refuses_several_machines_for_a_base_from_scratch(project, tmp_path):
    folder = without_results(project, tmp_path / "copy", remote={"nodes": 2})
    with cloud() as env:
        output, _ = start(folder, env, "python", "flows/launch.py", "experiment", "smoke").communicate(timeout=60)
    assert "stage by stage" in output
