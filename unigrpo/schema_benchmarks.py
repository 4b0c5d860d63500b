"""The schema of what a checkpoint is evaluated on: the shapes world's own prompts, GenEval, T2I-CompBench."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from unigrpo.schema_model import Positive, Section, Share

Category = Literal["color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]
SHAPES = "shapes"                               # the benchmark of the shapes world, and its verifier as a detector
IMAGES_OF_T2I = 10                              # images a prompt that T2I-CompBench's file names have room for
PROMPTS = {"geneval": 553, "t2i_compbench": 300}   # of the official set; of a category
GENEVAL_TASKS = 6


class PartialRule(Section):
    """What both benchmarks say about sets that are not the complete official one."""

    limit: Positive | None
    own_prompts: bool
    allow_partial: bool

    @model_validator(mode="after")
    def check_limit(self) -> Self:
        """A part of the prompts is asked for in so many words."""
        if self.limit is not None and not self.allow_partial:
            raise ValueError(f"limit={self.limit} draws a part of the prompts, which is no score of the benchmark: set "
                             "allow_partial: true, which marks it so, or limit: null")
        return self


class GenevalConfig(PartialRule):
    """GenEval: its prompts and the models that judge; see docs/scoring.md."""

    metadata: str
    images_per_prompt: Positive
    detector: str
    input_size: Positive
    colors: str | None
    canary: str | None

    @model_validator(mode="after")
    def check_canary(self) -> Self:
        """Models are compared with a record of what they said where they were trusted."""
        if self.canary is None and (self.detector != SHAPES or self.colors is not None):
            raise ValueError("canary must be the file that `unigrpo score canary --record` wrote, got null: no model is "
                             "trusted unseen (only detector: shapes needs none)")
        return self


class T2iCompbenchConfig(PartialRule):
    """T2I-CompBench: its prompts, their parses and the models that judge; see docs/scoring_t2i.md."""

    prompts: str
    categories: tuple[Category, ...] = Field(min_length=1)
    images_per_prompt: int = Field(ge=1, le=IMAGES_OF_T2I)
    parses: str | None
    blip: str | None
    blip_size: Positive
    clip: str | None
    detector: str | None
    labels: str | None
    min_score: Share
    input_size: Positive
    depth: str | None
    depth_size: Positive
    canary: str

    @model_validator(mode="after")
    def check_set(self) -> Self:
        """Each category once; fewer images than the benchmark's make a partial set."""
        if len(set(self.categories)) < len(self.categories):
            raise ValueError(f"categories must name each category once, got {list(self.categories)}")
        if self.images_per_prompt < IMAGES_OF_T2I and not self.allow_partial:
            raise ValueError(f"images_per_prompt={self.images_per_prompt} makes a partial set, T2I-CompBench's has "
                             f"{IMAGES_OF_T2I}: set it, or allow_partial: true, which marks the score")
        return self


class BenchmarkRules(Section):
    """The part of the section evaluate that says on what."""

    benchmarks: tuple[Literal["shapes", "geneval", "t2i_compbench"], ...] = Field(min_length=1)
    cells: tuple[tuple[Literal["off", "on"], Literal["on", "off", "greedy"]], ...] = Field(min_length=1)
    geneval: GenevalConfig | None
    t2i_compbench: T2iCompbenchConfig | None

    @field_validator("cells", mode="before")
    @classmethod
    def check_quotes(cls, value: Any) -> Any:
        """YAML reads a bare on or off as true or false."""
        if isinstance(value, list) and any(isinstance(part, bool) for cell in value if isinstance(cell, list) for part in cell):
            raise ValueError('cells must say "on" and "off" in quotes: YAML reads the bare words as true and false')
        return value

    @model_validator(mode="after")
    def check_benchmarks(self) -> Self:
        """Each benchmark once and with its section; each cell once, the headline cell among them."""
        for name, given in (("benchmarks", self.benchmarks), ("cells", self.cells)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name} must name each once, got {[*given]}")
        for name in ("geneval", "t2i_compbench"):
            if name in self.benchmarks and getattr(self, name) is None:
                raise ValueError(f"benchmarks names {name}, whose section is null; set evaluate.{name} as in "
                                 "params/scales/bagel_7b.yaml, or leave the benchmark out")
        if ("off", "on") not in self.cells:
            raise ValueError('cells must hold the headline cell ["off", "on"] (guidance off, thinking on), got '
                             f"{[list(cell) for cell in self.cells]}")
        return self

    def official_counts(self) -> dict[str, tuple[int, int]]:
        """Benchmark -> (prompts, images a prompt in each of `cells`), for a plan: prompts of one's own are not counted."""
        found: dict[str, tuple[int, int]] = {}
        for name in ("geneval", "t2i_compbench"):
            settings = getattr(self, name)
            if name in self.benchmarks and settings is not None:
                parts = len(settings.categories) if name == "t2i_compbench" else GENEVAL_TASKS
                each = PROMPTS[name] if name == "t2i_compbench" else PROMPTS[name] / parts
                limit = each if settings.limit is None else min(each, settings.limit)
                found[name] = (round(parts * limit), settings.images_per_prompt)
        return found

    def check_world(self, image_size: tuple[int, int], side: int) -> None:
        """The shapes world's verifier reads its own pictures. Raises ValueError where the model draws others."""
        reads = [f"benchmarks: [{SHAPES}]"] if SHAPES in self.benchmarks else []
        if "geneval" in self.benchmarks and self.geneval is not None and self.geneval.detector == SHAPES:
            reads.append(f"geneval.detector: {SHAPES}")
        if reads and tuple(image_size) != (side, side):
            raise ValueError(f"evaluate.{reads[0]} judges pictures of {side} x {side} pixels and model.image_size is "
                             f"{tuple(image_size)}; name benchmarks for photographs in evaluate.benchmarks")
