"""A model in two ONNX files, in ONNX Runtime on the CPU: one after the other, the part that is per view in chunks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import PER_VIEW
from moe3d_deploy.runtime.onnx_backend import OnnxBackend

Arrays = dict[str, NDArray[Any]]

VIEW_CHUNK = 1
"""Views that a part which is per view takes at a time unless told otherwise: the least memory (docs/export.md)."""


class SplitBackend:
    """The parts of one model as if they were one file.

    files       ONNX file of each role, in the order they run
    outputs     what `run` gives, in this order
    view_chunk  views that the encoder or the heads take at a time
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        outputs: Sequence[str],
        *,
        view_chunk: int = VIEW_CHUNK,
        threads: int | None = None,
    ) -> None:
        if view_chunk < 1:
            raise InputError(f"view_chunk must be at least 1, got {view_chunk}")
        self.output_names = list(outputs)
        self._view_chunk = view_chunk
        self._parts = {role: OnnxBackend(path, threads=threads) for role, path in files.items()}

    def run(self, images: NDArray[Any]) -> Arrays:
        """images (B, S, 3, H, W) float32, or (B, S, H, W, 3) uint8, as the file takes -> every output by name."""
        return self._run({"images": images})

    def encode(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """images as of `run` -> patch tokens (B, S, rows, columns, C), of a model whose encoder is a part."""
        (tokens,) = self._run_part("encoder", {"images": images}).values()
        return tokens

    def run_tokens(self, tokens: NDArray[np.float32]) -> Arrays:
        """As `run`, from what `encode` gave."""
        (name,) = self._parts["encoder"].output_names
        return self._run({name: tokens})

    def _run(self, tensors: Arrays) -> Arrays:
        """Every part whose outputs are not there yet."""
        for role, part in self._parts.items():
            if not set(part.output_names) <= tensors.keys():
                tensors |= self._run_part(role, {name: tensors[name] for name in part.input_names})
        return {name: tensors[name] for name in self.output_names}

    def _run_part(self, role: str, inputs: Arrays) -> Arrays:
        """What a part has used is given back at its end: else the peaks of two parts would add."""
        part = self._parts[role]
        if role not in PER_VIEW:
            return part.run_on(inputs, release=True)
        batch, views = next(iter(inputs.values())).shape[:2]
        count, size = batch * views, self._view_chunk
        flat = {name: value.reshape(1, count, *value.shape[2:]) for name, value in inputs.items()}
        result: Arrays = {}
        for start in range(0, count, size):
            chunk = {name: value[:, start : start + size] for name, value in flat.items()}
            some = part.run_on(chunk, release=start + size >= count)
            for name, value in some.items():
                if not start:  # one array for all views: a list of chunks would be joined at twice the memory
                    result[name] = np.empty((count, *value.shape[2:]), value.dtype)
                result[name][start : start + size] = value[0]
        return {name: value.reshape(batch, views, *value.shape[1:]) for name, value in result.items()}
