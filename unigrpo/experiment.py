"""The list of trainings and evaluations that dvc.yaml expands, written from runs x seeds.

A foreach over a dict can hold ragged arms where a matrix is a full product. DVC cannot fan in over such a dict, so the
inputs of the experiments' report are written into dvc.yaml, between two marks, by the same command; and so are the modules
each stage depends on.

Scorers and rewards that a stage reaches by name are in none of these lists, or every edit of them would make every stage stale.
Where params name them, `scorers` of an item is a digest of their code, which dvc.yaml has the stage depend on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unigrpo.closure import files_digest, module_files, stage_files
from unigrpo.config import Config, load_config
from unigrpo.schema import SIZED_REWARD
from unigrpo.schema_benchmarks import SHAPES
from unigrpo.stages import EXPERIMENT, STAGES, report_inputs

HEADER = """\
# The trainings and evaluations that dvc.yaml expands. Written by
#   unigrpo experiment write {arguments}
# which also writes the marked lists of dvc.yaml. Edit params/runs.yaml and write again.
"""
OPEN, CLOSE = "# >>> unigrpo experiment write: ", "# <<<"


def expand(root: Path, scales: Sequence[str], runs: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """The content of params/experiment.yaml: every run at every seed, and an evaluation of every checkpoint."""
    trainings, evaluations = {}, {}
    for scale in scales:
        scorers = evaluation_scorers(root, load_config(scale, root=root))
        for stage in ("base", "sft"):
            evaluations[f"{scale}-{stage}"] = {"scale": scale, "checkpoint": stage, "scorers": scorers}
        for run in runs:
            rewards = training_scorers(root, load_config(scale, run=run, root=root))
            for seed in seeds:
                trainings[f"{scale}-{run}-{seed}"] = {"scale": scale, "run": run, "seed": seed, "scorers": rewards}
                evaluations[f"{scale}-{run}-{seed}"] = {"scale": scale, "checkpoint": f"{run}/{seed}", "scorers": scorers}
    return {"scales": list(scales), "trainings": trainings, "evaluations": evaluations,
            "reports": {f"{scale}-main": {"scale": scale} for scale in scales}}


def evaluation_scorers(root: Path, config: Config) -> str:
    """Digest of the scorers that an evaluation reaches by name; "none" where it judges by the shapes world's verifier alone."""
    if set(config.evaluate.benchmarks) == {SHAPES}:
        return files_digest(root, ())
    return files_digest(root, module_files(root, "unigrpo.stages.benchmarks"))


def training_scorers(root: Path, config: Config) -> str:
    """Digest of the rewards that a training reaches by name; "none" where all are built in.

    Names are looked for in the whole section `reward`, as a mixture names its parts in its options. Of a reward of the user's,
    module:name, the module's file counts where it lies in the project; what it imports and what is installed do not.
    """
    from unigrpo.rewards.custom import SPECIFICATION
    from unigrpo.rewards.registry import FACTORIES

    files: set[str] = set()
    for word in words(config.reward.model_dump(mode="json")):
        name = sized[1] if (sized := re.fullmatch(SIZED_REWARD, word)) else word
        if name in FACTORIES:
            files |= set(module_files(root, FACTORIES[name].partition(":")[0]))
        elif SPECIFICATION.fullmatch(word):
            path = Path(*word.partition(":")[0].split("."))
            files |= {file.as_posix() for file in (path.with_suffix(".py"), path / "__init__.py") if (root / file).is_file()}
    return files_digest(root, files)


def words(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    for part in [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from words(part)


def render(root: Path, scales: Sequence[str], runs: Sequence[str], seeds: Sequence[int]) -> str:
    """params/experiment.yaml as text, one item a line."""
    content = expand(root, scales, runs, seeds)
    arguments = " ".join(["--scale", *scales, "--run", *runs, "--seed", *map(str, seeds)])
    lines = [HEADER.format(arguments=arguments), f"scales: {flow_style(content['scales'])}"]
    for key in ("trainings", "evaluations", "reports"):
        lines += ["", f"{key}:", *(f"  {name}: {flow_style(item)}" for name, item in content[key].items())]
    return "\n".join(lines) + "\n"


def flow_style(value: Any) -> str:
    """One value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()


def experiments_deps(runs: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The inputs of the experiments' report, as dvc.yaml names them."""
    checkpoints = ["base", "sft", *(f"{run}/{seed}" for run in runs for seed in seeds)]
    return list(report_inputs("${item}", checkpoints))


def replace_list(text: str, label: str, items: Sequence[str]) -> str:
    """dvc.yaml with the list after the mark `label` replaced. Raises ValueError unless the mark is there once."""
    lines = text.splitlines()
    opens = [i for i, line in enumerate(lines) if line.strip() == OPEN + label]
    close = next((i for i, line in enumerate(lines) if opens and i > opens[0] and line.strip() == CLOSE), None)
    if len(opens) != 1 or close is None:
        raise ValueError(f"dvc.yaml must hold one line {OPEN + label!r} and after it one {CLOSE!r}, got {len(opens)}")
    indent = " " * (len(lines[opens[0]]) - len(lines[opens[0]].lstrip()))
    return "\n".join([*lines[:opens[0] + 1], *(f"{indent}- {item}" for item in items), *lines[close:]]) + "\n"


def render_graph(root: Path, text: str, runs: Sequence[str], seeds: Sequence[int]) -> str:
    """dvc.yaml with all its marked lists as they should be."""
    for stage in STAGES:
        text = replace_list(text, f"code of {stage}", stage_files(root, stage))
    text = replace_list(text, "code of experiments", stage_files(root, "report"))
    return replace_list(text, "inputs of experiments", experiments_deps(runs, seeds))


def write(root: Path, scales: Sequence[str], runs: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Write params/experiment.yaml and the marked lines of dvc.yaml. Returns the files that changed.

    Raises: ValueError for an unknown scale or run, or a seed below 0, listing the choices.
    """
    known_scales = sorted(path.stem for path in (root / "params" / "scales").glob("*.yaml"))
    known_runs = sorted(yaml.safe_load((root / "params" / "runs.yaml").read_text(encoding="utf-8")))
    for what, given, known in (("scale", scales, known_scales), ("run", runs, known_runs)):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{what} must be one of {known}, got {unknown}")
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds must be whole numbers from 0, got {list(seeds)}")
    dvc_yaml = root / "dvc.yaml"
    new = {root / EXPERIMENT: render(root, scales, runs, seeds),
           dvc_yaml: render_graph(root, dvc_yaml.read_text(encoding="utf-8"), runs, seeds)}
    changed = [path for path, text in new.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(new[path], encoding="utf-8")
    return changed


def written_arguments(experiment: dict[str, Any]) -> tuple[list[str], list[str], list[int]]:
    """The (scales, runs, seeds) that a params/experiment.yaml was written from."""
    items = list(experiment["trainings"].values())
    return (list(experiment["scales"]), list(dict.fromkeys(str(item["run"]) for item in items)),
            list(dict.fromkeys(int(item["seed"]) for item in items)))
