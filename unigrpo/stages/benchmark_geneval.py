"""GenEval as a benchmark of the evaluate stage: prompts of its metadata file, its folder layout, its score."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from unigrpo.digests import sha256_json
from unigrpo.evaluation.backends.cache import ScoreCache
from unigrpo.evaluation.backends.clip import ClipColors
from unigrpo.evaluation.backends.coco import CLASSES
from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector
from unigrpo.evaluation.backends.shapes import ShapesDetector
from unigrpo.evaluation.benchmark_table import GENEVAL
from unigrpo.evaluation.geneval import OFFICIAL
from unigrpo.evaluation.geneval_folder import (
    OFFICIAL_SET,
    check_files,
    parse_metadata,
    read_image_set,
    read_metadata_file,
    write_metadata,
)
from unigrpo.evaluation.geneval_scoring import color_requests, image_keys, score_images, summary_record, write_scores
from unigrpo.schema_benchmarks import SHAPES, GenevalConfig
from unigrpo.stages.session import Session
from unigrpo.types import PromptRecord


class Geneval:
    """See `unigrpo.stages.benchmarks.Benchmark`. `read` fills `records`, `load` the models.

    Args:
        settings: the section evaluate.geneval. root: what its paths are relative to.
    """

    name = GENEVAL

    def __init__(self, settings: GenevalConfig, root: Path) -> None:
        self.settings, self.samples = settings, settings.images_per_prompt
        self.metadata = root / settings.metadata
        self.detector_folder = None if settings.detector == SHAPES else root / settings.detector
        self.colors_folder = None if settings.colors is None else root / settings.colors
        self.canary = None if settings.canary is None else root / settings.canary
        self.records: tuple[PromptRecord, ...] = ()
        self.indices: dict[str, int] = {}
        self.contents: list[dict[str, Any]] = []
        self.detector: Any = None
        self.colors: Any = None

    def missing(self) -> list[str]:
        """Files that params name and that are not there."""
        files, folders = {"metadata": self.metadata, "canary": self.canary}, {
            "detector": self.detector_folder, "colors": self.colors_folder}
        return missing_lines(self.name, files, folders)

    def read(self) -> None:
        """The prompts. Raises ValueError for a set that is not the official one unless own prompts are meant, for a prompt
        that stands there twice, and for what nobody could score."""
        contents, _ = read_metadata_file(self.metadata)
        digest = sha256_json(contents)
        if digest != OFFICIAL_SET and not self.settings.own_prompts:
            raise ValueError(f"metadata must be GenEval's own set (sha256 {OFFICIAL_SET[:16]}... over its records), and "
                             f"{self.metadata} is another ({digest[:16]}...); fetch it unchanged, or set own_prompts: true, "
                             "which the score's name then says")
        labels = ShapesDetector.labels if self.detector_folder is None else CLASSES
        records = [parse_metadata(content, f"{self.metadata}, record {index + 1}", labels)
                   for index, content in enumerate(contents)]
        if twice := [record for record, count in Counter(record.id for record in records).items() if count > 1]:
            prompt = next(record.prompt for record in records if record.id == twice[0])
            raise ValueError(f"{self.metadata} holds {prompt!r} twice; remove one")
        taken: Counter[str] = Counter()
        chosen = []
        for index, record in enumerate(records):
            taken[record.tag] += 1
            if self.settings.limit is None or taken[record.tag] <= self.settings.limit:
                chosen.append(record)
                self.indices[record.id] = index
        self.records, self.contents = tuple(chosen), contents
        if self._colored and self.colors_folder is None and self.detector_folder is not None:
            raise ValueError(f"prompts of {self.metadata} ask for colours: set colors to the colour model's folder")

    @property
    def _colored(self) -> bool:
        """Whether a prompt asks for a colour."""
        return any(color_requests(record) for record in self.records)

    def load(self, device: str, batch: int) -> dict[str, Any]:
        """Detector and colour model; those that canaries know."""
        scorers: dict[str, Any] = {}
        if self.detector_folder is None:
            self.detector = ShapesDetector()
        else:
            self.detector = scorers["detector"] = Mask2FormerDetector.load(
                self.detector_folder, device=device, shorter=self.settings.input_size, batch=batch,
                min_score=min(OFFICIAL.threshold, OFFICIAL.counting_threshold))
        if self._colored and self.colors_folder is not None:
            self.colors = scorers["colors"] = ClipColors.load(self.colors_folder, device=device)
        return scorers

    def place(self, record: PromptRecord, sample: int) -> str:
        """NNNNN/samples/NNNN.png."""
        return f"{self.indices[record.id]:05d}/samples/{sample:04d}.png"

    def describe(self, folder: Path) -> None:
        """Every prompt's NNNNN/metadata.jsonl."""
        for record in self.records:
            index = self.indices[record.id]
            if not (folder / f"{index:05d}" / "metadata.jsonl").is_file():
                write_metadata(folder, index, self.contents[index])

    def score(self, folder: Path, cell: tuple[str, str], stage: Session, cache: ScoreCache, batch: int) -> list[dict[str, Any]]:
        """results.jsonl and summary.json in `<folder>/<the score's name>`; rows of the benchmark table."""
        images = check_files(read_image_set(folder, self.detector.labels, samples=self.samples, metadata=self.metadata,
                                            allow_partial=self.settings.allow_partial))
        done = sum(key in cache for key in image_keys(images, self.detector, self.colors))
        stage.begin(f"{self.name}, score {folder.name}", len(images.samples), start=done, unit="images")
        assert stage.progress is not None
        scored = score_images(images, self.detector, self.colors, cache, batch=batch, progress=stage.progress.step)
        record = summary_record(scored, images, self.detector, self.colors, OFFICIAL, {})
        write_scores(folder / record["name"], scored, record, relative_to=folder)
        found: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for item in scored:
            found[item.sample.record.tag, item.sample.record.id].append(bool(item.verdict.correct))
        return [{"benchmark": self.name, "score": record["name"], "category": tag, "prompt_id": prompt, "cfg": cell[0],
                 "thinking": cell[1], "images": len(verdicts), "score_sum": float(sum(verdicts))}
                for (tag, prompt), verdicts in found.items()]


def missing_lines(name: str, files: dict[str, Path | None], folders: dict[str, Path | None]) -> list[str]:
    """What params name and is not there, a line each.

    Args:
        name: the benchmark's section. files, folders: key -> path, or None where the key is null.
    """
    lines = [f"evaluate.{name}.{key}: there is no file {path}" for key, path in files.items()
             if path is not None and not path.is_file()]
    return lines + [f"evaluate.{name}.{key}: there is no folder {path} with a model in Hugging Face format (config.json, "
                    "*.safetensors)" for key, path in folders.items()
                    if path is not None and not ((path / "config.json").is_file() and list(path.glob("*.safetensors")))]
