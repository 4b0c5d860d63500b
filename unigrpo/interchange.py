"""Between the official layout and our checkpoint folders: import and export, tensor by tensor, byte for byte.

Both write into a temporary folder beside the result and rename it when it is whole. Memory holds one tensor of the model at
a time, and the autoencoder.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigrpo.checks import check_checkpoint, check_output
from unigrpo.digests import sha256_path
from unigrpo.models import official
from unigrpo.models.configuration import MoTConfig
from unigrpo.tensorfiles import DTYPES, TensorFiles, raise_problems, read_json, shape_problems, write_tensors

Report = Callable[[str], None]
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # of a release that was exported here
HUB_FILES = ("ema.safetensors", "ema-*.safetensors", "model-*.safetensors", "*.index.json", "ae.safetensors",
             official.LLM_FILE, official.VIT_FILE, *official.TOKENIZER_FILES, *official.TOKENIZER_EXTRAS, *ADAPTER_FILES)
WEIGHTS = "weights_sha256"  # in source.json: of the model.safetensors that an import wrote, by which an export knows it again
BASE_MODEL = "ByteDance-Seed/BAGEL-7B-MoT"


def fetch(source: str, *, revision: str | None = None) -> Path:
    """The folder of a release: `source` itself, or a snapshot of a hub repository, whose download goes on where it stopped.

    Args:
        source: a folder, or "owner/name". revision: of the repository: a commit, branch or tag.
    Raises: ValueError if it is neither, or the hub cannot be reached or does not have it, or a folder is given a revision.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"--revision={revision} is of a hub repository, and {source} is a folder here; leave it out")
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"the source must be the folder of a release, and {source} is a file; give the folder it lies in")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"the source must be a folder, or a hub repository such as {BASE_MODEL}, got {source!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES)))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"no folder {source}, and the hub's repository of that name could not be fetched ({error}); download "
                         "it on a machine with a network and give its folder") from error


def import_release(source: Path, output: Path, *, digests: Mapping[str, str] | None = None, finite: bool = True,
                   origin: Mapping[str, str] | None = None, report: Report = print) -> MoTConfig:
    """Check a release and write our checkpoint folder from it.

    The folder's bytes depend on the release's tensors, configs and tokenizer alone: running twice writes the same, and a
    finished import of the same files is left as it is. `source.json` holds the sha256 of the released files
    and of the model.safetensors that was written, and the two configs.

    Args:
        source: a folder in the official layout, its adapter/ taken along where it has one. output: the checkpoint folder.
        digests: sha256 in hex by file name; each must be a file of the release and match.
        finite: check that every number is finite. origin: kept in source.json (repository, revision).
        report: is told what happens, a line at a time.
    Returns: the model's configuration.
    Raises: ValueError naming everything that is missing or does not fit, or an `output` that holds something else.
    """
    from unigrpo.checkpoint import SOURCE_FILE

    release = official.Release(source)
    report(f"{source}: {len(release.model.entries)} tensors, {size_text(release.model.size)}, and the autoencoder's "
           f"{len(release.autoencoder.entries)}: keys, shapes and types are right")
    if not output.exists():
        check_output(output, release.model.size + release.autoencoder.size)
    adapters = [name for name in ADAPTER_FILES if (source / name).is_file()]
    if adapters:
        merged_reader(release.model, source / "adapter")
    record = {"layout": "BAGEL", **dict(origin or {}), "llm_config": release.llm, "vit_config": release.vit,
              "sha256": _digests(release, [*release.files, *adapters], digests or {}, report)}
    if output.exists():
        known = read_json(output / SOURCE_FILE) if (output / SOURCE_FILE).is_file() else {}
        if {k: v for k, v in known.items() if k != WEIGHTS} == json.loads(json.dumps(record)):
            report(f"{output} holds this import already")
            return release.config
        raise ValueError(f"{output} exists and is not an import of these files; remove it or give another --output")
    if finite:
        _check_finite(release.autoencoder, official.AUTOENCODER_FILE)

    def read(name: str) -> Tensor:
        tensor = release.model.read(name)
        if finite:
            _refuse_non_finite(name, tensor)
        return tensor

    with whole_folder(output) as folder:
        from unigrpo.checkpoint import write_config
        from unigrpo.models.autoencoder import Autoencoder

        write_tensors(folder / "model.safetensors", {n: (e.dtype, e.shape) for n, e in release.model.entries.items()}, read,
                      _progress("copied", report))
        Autoencoder.from_official({n: release.autoencoder.read(n) for n in release.autoencoder.entries}).save(
            folder / "autoencoder")
        write_config(folder, release.config)
        if adapters:
            (folder / "adapter").mkdir()
        for name in (*release.tokenizer_files, *adapters):
            shutil.copyfile(source / name, folder / name)
        record[WEIGHTS] = sha256_path(folder / "model.safetensors")
        (folder / SOURCE_FILE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    report(f"wrote {output}")
    return release.config


def export_release(checkpoint: Path, output: Path, *, merge: bool = False, report: Report = print) -> None:
    """Write a checkpoint in the official layout, tensors byte for byte, with a model card.

    Args:
        checkpoint: of a BAGEL model, imported or trained from an imported one. output: a folder that does not exist yet.
        merge: add the adapters to the weights, W + (alpha / rank) B A in float32, rounded to the weights' type. Without,
            adapters are exported as they are, as `adapter/` in PEFT's format.
    Raises: ValueError naming what is missing or does not fit.
    """
    from unigrpo.checkpoint import SOURCE_FILE, load_autoencoder, read_config

    if output.exists():
        raise ValueError(f"{output} exists; remove it or give another folder")
    check_checkpoint(checkpoint)
    config = read_config(checkpoint)
    files = TensorFiles.find(checkpoint, "model.safetensors")
    check_output(output, files.size)
    dtype = str(DTYPES[files.entries["language_model.lm_head.weight"].dtype]).removeprefix("torch.") \
        if "language_model.lm_head.weight" in files.entries else "bfloat16"
    llm, vit = official.released_configs(config, dtype)
    official.check_tensors(files, official.model_shapes(config), f"{checkpoint / 'model.safetensors'} does not fit its "
                           "config.json", free=official.TABLES)
    autoencoder = load_autoencoder(checkpoint)
    if autoencoder is None:
        raise ValueError(f"{checkpoint} has no autoencoder/ folder, which the official layout includes")
    adapter = checkpoint / "adapter"
    if merge and not adapter.is_dir():
        raise ValueError(f"--merge needs adapters, and {checkpoint} has no adapter/ folder")
    source = read_json(checkpoint / SOURCE_FILE) if (checkpoint / SOURCE_FILE).is_file() else {}
    read = merged_reader(files, adapter) if merge else files.read
    with whole_folder(output) as folder:
        from unigrpo.models.autoencoder import to_official

        write_tensors(folder / official.MODEL_FILE, {n: (e.dtype, e.shape) for n, e in files.entries.items()}, read,
                      _progress("exported", report))
        vae = to_official(autoencoder.vae.state_dict())
        types = {value: key for key, value in DTYPES.items()}
        write_tensors(folder / official.AUTOENCODER_FILE, {n: (types[t.dtype], tuple(t.shape)) for n, t in vae.items()},
                      vae.__getitem__)
        for name, ours, theirs in ((official.LLM_FILE, llm, source.get("llm_config")),
                                   (official.VIT_FILE, vit, source.get("vit_config"))):
            # What the release states and we do not use stays; what we use is ours, unless it is only forced by the loaders.
            forced = {"tie_word_embeddings", "qk_norm", "layer_module", "rope", "initializer_range", "architectures"}
            values = {**ours, **theirs, **{k: v for k, v in ours.items() if k not in forced}} if theirs else ours
            (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in (*official.TOKENIZER_FILES, *official.TOKENIZER_EXTRAS):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
        official.check_tokenizer(folder, config.vocab_size)
        if adapter.is_dir() and not merge:
            shutil.copytree(adapter, folder / "adapter")
        (folder / "README.md").write_text(model_card(checkpoint, config, source, merge=merge), encoding="utf-8")
    report(f"wrote {output}")


def merged_reader(files: TensorFiles, adapter: Path) -> Callable[[str], Tensor]:
    """A reader that adds a PEFT folder's low-rank matrices to the weights they belong to.

    Raises: ValueError naming a missing file, a kind of adapter that is not plain LoRA, and adapters of unknown or
        misshapen matrices.
    """
    from unigrpo.adapters import CONFIG_FILE, PREFIX, WEIGHTS_FILE

    settings = read_json(adapter / CONFIG_FILE) if (adapter / CONFIG_FILE).is_file() else {}
    plain = settings.get("peft_type") == "LORA" and settings.get("bias") == "none" and not any(
        settings.get(key) for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
                                      "modules_to_save"))
    if not plain:
        raise ValueError(f"{adapter / CONFIG_FILE} must describe plain LoRA adapters, without biases and patterns")
    scale, low_rank = settings["lora_alpha"] / settings["r"], TensorFiles.find(adapter, WEIGHTS_FILE)
    found: dict[str, tuple[int, ...]] = {n: entry.shape for n, entry in low_rank.entries.items()}
    wanted = {}
    for name in {re.sub(r"\.lora_[AB]\.weight$", "", n) for n in found}:
        base = files.entries.get(f"{name.removeprefix(PREFIX)}.weight")
        if base is not None:
            wanted[f"{name}.lora_A.weight"] = (settings["r"], base.shape[1])
            wanted[f"{name}.lora_B.weight"] = (base.shape[0], settings["r"])
    raise_problems(f"{adapter / WEIGHTS_FILE} does not fit the checkpoint", shape_problems(wanted, found))

    def read(name: str) -> Tensor:
        weight = files.read(name)
        place = PREFIX + name.removesuffix(".weight")
        if f"{place}.lora_A.weight" not in found:
            return weight
        down, up = (low_rank.read(f"{place}.lora_{part}.weight").float() for part in "AB")
        return (weight.float() + scale * (up @ down)).to(weight.dtype)

    return read


def model_card(checkpoint: Path, config: MoTConfig, source: Mapping[str, Any], *, merge: bool) -> str:
    """README.md of an export: what it is, where it comes from, how it was trained, its licence and measured metrics."""
    tensors = official.model_shapes(config)
    parameters = sum(math.prod(shape) for shape in tensors.values())
    metrics: dict[str, float] = {}
    for place in (checkpoint / "metrics.json", checkpoint.parent / "metrics.json"):
        if place.is_file() and not metrics:
            metrics = {k: v for k, v in read_json(place).items() if isinstance(v, int | float)}
    adapter = checkpoint / "adapter" / "adapter_config.json"
    lora = read_json(adapter) if adapter.is_file() else {}
    place = checkpoint.resolve()
    run = " ".join(place.parts[-4:-1]).removeprefix("artifacts ") if place.name == "checkpoint" else place.name
    released = WEIGHTS in source and source[WEIGHTS] == sha256_path(checkpoint / "model.safetensors")
    if released and not lora:
        how = "Not trained further: the tensors are the released ones, byte for byte."
    else:
        how = (f"Stage output `{run}` of `unigrpo`, which trains reasoning text and image generation together with UniGRPO "
               "(arXiv 2603.23500). The run's parameters are in the project that made it, under `params/`.")
    if lora:
        where = "merged into the weights" if merge else ("in `adapter/`, in PEFT's format; the weights in `ema.safetensors` "
                                                         "are without them")
        how += f" LoRA adapters of rank {lora.get('r')}, alpha {lora.get('lora_alpha')}, are {where}."
    revision = f", revision `{source['revision']}`" if "revision" in source else ""
    lines = [
        "---", "license: apache-2.0", f"base_model: {BASE_MODEL}", "pipeline_tag: any-to-any", "tags: [bagel, unigrpo]", "---",
        "",
        f"# {run}", "",
        f"A BAGEL Mixture-of-Transformers model (arXiv 2505.14683): {parameters:,} parameters in {len(tensors):,} tensors, in "
        "the layout of the official release.", "", "## Base model", "",
        f"`{source.get('repository', BASE_MODEL)}`{revision}.", "", "## Training", "", how, "", "## Use", "",
        "`unigrpo import-bagel` reads this folder; its files have the names and keys that the official code loads.", "",
        "## Licence", "",
        "The released BAGEL-7B-MoT weights are under Apache 2.0; its language model derives from Qwen2.5, its vision tower "
        "from SigLIP and its autoencoder from FLUX.1-schnell, all Apache 2.0. The licence of data it was trained on further "
        "is the trainer's to state."]
    if metrics:
        lines += ["", "## Measured", "", "| metric | value |", "|---|---|"]
        lines += [f"| `{name}` | {value:.6g} |" for name, value in sorted(metrics.items())]
    return "\n".join(lines) + "\n"


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends without an error, and vanishes otherwise."""
    output = output.absolute()
    partial = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_digests(path: Path) -> dict[str, str]:
    """File name -> sha256 from lines as sha256sum writes them. Raises ValueError naming a line that is none."""
    out = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            match = re.fullmatch(r"([0-9a-fA-F]{64})[ *]+(.+)", line.strip())
            if not match:
                raise ValueError(f"{path}, line {number} must be a sha256 and a file name, got {line!r}")
            out[Path(match[2]).name] = match[1]
    if not out:
        raise ValueError(f"{path} must hold lines of a sha256 and a file name, and it holds none")
    return out


def _digests(release: official.Release, names: Sequence[str], wanted: Mapping[str, str], report: Report) -> dict[str, str]:
    """sha256 of every file of the release, compared with those given."""
    raise_problems(f"sha256 given for files that {release.folder} does not use", sorted(wanted.keys() - set(names)))
    found, problems = {}, []
    for name in names:
        found[name] = sha256_path(release.folder / name)
        right = name not in wanted or wanted[name].lower() == found[name]
        if not right:
            problems.append(f"{name} must have sha256 {wanted[name].lower()}, got {found[name]}")
        report(f"sha256 {found[name]} {name}{' (as wanted)' if name in wanted and right else ''}")
    raise_problems(f"{release.folder} holds other files than wanted; fetch them again", problems)
    return found


def _check_finite(files: TensorFiles, what: str) -> None:
    for name in files.entries:
        _refuse_non_finite(f"{name} of {what}", files.read(name))


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"tensor {name} has numbers that are not finite; fetch the file again, or import with "
                         "--no-finite-check")


def size_text(size: int) -> str:
    """Bytes as gigabytes, or as megabytes where they are fewer."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _progress(verb: str, report: Report) -> Callable[[int, int], None]:
    """A line each tenth of the bytes."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total > told:
            told = done * 10 // total
            report(f"{verb} {size_text(done)} of {size_text(total)}")

    return progress
