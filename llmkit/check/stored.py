"""Tensors in safetensors files, read one by one and in slices: memory stays flat in the size of the model.

    check_folder(path)                    # raises UserError for files that are cut short
    stored = Stored(path); stored.shapes["lm_head.weight"]; stored.slices("lm_head.weight")

Leaves out what the tensors mean (`weights.py`).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError

SLICE = 16_000_000  # elements read at once
LARGEST_HEADER = 100_000_000  # bytes; what safetensors allows
POINTER = b"version https://git-lfs"


def header(path: Path) -> dict[str, Any]:
    """{tensor: {dtype, shape, data_offsets}}. Raises UserError where the file is not as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if POINTER.startswith(start) and start:
            raise UserError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise UserError(f"{path}: is no safetensors file, or was cut short ({size:,} bytes); copy it again")
        try:
            found = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: its header cannot be read; copy it again") from None
    found.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in found.values()), default=0)
    if size != 8 + length + end:
        raise UserError(f"{path}: has {size:,} bytes, its header says {8 + length + end:,}: cut short; copy it again")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Those that from_pretrained reads. Raises UserError for shards that are missing."""
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    for index in indices:
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: cannot be read; expected an index of shards; copy it again") from None
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise UserError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of {len(shards)} shards): a checkpoint cut short; "
                "copy it again"
            )
        if index.name == "model.safetensors.index.json" or len(indices) == 1:
            return [folder / name for name in shards]
    return [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith(("adapter_", "consolidated"))]


def check_folder(folder: Path) -> None:
    """Raises UserError for weights that are missing in part, or cut short."""
    for path in [*weight_files(folder), *sorted(folder.glob("adapter_model*.safetensors"))]:
        header(path)


class Stored:
    """The tensors of a folder, or of the files given, read when they are asked for."""

    def __init__(self, folder: Path, files: list[Path] | None = None):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors spells them: F32, BF16, ...
        for path in weight_files(folder) if files is None else files:
            for name, entry in header(path).items():
                self.files[name], self.shapes[name] = path, tuple(entry["shape"])
                self.dtypes[name] = entry["dtype"]

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as stored) of a tensor, a few million elements at a time."""
        from safetensors import safe_open

        shape = self.shapes[name]
        with safe_open(self.files[name], framework="pt") as file:
            if len(shape) < 2 or not torch.Size(shape).numel():
                yield 0, file.get_tensor(name)
                return
            part, rows = file.get_slice(name), max(1, SLICE // torch.Size(shape[1:]).numel())
            for first in range(0, shape[0], rows):
                yield first, part[first : first + rows]

    def find(self, *endings: str) -> str | None:
        """The first stored name that is, or ends with a dot and, one of these."""
        return next((name for end in endings for name in self.shapes if name == end or name.endswith(f".{end}")), None)
