"""T2I-CompBench as a benchmark of the evaluate stage: its prompt files, its file names, its scores by category."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from unigrpo.evaluation.backends.blip import BlipYes
from unigrpo.evaluation.backends.cache import ScoreCache
from unigrpo.evaluation.backends.clip import ClipSimilarity
from unigrpo.evaluation.backends.depth import DptDepth
from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector
from unigrpo.evaluation.backends.owlv2 import Owlv2Detector
from unigrpo.evaluation.benchmark_table import T2I
from unigrpo.evaluation.parses import Parses, load_parses
from unigrpo.evaluation.t2i_compbench import IMAGES_PER_PROMPT
from unigrpo.evaluation.t2i_outputs import SCORERS, file_name, question_id
from unigrpo.evaluation.t2i_prompts import PLURALS_FILE, PromptFiles, find_images, read_prompts
from unigrpo.evaluation.t2i_score import NEEDS, PARSED, Models, Score, score_category, write_score
from unigrpo.prompts.records import record_id
from unigrpo.schema_benchmarks import T2iCompbenchConfig
from unigrpo.stages.benchmark_geneval import missing_lines
from unigrpo.stages.session import Session
from unigrpo.types import PromptRecord

KINDS = {"blip": "yes", "clip": "similarity", "detector": "detector", "depth": "depth"}  # role -> what canaries call it


class Compbench:
    """See `unigrpo.stages.benchmarks.Benchmark`. `read` fills `records`, `load` the models.

    Args:
        settings: the section evaluate.t2i_compbench. root: what its paths are relative to.
    """

    name = T2I

    def __init__(self, settings: T2iCompbenchConfig, root: Path) -> None:
        self.settings, self.root, self.samples = settings, root, settings.images_per_prompt
        self.prompts, self.canary = root / settings.prompts, root / settings.canary
        self.needed = list(dict.fromkeys(role for category in settings.categories for role in NEEDS[category]))
        self.parsed: list[str] = [category for category in settings.categories if category in PARSED]
        self.records: tuple[PromptRecord, ...] = ()
        self.numbers: dict[str, int] = {}
        self.files: dict[str, PromptFiles] = {}
        self.parses: Parses | None = None
        self.models: Models | None = None

    def missing(self) -> list[str]:
        """Files that params name and that are not there, and what the categories need and params do not name."""
        names = [f"{category}_val.txt" for category in self.settings.categories]
        names += ["complex_val_spatial.txt", "complex_val_action.txt"] if "complex" in self.settings.categories else []
        names += [PLURALS_FILE] if "numeracy" in self.settings.categories else []
        lines = [f"evaluate.{self.name}.prompts: there is no file {self.prompts / name}" for name in names
                 if not (self.prompts / name).is_file()]
        wanted = [*self.needed, *(["parses"] if self.parsed else [])]
        lines += [f"evaluate.{self.name}.{key} is null, and {', '.join(self._users(key))} need it" for key in wanted
                  if getattr(self.settings, key) is None]
        paths = {key: self.root / value for key in (*wanted, "labels", "canary")
                 if (value := getattr(self.settings, key)) is not None}
        return lines + missing_lines(self.name, {key: paths.get(key) for key in ("parses", "labels", "canary")},
                                     {key: paths.get(key) for key in self.needed})

    def _users(self, key: str) -> list[str]:
        """The categories that need a model, or the parses."""
        return self.parsed if key == "parses" else [str(name) for name in self.settings.categories if key in NEEDS[name]]

    def read(self) -> None:
        """Prompts and parses. Raises ValueError for files that are not the official ones unless own prompts are meant."""
        records: list[PromptRecord] = []
        try:
            self.files = {category: read_prompts(self.prompts, category, own=self.settings.own_prompts)
                          for category in self.settings.categories}
        except ValueError as error:
            raise ValueError(str(error).replace("--own-prompts", "own_prompts: true")) from error
        for category, files in self.files.items():
            for number, prompt in enumerate(files.prompts[:self.settings.limit]):
                records.append(PromptRecord(record_id(category, prompt, ()), category, prompt, (), source=self.name))
                self.numbers[records[-1].id] = number
        self.records = tuple(records)
        if self.parsed and self.settings.parses is not None:
            path = self.root / self.settings.parses
            self.parses = load_parses(path)
            self.parses.require((record.prompt for record in records if record.tag in self.parsed), path)

    def load(self, device: str, batch: int) -> dict[str, Any]:
        """The models that the categories need; all are known to canaries."""
        labels = None if self.settings.labels is None else read_labels(self.root / self.settings.labels)
        scorers = {role: self._load(role, device, labels) for role in self.needed}
        self.models = Models(**scorers, labels=labels, min_score=self.settings.min_score)
        return {KINDS[role]: scorer for role, scorer in scorers.items()}

    def _load(self, role: str, device: str, labels: frozenset[str] | None) -> Any:
        """One model."""
        settings, folder = self.settings, self.root / getattr(self.settings, role)
        if role == "blip":
            return BlipYes.load(folder, device=device, size=settings.blip_size)
        if role == "clip":
            return ClipSimilarity.load(folder, device=device)
        if role == "depth":
            return DptDepth.load(folder, device=device, size=settings.depth_size)
        if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") != "owlv2":
            return Mask2FormerDetector.load(folder, device=device, shorter=settings.input_size, min_score=settings.min_score)
        if labels is None:
            raise ValueError("the OWLv2 of detector finds what it is asked for: set labels to a file with one label a line")
        return Owlv2Detector.load(folder, sorted(labels), device=device, min_score=settings.min_score)

    def place(self, record: PromptRecord, sample: int) -> str:
        """<category>/samples/<prompt>_<NNNNNN>.png."""
        number = IMAGES_PER_PROMPT * self.numbers[record.id] + sample
        return f"{record.tag}/samples/{file_name(record.prompt, number)}"

    def describe(self, folder: Path) -> None:
        """Nothing: the file names say all."""

    def score(self, folder: Path, cell: tuple[str, str], stage: Session, cache: ScoreCache, batch: int) -> list[dict[str, Any]]:
        """The official files in `<folder>/<the score's name>` of every category; rows of the benchmark table."""
        rows = []
        for category, files in self.files.items():
            images = find_images(folder / category, files, partial=self.settings.allow_partial)
            assert self.models is not None
            score = score_category(files, images, self.models, self.parses, cache, partial=self.settings.allow_partial,
                                   batch=batch, progress=Steps(stage, f"{self.name}, score {folder.name} {category}"))
            write_score(folder / score.record["name"], score)
            rows += self._rows(files, score, cell)
        return rows

    def _rows(self, files: PromptFiles, score: Score, cell: tuple[str, str]) -> list[dict[str, Any]]:
        """One row a prompt."""
        answers: dict[int, list[float]] = defaultdict(list)
        for name, answer in zip(score.file_names, score.answers[SCORERS[files.category]], strict=True):
            answers[question_id(name) // IMAGES_PER_PROMPT].append(float(answer))
        ids = {self.numbers[record.id]: record.id for record in self.records if record.tag == files.category}
        return [{"benchmark": self.name, "score": score.record["name"], "category": files.category, "prompt_id": ids[number],
                 "cfg": cell[0], "thinking": cell[1], "images": len(values), "score_sum": sum(values)}
                for number, values in answers.items()]


class Steps:
    """A progress line for each model that is asked, one after the other."""

    def __init__(self, stage: Session, what: str) -> None:
        self.stage, self.what, self.asked = stage, what, ""

    def __call__(self, name: str, done: int, total: int) -> None:
        """`done` of `total` images are done by the model of this name; the first call of a name tells where it starts."""
        if name != self.asked:
            self.asked = name
            self.stage.begin(f"{self.what} {name}", total, start=done, unit="images")
        elif self.stage.progress is not None:
            self.stage.progress.step(done)


def read_labels(path: Path) -> frozenset[str]:
    """Labels, one a line. Raises ValueError if there are none."""
    labels = frozenset(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not labels:
        raise ValueError(f"labels must be a file with one label a line, and {path} holds none")
    return labels
