"""From a checkpoint folder to a policy and back: device, precision, autoencoder and adapters in one place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from unigrpo.adapters import detached, has_adapters, load_adapter, save_adapter
from unigrpo.checkpoint import SOURCE_FILE, load_autoencoder, load_checkpoint, save_checkpoint
from unigrpo.checks import check_checkpoint
from unigrpo.rollout import BagelPolicy
from unigrpo.schema import Config
from unigrpo.sealed import seal, sync

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_device(wanted: str) -> torch.device:
    """compute.device as a device; `auto` is the first GPU where there is one.

    Raises: ValueError where cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device=cuda, and this machine (or this build of torch) has no GPU; set it to auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_policy(folder: Path, config: Config, *, dtype: torch.dtype | None = None, **options: Any) -> BagelPolicy:
    """The policy of a checkpoint folder, with its autoencoder and its adapters where it has any.

    Args:
        dtype: of the weights; as stored by default. options: further arguments of BagelPolicy.
    Raises: ValueError naming what the folder lacks, or where it has no autoencoder and the params name one.
    """
    device = compute_device(config.compute.device)
    if folder.is_dir():  # libraries name neither file nor reason where one is cut off
        check_checkpoint(folder)
    model, tokenizer = load_checkpoint(folder, device=device, dtype=dtype)
    if (folder / "adapter").is_dir():
        load_adapter(model, folder / "adapter")
    autoencoder = load_autoencoder(folder)
    if (autoencoder is None) != (config.autoencoder is None):
        raise ValueError(f"{folder} {'has no' if autoencoder is None else 'has an'} autoencoder/ folder and the section "
                         f"autoencoder of params is {'null' if config.autoencoder is None else 'set'}; rerun the base stage")
    if autoencoder is not None:
        autoencoder.to(device)
    return BagelPolicy(model, tokenizer, system_prompt=config.rollout.system_prompt, autoencoder=autoencoder, **options)


def save_policy(folder: Path, policy: BagelPolicy, *, origin: Path | None = None) -> None:
    """Write a checkpoint folder: weights under official keys, autoencoder/ and adapter/ beside them where there are any.

    Adapters are not merged: the weights keep the bytes they were loaded with. The folder takes its name when all of it is on
    the disk; its manifest holds the sha256 of every file, which `load_policy` compares.

    Args:
        origin: the checkpoint that was trained. Where it was imported, the record of its release goes along, so that an
            export can name the repository.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    with detached(policy.model):
        save_checkpoint(partial, policy.model, policy.tokenizer)
    if policy.autoencoder is not None:
        policy.autoencoder.save(partial / "autoencoder")
    if has_adapters(policy.model):
        save_adapter(partial / "adapter", policy.model)
    if origin is not None and (origin / SOURCE_FILE).is_file():
        shutil.copyfile(origin / SOURCE_FILE, partial / SOURCE_FILE)
    seal(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
