"""safetensors files one tensor at a time: reading single and sharded ones, and writing without holding the model in memory.

The writer's bytes are those of safetensors' own `save_file`: tensors by falling alignment of their type, then by name, so
that the bytes depend on names and values alone. No pickle is ever read or written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

METADATA = {"format": "pt"}  # one key at most: with several, safetensors' bytes depend on the process
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
          "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
RANK = {code: i for i, code in enumerate(DTYPES)}  # safetensors' order of types


@dataclass(frozen=True)
class Entry:
    """A tensor of a file's header: its type as safetensors names it ("BF16"), shape, and place in the file in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFiles:
    """The tensors of a safetensors file, or of all shards that an index lists. Only headers are read here.

    Attributes: entries: name -> Entry. paths: the files, sorted. size: bytes of all tensors.
    """

    def __init__(self, entries: dict[str, Entry], paths: list[Path]) -> None:
        self.entries, self.paths = entries, paths
        self.size = sum(entry.size for entry in entries.values())

    @classmethod
    def find(cls, folder: Path, name: str, *, index: str | None = None) -> TensorFiles:
        """`name` in a folder, or the shards of its index.

        Args:
            name: "model.safetensors". index: the index's name; `name` + ".index.json" by default.
        Raises: ValueError naming the file, or the shard, that is missing or unreadable, and every tensor that index and
            shards place differently.
        """
        index = index or f"{name}.index.json"
        if (folder / name).is_file():
            return cls(read_header(folder / name), [folder / name])
        if not (folder / index).is_file():
            raise ValueError(f"{folder} must hold {name}, or {index} and its shards")
        return cls.sharded(folder / index)

    @classmethod
    def sharded(cls, index: Path) -> TensorFiles:
        """All shards of an index file {"weight_map": {tensor: file}}. Raises ValueError as `find`."""
        try:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} must be JSON with a weight_map: {error!r}") from error
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise ValueError(f"{index} must map each tensor to its file in weight_map, got {str(places)[:80]}")
        shards = sorted(set(places.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{index} must name files beside it, got {shard!r}")
            if not (index.parent / shard).is_file():
                raise ValueError(f"{index} names the shard {shard}, which is missing from {index.parent}")
        found: dict[str, Entry] = {}
        problems = []
        for shard in shards:
            for name, entry in read_header(index.parent / shard).items():
                if places.get(name) != shard:
                    problems.append(f"extra tensor {name} in {shard}, which the index places in {places.get(name, 'no file')}")
                found[name] = entry
        problems += [f"missing tensor {name}, which the index places in {places[name]}" for name in places if name not in found]
        raise_problems(f"{index} does not fit its shards", problems)
        return cls(found, [index.parent / shard for shard in shards])

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own: nothing stays mapped."""
        return self._read_into(name, torch.empty(self.entries[name].size, dtype=torch.uint8))

    def converted(self, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """All tensors on a device, in a type (None: as stored); besides them, memory holds the largest one as stored."""
        scratch = torch.empty(max((entry.size for entry in self.entries.values()), default=0), dtype=torch.uint8)
        return {name: self._read_into(name, scratch[:entry.size]).to(device=device, dtype=dtype, copy=True)
                for name, entry in self.entries.items()}

    def _read_into(self, name: str, buffer: Tensor) -> Tensor:
        """A tensor's bytes into `buffer`, and the view of them that is the tensor."""
        entry = self.entries[name]
        if entry.size:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                view, done = buffer.numpy().data, 0
                while done < entry.size:
                    count = file.readinto(view[done:])
                    if not count:
                        raise ValueError(f"{entry.path} ended inside tensor {name}")
                    done += count
        return buffer.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def mapped(self) -> dict[str, Tensor]:
        """All tensors as private maps of the files: pages are read on first use and shared by all processes of a node."""
        out = {}
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                out.update({name: file.get_tensor(name) for name in file.keys()})
        return out


def read_header(path: Path) -> dict[str, Entry]:
    """name -> Entry of one safetensors file. Raises ValueError if it is truncated, damaged or of an unknown type."""
    try:
        with safe_open(path, framework="pt"):  # checks header, offsets and length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} must be a readable safetensors file: {error}; fetch it again or rerun the stage that makes "
                         "it") from error
    header.pop("__metadata__", None)
    unknown = sorted(name for name, value in header.items() if value["dtype"] not in DTYPES)
    raise_problems(f"{path} has tensors of an unknown type", [f"{name} {header[name]['dtype']}" for name in unknown])
    return {name: Entry(path, value["dtype"], tuple(value["shape"]), 8 + length + value["data_offsets"][0],
                        value["data_offsets"][1] - value["data_offsets"][0]) for name, value in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the tensors (config.json, an index, ...). Raises ValueError if the file is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def shape_problems(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every missing, extra and misshapen tensor in words."""
    out = [f"missing tensor {name} {shape}" for name, shape in wanted.items() if name not in found]
    out += [f"extra tensor {name} {shape}" for name, shape in found.items() if name not in wanted]
    return out + [f"tensor {name} must have shape {shape}, got {found[name]}" for name, shape in wanted.items()
                  if name in found and found[name] != shape]


def raise_problems(what: str, problems: list[str]) -> None:
    """ValueError listing all problems, the first ten in full; nothing if there are none."""
    if problems:
        more = f"\n- and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{what}:\n- " + "\n- ".join(problems[:10]) + more)


def write_tensors(path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], Tensor],
                  report: Callable[[int, int], None] | None = None) -> None:
    """Write a safetensors file tensor by tensor; memory holds one at a time.

    Args:
        entries: name -> (type, shape). read: gives a tensor by name; called once each, in the file's order.
        report: called after each tensor with bytes written and bytes in all.
    Raises: ValueError if a tensor given is not of the type and shape announced.
    """
    names = sorted(entries, key=lambda name: (-RANK[entries[name][0]], name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in names:
        dtype, shape = entries[name]
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name).detach()
            if (CODES.get(tensor.dtype), tuple(tensor.shape)) != entries[name]:
                raise ValueError(f"{path}: tensor {name} must be {entries[name]}, got {(tensor.dtype, tuple(tensor.shape))}")
            _write(file, tensor)
            if report is not None:
                report(header[name]["data_offsets"][1], end)
        file.flush()
        os.fsync(file.fileno())


def _write(file: BinaryIO, tensor: Tensor) -> None:
    """A tensor's bytes, row-major."""
    if tensor.numel():
        file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
