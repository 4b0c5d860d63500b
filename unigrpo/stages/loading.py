"""From a checkpoint folder to a policy and back: device, precision, autoencoder and adapters in one place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from unigrpo.adapters import AdapterState, detached, has_adapters, load_adapter, save_adapter
from unigrpo.checkpoint import (
    SOURCE_FILE,
    load_autoencoder,
    load_checkpoint,
    restore_optimizers,
    save_checkpoint,
    training_files,
    write_training_state,
)
from unigrpo.checks import check_checkpoint
from unigrpo.distributed import ALONE, World
from unigrpo.rollout import BagelPolicy
from unigrpo.schema import Config
from unigrpo.sealed import seal, sync

if TYPE_CHECKING:
    from unigrpo.sharding import ShardedPolicy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_device(wanted: str) -> torch.device:
    """compute.device as a device; `auto` is the first GPU where there is one.

    Raises: ValueError where cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device=cuda, and this machine (or this build of torch) has no GPU; set it to auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_policy(folder: Path, config: Config, *, dtype: torch.dtype | None = None, on_cpu: bool = False,
                **options: Any) -> BagelPolicy:
    """The policy of a checkpoint folder, with its autoencoder and its adapters where it has any.

    Args:
        dtype: of the weights; as stored by default. options: further arguments of BagelPolicy.
        on_cpu: the weights are maps of the file there, as stored, until `spread` takes its rows of each.
    Raises: ValueError naming what the folder lacks, or where it has no autoencoder and the params name one.
    """
    device = compute_device(config.compute.device)
    if folder.is_dir():  # libraries name neither file nor reason where one is cut off
        check_checkpoint(folder)
    model, tokenizer = load_checkpoint(folder) if on_cpu else load_checkpoint(folder, device=device, dtype=dtype)
    if (folder / "adapter").is_dir():
        load_adapter(model, folder / "adapter")
    autoencoder = load_autoencoder(folder)
    if (autoencoder is None) != (config.autoencoder is None):
        raise ValueError(f"{folder} {'has no' if autoencoder is None else 'has an'} autoencoder/ folder and the section "
                         f"autoencoder of params is {'null' if config.autoencoder is None else 'set'}; rerun the base stage")
    if autoencoder is not None:
        autoencoder.to(device)
    return BagelPolicy(model, tokenizer, system_prompt=config.rollout.system_prompt, autoencoder=autoencoder, **options)


def is_spread(config: Config, world: World) -> bool:
    """Whether the weights that a stage trains are spread over its processes."""
    return config.compute.sharding == "full" and world.size > 1


def spread(policy: BagelPolicy, world: World, rounding: torch.dtype | None = None) -> BagelPolicy:
    """The policy with its weights spread over the processes. See unigrpo.sharding, which is slow to import."""
    from unigrpo.sharding import ShardedPolicy

    return ShardedPolicy(policy, world, rounding=rounding)


def masters(policy: BagelPolicy, config: Config, world: World) -> BagelPolicy:
    """The policy with float32 weights for supervised training; with precision bf16, matrix products round them."""
    if is_spread(config, world):
        return spread(policy, world)
    policy.model.float()
    return policy


def trained_part(policy: BagelPolicy) -> nn.Module:
    """What a resume folder holds: the model, or of an adapted model its adapters."""
    return AdapterState(policy.model) if has_adapters(policy.model) else policy.model


def save_progress(folder: Path, step: int, policy: BagelPolicy, optimizers: Sequence[torch.optim.Optimizer],
                  state: Callable[[dict[str, Tensor]], dict[str, Any]], world: World) -> None:
    """Write a training state after `step` steps; all processes call this, the main one writes.

    Args:
        state: JSON of anything else, given the reference's weights; asked in the main process.
    """
    files: dict[str, dict[str, Tensor]] = {}
    if policy.sharded:
        files = cast("ShardedPolicy", policy).training_files(optimizers)
    elif world.main:
        files = training_files(trained_part(policy), optimizers, policy.reference_weights)
    if world.main:
        write_training_state(folder, step, files, state(files["extra"]))
    world.wait()  # writing may take longer than the others would wait in the next step


def restore_progress(policy: BagelPolicy, optimizers: Sequence[torch.optim.Optimizer],
                     tensors: dict[str, dict[str, Tensor]]) -> None:
    """The weights, the reference and the optimizers of a training state, whatever layout wrote it."""
    if policy.sharded:
        cast("ShardedPolicy", policy).restore(tensors, optimizers)
        return
    trained_part(policy).load_state_dict(tensors["model"])
    policy.reference_weights = {name: value.to(policy.model.device) for name, value in tensors["extra"].items()}
    restore_optimizers(optimizers, tensors["optimizer"])


def save_policy(folder: Path, policy: BagelPolicy, *, origin: Path | None = None, dtype: torch.dtype | None = None,
                world: World = ALONE) -> None:
    """Write a checkpoint folder: weights under official keys, autoencoder/ and adapter/ beside them where there are any.

    All processes call this, the main one writes.

    Adapters are not merged: the weights keep the bytes they were loaded with. The folder takes its name when all of it is on
    the disk; its manifest holds the sha256 of every file, which `load_policy` compares.

    Args:
        origin: the checkpoint that was trained. Where it was imported, the record of its release goes along, so that an
            export can name the repository.
        dtype: of the weights; by default as they are, or as they are gathered.
    """
    tensors = None
    if policy.sharded:
        tensors = cast("ShardedPolicy", policy).whole_weights(dtype)
    elif dtype is not None:
        policy.model.to(dtype)  # type: ignore[arg-type]
    if not world.main:
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    with detached(policy.model):
        save_checkpoint(partial, policy.model, policy.tokenizer, tensors)
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
