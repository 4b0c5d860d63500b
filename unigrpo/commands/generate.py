"""`unigrpo generate`: prompts in; images, and a JSON with the thinking beside them, out."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN_FILE = "generate.json"  # what the folder was made with; a folder without it is never written to
PARTIAL = "generate.partial"  # all that a run leaves which was killed before it had begun
OURS = re.compile(r"\d{5,}-\d+\.png|(\d{5,}|generate)\.(json|partial)")  # names of all that this command writes


def add_parser(commands: Any) -> None:
    """The command and its arguments."""
    parser = commands.add_parser("generate", help="prompts in; thinking and images out; edits and questions too")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=Path, help="a file: one prompt a line, or JSON lines with the key prompt")
    parser.add_argument("--image", type=Path, help="an image to edit, or to answer about with --understand")
    parser.add_argument("--understand", action="store_true", help="answer the prompt about --image, draw nothing")
    parser.add_argument("--output", type=Path, required=True, help="folder; a run that was interrupted goes on in it")
    parser.add_argument("--overwrite", action="store_true", help="replace what another run of this command left in --output")
    parser.add_argument("--num-images", type=int, default=1, help="images a prompt")
    parser.add_argument("--batch", type=int, default=4, help="images at a time; finished prompts are kept")
    parser.add_argument("--token-budget", type=int, help="cached tokens at a time, which bounds memory; no bound by default")
    parser.add_argument("--seed", type=int, default=0, help="image k of a prompt is drawn with seed + k")
    parser.add_argument("--steps", type=int, default=49, help='model calls; BAGEL\'s "50" is 49')
    parser.add_argument("--height", type=int, help="pixels; the model's own, or the input's, by default")
    parser.add_argument("--width", type=int)
    parser.add_argument("--think", action="store_true", help="write a thinking first; needs --system-prompt")
    parser.add_argument("--system-prompt", help="of --think or --understand: text, '' for none, or @PATH/inferencer.py of "
                        "the official code")
    parser.add_argument("--max-thinking-tokens", type=int, default=1000)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the text; 0: the most likely tokens")
    parser.add_argument("--cfg", type=float, default=4.0, help="text guidance scale; 1: none")
    parser.add_argument("--cfg-image", type=float, help="image guidance scale; 2 for edits and none otherwise by default")
    parser.add_argument("--renorm", choices=["global", "channel", "text_channel"])
    parser.add_argument("--renorm-min", type=float, default=0.0, help="1 switches the rescaling off")
    parser.add_argument("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of the shifted noise level")
    parser.add_argument("--posterior", choices=["mean", "sample"], default="mean",
                        help="what the autoencoder reads --image as; BAGEL samples, keyed by the seed here")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights; as stored by default")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Generate; returns the exit status. Raises ValueError for what the user can mend."""
    prompts = read_prompts(args)
    image = open_image(args.image)
    check_arguments(args)
    settings = run_settings(args, prompts)
    todo = claim_output(args.output, settings, len(prompts), args.overwrite)
    if not todo:
        print(f"nothing to do: {args.output} holds all {len(prompts)} prompts of this run")
        return 0
    pipe = load_pipeline(args)
    import torch

    try:
        (answer_all if args.understand else draw_all)(pipe, args, prompts, todo, image)
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError("the GPU's memory is full: lower --batch or set --token-budget; prompts that are finished are kept "
                         f"({error})") from error
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that contradict each other, or that would have no effect."""
    if args.num_images < 1 or args.batch < 1:
        raise ValueError(f"--num-images and --batch must be at least 1, got {args.num_images} and {args.batch}")
    if args.understand and args.image is None:
        raise ValueError("--understand answers about an image: give --image")
    if args.understand and (args.think or args.num_images > 1):
        raise ValueError("--understand gives one answer a prompt and draws nothing: leave out --think and --num-images; "
                         "--system-prompt goes before the image")
    if args.system_prompt is not None and not (args.think or args.understand):
        raise ValueError("--system-prompt has no effect without --think or --understand; add one of them, or leave it out")


def answer_all(pipe: Any, args: argparse.Namespace, prompts: list[str], todo: list[int], image: Any) -> None:
    """Answer every prompt that is left about the image."""
    from unigrpo.progress import Progress

    finished = len(prompts) - len(todo)
    with Progress("understand", len(prompts), start=finished, unit="answers") as progress:
        for done, index in enumerate(todo, start=finished + 1):
            answer = pipe.understand(prompts[index], image, system_prompt=args.system_prompt or "",
                                     max_tokens=args.max_thinking_tokens, temperature=args.temperature, seed=args.seed)
            write_json(args.output / f"{index:05d}.json", {"prompt": prompts[index], "answer": answer})
            print(answer)
            progress.step(done)


def draw_all(pipe: Any, args: argparse.Namespace, prompts: list[str], todo: list[int], image: Any) -> None:
    """Draw every prompt that is left: some whole prompts at a time, or parts of one that has more images than a batch."""
    from unigrpo.progress import Progress

    together, finished = max(1, args.batch // args.num_images), (len(prompts) - len(todo)) * args.num_images

    def tell(progress: Progress, before: int) -> Callable[[int], None]:
        return lambda done: progress.step(before + done)

    with Progress("generate", len(prompts) * args.num_images, start=finished, unit="images") as progress:
        for start in range(0, len(todo), together):
            chosen = todo[start:start + together]
            entries: list[list[dict[str, Any]]] = [[] for _ in chosen]
            for first in range(0, args.num_images, args.batch):
                count = min(args.batch, args.num_images - first)
                out = pipe([prompts[i] for i in chosen], image, think=args.think, guidance_scale=args.cfg,
                           image_guidance_scale=args.cfg_image, renorm=args.renorm, renorm_min=args.renorm_min,
                           interval=args.cfg_interval and tuple(args.cfg_interval), posterior=args.posterior,
                           num_inference_steps=args.steps, num_images_per_prompt=count, height=args.height, width=args.width,
                           seed=args.seed + first, max_thinking_tokens=args.max_thinking_tokens,
                           temperature=args.temperature, token_budget=args.token_budget,
                           progress=tell(progress, finished + start * args.num_images + first))
                for row, picture in enumerate(out.images):
                    index = chosen[row // count]
                    name = f"{index:05d}-{out.seeds[row] - args.seed}.png"
                    picture.save(args.output / name)
                    entries[row // count].append({"file": name, "seed": out.seeds[row], "thinking": out.thinking[row]})
            for index, images in zip(chosen, entries, strict=True):
                write_json(args.output / f"{index:05d}.json", {"prompt": prompts[index], "images": images})
    print(f"prompts {len(todo)}, images {len(todo) * args.num_images}, in {args.output}")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """From --prompt and the file of --prompts. Raises ValueError naming the line that is no prompt."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise ValueError(f"--prompts must be a file, and {args.prompts} is none")
        found = [prompt_of(line, f"{args.prompts}:{number}") for number, line in enumerate(text_of(args.prompts), start=1)
                 if line.strip()]
        if not found:
            raise ValueError(f"--prompts must hold a prompt a line, and {args.prompts} is empty")
        prompts += found
    if not prompts:
        raise ValueError("give a prompt with --prompt, or a file of them with --prompts")
    return prompts


def text_of(path: Path) -> list[str]:
    """A file's lines. Raises ValueError if it is no text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts must be text in UTF-8, and {path} is not: {error}") from error


def prompt_of(line: str, place: str) -> str:
    """The prompt of a line: the line, or its key prompt where it is a JSON object. Raises ValueError naming the place."""
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        prompt = json.loads(line).get("prompt")
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} must be a JSON object with the key prompt, or plain text: {error}") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place} must have a text under the key prompt, got {prompt!r}")
    return prompt


def open_image(path: Path | None) -> Any:
    """The image of --image, or None. Raises ValueError if it cannot be read."""
    if path is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--image must be a readable image: {error}") from error


def run_settings(args: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """Everything that decides what is drawn: a folder is only continued with the same."""
    from unigrpo.digests import sha256_path
    from unigrpo.generate import READ_PROMPT, THINK_PROMPT, resolve_prompt

    if args.system_prompt is not None:  # the text, so that another file under the same name is another run
        args.system_prompt = resolve_prompt(args.system_prompt, READ_PROMPT if args.understand else THINK_PROMPT)
    skipped = {"command", "function", "output", "overwrite", "prompt", "prompts", "batch", "token_budget", "device"}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
                if name not in skipped}
    if not any(args.checkpoint.glob("model*.safetensors*")):
        raise ValueError(f"--checkpoint must be a checkpoint folder with model.safetensors, and {args.checkpoint} is none")
    files = sorted(path for path in args.checkpoint.rglob("*") if path.is_file())  # adapters and autoencoder too
    stamp = [[path.relative_to(args.checkpoint).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {**settings, "files": stamp,  # 29 GB are not hashed here
            "image_sha256": None if args.image is None else sha256_path(args.image),
            "prompts": prompts}


def claim_output(folder: Path, settings: dict[str, Any], prompts: int, overwrite: bool) -> list[int]:
    """The prompts that are still to be done in the folder, which is made if it is not there.

    Raises: ValueError if it holds anything else than an earlier part of the same run.
    """
    from unigrpo.checks import check_output

    marker = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder, and {folder} is a file")
    check_output(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not marker.is_file() and [path.name for path in folder.iterdir()] != [PARTIAL]:
            raise ValueError(f"--output {folder} holds files that this command did not write; give an empty or a new folder")
        if marker.is_file() and recorded(marker) != settings:
            if not overwrite:
                raise ValueError(f"--output {folder} holds another run (see its {RUN_FILE}); give another folder, or "
                                 "--overwrite to replace it")
            clear(folder)
        elif overwrite:
            clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, settings)
    return [i for i in range(prompts) if not (folder / f"{i:05d}.json").is_file()]


def recorded(marker: Path) -> Any:
    """What the folder was made with; None where that is damaged, which no run equals."""
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return None


def clear(folder: Path) -> None:
    """Remove what this command writes, and nothing else."""
    for path in sorted(folder.iterdir()):
        if OURS.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a prompt with its JSON is finished."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline of --checkpoint on --device."""
    import torch

    from unigrpo.generate import UnifiedPipeline

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and this machine (or this build of torch) has no GPU; use --device auto")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    return UnifiedPipeline.from_pretrained(args.checkpoint, device=device, dtype=dtype,
                                            system_prompt=None if args.understand else args.system_prompt)
