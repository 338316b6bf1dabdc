"""What is measured on: random images that no run has seen before, and photographs that become such images."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe3d_deploy.benchmarks.bench.report import Shape
from moe3d_deploy.manifest import Preprocessing

_BUFFERS = 3  # in turn, so that neither the values nor the place in memory are those of the run before
_PHOTOGRAPH_SCALE = 2  # pixels of a photograph for one of the view, along each axis
_NOISE_PIXELS = 16  # of a photograph to one random value: smooth, as pictures are
_JPEG_QUALITY = 90


class FreshImages:
    """Random images of one shape (B, S, H, W) in the model's input type, new ones at every call.

    A cache keyed by values, or by where they lie, never finds anything.
    """

    def __init__(self, shape: Shape, input_type: str, seed: int) -> None:
        batch, views, height, width = shape
        self._random = np.random.default_rng(seed)
        self._pixels = input_type == "uint8"
        full = (batch, views, height, width, 3) if self._pixels else (batch, views, 3, height, width)
        self._buffers = [np.zeros(full, input_type) for _ in range(_BUFFERS)]
        self._calls = 0

    def next(self) -> NDArray[Any]:
        """float32 in [0, 1) (B, S, 3, H, W), or uint8 (B, S, H, W, 3); overwritten at the third call from now."""
        buffer = self._buffers[self._calls % _BUFFERS]
        self._calls += 1
        if self._pixels:
            buffer[...] = self._random.integers(0, 256, buffer.shape, np.uint8)
        else:
            self._random.random(out=buffer, dtype=np.float32)
        return buffer


class FreshPhotographs:
    """JPEG files of random smooth pictures, twice as large as a view along each axis."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape = shape
        self._random = np.random.default_rng(seed)

    def next(self) -> list[list[bytes]]:
        """A file for every view of every scene, new ones at every call."""
        batch, views, _, _ = self._shape
        return [[self._file() for _ in range(views)] for _ in range(batch)]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a photograph."""
        return _PHOTOGRAPH_SCALE * self._shape[3], _PHOTOGRAPH_SCALE * self._shape[2]

    def __str__(self) -> str:
        return f"JPEG files of {self.size[0]}x{self.size[1]}, in memory"

    def _file(self) -> bytes:
        width, height = self.size
        coarse = (max(2, height // _NOISE_PIXELS), max(2, width // _NOISE_PIXELS), 3)
        noise = Image.fromarray(self._random.integers(0, 256, coarse, np.uint8))
        file = io.BytesIO()
        noise.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=_JPEG_QUALITY)
        return file.getvalue()


def comes_from_photographs(shape: Shape, preprocessing: Preprocessing) -> bool:
    """Whether the model's own way of fitting makes views of this shape: "crop" makes none higher than wide, "pad" and
    "square" make squares."""
    _, _, height, width = shape
    return height <= width if preprocessing.mode == "crop" else height == width
