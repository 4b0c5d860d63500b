"""Names, the graph, imports and the launcher: everything around the stages."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flow_scripts import ROOT, load

from unigrpo.closure import CODE, closure, imports
from unigrpo.config import load_config, read_yaml
from unigrpo.experiment import (
    evaluation_scorers,
    expand,
    render,
    render_graph,
    replace_list,
    training_scorers,
    words,
    written_request,
)
from unigrpo.stages import STAGES, parse_name, read_experiment, report_inputs

SECTIONS = ("world", "curate", "model", "base", "sft", "rollout", "reward", "credit", "objective", "optim", "train", "evaluate",
            "report", "compute")


@pytest.fixture(scope="module")
def launch():
    return load(ROOT / "flows" / "launch.py")


# ---------------------------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize(("stage", "name", "arguments", "output"), [
    ("curate", "tiny", {"scale": "tiny"}, "artifacts/tiny/prompts"),
    ("base", "smoke", {"scale": "smoke"}, "artifacts/smoke/base"),
    ("sft", "tiny", {"scale": "tiny"}, "artifacts/tiny/sft"),
    ("train", "tiny-unigrpo-1", {"scale": "tiny", "run": "unigrpo", "seed": 1}, "artifacts/tiny/unigrpo/1"),
    ("evaluate", "tiny-sft", {"scale": "tiny", "checkpoint": "sft", "cells": "all"}, "artifacts/tiny/sft"),
    ("evaluate", "tiny-unigrpo-0", {"scale": "tiny", "checkpoint": "unigrpo/0", "cells": "all"}, "artifacts/tiny/unigrpo/0"),
    ("evaluate", "tiny-short-10", {"scale": "tiny", "checkpoint": "short/10", "cells": "headline"}, "artifacts/tiny/short/10"),
    ("report", "tiny-main", {"scale": "tiny", "which": "main"}, "artifacts/tiny/report"),
    ("report", "tiny-experiments", {"scale": "tiny", "which": "experiments"}, "artifacts/tiny/experiments"),
])
def test_a_name_becomes_the_arguments_of_a_stage_function(stage, name, arguments, output):
    job = parse_name(stage, name, ROOT)
    assert (job.arguments, job.output) == (arguments, output)


@pytest.mark.parametrize(("stage", "name", "wanted"), [
    ("traim", "tiny", "curate.*base.*sft"), ("base", "tyni", "smoke.*tiny"), ("train", "tiny-unigrpo-9", "tiny-unigrpo-0"),
    ("evaluate", "tiny-rl", "tiny-base"), ("report", "tiny", "main.*experiments"),
])
def test_an_unknown_name_lists_the_choices(stage, name, wanted):
    with pytest.raises(ValueError, match=wanted):
        parse_name(stage, name, ROOT)


# ------------------------------------------------------------------------------------------------------------ the graph

def test_experiment_yaml_is_what_the_command_writes():
    text = (ROOT / "params" / "experiment.yaml").read_text()
    request = written_request(ROOT, text)
    assert read_experiment(ROOT) == expand(ROOT, request)
    assert text == render(ROOT, request)
    assert {run for part in request.sets for run in part.runs} <= set(read_yaml(ROOT / "params" / "runs.yaml"))


def test_dvc_yaml_lists_what_the_command_writes():
    request = written_request(ROOT, (ROOT / "params" / "experiment.yaml").read_text())
    text = (ROOT / "dvc.yaml").read_text()
    assert render_graph(text, request) == text, "dvc.yaml is behind: run `unigrpo experiment write`, see its header"


def with_rewards(**weights):
    config = load_config("smoke", root=ROOT)
    return config.model_copy(update={"reward": config.reward.model_copy(update={"weights": weights})})


def test_scorers_that_params_name_are_tracked_by_digest():
    """Of an evaluation the benchmarks' closure, of a training its rewards' by name; none where the shapes world is enough."""
    shapes = load_config("smoke", root=ROOT)
    assert evaluation_scorers(ROOT, shapes) == training_scorers(ROOT, shapes) == "none"
    assert {item["scorers"] for part in ("trainings", "evaluations") for item in read_experiment(ROOT)[part].values()
            if item["scale"] == "tiny" and item.get("run") != "sft_longer"} == {"none"}
    longer = load_config("smoke", run="sft_longer", root=ROOT)
    assert re.fullmatch("[0-9a-f]{16}", training_scorers(ROOT, longer))
    both = shapes.model_copy(update={"evaluate": shapes.evaluate.model_copy(update={"benchmarks": ("shapes", "geneval")})})
    digest = evaluation_scorers(ROOT, both)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert digest == evaluation_scorers(ROOT, load_config("bagel_7b", root=ROOT))
    found = [training_scorers(ROOT, with_rewards(**{name: 1.0})) for name in (
        "geneval_soft_mask2former_hf", "pickscore", "shapes_exact", "geneval_soft_mask2former_hf_512px")]
    assert found[2] == "none"
    assert found[0] == found[3] != found[1]


def test_a_digest_follows_the_files_it_is_of(tmp_path):
    """A reward of the user's by its own file; names in a mixture's options count too, and what is installed does not."""
    shutil.copytree(ROOT / "unigrpo", tmp_path / "unigrpo", ignore=shutil.ignore_patterns("__pycache__"))
    scorer = tmp_path / "unigrpo" / "evaluation" / "geneval_color.py"
    bagel = load_config("bagel_7b", root=ROOT)
    before = evaluation_scorers(tmp_path, bagel)
    scorer.write_text(scorer.read_text() + "# another\n")
    assert evaluation_scorers(tmp_path, bagel) != before
    own = with_rewards(**{"my_rewards:brightness": 1.0})
    assert training_scorers(tmp_path, own) == training_scorers(tmp_path, with_rewards(**{"os:getcwd": 1.0})) == "none"
    (tmp_path / "my_rewards.py").write_text("first")
    first = training_scorers(tmp_path, own)
    (tmp_path / "my_rewards.py").write_text("second")
    assert "none" != first != training_scorers(tmp_path, own)
    section = {"weights": {"mixture": 1.0}, "options": {"mixture": {"weights": {"clip_score": 2}, "list": ["x:y"]}}}
    assert {"mixture", "clip_score", "x:y"} <= set(words(section))


def test_writing_refuses_a_graph_without_marks():
    with pytest.raises(ValueError, match="got 0"):
        replace_list("stages: {}\n", "inputs of experiments", ["a"])


@pytest.mark.parametrize("stage", STAGES)
def test_params_in_dvc_yaml_are_the_sections_a_stage_reads(stage):
    """Every `config.<section>` in the modules that take the whole config is among the stage's params."""
    params = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["do"]["params"]
    listed = {str(key).split(".")[0] for item in params for keys in item.values() for key in keys}
    own = {f"unigrpo.stages.{stage}"} | ({"unigrpo.rollout", "unigrpo.train", "unigrpo.update", "unigrpo.mismatch"}
                                        if stage == "train" else {"unigrpo.evaluate"} if stage == "evaluate" else set())
    if stage == "report":
        own |= {module for module in closure(ROOT, "unigrpo.stages.report") if module.startswith("unigrpo.report")}
    files = [ROOT / (name.replace(".", "/") + ".py") for name in own]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    read = set(re.findall(rf"\bconfig\.({'|'.join(SECTIONS)})\b", text))
    assert read <= listed


def test_an_evaluation_depends_on_the_keys_of_rollout_that_it_reads():
    """Not on the group size: another one makes no evaluation of base and sft stale. A scale's keys count all."""
    params = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["evaluate"]["do"]["params"]
    listed = {key.removeprefix("rollout.") for key in params[0]["params/base.yaml"] if key.startswith("rollout.")}
    texts = [(ROOT / "unigrpo" / f"{name}.py").read_text() for name in ("evaluate", "stages/evaluate", "stages/loading",
                                                                        "stages/session", "stages/benchmarks")]
    assert set(re.findall(r"\bconfig\.rollout\.(\w+)", "".join(texts))) == listed
    assert not re.search(r"\bconfig\.rollout\b[^.]", "".join(texts))


def test_main_report_inputs_are_in_dvc_yaml():
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]["do"]["deps"]
    wanted = report_inputs("${item.scale}", ["base", "sft", "unigrpo/0"])
    assert set(wanted) == {dep for dep in deps if dep.startswith("artifacts/") and not dep.startswith(CODE)}


def test_curate_depends_on_the_benchmarks_digests():
    """They are data beside the code: the firewall refuses by them."""
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["curate"]["do"]["deps"]
    assert {"unigrpo/prompts/digests", "unigrpo/prompts/official.sha256"} <= set(deps)


def test_no_out_is_left_out_of_the_cache():
    """`cache: false` under outs switches off the run cache of the whole stage."""
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        assert name == "code" or all(isinstance(out, str) for out in stage["do"]["outs"])


# -------------------------------------------------------------------------------------------------------------- imports

LEVELS = {0: {"types", "config", "schema", "schema_benchmarks", "schema_compute", "schema_model", "schema_rl", "seeding",
              "digests", "distributed", "courier", "stages"},  # `stages`: names only
          1: {"sealed", "tensorfiles", "policy", "muon", "advantages", "credit", "objectives", "text", "flow"},
          2: {"models", "rewards", "evaluation", "worlds", "prompts"},
          3: {"train", "sft", "rollout", "contexts", "evaluate", "report", "tally", "update", "mismatch", "cost", "checkpoint",
              "adapters", "masters", "sharding", "roofline", "footprint", "stepmodel", "sampling", "images", "interchange",
              "checks"},
          4: {"dvcfiles", "gallery", "links", "progress", "preemption", "resume", "journal", "tracking", "stages.*", "plan",
              "probe", "generate"},
          5: {"arms", "experiment", "closure", "commands", "cli", "__main__"}}


def level(module: str) -> int:
    """Where a module stands; a new one must be given a place."""
    part = "stages.*" if module.startswith("unigrpo.stages.") else module.split(".")[1]
    return next(number for number, names in LEVELS.items() if part in names)


def all_modules() -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for path in sorted((ROOT / "unigrpo").rglob("*.py"))]


@pytest.mark.parametrize("module", [name for name in all_modules() if name != "unigrpo"])
def test_imports_point_one_way(module):
    for name in imports(ROOT, module) - {"unigrpo", module}:
        assert level(name) <= level(module), f"{module} imports {name}, which stands above it"


def top_level_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_tools_stay_in_their_places():
    """metaflow in flows/, mlflow in journal.py and tracking.py, and the training loop is handed its policy and its reward."""
    for path in (ROOT / "unigrpo").rglob("*.py"):
        found = top_level_imports(path)
        assert "metaflow" not in found, path
        assert "mlflow" not in found or path.name in ("journal.py", "tracking.py"), path
        assert "dvc" not in found, path
    for path in (ROOT / "flows").glob("*.py"):
        assert "mlflow" not in top_level_imports(path), path
    reached = {name.split(".")[1] for name in imports(ROOT, "unigrpo.train") if "." in name}
    assert not reached & {"models", "rewards", "rollout", "worlds", "tracking"}


@pytest.mark.parametrize("module", ["advantages", "credit", "objectives", "text", "flow.sde", "flow.schedule", "flow.guidance"])
def test_pure_modules_import_arrays_and_types_only(module):
    path = ROOT / "unigrpo" / (module.replace(".", "/") + ".py")
    assert top_level_imports(path) - set(sys.stdlib_module_names) <= {"torch", "numpy", "unigrpo"}


def test_help_is_quick():
    """The command's --help loads nothing heavy."""
    code = "import sys, unigrpo.cli; unigrpo.cli.parser().format_help(); print([m for m in ('torch', 'mlflow', 'yaml', " \
           "'pydantic', 'numpy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dvc_reads_yaml_in_c():
    """Without it a `dvc repro` that finds nothing to do takes 3.5 s in place of 2.1 s, most of it reading YAML in Python."""
    from ruamel.yaml import YAML

    assert YAML(typ="safe").Parser.__name__ == "CParser", "pip install -c constraints.txt ruamel.yaml.clib"


# ------------------------------------------------------------------------------------------------------------- launcher

def test_the_environment_of_a_stage_does_not_come_from_the_shell(launch):
    config = load_config("smoke", root=ROOT)
    env = launch.environment(config, {"OMP_NUM_THREADS": "64", "PYTHONHASHSEED": "7", "USER": "root", "PATH": "/bin"})
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == str(config.compute.threads)
    assert env["PYTHONHASHSEED"] == "0"
    assert env["MALLOC_MMAP_THRESHOLD_"] == "33554432"
    assert env["GOMP_SPINCOUNT"] == "2000"
    assert env["METAFLOW_USER"] == "unigrpo"  # Metaflow refuses root
    assert launch.environment(config, {"USER": "ada"})["METAFLOW_USER"] == "ada"


def test_a_processor_with_wider_vectors_rounds_like_one_without(launch):
    """The committed lock was made without AVX-512. What the shell says of it does not count."""
    config = load_config("tiny", root=ROOT)
    assert config.compute.instructions == load_config("smoke", root=ROOT).compute.instructions == "avx2"
    env = launch.environment(config, {"PATH": "/bin", "ATEN_CPU_CAPABILITY": "default"})
    code = "import torch; print(torch.backends.cpu.get_cpu_capability()); import numpy._core._multiarray_umath as m; " \
           "print(any(m.__cpu_features__.get(name) for name in ('X86_V4', 'AVX512_SKX')))"
    said = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env, "PATH": os.environ["PATH"]},
                          capture_output=True, text=True, check=True)
    capability, wider = said.stdout.split()
    assert capability in ("AVX2", "DEFAULT", "NO AVX")
    assert wider == "False"
    native = launch.environment(load_config("bagel_7b", root=ROOT), {"PATH": "/bin", "ATEN_CPU_CAPABILITY": "default"})
    assert "ATEN_CPU_CAPABILITY" not in native


def test_a_mistake_ends_the_launcher_in_one_line(launch, monkeypatch, capsys):
    monkeypatch.delenv("UNIGRPO_BACKEND", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert launch.main(["train", "tiny-unigrpo-99"]) == 2
    error = capsys.readouterr().err
    assert "tiny-unigrpo-0" in error
    assert "Traceback" not in error


def test_provenance_is_unknown_without_git_and_never_a_guess(launch, monkeypatch, tmp_path):
    config = load_config("smoke", root=ROOT)
    monkeypatch.setattr(launch, "ROOT", tmp_path)  # no repository here
    monkeypatch.delenv("DVC_STAGE", raising=False)
    found = launch.provenance(parse_name("base", "smoke", ROOT), config)
    assert (found["git_commit"], found["git_dirty"], found["dvc_stage"]) == ("unknown", "unknown", "unknown")
    assert re.fullmatch("[0-9a-f]{64}", found["params_sha256"])


@pytest.mark.parametrize("flow", ["experiment", "experiment_nodes", "nodes", "remote"])
def test_a_step_of_the_whole_graph_calls_one_stage_function(flow):
    """A step that asks for a stage's resources calls that stage, and no other step calls any."""
    tree = ast.parse((ROOT / "flows" / f"{flow}_flow.py").read_text())
    steps = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert steps
    for node in steps:
        text, calls = ast.unparse(node), [call for call in ast.walk(node) if isinstance(call, ast.Call)]
        asked = re.findall(r"@where\('(\w+)'\)", text)
        called = [ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) == "call_stage"]
        assert ast.get_docstring(node), node.name
        if flow in ("nodes", "remote"):  # a flow of any stage
            assert called == ["STAGE"] * (node.name == "work")
        else:
            assert called == [f"'{stage}'" for stage in asked if stage != "small"], node.name
            assert len(asked) == 1, node.name


@pytest.mark.parametrize("stage", STAGES)
def test_a_flow_calls_one_stage_function(stage):
    text = (ROOT / "flows" / f"{stage}_flow.py").read_text()
    assert text.count(f'call_stage(self, "{stage}")') == text.count("call_stage(self") == 1
    assert ("@card" in text) == (stage in ("train", "evaluate"))
    assert ("@resources" in text) == (stage in ("base", "sft", "train", "evaluate"))
    assert text.count("@step") == 1  # every further step starts Python and Metaflow once more, 0.3 s each
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name


def test_a_card_shows_what_moves_and_the_reward_first(launch, monkeypatch, tmp_path):
    """24 small plots of more columns than that; constant ones, and the alphabet, decide nothing."""
    monkeypatch.setenv("METAFLOW_USER", "test")
    monkeypatch.setenv("UNIGRPO_SCALE", "smoke")
    names = ["step", "cost/images", *(f"a{number}" for number in range(30)), "probe/exact", "reward/mean"]
    rows = [[0, 8, *range(32)], [1, 8, *range(1, 33)]]
    (tmp_path / "curves.csv").write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n")
    figure = load(ROOT / "flows" / "common.py").curves_figure(tmp_path / "curves.csv")
    shown = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert shown == ["reward/mean", "probe/exact", *(f"a{number}" for number in range(22))]
