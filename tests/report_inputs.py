"""Made-up artifacts of a whole small pipeline, for tests of the report: `write_artifacts(root)`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from unigrpo.evaluate import GRID
from unigrpo.evaluation.benchmark_table import make_table, write_table
from unigrpo.evaluation.controls import COLUMNS, understanding_metrics, understanding_table, write_understanding
from unigrpo.evaluation.outcomes import compute_metrics, write_metrics, write_outcomes
from unigrpo.stages.session import save_picture
from unigrpo.worlds.shapes import random_scene, render
from unigrpo.worlds.shapes.thinking import plan_text

PROJECT = Path(__file__).resolve().parent.parent
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SKILL = {"base": 0.25, "sft": 0.4, "unigrpo": 0.6, "image_only": 0.45, "text_only": 0.3}
OTHER = 0.5                 # the skill of any other run
CELL = {"on": 1.0, "greedy": 1.05, "off": 0.7, "shuffled": 0.15, "truncated": 0.5}
GUARDS = {"edge_density": 0.14, "brightness": 0.8, "thinking_length": 9.0, "border_red": 0.92, "border_green": 0.92,
          "border_blue": 0.92}


def write_artifacts(root: Path, *, prompts: int = 48, images: int = 4,
                    checkpoints: tuple[str, ...] = ("base", "sft", "unigrpo/0"),
                    words: str = "a red circle left of two blue squares", steps: int = 60, shown: int = 8,
                    points: dict[str, dict] | None = None) -> None:
    """Params and artifacts/smoke under `root`, as the stages write them. The verdicts are coin flips of a stated bias.

    Args:
        points: entries of params/runs.yaml beside unigrpo. text_only and runs whose names end in _point have the headline cell
            alone.
    """
    shutil.copytree(PROJECT / "params", root / "params", dirs_exist_ok=True)
    if points:
        (root / "params" / "runs.yaml").write_text(yaml.safe_dump({"unigrpo": {}, **points}), encoding="utf-8")
    runs = [name.split("/") for name in checkpoints if "/" in name]
    named = {f"smoke-{name.replace('/', '-')}": {"scale": "smoke", "checkpoint": name} for name in checkpoints}
    (root / "params" / "experiment.yaml").write_text(yaml.safe_dump({
        "scales": ["smoke"], "evaluations": named, "reports": {"smoke-main": {"scale": "smoke"}},
        "trainings": {f"smoke-{run}-{seed}": {"scale": "smoke", "run": run, "seed": int(seed)} for run, seed in runs}}),
        encoding="utf-8")
    folder = root / "artifacts" / "smoke"
    (folder / "prompts").mkdir(parents=True)
    put(folder / "curate.json", {"curate/sft": 64})
    split = {"prompts": 64, "tags": dict.fromkeys(TAGS, 10), "needs_reasoning": 0.65, "objects": {"1": 30, "2": 34}}
    put(folder / "prompts" / "statistics.json", {name: split for name in ("sft", "train", "validation", "eval")})
    put(folder / "prompts" / "leakage.json", {
        "pairs": {"sft-eval": {"exact": 0, "canonical": 0, "specification": 0}}, "leaks": 0,
        "evaluation": {"prompts": prompts, "held_out_combinations": 12}})
    for name in checkpoints:
        write_checkpoint(folder / name, name, prompts, images, words, steps, shown)


def write_checkpoint(folder: Path, name: str, prompts: int, images: int, words: str, steps: int, shown: int) -> None:
    """One checkpoint's files."""
    rng = np.random.default_rng(sum(name.encode()))
    run = name.split("/")[0]
    skill, grid = SKILL.get(run, OTHER), GRID[:1] if run.endswith("_point") or run == "text_only" else GRID
    rows = []
    for cfg, thinking in grid:
        for i in range(prompts):
            reasoning = ("arithmetic", "negation", "")[i % 3]
            exact = int(rng.binomial(images, min(1.0, skill * CELL[thinking])))
            plan = 0 if thinking == "off" else int(rng.binomial(images, 0.6))
            rows.append({"prompt_id": f"{i:016x}", "tag": TAGS[i % 6], "reasoning": reasoning,
                         "needs_reasoning": bool(reasoning), "cfg": cfg, "thinking": thinking, "images": images,
                         "exact": exact, "geneval": min(images, exact + 1),
                         "plan_right": plan, "exact_and_plan_right": min(exact, plan), "graded_sum": float(exact)})
    outcomes = pd.DataFrame(rows).sort_values(["cfg", "thinking", "prompt_id"])
    (folder / "samples").mkdir(parents=True)
    write_outcomes(outcomes, folder / "outcomes.csv")
    write_table(make_table(), folder / "benchmarks.csv")
    losses = {f"{i:016x}": (10, 4.0 + float(rng.random()) - skill) for i in range(prompts)}
    table = understanding_table(outcomes, losses) if len(grid) > 1 else pd.DataFrame(columns=list(COLUMNS))
    write_understanding(table, folder / "understanding.csv")
    standing = {f"sentinel/{guard}": value * (1.5 if run == "unigrpo" and guard == "edge_density" else 1)
                for guard, value in GUARDS.items()} | {f"sentinel/{guard}/noise": 0.001 for guard in GUARDS}
    known = understanding_metrics(table) if len(grid) > 1 else {}
    write_metrics(compute_metrics(outcomes) | known | standing, folder / "metrics.json")
    put(folder / "training.json", {"cost/prompts": 480.0, "cost/images": 7680.0, "cost/text_tokens": 201000.0,
                                   "cost/updates": 60.0, "cost/model_calls": 61440.0, "cost/flops": 3.2e13,
                                   "data/wrong_plans_of_reasoning": 0.39, **(
                                       {"sentinel/probes": 7.0, "sentinel/alarms": 1.0, "sentinel/alarm/gold/thinking": 40.0,
                                        "image/velocity_mse": 1e-4 / skill, "reward/mean": 1.2}
                                       if "/" in name else {})})
    step = np.arange(steps)
    curves = {"step": step, "image/loss": 0.3 + np.exp(-step / 20), "text/loss": 0.5 + np.exp(-step / 10)}
    if "/" in name:
        noise = rng.normal(size=steps)
        share = np.abs(noise) / 50
        curves |= {"reward/mean": 0.5 + step / steps / 4 + noise / 50, "update_2/text/clip_fraction": 0.1 + share,
                   "update_2/image/clip_fraction": 0.2 + share, "text/entropy": 0.6 - step / steps / 10 + noise / 90,
                   "image/velocity_mse": 1e-5 + step * 1e-5, "thinking/length": 20 + noise,
                   "understanding/grad_norm": 1 + noise**2, "generation/grad_norm": 0.1 + noise**2 / 10,
                   "update_2/image/ratio_mean": 1 + noise * 1e-5, "mismatch/text": 1e-6 * (1 + noise**2),
                   "probe/exact": np.where(step % 10 == 0, 0.4 + step / steps / 5, np.nan)}
    pd.DataFrame(curves).to_csv(folder / "curves.csv", index=False, float_format="%.6g")
    samples = []
    for i in range(shown):
        for cfg, thinking in grid:
            scene = random_scene(rng)
            file = f"{i:016x}-cfg_{cfg}-thinking_{thinking}.png"
            save_picture(render([scene], rng)[0], folder / "samples" / file)
            samples.append({"prompt_id": f"{i:016x}", "prompt": words, "thinking": plan_text(scene, rng), "cfg": cfg,
                            "cell": thinking, "sample": 0, "image": file, "exact": bool(rng.random() < skill),
                            "graded": 0.5})
    put(folder / "samples" / "samples.json", samples)


def put(path: Path, value: object) -> None:
    """JSON to a file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
