"""`unigrpo score t2i-compbench DIR`: a folder of images against T2I-CompBench(++), in official files and by an honest name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unigrpo.progress import Progress

CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")


def add_parser(benchmarks: Any) -> None:
    """Add the benchmark to the sub-commands of `unigrpo score`."""
    parser = benchmarks.add_parser("t2i-compbench", help="300 prompts a category, 10 images each")
    parser.add_argument("folder", type=Path, metavar="DIR",
                        help="DIR/samples/<prompt>_<NNNNNN>.png of one category, or DIR/<category>/samples/ of several")
    parser.add_argument("--category", nargs="+", choices=CATEGORIES, metavar="CATEGORY",
                        help=f"of {', '.join(CATEGORIES)}; those that DIR has by default")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FOLDER",
                        help="T2I-CompBench's examples/dataset, unchanged")
    parser.add_argument("--parses", type=Path, metavar="FILE", help="made by unigrpo parse-prompts; not for numeracy and "
                        "non_spatial")
    parser.add_argument("--output", type=Path, help="folder of the results; DIR/<the score's name> by default")
    parser.add_argument("--cache", type=Path, help="answers by image digest; DIR/scores.cache.jsonl by default")
    parser.add_argument("--allow-partial", action="store_true", help="score what is there and mark the result as partial")
    parser.add_argument("--own-prompts", action="store_true", help="other prompts in files of these names; told in the name")
    parser.add_argument("--corrected", action="store_true",
                        help="the rules that were meant instead of the official ones; told in the name")
    parser.add_argument("--batch", type=int, default=8, help="images at a time; answers are kept after each batch")
    parser.add_argument("--canary", type=Path, default=Path("canary.json"), help="recorded scores of the canary pictures, see "
                        "`unigrpo score canary`")
    parser.add_argument("--blip", help="a BLIP-VQA for attributes: officially Salesforce/blip-vqa-capfilt-large")
    parser.add_argument("--clip", help="the CLIP of CLIPScore: officially ViT-B/32 of OpenAI, openai/clip-vit-base-patch32")
    parser.add_argument("--depth", help="a DPT for 3D: officially Intel/dpt-hybrid-midas")
    parser.add_argument("--detector", help="a Mask2Former with COCO's classes, or an OWLv2, which is asked for --labels; the "
                        "official one (UniDet) is neither")
    parser.add_argument("--min-score", type=float, default=0.5, help="detections score above this; another value than the "
                        "official detector's is told in the name")
    add_model_options(parser)
    parser.set_defaults(function=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `score canary` must be told the same way."""
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels that count, one a line: what an OWLv2 is asked "
                        "for, which of a Mask2Former's are kept")
    parser.add_argument("--input-size", type=int, default=800, help="shorter side that a Mask2Former reads")
    parser.add_argument("--blip-size", type=int, default=480, help="side that BLIP reads; another one is told in the name")
    parser.add_argument("--depth-size", type=int, default=480, help="side that the DPT reads; another one is told in the name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def run(args: argparse.Namespace) -> int:
    """Score; returns the exit status. Raises ValueError for what the user can mend."""
    from unigrpo.evaluation.backends import canary
    from unigrpo.evaluation.backends.cache import ScoreCache
    from unigrpo.evaluation.backends.weights import quiet_transformers
    from unigrpo.evaluation.parses import load_parses
    from unigrpo.evaluation.t2i_prompts import find_images, read_prompts
    from unigrpo.evaluation.t2i_score import NEEDS, PARSED, Models, score_category, write_score

    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    # What can be refused is refused before a model is loaded.
    folders = category_folders(args.folder, args.category)
    files = {name: read_prompts(args.prompts, name, own=args.own_prompts) for name in folders}
    images = {name: find_images(folder, files[name], partial=args.allow_partial) for name, folder in folders.items()}
    needed = list(dict.fromkeys(role for name in folders for role in NEEDS[name]))
    if missing := [role for role in needed if getattr(args, role) is None]:
        raise ValueError(f"{', '.join(folders)} need models: give {', '.join(f'--{role}' for role in missing)}")
    parses = None
    if parsed := [name for name in folders if name in PARSED]:
        if args.parses is None:
            raise ValueError(f"{', '.join(parsed)} need the prompts' noun phrases and parts of speech: --parses FILE, which "
                             f"`unigrpo parse-prompts {args.prompts / (parsed[0] + '_val.txt')} ... --output FILE` makes")
        parses = load_parses(args.parses)
        parses.require((prompt for name in parsed for prompt in files[name].prompts), args.parses)

    quiet_transformers()
    scorers = {role: load_scorer(role, args) for role in needed}
    kinds = {"blip": "yes", "clip": "similarity", "detector": "detector", "depth": "depth"}
    canary.check(args.canary, {kinds[role]: scorer for role, scorer in scorers.items()}, canary.device_name(args.device))
    labels = read_labels(args.labels) if args.labels is not None else None
    models = Models(**scorers, labels=labels, min_score=args.min_score)
    cache = ScoreCache(args.cache or args.folder / "scores.cache.jsonl")
    for name in folders:
        bars = Bars()
        try:
            score = score_category(files[name], images[name], models, parses, cache, official=not args.corrected,
                                   partial=args.allow_partial, batch=args.batch, progress=bars.step)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise ValueError(f"the GPU's memory is full: lower --batch; finished answers are kept ({error})") from error
        finally:
            bars.close()
        output = args.output or args.folder / score.record["name"]
        if args.output is not None and len(folders) > 1:
            output /= name
        write_score(output, score)
        print("\n".join([*lines(score.record), f"  wrote    {output}"]), flush=True)
    return 0


class Bars:
    """A progress line for each model that is asked, one after the other."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def step(self, name: str, done: int, total: int) -> None:
        """`done` of `total` images are done by the model of this name; the first call of a name tells where it starts."""
        if self.bar is None or self.bar.name != name:
            self.close()
            self.bar = Progress(name, total, start=done, unit="images")
        elif done != self.bar.done:
            self.bar.step(done)

    def close(self) -> None:
        """End the line."""
        if self.bar is not None:
            self.bar.__exit__()
            self.bar = None


def category_folders(folder: Path, categories: Sequence[str] | None) -> dict[str, Path]:
    """The folder that holds samples/ for each category. Raises ValueError if it is unclear which category DIR is of."""
    if not folder.is_dir():
        raise ValueError(f"DIR must be a folder of images, and {folder} is none")
    if (folder / "samples").is_dir():
        if categories is None or len(categories) != 1:
            raise ValueError(f"{folder}/samples holds the images of one category; say which with --category")
        return {categories[0]: folder}
    found = [name for name in CATEGORIES if (folder / name / "samples").is_dir()]
    missing = [name for name in categories or () if name not in found]
    if missing or not found:
        raise ValueError(f"{folder} must hold samples/, or <category>/samples/ for {', '.join(missing or CATEGORIES)}; it "
                         f"holds {', '.join(found) or 'neither'}")
    return {name: folder / name for name in (categories or found)}


def load_scorer(role: str, args: argparse.Namespace) -> Any:
    """The model of --blip, --clip, --depth or --detector."""
    if role == "blip":
        from unigrpo.evaluation.backends.blip import BlipYes

        return BlipYes.load(args.blip, device=args.device, size=args.blip_size)
    if role == "clip":
        from unigrpo.evaluation.backends.clip import ClipSimilarity

        return ClipSimilarity.load(args.clip, device=args.device)
    if role == "depth":
        from unigrpo.evaluation.backends.depth import DptDepth

        return DptDepth.load(args.depth, device=args.device, size=args.depth_size)
    return load_detector(args)


def load_detector(args: argparse.Namespace) -> Any:
    """The model of --detector: by its own words a Mask2Former or an OWLv2."""
    import json

    from unigrpo.evaluation.backends.weights import model_folder

    folder = model_folder(args.detector)
    min_score = getattr(args, "min_score", 0.0)
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "owlv2":
        from unigrpo.evaluation.backends.owlv2 import Owlv2Detector

        if args.labels is None:
            raise ValueError("an OWLv2 finds what it is asked for: give --labels FILE, one label a line")
        return Owlv2Detector.load(folder, sorted(read_labels(args.labels)), device=args.device, min_score=min_score)
    from unigrpo.evaluation.backends.mask2former import Mask2FormerDetector

    return Mask2FormerDetector.load(folder, device=args.device, shorter=args.input_size, min_score=min_score)


def read_labels(path: Path) -> frozenset[str]:
    """Labels, one a line. Raises ValueError if there are none."""
    if not path.is_file():
        raise ValueError(f"--labels takes a file with one label a line, and {path} is missing")
    labels = frozenset(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not labels:
        raise ValueError(f"--labels takes a file with one label a line, and {path} holds none")
    return labels


def lines(record: dict[str, Any]) -> list[str]:
    """A score, and what limits it, for a terminal."""
    partial = "" if record["complete"] else f" of {record['images_of_a_complete_set']}: PARTIAL, no T2I-CompBench score"
    out = [record["name"], f"  score    {record['score']:.4f}, the mean of {record['images']} images{partial}"]
    if record["unreadable"]:
        out.append(f"  files    {record['unreadable']} images cannot be read and are left out")
    if len(record["parts"]) > 1:
        out.append("  parts    " + ", ".join(f"{name} {value:.4f}" for name, value in record["parts"].items()))
    if "detector_ceiling" in record:
        part = " of its 2D part" if record["category"] == "complex" else ""
        out.append(f"  ceiling  {record['detector_ceiling']:.4f}{part} with {record['detector_labels']} labels; "
                   f"{record['prompts_beyond_labels']} prompts name an object that none of them is")
    if len(record["image_sizes"]) > 1:
        sizes = ", ".join(f"{size} ({count})" for size, count in record["image_sizes"].items())
        out.append(f"  sizes    images differ: {sizes}")
    if record["parser"]:
        out.append("  parser   " + " ".join(f"{key} {value}" for key, value in record["parser"].items()))
    if not record["official_rules"]:
        out.append("  rules    corrected: not to be compared with published numbers")
    if not record["official_prompts"]:
        out.append("  prompts  others than the official files")
    return out
