"""Every stage of scale small at its own size with few steps, twice: its own graph, and that of a release in BAGEL's layout.

    python tests/whole_graph.py --write docs/benchmarks/small_graph.md

runs both in a temporary folder and writes what they took. Stage functions are called one after the other in this process, as
the flows call them; DVC and Metaflow are tested at scale smoke.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from unigrpo.cli import main as command
from unigrpo.config import load_config
from unigrpo.interchange import export_release
from unigrpo.models.autoencoder import FLUX, Autoencoder
from unigrpo.progress import duration
from unigrpo.stages import base, curate, evaluate, report, sft, train
from unigrpo.stages.base import fresh_policy
from unigrpo.stages.loading import save_policy

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"unigrpo": {}, "lora": {"lora": {"rank": 4, "alpha": 8}},
        "bf16": {"train": {"precision": "bf16", "activation_checkpointing": True,
                           "max_mismatch": {"text": 1.0, "image": 1.0e9}}}}
FEW = {
    "autoencoder": {"training": {"steps": 60}},
    "base": {"steps": 4, "checkpoint_every": 2},
    "sft": {"steps": 3, "checkpoint_every": 2, "drift": {"max_image_loss_ratio": 100.0}},  # so few steps only disturb
    "train": {"num_steps": 2, "probe_every": 2, "probe_prompts": 4, "checkpoint_every": 1},
    "evaluate": {"prompts": 4},
}
# What BAGEL's layout asks of a model: its autoencoder's geometry, its encoder's patches, the release's position tables.
RELEASED = {
    "model": {"latent_channels": 16, "latent_downsample": 8, "max_latent_size": 64, "vit_max_patches": 70,
              "vision": {"patch_size": 14, "image_size": 980}},
    "autoencoder": {"latent_channels": 16, "block_out_channels": [32, 64, 128, 128], "layers_per_block": 2,
                    "norm_num_groups": 32, "scaling_factor": FLUX["scaling_factor"], "shift_factor": FLUX["shift_factor"],
                    "training": None},
    "base": {"source": "imported", "checkpoint": "checkpoints/made"},
    "sft": {"steps": 2},
    "train": {"num_steps": 1},
    "evaluate": {"prompts": 2},
}


def deep(values: dict, change: dict) -> dict:
    """`change` over `values`, mapping by mapping."""
    return {**values, **{k: deep(values.get(k) or {}, v) if isinstance(v, dict) else v for k, v in change.items()}}


def project(folder: Path, few: dict) -> Path:
    """A project root with the params of this one, `small` reduced, and runs for adapters and precision."""
    shutil.copytree(ROOT / "params", folder / "params", dirs_exist_ok=True)
    small = yaml.safe_load((ROOT / "params" / "scales" / "small.yaml").read_text())
    write_scale(folder, "small", deep(small, few))
    (folder / "params" / "runs.yaml").write_text(yaml.safe_dump(RUNS))
    return folder


def write_scale(folder: Path, name: str, values: dict) -> None:
    """A file of params/scales/."""
    (folder / "params" / "scales" / f"{name}.yaml").write_text(yaml.safe_dump(values))


@dataclass
class Graph:
    """A graph as it runs: seconds and results of every step.

    Attributes: root: the project. scale: of it. rows: (step, seconds). results: step -> what it returned.
    """

    root: Path
    scale: str
    rows: list[tuple[str, float]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def step(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step and keep its seconds."""
        print(f"{self.scale}: {name}", flush=True)
        start = time.perf_counter()
        self.results[name] = function(*args, **kwargs)
        self.rows.append((name, time.perf_counter() - start))
        return self.results[name]

    def stage(self, name: str, module: Any, **arguments: Any) -> dict[str, float]:
        """Run a stage function."""
        return self.step(name, module.run, self.scale, root=self.root, **arguments)

    def checkpoint(self, name: str) -> Path:
        """The checkpoint folder of "base", "sft" or "<run>/<seed>"."""
        return self.root / "artifacts" / self.scale / name / "checkpoint"

    def generate(self, checkpoint: Path, output: str) -> Path:
        """Four images of a prompt through the command; the folder they are in."""
        prompt = load_config(self.scale, root=self.root).rollout.system_prompt
        folder = self.root / output
        status = command(["generate", "--checkpoint", str(checkpoint), "--output", str(folder), "--prompt", "one red circle",
                          "--think", "--system-prompt", prompt, "--max-thinking-tokens", "44", "--num-images", "4",
                          "--steps", "8", "--device", "cpu", "--height", "32", "--width", "32"])
        assert status == 0
        return folder

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(seconds for _, seconds in self.rows)


def small_graph(root: Path) -> Graph:
    """Prompts, autoencoder and base model, warm-up, training of all weights and of adapters, evaluations, report, images."""
    graph = Graph(root, "small")
    graph.stage("curate", curate)
    graph.stage("base", base)
    graph.stage("sft", sft)
    graph.stage("train unigrpo", train, run="unigrpo", seed=0)
    graph.stage("train lora", train, run="lora", seed=0)
    for name in ("base", "sft", "unigrpo/0", "lora/0"):
        graph.stage(f"evaluate {name}", evaluate, checkpoint=name)
    graph.stage("report", report)
    graph.step("generate", graph.generate, graph.checkpoint("unigrpo/0"), "images")
    return graph


def released_graph(root: Path) -> Graph:
    """A made release: imported, warmed up, trained, evaluated, exported, imported again, and the same pictures drawn."""
    write_scale(root, "released", deep(yaml.safe_load((root / "params" / "scales" / "small.yaml").read_text()), RELEASED))
    graph = Graph(root, "released")
    made, release, first, again = (root / "checkpoints" / name for name in ("source", "release", "made", "again"))
    save_release_source(root, made)
    graph.step("export of the made model", export_release, made, release)
    assert graph.step("import-bagel", command, ["import-bagel", str(release), "--output", str(first)]) == 0
    graph.stage("curate", curate)
    graph.stage("base (imported)", base)
    graph.stage("sft", sft)
    graph.stage("train unigrpo", train, run="unigrpo", seed=0)
    graph.stage("evaluate unigrpo/0", evaluate, checkpoint="unigrpo/0")
    trained = graph.checkpoint("unigrpo/0")
    assert graph.step("export", command, ["export", str(trained), str(root / "exported")]) == 0
    assert graph.step("import of the export", command, ["import-bagel", str(root / "exported"), "--output", str(again)]) == 0
    graph.step("generate, trained", graph.generate, trained, "released-images")
    graph.step("generate, imported", graph.generate, again, "again-images")
    return graph


def save_release_source(root: Path, folder: Path) -> None:
    """Random weights in a shape that BAGEL's layout can hold."""
    config = load_config("released", root=root)
    policy = fresh_policy(config)
    assert config.autoencoder is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.autoencoder = Autoencoder(config.autoencoder.model_dump(exclude={"posterior", "training"}))
    save_policy(folder, policy)


def page(graphs: list[Graph], parameters: int, threads: int) -> str:
    """The measured seconds as a page."""
    lines = ["# The whole graph of scale `small`", "",
             f"Every stage at the scale's own size ({parameters / 1e6:.0f}M parameters, 32-pixel images, latents of its own "
             f"autoencoder) with few steps, as `make test-slow` runs it, on {platform.machine()}, {threads} thread(s), torch "
             f"{torch.__version__}. It shows that every line runs and what a step costs, and nothing about quality.", ""]
    titles = {"small": f"Its own graph: {FEW['autoencoder']['training']['steps']} steps of the autoencoder, "
                       f"{FEW['base']['steps']} of base, {FEW['sft']['steps']} of sft, {FEW['train']['num_steps']} of each "
                       f"training, {FEW['evaluate']['prompts']} prompts an evaluation.",
              "released": "A release in BAGEL's layout, made here with random weights of that size: imported as the base, "
                          "warmed up, trained, exported and imported again, after which the same seed draws the same bytes."}
    for graph in graphs:
        lines += [titles[graph.scale], "", "| step | m:ss |", "|---|---|"]
        lines += [f"| {name} | {duration(seconds)} |" for name, seconds in graph.rows]
        lines += [f"| all | {duration(graph.seconds)} |", ""]
    return "\n".join([*lines, "    python tests/whole_graph.py --write docs/benchmarks/small_graph.md"]) + "\n"


def main() -> int:
    """Both graphs; the page goes to a file or to the terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="compute.threads; the scale's own by default")
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="unigrpo-small-"))
    try:
        root = project(folder, FEW if args.threads is None else {**FEW, "compute": {"threads": args.threads}})
        graphs = [small_graph(root), released_graph(root)]
        metrics = graphs[0].results["base"]
        parameters = sum(p.numel() for p in fresh_policy(load_config("small", root=root)).model.parameters())
        text = page(graphs, parameters, load_config("small", root=root).compute.threads)
        print({name: round(value, 4) for name, value in metrics.items() if not name.startswith("cost/")})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.write is None:
        print(text)
    else:
        args.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
