"""Rollout and LoRA update of the BAGEL-7B-MoT shape with random bfloat16 weights on one GPU: seconds, images/s, memory, MFU.

    python benchmarks/bagel_7b_gpu.py [--group 8] [--micro-batch 1] [--write FILE.md]

Without a GPU it runs scale `small` in float32 on the CPU and says so: that shows that every line runs, not how fast.
FLOPs are the model's own (unigrpo.cost): padding, and the forward that activation checkpointing repeats, do not count. A LoRA
update counts two forwards: the forward, and the backward through activations; frozen weights have no gradient.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from unigrpo.adapters import adapter_parameters, add_lora
from unigrpo.config import Config, load_config
from unigrpo.cost import replay_flops, rollout_flops
from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.embeddings import PositionTable, sincos_table
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.rollout import BagelPolicy
from unigrpo.roofline import GPUS
from unigrpo.seeding import generator
from unigrpo.types import PromptRecord, Rollouts
from unigrpo.worlds.shapes import sample_record, vocabulary

ROOT = Path(__file__).parents[1]
BAGEL_VOCABULARY = 152_064


def random_policy(config: Config, *, vocabulary_size: int, device: torch.device, dtype: torch.dtype) -> BagelPolicy:
    """The scale's model, autoencoder and adapters with random weights, made on the device; its thinking never stops."""
    tokenizer = word_tokenizer(vocabulary())
    with torch.device("meta"):
        model = MoTModel(MoTConfig(vocab_size=max(vocabulary_size, len(tokenizer)), **config.model.model_dump()))
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0)                                         # norms, and biases, whose value costs no time
        for module in model.modules():
            if isinstance(module, PositionTable):
                places, width = module.pos_embed.shape
                module.pos_embed.copy_(sincos_table(round(places**0.5), width))
    settings = config.autoencoder
    assert settings is not None
    values = settings.model_dump(include={"latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups"})
    autoencoder = Autoencoder({**values, "scaling_factor": 1.0, "shift_factor": 0.0}).to(device=device, dtype=dtype)
    policy = BagelPolicy(model, tokenizer, system_prompt="plan first then draw", autoencoder=autoencoder)
    policy.special = replace(policy.special, eos=-1)                         # an id that is never drawn
    add_lora(model, rank=config.lora.rank or 64, alpha=config.lora.alpha, targets=config.lora.targets,
             experts=config.train.experts, seed=0)
    model.activation_checkpointing_enable()
    return policy


def timed(function: Callable[[], Rollouts | None], device: torch.device, repeats: int) -> tuple[float, Rollouts | None]:
    """Best seconds of several calls after a first that is not counted, and the last result."""
    seconds, result = [], function()
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def update(policy: BagelPolicy, rollouts: Rollouts, optimizer: torch.optim.Optimizer, micro_batch: int) -> None:
    """One optimizer step over all rollouts: replay with gradient, micro-batch by micro-batch."""
    policy.model.train()
    for rows in rollouts.chunks(micro_batch):
        replay = policy.replay(rollouts.select(rows))
        (replay.velocities.square().mean() + replay.text_log_probs.sum() / max(1, replay.text_log_probs.numel())).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    policy.model.eval()


def measure(policy: BagelPolicy, config: Config, prompts: Sequence[PromptRecord], args: argparse.Namespace, *, pixels: int,
            thinking: int, peak: float | None) -> list[str]:
    """One row of the table."""
    model = policy.model
    model.config.image_size = (pixels, pixels)
    sampling = config.rollout.model_copy(update={"max_thinking_tokens": thinking, "token_budget": args.token_budget})
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rollout_seconds, rollouts = timed(lambda: policy.generate(
        prompts, group_size=args.group, sampling=sampling, generators=lambda purpose, *key: generator(0, purpose, *key)),
        model.device, args.repeats)
    assert rollouts is not None
    sampled = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    decode_seconds, _ = timed(lambda: policy.decode(rollouts.image.final_latents) is None or None, model.device, args.repeats)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-5)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    update_seconds, _ = timed(lambda: update(policy, rollouts, optimizer, args.micro_batch), model.device, args.repeats)
    updated = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    prefix, window = float(rollouts.prompt_lengths.float().mean()), len(rollouts.image.steps)
    flops = (rollout_flops(model.config, rollouts=args.group, prompt_tokens=prefix, thinking_tokens=thinking + 1, prompts=1,
                           model_calls=args.group * sampling.num_steps),
             2 * replay_flops(model.config, rollouts=args.group, text_tokens=prefix + thinking + 1, thinking_tokens=thinking,
                              window=window))
    share = [f"{100 * count / seconds / peak:.0f} %" if peak else "–"
             for count, seconds in zip(flops, (rollout_seconds, update_seconds), strict=True)]
    memory = [f"{m / 2**30:.1f}" if m else "–" for m in (sampled, updated)]
    return [str(pixels), str(thinking), f"{rollout_seconds:.2f}", f"{args.group / rollout_seconds:.2f}", share[0], memory[0],
            f"{decode_seconds:.2f}", f"{update_seconds:.2f}", f"{args.group / update_seconds:.2f}", share[1], memory[1]]


def table(args: argparse.Namespace) -> Iterator[str]:
    """Lines of the page; a row is yielded as soon as it is measured."""
    cuda = torch.cuda.is_available() and not args.cpu
    scale = "bagel_7b" if cuda else "small"
    config = load_config(scale, run="unigrpo", root=ROOT)
    device = torch.device("cuda" if cuda else "cpu")
    policy = random_policy(config, vocabulary_size=BAGEL_VOCABULARY if cuda else 0, device=device,
                           dtype=torch.bfloat16 if cuda else torch.float32)
    name = torch.cuda.get_device_name() if cuda else ""
    peak = next((gpu.flops for key, gpu in GPUS.items() if key.split("-")[0] in name.lower()), None)
    parameters = sum(p.numel() for key, p in policy.model.named_parameters() if ".lora_" not in key)
    yield from ["# One GPU: rollout and LoRA update of BAGEL-7B-MoT's shape" if cuda else
                "# Rollout and LoRA update on a CPU (no GPU here: scale `small`, which shows only that it runs)", ""]
    rank = config.lora.rank or 64
    yield (f"{parameters / 1e6:,.0f}M random parameters, {'bfloat16' if cuda else 'float32'}, {name or 'CPU'}, torch "
           f"{torch.__version__}. One prompt, group {args.group}, {config.rollout.num_steps} denoising steps, update in "
           f"micro-batches of {args.micro_batch} with activation checkpointing, adapters of rank {rank}; best "
           f"of {args.repeats} after one that warms up. Memory in GiB.")
    yield from ["", "| px | thinking | rollout s | images/s | MFU | memory | decode s | update s | images/s | MFU | memory |",
                "|" + "---|" * 11]
    prompts = [sample_record(generator(0, "benchmark-prompt"))]
    sides = args.pixels or ([512, 1024] if cuda else [max(config.model.image_size)])
    for pixels in sides:
        for thinking in args.thinking or ([0, 256, 512] if cuda else [0, 16, 32]):
            row = measure(policy, config, prompts, args, pixels=pixels, thinking=thinking, peak=peak)
            yield "| " + " | ".join(row) + " |"
    yield from ["", "    " + " ".join(["python benchmarks/bagel_7b_gpu.py", *sys.argv[1:]]), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--pixels", type=int, nargs="+", help="512 1024 on a GPU, the scale's own size on a CPU")
    parser.add_argument("--thinking", type=int, nargs="+", help="tokens: 0 256 512 on a GPU, 0 16 32 on a CPU")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--cpu", action="store_true", help="scale small even where there is a GPU")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    args = parser.parse_args()
    lines = []
    for line in table(args):
        print(line, flush=True)
        lines.append(line)
    if args.write is not None:
        args.write.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
