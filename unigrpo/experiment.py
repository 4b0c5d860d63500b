"""The list of trainings and evaluations that dvc.yaml expands, written from the sets of params/sets.yaml.

A foreach over a dict can hold ragged arms where a matrix is a full product. DVC cannot fan in over such a dict, so the
inputs of the experiments' report are written into dvc.yaml, between two marks, by the same command.

Scorers and rewards that a stage reaches by name are not in its import closure (unigrpo/closure.py), or every edit of them would
make every stage stale.
Where params name them, `scorers` of an item is a digest of their code, which dvc.yaml has the stage depend on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unigrpo.closure import files_digest, module_files
from unigrpo.config import Config, load_config, read_yaml
from unigrpo.digests import sha256_json
from unigrpo.schema import SIZED_REWARD
from unigrpo.schema_benchmarks import SHAPES
from unigrpo.stages import CELLS, EXPERIMENT, SETS, report_inputs

HEADER = """\
# The trainings and evaluations that dvc.yaml expands. Written by
#   unigrpo experiment write {arguments}
# which also writes the marked list of dvc.yaml. Edit params/runs.yaml, params/sets.yaml and write again.
"""
OPEN, CLOSE = "# >>> unigrpo experiment write: ", "# <<<"


@dataclass(frozen=True)
class RunSet:
    """Runs that are trained with the same seeds and evaluated in the same cells."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: str = CELLS[0]

    def arms(self) -> Iterator[tuple[str, int]]:
        """(run, seed), seed after seed, so that what is compared is there early."""
        yield from ((run, seed) for seed in self.seeds for run in self.runs)


@dataclass(frozen=True)
class Request:
    """What `unigrpo experiment write` was asked for: its arguments, and the sets that they mean."""

    scales: tuple[str, ...]
    sets: tuple[RunSet, ...]
    arguments: str

    def arms(self) -> dict[tuple[str, int], str]:
        """(run, seed) -> cells, every arm where it comes first; the most of them where several sets have it."""
        found: dict[tuple[str, int], str] = {}
        for part in self.sets:
            for arm in part.arms():
                found[arm] = min(found.get(arm, part.cells), part.cells, key=CELLS.index)
        return found


def read_sets(root: Path, names: Sequence[str] | None = None) -> tuple[RunSet, ...]:
    """Sets of params/sets.yaml, all of them or those named, in the file's order. Raises ValueError naming what is wrong."""
    path = root / SETS
    content = read_yaml(path)
    if unknown := sorted(set(names or ()) - set(content)):
        raise ValueError(f"set must be one of {list(content)}, the entries of {path}, got {unknown}")
    found = []
    for name, item in content.items():
        if not isinstance(item, dict) or set(item) != {"runs", "seeds", "cells"} or item["cells"] not in CELLS:
            raise ValueError(f"{name} of {path} must hold runs, seeds and cells (one of {list(CELLS)}), got {item!r}")
        if names is None or name in names:
            found.append(RunSet(tuple(map(str, item["runs"])), tuple(map(int, item["seeds"])), item["cells"]))
    return tuple(found)


def make_request(root: Path, scales: Sequence[str], *, sets: Sequence[str] | None = None, runs: Sequence[str] | None = None,
                 seeds: Sequence[int] | None = None) -> Request:
    """What the command line says: sets of params/sets.yaml, all of them by default; or runs x seeds in all cells.

    Raises: ValueError for an unknown scale, set or run, or a seed below 0, listing the choices.
    """
    arguments = ["--scale", *scales]
    if runs is None and seeds is None:
        parts = read_sets(root, sets)
        arguments += ["--set", *sets] if sets else []
    else:
        if sets:
            raise ValueError("either --set, or --run with --seed: a set has seeds of its own")
        known = list(read_yaml(root / "params" / "runs.yaml"))
        parts = (RunSet(tuple(known if runs is None else runs), tuple((0, 1, 2) if seeds is None else seeds)),)
        arguments += ["--run", *parts[0].runs, "--seed", *map(str, parts[0].seeds)]
    known_scales = sorted(path.stem for path in (root / "params" / "scales").glob("*.yaml"))
    known_runs = sorted(read_yaml(root / "params" / "runs.yaml"))
    given_runs = [run for part in parts for run in part.runs]
    for what, given, choices in (("scale", scales, known_scales), ("run", given_runs, known_runs)):
        if unknown := sorted(set(given) - set(choices)):
            raise ValueError(f"{what} must be one of {choices}, got {unknown}")
    for part in parts:
        if not part.seeds or min(part.seeds) < 0:
            raise ValueError(f"seeds must be whole numbers from 0, got {list(part.seeds)}")
    return Request(tuple(scales), parts, " ".join(arguments))


def expand(root: Path, request: Request) -> dict[str, Any]:
    """The content of params/experiment.yaml: every arm, and an evaluation of every checkpoint."""
    trainings, evaluations = {}, {}
    for scale in request.scales:
        scorers = evaluation_scorers(root, load_config(scale, root=root))
        for stage in ("base", "sft"):
            evaluations[f"{scale}-{stage}"] = {"scale": scale, "checkpoint": stage, "cells": CELLS[0], "scorers": scorers}
        rewards: dict[str, str] = {}
        for (run, seed), cells in request.arms().items():
            if run not in rewards:
                rewards[run] = training_scorers(root, load_config(scale, run=run, root=root))
            name = f"{scale}-{run}-{seed}"
            trainings[name] = {"scale": scale, "run": run, "seed": seed, "scorers": rewards[run]}
            evaluations[name] = {"scale": scale, "checkpoint": f"{run}/{seed}", "cells": cells, "scorers": scorers}
    return {"scales": list(request.scales), "trainings": trainings, "evaluations": evaluations,
            "reports": {f"{scale}-main": {"scale": scale} for scale in request.scales}}


def evaluation_scorers(root: Path, config: Config) -> str:
    """Digest of the scorers that an evaluation reaches by name; "none" where it judges by the shapes world's verifier alone."""
    if set(config.evaluate.benchmarks) == {SHAPES}:
        return files_digest(root, ())
    return files_digest(root, module_files(root, "unigrpo.stages.benchmarks"))


def training_scorers(root: Path, config: Config) -> str:
    """Digest of what a training reaches by name, rewards and supervised training; "none" where all is built in.

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
    if config.train.method != "sft":
        return files_digest(root, files)
    files |= set(module_files(root, "unigrpo.stages.longer"))  # and its section of params, which no other training reads
    return sha256_json([files_digest(root, files), config.sft.model_dump(mode="json")])[:16]


def words(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    for part in [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from words(part)


def render(root: Path, request: Request) -> str:
    """params/experiment.yaml as text, one item a line."""
    content = expand(root, request)
    lines = [HEADER.format(arguments=request.arguments), f"scales: {flow_style(content['scales'])}"]
    for key in ("trainings", "evaluations", "reports"):
        lines += ["", f"{key}:", *(f"  {name}: {flow_style(item)}" for name, item in content[key].items())]
    return "\n".join(lines) + "\n"


def flow_style(value: Any) -> str:
    """One value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()


def experiments_deps(request: Request) -> list[str]:
    """The inputs of the experiments' report, as dvc.yaml names them."""
    return list(report_inputs("${item}", ["base", "sft", *(f"{run}/{seed}" for run, seed in request.arms())]))


def replace_list(text: str, label: str, items: Sequence[str]) -> str:
    """dvc.yaml with the list after the mark `label` replaced. Raises ValueError unless the mark is there once."""
    lines = text.splitlines()
    opens = [i for i, line in enumerate(lines) if line.strip() == OPEN + label]
    close = next((i for i, line in enumerate(lines) if opens and i > opens[0] and line.strip() == CLOSE), None)
    if len(opens) != 1 or close is None:
        raise ValueError(f"dvc.yaml must hold one line {OPEN + label!r} and after it one {CLOSE!r}, got {len(opens)}")
    indent = " " * (len(lines[opens[0]]) - len(lines[opens[0]].lstrip()))
    return "\n".join([*lines[:opens[0] + 1], *(f"{indent}- {item}" for item in items), *lines[close:]]) + "\n"


def render_graph(text: str, request: Request) -> str:
    """dvc.yaml with its marked list as it should be."""
    return replace_list(text, "inputs of experiments", experiments_deps(request))


def write(root: Path, request: Request) -> list[Path]:
    """Write params/experiment.yaml and the marked list of dvc.yaml. Returns the files that changed."""
    dvc_yaml = root / "dvc.yaml"
    new = {root / EXPERIMENT: render(root, request),
           dvc_yaml: render_graph(dvc_yaml.read_text(encoding="utf-8"), request)}
    changed = [path for path, text in new.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(new[path], encoding="utf-8")
    return changed


def written_request(root: Path, text: str) -> Request:
    """The request in the header of a params/experiment.yaml. Raises ValueError where there is none."""
    if (found := re.search(r"^#   unigrpo experiment write (.+)$", text, re.MULTILINE)) is None:
        raise ValueError(f"{EXPERIMENT} must begin with the command that wrote it; `unigrpo experiment write` writes it")
    words: dict[str, list[str]] = {}
    for word in found[1].split():
        if word.startswith("--"):
            key = word.removeprefix("--")
            words[key] = []
        else:
            words[key].append(word)
    return make_request(root, words["scale"], sets=words.get("set"), runs=words.get("run"),
                        seeds=[int(seed) for seed in words["seed"]] if "seed" in words else None)
