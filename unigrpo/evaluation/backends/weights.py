"""Released models as local folders: found or fetched, safetensors only, known by the sha256 of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unigrpo.digests import sha256_json, sha256_path

FETCHED = ["*.json", "*.txt", "*.safetensors", "*.model"]  # neither pickles nor other frameworks' weights


def model_folder(name: str | Path) -> Path:
    """The folder of a model in Hugging Face format: the one named, or a copy of the hub's repository of that name.

    Raises: ValueError if there is no such folder and no such repository (or no network), or if it holds no config.json or no
        safetensors (pickled weights are never read).
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetch(str(name))
    if not (folder / "config.json").is_file():
        raise ValueError(f"a model folder must hold config.json, and {folder} does not; give a folder in Hugging Face format")
    if not list(weight_files(folder)):
        raise ValueError(f"a model folder must hold its weights as *.safetensors, and {folder} does not; pickled weights "
                         "(.bin, .pt, .pth) are not read, as loading one runs its code: convert them first")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that the model's loader reads: model.safetensors, or the shards of that name."""
    return sorted(folder.glob("model.safetensors")) or sorted(folder.glob("model-*.safetensors"))


def weights_sha256(folder: Path) -> str:
    """64 hex digits: the digest of the weights file, or of the list of names and digests of several, with the config's."""
    parts = [folder / "config.json", *weight_files(folder)]
    return sha256_json([[path.name, sha256_path(path)] for path in parts])


def check_complete(model: Any, info: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError if a parameter was not in the file and so is random, or had another shape.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
    """
    parameters = {name for name, _ in model.named_parameters()}  # buffers are computed, and older files lack some
    lost = sorted({key if isinstance(key, str) else key[0] for key in [*info["missing_keys"], *info["mismatched_keys"]]}
                  & parameters)
    if lost:
        raise ValueError(f"the weights of {folder} lack {len(lost)} tensors that its config.json wants, {lost[0]} among them; "
                         "they would be random: give the whole model")


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers: for commands, which show progress of their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_device(device: str) -> str:
    """cpu or cuda, as given. Raises ValueError for another name, or for a GPU that is not there."""
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"a scorer's device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and this machine (or this build of torch) has no GPU; use --device cpu")
    return device


@contextmanager
def exact_float32() -> Iterator[None]:
    """No reduced precision in convolutions and matrix products on a GPU (torch allows TF32 in convolutions by default)."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _fetch(name: str) -> Path:
    """The hub's repository as a local folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"{name!r} is neither a folder nor a model that huggingface_hub can get "
                         f"({type(error).__name__}: {str(error).splitlines()[0]:.200}); download the model where there is a "
                         "network and give its folder") from error
