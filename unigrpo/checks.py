"""What a command looks at before it begins: files that can be read, folders that can be written, and room on the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from unigrpo.sealed import MANIFEST, seal_problems
from unigrpo.tensorfiles import read_header, read_json

SPARE = 1.02  # of the bytes to be written: configs, tokenizer and a file system's own


def check_checkpoint(folder: Path) -> None:
    """Every JSON and safetensors file of a checkpoint folder can be read, and every file is as it was written.

    What the files hold is the readers' to judge; those of libraries name neither file nor reason where one is cut off. A
    folder without a manifest, which an import or another program wrote, has nothing to be compared with.

    Raises: ValueError naming a folder that is not there, or a file that is empty, truncated or damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"a checkpoint must be a folder, and there is none at {folder}")
    for path in sorted(p for part in (folder, folder / "autoencoder", folder / "adapter") if part.is_dir()
                       for p in part.iterdir() if p.is_file()):
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            read_header(path)
    if (folder / MANIFEST).exists() and (problems := seal_problems(folder)):
        named = "; ".join(f"{folder / problem}" for problem in problems)
        raise ValueError(f"{folder} is not what was written: {named}; fetch it again or rerun the stage that makes it. If the "
                         f"change is meant, remove {folder / MANIFEST}")


def check_output(folder: Path, size: int = 0) -> None:
    """A folder can be made, or written into if it is there, and its disk has room for `size` bytes.

    Raises: ValueError naming the folder in the way, or the bytes that are missing.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{folder} cannot be made: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: no permission in {place}; give another folder")
    free = shutil.disk_usage(place).free
    if free < size * SPARE:
        raise ValueError(f"{folder} needs {size * SPARE / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left; free some, "
                         "or give another folder")
