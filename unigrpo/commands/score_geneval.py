"""`unigrpo score geneval DIR`: a folder in GenEval's layout to results.jsonl, the official summary and an honest name."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

SHAPES = "shapes"  # the detector that is no model


def add_parser(benchmarks: Any) -> None:
    """The command and its arguments."""
    parser = benchmarks.add_parser("geneval", help="GenEval: DIR/NNNNN/metadata.jsonl and DIR/NNNNN/samples/NNNN.png")
    parser.add_argument("images", type=Path, metavar="DIR", help="folder in the official layout")
    parser.add_argument("--detector", required=True, help="a Mask2Former with COCO's classes, as safetensors: its folder or "
                        "name on the hub, like facebook/mask2former-swin-small-coco-instance; or 'shapes', tiny's verifier")
    parser.add_argument("--color", help="the colour model, a CLIP with quick_gelu: officially ViT-L/14 of OpenAI, "
                        "openai/clip-vit-large-patch14")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="images at a time; results are kept after each batch")
    parser.add_argument("--input-size", type=int, default=800, help="shorter side that the detector reads; another one is told "
                        "in the score's name")
    parser.add_argument("--class-names", type=Path, help="GenEval's object_names.txt; the same names by default")
    parser.add_argument("--metadata", type=Path, help="the prompt set that DIR should hold, one record a line; the official "
                        "one by default")
    parser.add_argument("--samples", type=int, default=4, help="images a prompt; another number is told in the score's name")
    parser.add_argument("--allow-partial", action="store_true", help="score what is there and mark the result as partial")
    parser.add_argument("--mixed-sizes", action="store_true", help="images of several sizes are meant")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an official option: threshold, "
                        "counting_threshold, max_objects, max_overlap, position_threshold; told in the score's name")
    parser.add_argument("--soft", action="store_true", help="also Flow-GRPO's soft and strict rewards, in soft.jsonl")
    parser.add_argument("--position-bug", action="store_true", help="the soft reward as Flow-GRPO computes it, where a wrong "
                        "position earns its point afterwards")
    parser.add_argument("--canary", type=Path, default=Path("canary.json"), help="recorded scores of the canary pictures, see "
                        "`unigrpo score canary`")
    parser.add_argument("--cache", type=Path, help="scores by image digest; DIR/scores.cache.jsonl by default")
    parser.add_argument("--output", type=Path, help="folder of results.jsonl and summary.json; DIR/<the score's name> by "
                        "default")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Score; returns the exit status. Raises ValueError for what the user can mend."""
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.position_bug and not args.soft:
        raise ValueError("--position-bug changes the soft reward only: add --soft, or leave it out")
    options = parse_options(args.option)
    from unigrpo.evaluation.backends import canary
    from unigrpo.evaluation.backends.cache import ScoreCache
    from unigrpo.evaluation.backends.weights import quiet_transformers
    from unigrpo.evaluation.geneval_folder import check_files, read_image_set
    from unigrpo.evaluation.geneval_scoring import (
        color_requests,
        image_keys,
        score_images,
        soft_means,
        summary_record,
        write_scores,
    )
    from unigrpo.progress import Progress

    images = read_image_set(args.images, class_labels(args), samples=args.samples, metadata=args.metadata,
                            allow_partial=args.allow_partial)
    colored = any(color_requests(sample.record) for sample in images.samples)
    if colored and args.color is None and args.detector != SHAPES:
        raise ValueError(f"prompts of {args.images} ask for colours: give the colour model with --color")
    with Progress("check files", len(images.samples)) as progress:
        images = check_files(images, mixed_sizes=args.mixed_sizes, progress=progress.step)

    quiet_transformers()
    detector = load_detector(args, min_score=min(options.threshold, options.counting_threshold))
    colors = load_colors(args) if colored else None
    models: dict[str, Any] = {} if args.detector == SHAPES else {"detector": detector}
    if colors is not None:
        models["colors"] = colors
    if models:
        canary.check(args.canary, models, canary.device_name(args.device))
    score_cache = ScoreCache(args.cache or args.images / "scores.cache.jsonl")
    start = sum(key in score_cache for key in image_keys(images, detector, colors, options))
    with Progress("score", len(images.samples), start=start) as progress:
        try:
            scored = score_images(images, detector, colors, score_cache, options=options, batch=args.batch,
                                  position_bug=args.position_bug, progress=progress.step)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise ValueError(f"the GPU's memory is full: lower --batch; images that are finished are kept ({error})") from error
    extra = {"official_position_bug": args.position_bug, **soft_means(scored)} if args.soft else {}
    record = summary_record(scored, images, detector, colors, options, extra)
    output = args.output or args.images / record["name"]
    write_scores(output, scored, record, soft=args.soft)
    tell(scored, images, record, output)
    return 0


def tell(scored: Any, images: Any, record: dict[str, Any], output: Path) -> None:
    """The official summary, then what it may be called and what it was made from."""
    from unigrpo.evaluation.geneval_scoring import summarize_scored

    print("\n".join(summarize_scored(scored).lines()))
    if "soft" in record:
        print(f"Flow-GRPO's rewards (avg. over tasks): soft {record['soft']['overall']:.5f}, "
              f"strict {record['strict']['overall']:.5f}")
    print(f"{record['name']} = {record['overall']:.5f}")
    if images.missing:
        print(f"PARTIAL: {len(images.missing)} missing, first {'; '.join(images.missing[:3])}. No GenEval score.")
    prompts = images.prompt_set if not images.sha256 else f"{images.prompt_set}, sha256 {images.sha256}"
    print(f"prompt set: {prompts}\nwrote {output}/results.jsonl and summary.json")


def parse_options(pairs: list[str]) -> Any:
    """`Options` with the given values. Raises ValueError for an unknown key or a value that is no number."""
    from dataclasses import fields, replace

    from unigrpo.evaluation.geneval import OFFICIAL

    kinds = {field.name: type(getattr(OFFICIAL, field.name)) for field in fields(OFFICIAL)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in kinds:
            raise ValueError(f"--option must be one of {', '.join(kinds)} with =VALUE, got {pair!r}")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise ValueError(f"--option {key} must be a number ({kinds[key].__name__}), got {text!r}") from None
        if not math.isfinite(values[key]):
            raise ValueError(f"--option {key} must be finite, got {text!r}: nothing is above NaN or infinity")
    return replace(OFFICIAL, **values)


def class_labels(args: argparse.Namespace) -> tuple[str, ...]:
    """The names that the detector of --detector will give."""
    from unigrpo.evaluation.backends.coco import CLASSES, read_class_names

    if args.detector == SHAPES:
        from unigrpo.evaluation.backends.shapes import ShapesDetector

        return ShapesDetector.labels
    return CLASSES if args.class_names is None else read_class_names(args.class_names)


def load_detector(args: argparse.Namespace, min_score: float = 0.0) -> Any:
    """The detector of --detector on --device."""
    if args.detector == SHAPES:
        from unigrpo.evaluation.backends.shapes import ShapesDetector

        return ShapesDetector()
    from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector

    return Mask2FormerDetector.load(args.detector, device=args.device, labels=class_labels(args), shorter=args.input_size,
                                    min_score=min_score, batch=getattr(args, "batch", 8))


def load_colors(args: argparse.Namespace) -> Any:
    """The colour model of --color, or None where the detector tells colours itself."""
    if args.color is None:
        return None
    from unigrpo.evaluation.backends.clip import ClipColors

    return ClipColors.load(args.color, device=args.device)
