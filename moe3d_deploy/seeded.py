"""Seeded weights: every tensor of a model from its name, its shape and a seed, without a checkpoint.

They carry no knowledge, but keep activations in the range of trained ones, so that exports, engines and
benchmarks can be built and checked anywhere. This is generator version 1: the same bits on every platform
and NumPy version, because only the raw 64-bit PCG64 stream and IEEE float64 arithmetic are used. numpy only.
"""

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError

GENERATOR_VERSION = 1

_BLOCK_VALUES = 1 << 15  # the float64 work buffers then stay in the level-2 cache
_NORM_WEIGHT = re.compile(r"norm\d?\.weight$")
_TRANSPOSED_CONV = re.compile(r"resize_layers\.[01]\.weight$")


def seeded_tensor(name: str, shape: Sequence[int], seed: int = 0) -> NDArray[np.float32]:
    """The float32 weights of state-dict key `name`; seed 0 gives the weights of the golden files.

    Raises InputError for a seed that is no integer >= 0.
    """
    return salted_tensor(name, shape, seed_salt(seed))


def seed_salt(seed: int) -> str:
    """The salt that stands for `seed`: empty for 0, else its digits. Raises InputError for a negative one."""
    if seed < 0:
        raise InputError(f"seed {seed} is negative; use an integer >= 0")
    return str(seed) if seed else ""


def salted_tensor(name: str, shape: Sequence[int], salt: str) -> NDArray[np.float32]:
    """The float32 weights of state-dict key `name`, drawn from the stream that `salt` + `name` selects.

    A value is u / divisor * factor + offset in float64, rounded to float32. u = (2 x - 1) sqrt(3) has zero
    mean and unit variance; x, uniform in [0, 1), is the top 53 bits of one word of PCG64(crc32(salt + name)).
    Memory: the result and two buffers of 256 KiB.
    """
    sizes = tuple(int(size) for size in shape)
    scale = _scale_of(name, sizes)
    stream = np.random.PCG64(zlib.crc32((salt + name).encode("utf-8")))
    values = np.empty(math.prod(sizes), np.float32)
    buffer = np.empty(min(values.size, _BLOCK_VALUES), np.float64)
    for start in range(0, values.size, _BLOCK_VALUES):
        block = buffer[: values.size - start]
        words = stream.random_raw(block.size)
        words >>= np.uint64(11)
        np.multiply(words, 2.0**-52, out=block)  # 2 x, exact like the subtraction that follows
        block -= 1.0
        block *= math.sqrt(3.0)
        scale.apply(block)
        values[start : start + block.size] = block
    return values.reshape(sizes)


@dataclass(frozen=True)
class _Scale:
    """The map u -> u / divisor * factor + offset; `offset` per value only for tensors of one block."""

    divisor: float = 1.0
    factor: float = 1.0
    offset: float | tuple[float, ...] = 0.0

    def apply(self, block: NDArray[np.float64]) -> None:
        """In place; a step that would change nothing is left out."""
        if self.divisor != 1.0:
            block /= self.divisor
        if self.factor != 1.0:
            block *= self.factor
        if self.offset != 0.0:
            block += self.offset


def _scale_of(name: str, shape: tuple[int, ...]) -> _Scale:
    """Scale by role: kernels 1 / sqrt(fan in), norms near 1, LayerScale near 0.3, small tokens and biases.

    The camera head gets small pose updates, and fields of view and a quaternion real part around 0.25, so
    that the predicted cameras are valid ones.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "gamma":
        return _Scale(factor=0.05, offset=0.3)
    if leaf == "pos_embed":
        return _Scale(factor=0.2)
    if leaf == "empty_pose_tokens":
        return _Scale(factor=0.5)
    if "token" in leaf:  # cls, register, camera and mask tokens
        return _Scale(factor=0.02)
    if _NORM_WEIGHT.search(name):
        return _Scale(factor=0.1, offset=1.0)
    if name.endswith("camera_head.pose_branch.fc2.bias"):
        return _Scale(factor=0.02, offset=(0.0,) * 6 + (0.25,) * 3)
    if leaf == "bias" or leaf.endswith("_bias") or len(shape) == 1:
        return _Scale(factor=0.02)
    if _TRANSPOSED_CONV.search(name):  # (in, out, k, k) with stride k: one input pixel per output pixel
        return _Scale(divisor=math.sqrt(shape[0]))
    small_pose_update = name.endswith("camera_head.pose_branch.fc2.weight")
    return _Scale(divisor=math.sqrt(math.prod(shape[1:])), factor=0.3 if small_pose_update else 1.0)
