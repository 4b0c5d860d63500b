"""Checkpoints: a folder with config.json, model.safetensors under official keys and the tokenizer's files. No pickle.

Training state lies in the stage's resume folder while it runs: `state`, the newest, and `state.old`, the one before. Writing
is atomic: a folder has its final name when all of it is on the disk. Its manifest holds the sha256 of every file, and a state
is read only if all of them agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.sealed import disk_full, seal, seal_problems, sync
from unigrpo.tensorfiles import DTYPES, METADATA, TensorFiles, raise_problems, read_json, shape_problems

STATES = ("state", "state.old")  # of a resume folder, newest first
SOURCE_FILE = "source.json"  # beside imported weights: repository, revision, sha256 and configs of the release
CONFIG_EXTRAS = ("model_type", "transformers_version", "architectures", "dtype", "tie_word_embeddings")


def save_checkpoint(folder: Path, model: MoTModel, tokenizer: PreTrainedTokenizerBase,
                    tensors: dict[str, Tensor] | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files. tensors: the weights, where the model has not all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, model.config)
    weights = model.state_dict() if tensors is None else tensors
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata=METADATA)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # a reloaded tokenizer remembers where it came from; its bytes must not
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def write_config(folder: Path, config: MoTConfig) -> None:
    """Write a model's config.json."""
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True, default=str) + "\n")


def read_config(folder: Path) -> MoTConfig:
    """Read a checkpoint folder's config.json. Raises ValueError if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"a checkpoint folder must hold config.json, and {folder} does not; rerun the stage that makes it")
    values = {k: v for k, v in read_json(folder / "config.json").items() if k not in CONFIG_EXTRAS}
    try:
        return MoTConfig(**values)
    except Exception as error:  # transformers has many
        raise ValueError(f"{folder / 'config.json'} must describe a model: {error}") from error


def load_checkpoint(folder: Path, *, device: torch.device | str = "cpu",
                    dtype: torch.dtype | None = None) -> tuple[MoTModel, PreTrainedTokenizerBase]:
    """Read a checkpoint folder; the model is built on the meta device and its tensors are assigned.

    On the CPU and as stored, tensors are maps of the file: its pages are read on first use and held once a node, however many
    processes load it. Towards another device or type tensors are read one by one, so a process holds its result and one
    tensor, and nothing stays mapped.

    Args:
        device: where the weights go. dtype: of the weights; as stored by default.
    Raises: ValueError naming a missing file or shard, and every missing, extra or misshapen tensor.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"a checkpoint folder must hold {name}, and {folder} does not; rerun the stage that makes it")
    files = TensorFiles.find(folder, "model.safetensors")
    config = read_config(folder)
    raise_problems(f"{folder / 'config.json'} does not fit model.safetensors", size_problems(config, files))
    try:
        with torch.device("meta"):
            model = MoTModel(config)
    except Exception as error:  # heads of no width, sizes that are texts, ...
        raise ValueError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    raise_problems(f"{folder / 'model.safetensors'} does not fit its config.json",
                   shape_problems(shapes, {name: entry.shape for name, entry in files.entries.items()}))
    as_stored = torch.device(device).type == "cpu" and all(
        dtype in (None, DTYPES[entry.dtype]) for entry in files.entries.values())
    model.load_state_dict(files.mapped() if as_stored else files.converted(device, dtype), assign=True)
    return model.eval(), load_tokenizer(folder)


def size_problems(config: MoTConfig, files: TensorFiles) -> list[str]:
    """Sizes in which a config differs from the tensors beside it: a wrong one may ask for a model that no machine builds."""
    entries = files.entries
    layers = {match[1] for name in entries if (match := re.match(r"language_model\.model\.layers\.(\d+)\.", name))}
    found = {"num_hidden_layers": len(layers)} if layers else {}
    for name, axis, key in (("language_model.model.embed_tokens.weight", 0, "vocab_size"),
                            ("language_model.model.embed_tokens.weight", 1, "hidden_size"),
                            ("language_model.model.layers.0.mlp.gate_proj.weight", 0, "intermediate_size")):
        if name in entries and len(entries[name].shape) == 2:
            found[key] = entries[name].shape[axis]
    for name, key in (("latent_pos_embed.pos_embed", "max_latent_size"), ("vit_pos_embed.pos_embed", "vit_max_patches")):
        if name in entries and entries[name].shape:
            found[key] = math.isqrt(entries[name].shape[0])
    return [f"{key} must be {size}, as the tensors have it, got {getattr(config, key)!r}" for key, size in found.items()
            if getattr(config, key) != size]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises ValueError naming it if it cannot be read."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)  # libraries name neither file nor reason
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the tokenizers' Rust code
            raise
        raise ValueError(f"{folder / 'tokenizer.json'} and tokenizer_config.json must be a tokenizer's: {error}") from error


def load_autoencoder(folder: Path) -> Autoencoder | None:
    """The autoencoder of a checkpoint folder, or None where it has none."""
    return Autoencoder.from_folder(folder / "autoencoder") if (folder / "autoencoder").is_dir() else None


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All state of the optimizers, flat: `<optimizer>.<parameter>.<name>`."""
    out = {}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"optimizer state {name} must be a tensor, got {type(value).__name__}")
                out[f"{i}.{index}.{name}"] = value
    return out


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; parameter groups keep the values of today's config."""
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == i:
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def training_files(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
                   extra: dict[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
    """The tensors of a training state by file."""
    return {"model": dict(model.state_dict()), "optimizer": optimizer_tensors(optimizers), "extra": extra or {}}


def save_training_state(folder: Path, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
                        state: dict[str, Any], extra: dict[str, Tensor] | None = None) -> None:
    """`write_training_state` of a model that is whole. extra: further tensors (the reference's weights)."""
    write_training_state(folder, step, training_files(model, optimizers, extra), state)


def write_training_state(folder: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write everything a stage needs to go on after `step` steps. The state before it is kept, and is replaced only when
    this one is whole. Where the disk has no room for three, the older of the two that are there gives its own.

    Args:
        folder: the stage's resume folder. files: see `training_files`. state: JSON of anything else (curves so far, counters).
    Raises: OSError or SafetensorError of a disk that is full all the same; the states that were there are as they were.
    """
    partial, final, old = folder / "state.partial", folder / STATES[0], folder / STATES[1]
    try:
        _write_state(partial, files, {"step": step, **state})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not disk_full(error) or not old.exists() or not final.exists() or seal_problems(final):
            raise
        print(f"{folder}: no room for a third training state; {old.name} is removed for it", file=sys.stderr, flush=True)
        shutil.rmtree(old)
        try:
            _write_state(partial, files, {"step": step, **state})
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    sync(folder)


def _write_state(folder: Path, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """A state's files, and its manifest last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors", metadata=METADATA)
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)


def load_training_state(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """The newest whole state of a resume folder: state.json and the tensors of model, optimizer and extra; None if none.

    A state that is not what was written is refused by name, with what differs, and set aside as `<name>.damaged`, so that
    the next save does not put it in the place of the one before it, which is used.
    """
    refused = 0
    for path in (folder / name for name in STATES):
        if not path.exists():
            continue
        if problems := seal_problems(path):
            refused += 1
            print(f"{path} is damaged and not used: {'; '.join(problems)}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):  # another process of the stage may have done it
                shutil.rmtree(aside := path.with_name(f"{path.name}.damaged"), ignore_errors=True)
                path.rename(aside)
            continue
        state = read_json(path / "state.json")
        if refused:
            print(f"{path}, the state before it, is whole: going on after step {state['step']}", file=sys.stderr, flush=True)
        return state, {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "extra")}
    if refused:
        print(f"{folder} holds no whole state: starting from the beginning", file=sys.stderr, flush=True)
    return None
