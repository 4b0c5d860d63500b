"""Checkpoints: a folder with config.json, model.safetensors under official keys and the tokenizer's files. No pickle.

Training state lies beside it while a stage runs: optimizer.safetensors and state.json. Writing is atomic: a folder is
complete and has its final name, or is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unigrpo.models.autoencoder import Autoencoder
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.tensorfiles import DTYPES, METADATA, TensorFiles, raise_problems, shape_problems

SOURCE_FILE = "source.json"  # beside imported weights: repository, revision, sha256 and configs of the release
CONFIG_EXTRAS = ("model_type", "transformers_version", "architectures", "dtype", "tie_word_embeddings")


def save_checkpoint(folder: Path, model: MoTModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write config.json, model.safetensors and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, model.config)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", metadata=METADATA)
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
    return MoTConfig(**{k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in CONFIG_EXTRAS})


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
    with torch.device("meta"):
        model = MoTModel(read_config(folder))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    raise_problems(f"{folder / 'model.safetensors'} does not fit its config.json",
                   shape_problems(shapes, {name: entry.shape for name, entry in files.entries.items()}))
    as_stored = torch.device(device).type == "cpu" and all(
        dtype in (None, DTYPES[entry.dtype]) for entry in files.entries.values())
    model.load_state_dict(files.mapped() if as_stored else files.converted(device, dtype), assign=True)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


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


def save_training_state(folder: Path, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
                        state: dict[str, Any], extra: dict[str, Tensor] | None = None) -> None:
    """Write everything a stage needs to go on after `step` steps; the previous state is replaced only when this one is whole.

    Args:
        folder: the stage's resume folder. state: JSON of anything else (curves so far, counters).
        extra: further tensors (the reference's weights).
    """
    partial, final, old = folder / "state.partial", folder / "state", folder / "state.old"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {"model": dict(model.state_dict()), "optimizer": optimizer_tensors(optimizers), "extra": extra or {}}
    digests = {}
    for name, tensors in files.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial / f"{name}.safetensors", metadata=METADATA)
        digests[name] = file_digest(partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, "sha256": digests, **state}))
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load_training_state(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """The newest whole state of a resume folder: state.json and the tensors of model, optimizer and extra; None if none.

    A state whose digests do not match is refused by name and the previous one is used, if there is one.
    """
    for name in ("state", "state.old"):
        path = folder / name
        if not (path / "state.json").is_file():
            continue
        state = json.loads((path / "state.json").read_text())
        damaged = [n for n, digest in state["sha256"].items() if file_digest(path / f"{n}.safetensors") != digest]
        if damaged:
            print(f"{path} is damaged ({damaged}); not used", flush=True)
            continue
        return state, {n: load_file(path / f"{n}.safetensors") for n in state["sha256"]}
    return None


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
