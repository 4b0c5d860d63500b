"""The base stage with a released checkpoint: its settings are compared with params, its files are linked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from unigrpo.schema import Config
from unigrpo.sealed import MANIFEST, seal

# What a run chooses and no tensor depends on: taken from params, whatever the checkpoint's config.json says.
CHOSEN = ("image_size", "timestep_shift", "min_sigma", "initializer_range", "attention_dropout")


def import_base(source: Path, folder: Path, config: Config) -> dict[str, float]:
    """Make `folder` the base checkpoint: the source's files, hard-linked where the file system allows, and its own config.

    Args:
        source: a checkpoint folder, as `unigrpo import-bagel` writes it.
    Returns: metrics: bytes and files.
    Raises: ValueError naming a missing file, and every setting in which checkpoint and params differ.
    """
    if not (source / "config.json").is_file():
        raise ValueError(f"base.checkpoint must be a folder that `unigrpo import-bagel` wrote, and {source} holds no "
                         f"config.json; run it, or change base.checkpoint in params/scales/{config.scale}.yaml")
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    problems = model_differences(settings, config)
    vae = source / "autoencoder" / "config.json"
    found = json.loads(vae.read_text(encoding="utf-8")) if vae.is_file() else None
    problems += autoencoder_differences(found, config)
    if problems:
        raise ValueError(f"{source} is another model than params/scales/{config.scale}.yaml describes:\n- "
                         + "\n- ".join(problems))
    shutil.rmtree(folder, ignore_errors=True)
    size, files = 0, 0
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        link(path, target)
        size, files = size + path.stat().st_size, files + 1
    settings |= {name: getattr(config.model, name) for name in CHOSEN}
    (folder / "config.json").unlink()  # a link: the source keeps its own
    (folder / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / MANIFEST).unlink(missing_ok=True)
    seal(folder)
    return {"model/files": float(files), "model/bytes": float(size)}


def link(path: Path, target: Path) -> None:
    """A hard link, or a copy across file systems."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def model_differences(settings: dict[str, Any], config: Config) -> list[str]:
    """What config.json and params disagree on."""
    unread = ("vit_max_patches",) if config.model.vision is None else ()
    wanted = {k: v for k, v in config.model.model_dump(mode="json").items() if k not in CHOSEN + unread}
    out = []
    for name, value in wanted.items():
        given = settings.get(name)
        if isinstance(value, dict) and isinstance(given, dict):  # an encoder may state more than params name
            out += [f"model.{name}.{key} is {part!r} in params and {given.get(key)!r} in config.json"
                    for key, part in value.items() if given.get(key) != part]
        elif given != value:
            out.append(f"model.{name} is {value!r} in params and {given!r} in config.json")
    return out


def autoencoder_differences(settings: dict[str, Any] | None, config: Config) -> list[str]:
    """What autoencoder/config.json and params disagree on."""
    wanted = config.autoencoder
    if wanted is None or settings is None:
        return [] if wanted is settings else [f"the section autoencoder is {'null' if wanted is None else 'set'} in params "
                                              f"and the checkpoint has {'an' if settings else 'no'} autoencoder/ folder"]
    values = wanted.model_dump(mode="json", exclude={"posterior", "training"})
    return [f"autoencoder.{name} is {value!r} in params and {settings.get(name)!r} in autoencoder/config.json"
            for name, value in values.items() if settings.get(name) != value]
