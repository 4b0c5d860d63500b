"""Makes checkpoints in the official BAGEL layout: the 7B's 1,223 keys (or fewer layers) at shrunk widths, random values."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from unigrpo.models.bagel import BOS, EOS, IMAGE_END, IMAGE_START, PAD
from unigrpo.models.embeddings import sincos_table
from unigrpo.models.official import TABLES, Shapes, autoencoder_shapes, model_shapes, settings

MARKERS = (PAD, BOS, EOS, IMAGE_START, IMAGE_END)
# The release's own numbers of layers and tables; widths are shrunk. 28 heads of 2 become 4 of 8.
LLM: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 28,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 258, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "max_position_embeddings": 32768}
VIT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 27, "num_attention_heads": 2,
                       "patch_size": 14, "image_size": 980, "num_channels": 3}
AE_CHANNELS = 32  # GroupNorm has 32 groups


def qwen_like_tokenizer(markers: tuple[str, ...] = MARKERS) -> Tokenizer:
    """A byte-level BPE tokenizer with one merge; the markers follow the vocabulary, as in Qwen2.5."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "re"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("r", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in markers])
    return tokenizer


def write_tokenizer(folder: Path, markers: tuple[str, ...] = MARKERS) -> None:
    """tokenizer.json, vocab.json, merges.txt and tokenizer_config.json."""
    tokenizer = qwen_like_tokenizer(markers)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": EOS, "pad_token": PAD, "add_prefix_space": False,
         "model_max_length": 32768}))


def random_tensors(shapes: Shapes, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Values of a healthy size: matrices keep a unit scale, norms are near 1, position tables are the rounded sin-cos ones."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        if name in TABLES:
            value = sincos_table(round(shape[0] ** 0.5), shape[1])
        else:
            value = torch.randn(shape, generator=generator)
            value = 1 + 0.05 * value if len(shape) == 1 and name.endswith("weight") else \
                0.05 * value if len(shape) == 1 else value * torch.Size(shape[1:]).numel() ** -0.5
        out[name] = value.to(dtype)
    return out


def write_release(folder: Path, *, llm: dict[str, Any] | None = None, vit: dict[str, Any] | None = None, shards: int = 0,
                  dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A folder in the official layout.

    Args:
        llm, vit: changes to the two configs. shards: 0 writes one ema.safetensors.
    """
    folder.mkdir(parents=True)
    llm, vit = LLM | (llm or {}), VIT | (vit or {})
    tensors = random_tensors(model_shapes(settings(llm, vit)), dtype, seed)
    if shards:
        write_shards(folder, tensors, shards)
    else:
        save_file(tensors, folder / "ema.safetensors", metadata={"format": "pt"})
    save_file(random_tensors(autoencoder_shapes(AE_CHANNELS), torch.float32, seed), folder / "ae.safetensors",
              metadata={"format": "pt"})
    (folder / "llm_config.json").write_text(json.dumps(llm))
    (folder / "vit_config.json").write_text(json.dumps(vit))
    write_tokenizer(folder)
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int, stem: str = "ema") -> None:
    """`stem`-00001-of-0000N.safetensors and their index."""
    names, places = list(tensors), {}
    for i in range(shards):
        shard = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, shard))
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A whole release: the 1,223 keys in one file."""
    return write_release(tmp_path_factory.mktemp("release") / "BAGEL")


def linked(folder: Path, target: Path) -> Path:
    """A copy whose files may be replaced, not written into."""
    return Path(shutil.copytree(folder, target, copy_function=os.link))


def quiet(line: str) -> None:
    """Takes the lines of an import or export."""
