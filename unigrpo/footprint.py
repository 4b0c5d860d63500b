"""What lies in a GPU's memory during RL, part by part, and the nearest settings where it does not fit; of sft and of an
evaluation the sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from unigrpo.adapters import MATRICES
from unigrpo.config import Config
from unigrpo.models.mot import MoTConfig
from unigrpo.rollout import DECODED_PIXELS
from unigrpo.roofline import Gpu, cache_bytes, drawn_sets, layer_parameters, window_steps

USABLE = 0.92  # of a GPU's memory: the rest is CUDA's own and lost between allocations
LOGIT_COPIES = 5  # float32: logits, their log-softmax (kept for the backward pass), and three while the entropy is taken
TARGET_COPIES = 3  # float32, of supervised targets: logits, their log-softmax, the gradient
SAVED_WIDTHS, SAVED_INNER = 14, 4  # kept of a layer for its backward: norms, q, k, v, attention, residuals | the MLP's inner
ALIVE_WIDTHS, ALIVE_INNER = 8, 3  # at once in a layer without gradient: the same, one by one | gate, up, product
ALIVE_PIXELS = 3  # full-resolution tensors at once in the autoencoder's last level, as wide as its input
ADAPTER_RANK = 64  # of the adapters that are proposed (algorithm of the public BAGEL runs with LoRA)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, all but the frozen tables, of the experts that RL trains, of the largest layer, of the
    autoencoder (float32)."""

    total: int
    supervised: int
    trained: int
    layer: int
    autoencoder: int


@dataclass(frozen=True)
class Case:
    """A run on some GPUs: what decides its memory. thinking and prompt: tokens."""

    config: Config
    model: MoTConfig
    sizes: Sizes
    gpus: int
    prompt: int
    thinking: int

    @property
    def rows(self) -> int:
        """Rollouts of a step on one GPU."""
        return -(-self.config.rollout.prompts_per_step * self.config.rollout.group_size // self.gpus)

    @property
    def context(self) -> int:
        """Cached tokens of one rollout while its image is drawn."""
        return self.prompt + self.thinking + 2 + self.model.grid[0] * self.model.grid[1] + 2

    @property
    def batch(self) -> int:
        """Rollouts sampled side by side on one GPU: all, or equal turns of what the token budget lets in."""
        budget = self.config.rollout.token_budget
        limit = self.rows if budget is None else max(1, min(self.rows, budget // self.context))
        turns = -(-self.rows // limit)
        return -(-self.rows // turns)


def adapter_count(config: Config, model: MoTConfig) -> int:
    """Parameters of the adapters: rank * (in + out) for every wrapped matrix."""
    width, inner, kv = model.hidden_size, model.intermediate_size, model.num_key_value_heads * model.head_dim
    outputs = {"q_proj": (width, width), "k_proj": (width, kv), "v_proj": (width, kv), "o_proj": (width, width),
               "gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    matrices = [name for target in config.lora.targets for name in MATRICES[target][1]]
    layer = sum(sum(outputs[name]) for name in matrices) * config.lora.rank
    return layer * model.num_hidden_layers * len(config.train.experts)


def is_spread(case: Case) -> bool:
    """Whether weights are planned as compute.sharding: full has them: on several GPUs, unless adapters are trained."""
    return case.gpus > 1 and case.config.lora.rank == 0


def memory(case: Case) -> dict[str, float]:
    """Part -> bytes on each GPU. What belongs to parameters is spread over the GPUs (see `is_spread`), what belongs to rows is
    not. Spread weights are float32, so they are their own masters; the reference changes places with them, so it is too."""
    config, model, sizes = case.config, case.model, case.sizes
    item = 2 if config.train.precision == "bf16" else 4
    adapters, spread = config.lora.rank > 0, is_spread(case)
    trained = adapter_count(config, model) if adapters else sizes.trained
    separate = config.train.precision == "bf16" and not adapters and not spread  # masters beside the weights
    parts = {
        "weights": 4.0 * sizes.total if spread else item * sizes.total + (4.0 * trained if adapters else 0.0),
        "gradients (fp32)": 4.0 * trained,
        "optimizer (two moments, fp32)": 8.0 * trained,
        "masters (fp32)": 4.0 * trained if separate else 0.0,
        "reference": 0.0 if adapters else 4.0 * trained if spread else float(item * trained),
    }
    if spread:
        parts = {name: value / case.gpus for name, value in parts.items()} | {
            "gathered layers (two)": 2.0 * item * sizes.layer, "gathered embeddings and head": float(item * outer(case)),
            "gradients of a layer": (4.0 + item) * sizes.layer}
    parts["autoencoder"] = 4.0 * sizes.autoencoder

    blocks, image = window_steps(config), model.grid[0] * model.grid[1]
    text, micro = case.prompt + case.thinking + 1, min(config.train.micro_batch, case.rows)
    tokens = text + blocks * (image + 2)
    guided = 2 if config.rollout.guidance_scale > 1 else 1
    if spread:  # each decodes as long as its own longest thinking, so nothing can be gathered meanwhile
        parts["whole weights for sampling"] = float(item * sizes.total)
    return parts | {
        "trajectories": case.rows * (4.0 * blocks + 1) * image * model.token_channels * 4,
        "caches of a rollout": float(case.batch * case.context * cache_bytes(model, item) * guided),
        "activations of denoising": denoising(model, case.context, item, case.batch),
        "decoding images": decoding(config, case.rows),
        "activations of a micro-batch": float(micro * tokens * kept(model, item, config.train.activation_checkpointing)),
        "attention mask": float(micro * tokens * tokens * (1 + item)),  # and once more as the kernel's bias
        "logits": float(micro * case.thinking * model.vocab_size * 4 * LOGIT_COPIES),
    }


def outer(case: Case) -> int:
    """Parameters outside of the layers: embeddings, head, encoder of images."""
    return case.sizes.total - case.model.num_hidden_layers * case.sizes.layer


def denoising(model: MoTConfig, context: int, item: int, rows: int) -> float:
    """Bytes of a layer's activations, at once, while the images of `rows` contexts are denoised."""
    image = model.grid[0] * model.grid[1] + 2
    alive = (ALIVE_WIDTHS * model.hidden_size + ALIVE_INNER * model.intermediate_size) * item
    expanded = 2 * model.num_attention_heads * model.head_dim * item  # keys and values, where a mask is needed
    return float(rows * (image * alive + context * expanded))


def kept(model: MoTConfig, item: int, checkpointing: bool) -> int:
    """Bytes a token keeps for the backward pass: of every layer, or of one and the inputs of all."""
    layer = (SAVED_WIDTHS * model.hidden_size + SAVED_INNER * model.intermediate_size) * item
    return model.hidden_size * item * model.num_hidden_layers + layer if checkpointing else layer * model.num_hidden_layers


def decoding(config: Config, images: int) -> float:
    """Bytes alive while the autoencoder decodes, some of the images at a time."""
    if config.autoencoder is None:
        return 0.0
    widths = config.autoencoder.block_out_channels
    return _full_resolution(config, images, widths[min(1, len(widths) - 1)])


def encoding(config: Config, images: int) -> float:
    """Bytes alive while the autoencoder encodes, some of the images at a time: its first level is the widest in bytes."""
    return 0.0 if config.autoencoder is None else _full_resolution(config, images, config.autoencoder.block_out_channels[0])


def _full_resolution(config: Config, images: int, width: int) -> float:
    """ALIVE_PIXELS float32 tensors of that many channels, for the images that go through the autoencoder together."""
    pixels = config.model.image_size[0] * config.model.image_size[1]
    return float(min(images, max(1, DECODED_PIXELS // pixels)) * pixels * 4 * ALIVE_PIXELS * width)


def warmup_rows(config: Config, gpus: int) -> tuple[int, int]:
    """(texts of an sft step on one GPU, texts of one forward there)."""
    rows = -(-config.sft.texts_per_step // gpus)
    return rows, min(config.sft.micro_batch or rows, rows)


def warmup_memory(case: Case) -> float:
    """Bytes on each GPU at the peak of the sft stage: float32 weights, gradients and moments, and one micro-batch."""
    settings, model = case.config.sft, case.model
    rows, micro = warmup_rows(case.config, case.gpus)
    text, image = case.prompt + case.thinking + 2, model.grid[0] * model.grid[1] + 2
    tokens = text + settings.images_per_text * image
    item = 2 if settings.precision == "bf16" else 4
    batch = tokens * kept(model, 4, settings.activation_checkpointing) + tokens**2 * (1 + item)
    batch += case.thinking * model.vocab_size * 4 * TARGET_COPIES
    states = (4.0 * case.sizes.total + 12.0 * case.sizes.supervised) / case.gpus
    states += 4.0 * case.sizes.autoencoder
    if case.gpus > 1:  # two gathered layers, a layer's gradients twice, embeddings and head
        states += 4 * 4.0 * case.sizes.layer + 4.0 * outer(case)
    return states + max(micro * batch, encoding(case.config, rows))


def warmup_gpus(case: Case, gpu: Gpu) -> int | None:
    """The fewest GPUs (a power of two up to 64) that hold the sft stage, or None."""
    counts = (2**n for n in range(7))
    return next((n for n in counts if warmup_memory(replace(case, gpus=n)) <= USABLE * gpu.memory), None)


def evaluation_memory(case: Case) -> float:
    """Bytes on a GPU that draws evaluate.batch images side by side with guidance, from weights as training left them."""
    config, model = case.config, case.model
    item = 2 if config.train.precision == "bf16" else 4
    rows = min(config.evaluate.batch, max(drawn.prompts * drawn.images for drawn in drawn_sets(config).values()))
    drawn = denoising(model, case.context, item, rows) + 2.0 * rows * case.context * cache_bytes(model, item)
    return float(item * case.sizes.total) + 4.0 * case.sizes.autoencoder + max(drawn, decoding(config, rows))


MOMENTS = {"sampling": ("whole weights for sampling", "caches of a rollout", "activations of denoising"),
           "decoding": ("whole weights for sampling", "decoding images"),
           "updating": ("activations of a micro-batch", "attention mask", "logits", "gathered layers (two)",
                        "gathered embeddings and head", "gradients of a layer")}
"""Moment of a training step -> the parts alive in it alone; all others are there all the time."""


def peak(parts: dict[str, float]) -> float:
    """Bytes at the worst of three moments: sampling, decoding what was sampled, and the update of a micro-batch."""
    always = sum(value for name, value in parts.items() if not any(name in names for names in MOMENTS.values()))
    return always + _alive(parts, worst(parts))


def worst(parts: dict[str, float]) -> str:
    """The moment of the peak."""
    return max(MOMENTS, key=lambda moment: _alive(parts, moment))


def _alive(parts: dict[str, float], moment: str) -> float:
    return sum(parts.get(name, 0.0) for name in MOMENTS[moment])


def fits(case: Case, gpu: Gpu) -> bool:
    """Whether the peak is inside the usable part of a GPU's memory."""
    return peak(memory(case)) <= USABLE * gpu.memory


def changed(case: Case, **values: Any) -> Case:
    """The case with other settings: micro_batch, token_budget, checkpointing, precision, lora_rank, gpus."""
    config = case.config
    train = {key: values[name] for name, key in (("micro_batch", "micro_batch"), ("precision", "precision"),
                                                 ("checkpointing", "activation_checkpointing")) if name in values}
    update: dict[str, Any] = {"train": config.train.model_copy(update=train)}
    if "token_budget" in values:
        update["rollout"] = config.rollout.model_copy(update={"token_budget": values["token_budget"]})
    if "lora_rank" in values:
        update["lora"] = config.lora.model_copy(update={"rank": values["lora_rank"]})
    return replace(case, config=config.model_copy(update=update), gpus=values.get("gpus", case.gpus))


def alternatives(case: Case) -> dict[str, list[Any]]:
    """Setting -> other values, nearest first."""
    config = case.config
    update = config.rollout.prompts_per_step // config.train.updates_per_rollout * config.rollout.group_size
    rollouts = config.rollout.prompts_per_step * config.rollout.group_size
    out: dict[str, list[Any]] = {
        "micro_batch": [n for n in range(config.train.micro_batch - 1, 0, -1) if update % n == 0],
        "checkpointing": [] if config.train.activation_checkpointing else [True],
        "token_budget": [case.context * n for n in (case.batch // 2, case.batch // 4, case.batch // 8, 1)
                         if 0 < n < case.batch],
        "precision": ["bf16"] if config.train.precision == "fp32" else [],
        "gpus": [n for n in (2, 4, 8, 16, 32, 64) if n > case.gpus and rollouts % n == 0],
        "lora_rank": [] if config.lora.rank else [ADAPTER_RANK],
    }
    return {name: values for name, values in out.items() if values}


def nearest(case: Case, gpu: Gpu, *, wanted: int = 4) -> list[dict[str, Any]]:
    """The fewest changes that fit, up to `wanted` of them, and the fewest that need no other number of GPUs."""
    options = alternatives(case)
    found = _fewest(case, gpu, options)
    if all("gpus" in values for values in found):
        found = found[:wanted - 1] + _fewest(case, gpu, {name: values for name, values in options.items() if name != "gpus"})
    return found[:wanted]


def _fewest(case: Case, gpu: Gpu, options: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """What fits with one setting changed, or with two, three or four: the first of these that has any."""
    for count in range(1, 5):
        found = [fit for names in itertools.combinations(options, count)
                 if (fit := next(_fitting(case, gpu, {name: options[name] for name in names}), None)) is not None]
        if found:
            return found
    return []


def _fitting(case: Case, gpu: Gpu, options: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Combinations of the options' values that fit, nearest values first."""
    for combination in itertools.product(*options.values()):
        values = dict(zip(options, combination, strict=True))
        if fits(changed(case, **values), gpu):
            yield values


KEYS = {"micro_batch": "train.micro_batch", "checkpointing": "train.activation_checkpointing", "precision": "train.precision",
        "token_budget": "rollout.token_budget", "lora_rank": "lora.rank", "gpus": "--gpus"}


def refuse(case: Case, gpu: Gpu, name: str) -> str:
    """Why a run does not fit, and what does: one line each."""
    parts = memory(case)
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    lines = [f"{case.config.scale} needs {peak(parts) / 1e9:.0f} GB on each of {case.gpus} GPUs, and {name} has "
             f"{USABLE * gpu.memory / 1e9:.0f} GB to use ({USABLE:.0%} of {gpu.memory / 1e9:.0f}); the largest parts: "
             + ", ".join(f"{part} {value / 1e9:.1f} GB" for part, value in largest)]
    found = nearest(case, gpu)
    lines += ["the nearest settings that fit:" if found else "no combination of micro-batch, adapters, precision, token budget "
              "and up to 64 GPUs fits; take a smaller image or a shorter thinking"]
    for values in found:
        needs = peak(memory(changed(case, **values))) / 1e9
        lines.append("  " + ", ".join(f"{KEYS[key]} {str(value).lower()}" for key, value in values.items())
                     + f"   ({needs:.0f} GB)")
    return "\n".join(lines)


def layer_sizes(model: MoTConfig) -> int:
    """Parameters of one layer, both experts."""
    return 2 * layer_parameters(model)
