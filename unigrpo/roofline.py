"""How long a phase takes at best: its floating-point operations against a GPU's arithmetic, its bytes against its bandwidth.

    seconds = max(FLOP / (peak * COMPUTE_SHARE), bytes / (bandwidth * BANDWIDTH_SHARE))

Weights and caches are bfloat16 (2 bytes). Checked against counts of the released model in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from unigrpo.config import Config
from unigrpo.cost import layer_parameters
from unigrpo.evaluate import GRID, cell_images
from unigrpo.evaluation.outcomes import HEADLINE
from unigrpo.flow.guidance import model_calls
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.mot import MoTConfig
from unigrpo.schema import RolloutConfig
from unigrpo.schema_benchmarks import SHAPES

COMPUTE_SHARE = 0.4  # of the peak: what well-tuned training of models of this size reaches (PaLM arXiv:2204.02311: 0.46)
BANDWIDTH_SHARE = 0.7  # of the peak: what decoding one token at a time reaches
BYTES = 2  # of a bfloat16 number


@dataclass(frozen=True)
class Gpu:
    """One accelerator. flops: dense bfloat16, FLOP/s. bandwidth: bytes/s. memory: bytes. source: where the numbers are from."""

    flops: float
    bandwidth: float
    memory: float
    source: str


GPUS = {
    "h200": Gpu(989e12, 4.8e12, 141e9, "NVIDIA H200 datasheet, SXM"),
    "h100": Gpu(989e12, 3.35e12, 80e9, "NVIDIA H100 datasheet, SXM"),
    "a100-80": Gpu(312e12, 2.039e12, 80e9, "NVIDIA A100 80GB datasheet, SXM"),
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved; adds up."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)

    def seconds(self, gpu: Gpu, *, compute: float = COMPUTE_SHARE, bandwidth: float = BANDWIDTH_SHARE) -> float:
        """On one GPU, at the stated shares of its peaks."""
        return max(self.flops / (gpu.flops * compute), self.bytes / (gpu.bandwidth * bandwidth))


def expert_weights(config: MoTConfig) -> int:
    """Weights of one expert set's matrices, all layers."""
    return layer_parameters(config) * config.num_hidden_layers


def head_weights(config: MoTConfig) -> int:
    """Weights of the text head."""
    return config.hidden_size * config.vocab_size


def cache_bytes(config: MoTConfig, itemsize: int = BYTES) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def attention_flops(config: MoTConfig, queries: float, keys: float) -> float:
    """Two products of every query with every key it sees, all layers and heads."""
    return 4.0 * config.hidden_size * config.num_hidden_layers * queries * keys


def decode_step(config: MoTConfig, context: float, rows: int = 1) -> Work:
    """One more text token in each of `rows` rows: the experts' and the head's weights are read once, every cache once."""
    weights = expert_weights(config) + head_weights(config)
    return Work(rows * (2.0 * weights + attention_flops(config, 1, context)),
                BYTES * weights + rows * context * cache_bytes(config))


def image_forward(config: MoTConfig, context: float, rows: int = 1, grid: tuple[int, int] | None = None) -> Work:
    """One denoising call of `rows` images against their caches. Two marker tokens pull in all understanding weights too."""
    height, width = grid or config.grid
    tokens = height * width
    linear = 2.0 * expert_weights(config) * (tokens + 2)
    return Work(rows * (linear + attention_flops(config, tokens + 2, tokens + 2 + context)),
                BYTES * 2 * expert_weights(config) + rows * context * cache_bytes(config))


def packed_forward(config: MoTConfig, text: float, blocks: int, logits: float, rows: int = 1) -> Work:
    """[text | image | image | ...]: each block sees the text and itself; `logits` text tokens go through the head."""
    image = config.grid[0] * config.grid[1] + 2
    flops = 2.0 * expert_weights(config) * (text + blocks * image) + 2.0 * head_weights(config) * logits
    flops += attention_flops(config, text, text / 2) + blocks * attention_flops(config, image, image + text)
    return Work(rows * flops, BYTES * (2 * expert_weights(config) + head_weights(config)))


def passes(*, checkpointing: bool, adapters: bool) -> float:
    """A training step in units of its forward: 1, then 2 backward (gradients of activations and of weights), 1 recomputed.

    Frozen matrices with adapters need no gradient of their own, and the adapters' is small.
    """
    return 1.0 + (1.0 if adapters else 2.0) + (1.0 if checkpointing else 0.0)


@lru_cache(maxsize=8)
def autoencoder_flops(settings: tuple[tuple[str, object], ...], size: tuple[int, int]) -> tuple[float, float]:
    """(encode, decode) of one image of `size` pixels, counted by running the autoencoder on the meta device.

    Args:
        settings: items of Autoencoder's config.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from unigrpo.models.autoencoder import Autoencoder

    counts = []
    with torch.device("meta"), torch.no_grad():
        model = Autoencoder(dict(settings))
        down, channels = model.downsample, model.config["latent_channels"]
        for function, shape in ((model.vae.encode, (1, 3, *size)),
                                (model.vae.decode, (1, channels, size[0] // down, size[1] // down))):
            with FlopCounterMode(display=False) as counter:
                function(torch.empty(shape))
            counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]


def autoencoder_work(config: Config) -> tuple[Work, Work]:
    """(encode, decode) of one image; nothing where pixels are drawn."""
    if config.autoencoder is None:
        return Work(), Work()
    values = config.autoencoder.model_dump(include={"latent_channels", "block_out_channels", "layers_per_block",
                                                    "norm_num_groups"})
    encode, decode = autoencoder_flops(tuple(values.items()), tuple(config.model.image_size))
    return Work(encode), Work(decode)


def window_steps(config: Config) -> int:
    """Denoising steps of a rollout that are trained."""
    window = config.rollout.window
    return window.size if window.kind != "all" else window.range[1] - window.range[0]


@dataclass(frozen=True)
class Loads:
    """Rows a GPU runs at a time, and lengths of what they hold.

    Args:
        prompt, thinking: tokens. rows: of a rollout, on this GPU. batch: of them side by side.
    """

    prompt: int
    thinking: int
    rows: int
    batch: int


def rollout_calls(rollout: RolloutConfig) -> int:
    """Model calls of one image of a rollout."""
    if rollout.guidance_scale <= 1:
        return rollout.num_steps
    return model_calls(sigma_schedule(rollout.num_steps, rollout.shift), rollout.guidance_interval)


def rollout_phases(config: Config, model: MoTConfig, loads: Loads) -> dict[str, tuple[Work, int]]:
    """Phase -> (work of one call, number of calls), of one GPU's share of a training step's rollouts."""
    rollout = config.rollout
    context = loads.prompt + loads.thinking + 2
    turns = -(-loads.rows // loads.batch)
    return {"thinking": (decode_step(model, loads.prompt + loads.thinking / 2, loads.batch), turns * loads.thinking),
            "denoising": (image_forward(model, context, loads.batch), turns * rollout_calls(rollout)),
            "decoding images": (autoencoder_work(config)[1], loads.rows)}


def training_phases(config: Config, model: MoTConfig, loads: Loads) -> dict[str, tuple[Work, int]]:
    """Phase -> (work of one micro-batch, number of micro-batches), of one GPU's share of a training step's updates."""
    blocks, micro = window_steps(config), min(config.train.micro_batch, loads.rows)
    forward = packed_forward(model, loads.prompt + loads.thinking + 1, blocks, loads.thinking, micro)
    count = -(-loads.rows // micro)
    factor = passes(checkpointing=config.train.activation_checkpointing, adapters=config.lora.rank > 0)
    reference = config.objective.image.regularizer != "none" or config.objective.text.kl_weight > 0
    return {"old log-probs": (forward, count), "reference": (forward, count if reference else 0),
            "updates": (forward * factor, count)}


@dataclass(frozen=True)
class Drawn:
    """What an evaluation draws of a benchmark: prompts, images a prompt in the headline cell and in each of the others, cells
    (guidance, thinking)."""

    prompts: int
    images: int
    controls: int
    cells: tuple[tuple[str, str], ...]

    def count(self, cell: tuple[str, str]) -> int:
        """Images a prompt in a cell."""
        return self.images if cell == HEADLINE else self.controls

    @property
    def total(self) -> int:
        """Images in all cells."""
        return self.prompts * sum(map(self.count, self.cells))


def drawn_sets(config: Config) -> dict[str, Drawn]:
    """Benchmark -> what is drawn of it: the shapes world in the whole grid, others in evaluate.cells, of the official sets."""
    settings = config.evaluate
    headline, other = (cell_images(config, cell) for cell in GRID[:2])
    found = {SHAPES: Drawn(settings.prompts, headline, other, GRID)} if SHAPES in settings.benchmarks else {}
    return found | {name: Drawn(prompts, images, images, settings.cells)
                    for name, (prompts, images) in settings.official_counts().items()}


def evaluation_work(config: Config, model: MoTConfig, loads: Loads) -> dict[str, tuple[Work, int]]:
    """Phase -> (work of a call, calls), of a whole evaluation on one GPU: its benchmarks in their cells, without the scorers.

    Thinking is sampled once for every image, whatever the cells, and once more a prompt for the greedy cell.
    """
    settings, context = config.evaluate, loads.prompt + loads.thinking + 2
    guided = model_calls(sigma_schedule(settings.num_steps, config.rollout.shift), settings.guidance_interval)
    phases: dict[str, tuple[Work, int]] = {}
    writing = loads.prompt + loads.thinking / 2
    for name, drawn in drawn_sets(config).items():
        images = drawn.prompts * drawn.images
        batch = min(settings.batch, images)
        turns, shown = -(-images // batch), "" if name == SHAPES else f"{name}, "
        thinking = turns + (-(-drawn.prompts // batch) if any(cell == "greedy" for _, cell in drawn.cells) else 0)
        calls = sum(-(-drawn.prompts * drawn.count(cell) // batch) * (guided if cell[0] == "on" else settings.num_steps)
                    for cell in drawn.cells)
        phases |= {f"{shown}thinking": (decode_step(model, writing, batch), thinking * loads.thinking),
                   f"{shown}denoising": (image_forward(model, context, batch), calls),
                   f"{shown}decoding images": (autoencoder_work(config)[1], drawn.total)}
    return phases


def warmup_phases(config: Config, model: MoTConfig, loads: Loads) -> dict[str, tuple[Work, int]]:
    """Phase -> (work of a call, calls), of one GPU's share of a step of the sft stage: `rows` texts, `batch` a forward."""
    settings, text = config.sft, loads.prompt + loads.thinking
    forward = packed_forward(model, text, settings.images_per_text, text, loads.batch)
    factor = passes(checkpointing=settings.activation_checkpointing, adapters=False)
    return {"encoding images": (autoencoder_work(config)[0], loads.rows),
            "updates": (forward * factor, -(-loads.rows // loads.batch))}
