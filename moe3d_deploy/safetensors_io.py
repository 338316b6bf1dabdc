"""Safetensors files one tensor at a time, so that a 5 GB file needs the memory of its largest tensor.

The safetensors library checks a file as a whole; its own tensor readers map the file into memory and its writers
want every tensor at once, hence the direct reads and writes here. Format: 8 bytes header length (little endian),
a JSON header, then the raw data without holes.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe3d_deploy import strict_json
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.files import sha256_file

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit

WEIGHT_DTYPES = tuple(_DTYPE_NAMES)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` and `size` in bytes, from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class SafetensorsFile:
    """A checked file: `tensors` in the order of the header, `read` for one of them."""

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises CheckpointError for a file that is missing, damaged or not of floats."""
        self.path = path
        try:
            with safe_open(path, framework="np"):  # header, bounds, overlaps and the file's length
                pass
            with path.open("rb") as file:
                self._stamp = _stamp(file.fileno())
                length = int.from_bytes(file.read(8), "little")
                header = strict_json.parse(file.read(length), max_bytes=_LARGEST_HEADER)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{path}: truncated or damaged safetensors file ({_one_line(error)}); copy or download it again"
            ) from error
        header.pop("__metadata__", None)
        self.tensors = {name: self._stored(name, entry, 8 + length) for name, entry in header.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.tensors.items()}

    def sha256(self) -> str:
        return sha256_file(self.path)

    def read(self, name: str) -> Tensor:
        """Tensor `name` in its stored dtype, in memory of its own."""
        stored = self.tensors[name]
        try:
            with self.path.open("rb") as file:
                if _stamp(file.fileno()) != self._stamp:
                    raise CheckpointError(f"{self.path}: changed while it was being read; start again")
                file.seek(stored.start)
                data = np.fromfile(file, np.uint8, stored.size)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        if data.size != stored.size:
            raise CheckpointError(f"{self.path}: ends inside tensor {name!r}; copy or download it again")
        return torch.from_numpy(data).view(stored.dtype).reshape(stored.shape)

    def _stored(self, name: str, entry: dict, data_start: int) -> StoredTensor:
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {entry['dtype']}; weights must be one of {', '.join(_DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        return StoredTensor(_DTYPES[entry["dtype"]], tuple(entry["shape"]), data_start + begin, end - begin)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor_of: Callable[[str], Tensor],
) -> None:
    """Write the tensors of `shapes`, in its order and all of `dtype`, asking `tensor_of` for one at a time.

    Raises CheckpointError for a dtype that has no place in a checkpoint, ValueError for a tensor that is not as
    announced, OSError for a full disk.
    """
    if dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"{path}: cannot hold {dtype}; use one of {', '.join(map(str, _DTYPE_NAMES))}")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape in shapes.items():
            tensor = tensor_of(name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {shape} {dtype}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _stamp(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
