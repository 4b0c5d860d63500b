"""The layout BAGEL-7B-MoT is released in: which files, which tensors, and the settings that its files do not state.

`ema.safetensors` (one file or shards), `ae.safetensors`, `llm_config.json`, `vit_config.json` and the files of a Qwen2.5
tokenizer. The official loaders override some of what the two configs say, and hard-code the rest:

    vision tower              one layer fewer is built than vit_config.json counts (the last but one layer is read out)
    max_latent_size           64 (the class default, 32, is another model's)
    query and key norms       always; embeddings never tied
    beginning of text         <|im_start|> by name, not llm_config.json's bos_token_id
    autoencoder               FLUX.1's geometry, scale 0.3611, shift 0.1159

Source: ByteDance-Seed/Bagel (app.py, inference notebook, modeling/autoencoder.py), BAGEL arXiv 2505.14683.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unigrpo.models.bagel import BOS, EOS, IMAGE_END, IMAGE_START, PAD
from unigrpo.models.configuration import MoTConfig
from unigrpo.models.embeddings import TIME_FREQUENCIES
from unigrpo.tensorfiles import TensorFiles, raise_problems, read_json, shape_problems

Shapes = dict[str, tuple[int, ...]]

MODEL_FILE, AUTOENCODER_FILE, LLM_FILE, VIT_FILE = "ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json"
MODEL_INDEXES = ("ema.safetensors.index.json", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_EXTRAS = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
MARKERS = (BOS, EOS, IMAGE_START, IMAGE_END, PAD)
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")  # frozen; stored values are kept as they are

FORCED: dict[str, Any] = {"latent_channels": 16, "latent_patch_size": 2, "latent_downsample": 8, "max_latent_size": 64,
                          "vit_max_patches": 70, "prediction": "velocity"}
LLM_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "rope_theta")
VIT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
CHANNEL_MULTIPLES, BLOCKS = (1, 2, 4, 4), 2  # of the autoencoder
FLOATS = ("BF16", "F16", "F32")


def settings(llm: Mapping[str, Any], vit: Mapping[str, Any]) -> MoTConfig:
    """The model that the two released config files describe, with what the official loaders force.

    Args:
        llm: llm_config.json. vit: vit_config.json, whose num_hidden_layers is one more than is built.
    Raises: ValueError naming each key that is missing, impossible, or describes a variant that BAGEL is not.
    """
    problems = [f"{LLM_FILE} lacks {key}" for key in LLM_KEYS if key not in llm]
    problems += [f"{VIT_FILE} lacks {key}" for key in VIT_KEYS if key not in vit]
    raise_problems("the released configs are incomplete", problems)
    for file, config in ((LLM_FILE, llm), (VIT_FILE, vit)):
        if config["hidden_size"] % config["num_attention_heads"]:
            problems.append(f"{file}: num_attention_heads={config['num_attention_heads']} must divide "
                            f"hidden_size={config['hidden_size']}")
    if llm["num_attention_heads"] % llm["num_key_value_heads"]:
        problems.append(f"{LLM_FILE}: num_key_value_heads={llm['num_key_value_heads']} must divide "
                        f"num_attention_heads={llm['num_attention_heads']}")
    if vit["num_hidden_layers"] < 2:
        problems.append(f"{VIT_FILE}: num_hidden_layers must be at least 2, one more than is built, got "
                        f"{vit['num_hidden_layers']}")
    wanted = ((LLM_FILE, llm, "hidden_act", "silu"), (LLM_FILE, llm, "use_sliding_window", False),
              (LLM_FILE, llm, "rope_scaling", None), (VIT_FILE, vit, "hidden_act", "gelu_pytorch_tanh"))
    problems += [f"{file}: {key} must be {value!r}, got {config[key]!r}" for file, config, key, value in wanted
                 if config.get(key, value) != value]
    raise_problems("the released configs describe no BAGEL model", problems)
    vision = {key: vit[key] for key in (*VIT_KEYS, "num_channels", "layer_norm_eps") if key in vit}
    vision["num_hidden_layers"] -= 1
    return MoTConfig(**{key: llm[key] for key in LLM_KEYS}, **FORCED, vision=vision)


def released_configs(config: MoTConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inverse of `settings`: llm_config.json and vit_config.json.

    Args:
        dtype: of the tensors, as torch names it ("bfloat16").
    Raises: ValueError naming each setting in which the model is not one of BAGEL's layout.
    """
    problems = [f"{key} must be {value!r}, got {getattr(config, key)!r}" for key, value in FORCED.items()
                if getattr(config, key) != value]
    if config.vision is None:
        problems.append("vision must be set: the layout includes a tower that reads images")
    raise_problems("this model has no official layout; only a BAGEL model, such as an imported one and what is trained from "
                   "it, can be exported. In config.json", problems)
    assert config.vision is not None
    llm = {key: getattr(config, key) for key in LLM_KEYS} | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": False,
        "qk_norm": True, "layer_module": "Qwen2MoTDecoderLayer", "use_sliding_window": False, "attention_dropout": 0.0,
        "initializer_range": config.initializer_range, "max_position_embeddings": 32768, "torch_dtype": dtype}
    vit = dict(config.vision) | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "rope": False,
                                 "attention_dropout": 0.0,
                                 "num_hidden_layers": config.vision["num_hidden_layers"] + 1}
    return llm, vit


def model_shapes(config: MoTConfig) -> Shapes:
    """Every tensor of ema.safetensors and its shape; linear weights are (out, in). 1,223 for BAGEL-7B-MoT.

    Written out here, not asked of the model class, so that each checks the other.
    """
    assert config.vision is not None
    width, wide, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head, keys = config.head_dim, config.num_key_value_heads * config.head_dim
    out: Shapes = {"language_model.model.embed_tokens.weight": (vocab, width), "language_model.lm_head.weight": (vocab, width)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for i in range(config.num_hidden_layers):
        layer = f"language_model.model.layers.{i}"
        for expert in ("", "_moe_gen"):
            for name, size in (("q", width), ("k", keys), ("v", keys)):
                linear(f"{layer}.self_attn.{name}_proj{expert}", size, width)
            out[f"{layer}.self_attn.o_proj{expert}.weight"] = (width, width)
            for name in ("q", "k"):
                out[f"{layer}.self_attn.{name}_norm{expert}.weight"] = (head,)
            for name in ("gate", "up"):
                out[f"{layer}.mlp{expert}.{name}_proj.weight"] = (wide, width)
            out[f"{layer}.mlp{expert}.down_proj.weight"] = (width, wide)
            for name in ("input", "post_attention"):
                out[f"{layer}.{name}_layernorm{expert}.weight"] = (width,)
    for expert in ("", "_moe_gen"):
        out[f"language_model.model.norm{expert}.weight"] = (width,)
    linear("time_embedder.mlp.0", width, TIME_FREQUENCIES)
    linear("time_embedder.mlp.2", width, width)
    linear("vae2llm", width, config.token_channels)
    linear("llm2vae", config.token_channels, width)
    out["latent_pos_embed.pos_embed"] = (config.max_latent_size**2, width)
    out["vit_pos_embed.pos_embed"] = (config.vit_max_patches**2, width)

    vision = config.vision
    size, tower = vision["hidden_size"], "vit_model.vision_model"
    linear(f"{tower}.embeddings.patch_embedding", size, vision["num_channels"] * vision["patch_size"] ** 2)
    out[f"{tower}.embeddings.position_embedding.weight"] = ((vision["image_size"] // vision["patch_size"]) ** 2, size)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for name in ("q", "k", "v", "out"):
            linear(f"{layer}.self_attn.{name}_proj", size, size)
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{layer}.{name}.weight"] = out[f"{layer}.{name}.bias"] = (size,)
        linear(f"{layer}.mlp.fc1", vision["intermediate_size"], size)
        linear(f"{layer}.mlp.fc2", size, vision["intermediate_size"])
    out[f"{tower}.post_layernorm.weight"] = out[f"{tower}.post_layernorm.bias"] = (size,)
    linear("connector.fc1", width, size)
    linear("connector.fc2", width, width)
    return out


def autoencoder_shapes(channels: int = 128, latent_channels: int = 16) -> Shapes:
    """Every tensor of ae.safetensors and its shape: 244, at any width of the first level."""
    out: Shapes = {}

    def conv(name: str, outputs: int, inputs: int, side: int = 3) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (outputs, inputs, side, side), (outputs,)

    def norm(name: str, size: int) -> None:
        out[f"{name}.weight"] = out[f"{name}.bias"] = (size,)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", outputs, inputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", outputs, inputs, 1)

    def middle(side: str, size: int) -> None:
        block(f"{side}.mid.block_1", size, size)
        norm(f"{side}.mid.attn_1.norm", size)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{name}", size, size, 1)
        block(f"{side}.mid.block_2", size, size)

    sizes = [channels * multiple for multiple in CHANNEL_MULTIPLES]
    last = len(sizes) - 1
    conv("encoder.conv_in", channels, 3)
    current = channels
    for i, size in enumerate(sizes):
        for j in range(BLOCKS):
            block(f"encoder.down.{i}.block.{j}", current, size)
            current = size
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", size, size)
    middle("encoder", current)
    norm("encoder.norm_out", current)
    conv("encoder.conv_out", 2 * latent_channels, current)
    conv("decoder.conv_in", current, latent_channels)
    middle("decoder", current)
    for i, size in reversed(list(enumerate(sizes))):
        for j in range(BLOCKS + 1):
            block(f"decoder.up.{i}.block.{j}", current, size)
            current = size
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", size, size)
    norm("decoder.norm_out", current)
    conv("decoder.conv_out", 3, current)
    return out


class Release:
    """A folder of the official layout, opened and checked: every key, shape and type, the configs and the tokenizer.

    Attributes: config: MoTConfig. llm, vit: the two JSON files. model, autoencoder: TensorFiles. files: all files that
        belong to it, sorted by name.
    Raises: ValueError naming what is missing or does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        missing = [name for name in (AUTOENCODER_FILE, LLM_FILE, VIT_FILE, *TOKENIZER_FILES) if not (folder / name).is_file()]
        indexes = [name for name in MODEL_INDEXES if (folder / name).is_file()]
        if not (folder / MODEL_FILE).is_file() and not indexes:
            missing.append(f"{MODEL_FILE} (or {MODEL_INDEXES[0]} and its shards)")
        raise_problems(f"{folder} is no released BAGEL checkpoint", [f"missing file {name}" for name in missing])
        self.llm, self.vit = read_json(folder / LLM_FILE), read_json(folder / VIT_FILE)
        self.config = settings(self.llm, self.vit)
        self.model = TensorFiles.find(folder, MODEL_FILE, index=indexes[0] if indexes else None)
        self.autoencoder = TensorFiles.find(folder, AUTOENCODER_FILE)
        check_tensors(self.model, model_shapes(self.config), f"{folder / MODEL_FILE} does not fit {LLM_FILE} and {VIT_FILE} "
                      f"(of whose layers one fewer is built: {self.vit['num_hidden_layers'] - 1})",
                      free=TABLES)
        first = self.autoencoder.entries.get("encoder.conv_in.weight")
        check_tensors(self.autoencoder, autoencoder_shapes(first.shape[0] if first and first.shape else 128),
                      f"{folder / AUTOENCODER_FILE} is not FLUX.1's autoencoder")
        check_tokenizer(folder, self.config.vocab_size)
        names = [*self.tokenizer_files, LLM_FILE, VIT_FILE, *(p.name for p in (*self.model.paths, *self.autoencoder.paths))]
        if self.model.paths[0].name != MODEL_FILE:
            names.append(indexes[0])
        self.files = sorted(names)

    @property
    def tokenizer_files(self) -> list[str]:
        """Names of the tokenizer's files that are there."""
        return [name for name in (*TOKENIZER_FILES, *TOKENIZER_EXTRAS) if (self.folder / name).is_file()]


def check_tensors(files: TensorFiles, wanted: Shapes, what: str, free: tuple[str, ...] = ()) -> None:
    """Every key and shape, and one floating type for all.

    Args:
        free: tensors that may be of another floating type.
    Raises: ValueError naming every missing, extra and misshapen tensor, and those of another type than most.
    """
    problems = shape_problems(wanted, {name: entry.shape for name, entry in files.entries.items()})
    types = [entry.dtype for entry in files.entries.values()]
    usual = max(sorted(set(types)), key=types.count) if types else ""
    problems += [f"tensor {name} must be of type {usual} as the others, got {entry.dtype}"
                 for name, entry in files.entries.items()
                 if entry.dtype != usual and not (name in free and entry.dtype in FLOATS)]
    if usual not in FLOATS and types:
        problems.append(f"tensors must be of one of the types {', '.join(FLOATS)}, got {usual}")
    raise_problems(what, problems)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """The five markers are known by name and lie within the vocabulary. Raises ValueError naming those that do not."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder / 'tokenizer.json'} must be a readable tokenizer: {error}") from error
    ids = {name: tokenizer.token_to_id(name) for name in MARKERS}
    problems = [f"marker {name} is missing" for name, token in ids.items() if token is None]
    problems += [f"marker {name} has the id {token}, outside the vocabulary of {vocab_size}" for name, token in ids.items()
                 if token is not None and token >= vocab_size]
    raise_problems(f"{folder / 'tokenizer.json'} does not fit BAGEL", problems)
