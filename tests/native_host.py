"""Helpers for the tests of engines/native: its C structures, its compilers, and its host form called through ctypes."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NATIVE = Path(__file__).parent.parent / "engines" / "native"
HEADERS = "MOE3D_TENSORRT_HEADERS"  # environment variable: a folder with TensorRT's headers, one sub-folder per version
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
LAYOUTS = {"nchw": 0, "channels_last": 1}


class Sizes(ctypes.Structure):
    """moe3d_expert_mix_sizes."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("views", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("expert_width", ctypes.c_int64),
        ("gate_width", ctypes.c_int64),
        ("pixel_stride", ctypes.c_int64),
        ("temperature", ctypes.c_float),
    ]


class Tensors(ctypes.Structure):
    """moe3d_expert_mix_tensors, addresses as integers."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("hidden", "expert_weight", "expert_bias", "gate_weight", "gate_bias"),
            *("depth", "confidence", "weights"),
        )
    ]


def sizes(**changed: Any) -> Sizes:
    """One 518 x 518 view of 4 experts in fp16, as in moe3d-1b, but for `changed`."""
    usual = {"type": 1, "layout": 0, "views": 1, "height": 518, "width": 518, "experts": 4}
    return Sizes(**{**usual, "expert_width": 32, "gate_width": 32, "pixel_stride": 0, "temperature": 1.0, **changed})


def tensors(**changed: int) -> Tensors:
    """Addresses that a GPU's allocator could have given, but for `changed`. Nothing lies there."""
    return Tensors(**{name: (4096 * (i + 1)) for i, (name, _) in enumerate(Tensors._fields_)} | changed)


def tool(name: str, why: str) -> str:
    """The path of a program; the test is skipped where it is not installed."""
    if path := shutil.which(name):
        return path
    pytest.skip(f"{name} is not installed: {why}")


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    """What a program printed, both streams; fails with it where the program does."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def tensorrt_headers() -> dict[str, Path]:
    """{version: folder with NvInfer.h}, oldest first, in the sub-folders of the folder that the variable names."""
    named = os.environ.get(HEADERS)
    if not named:
        return {}
    found = {}
    for header in (*Path(named).glob("*/NvInfer.h"), *Path(named).glob("*/include/NvInfer.h")):
        text = (header.parent / "NvInferVersion.h").read_text(encoding="utf-8")
        version = [
            int(number)
            for part in ("MAJOR", "MINOR")
            for number in re.findall(rf"define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text)
        ]
        found[tuple(version)] = header.parent
    assert found, f"{HEADERS}: no NvInfer.h in the sub-folders of {named}"
    return {".".join(map(str, version)): found[version] for version in sorted(found)}


def mix(
    host: ctypes.CDLL,
    hidden: np.ndarray,
    operands: tuple[np.ndarray, ...],
    *,
    type_name: str = "float32",
    layout: str = "nchw",
    temperature: float = 1.0,
    pixel_stride: int = 0,
    with_weights: bool = True,
    hidden_offset: int = 0,
) -> tuple[np.ndarray, ...]:
    """depth, confidence (N, H, W), weights (N, K, H, W) or None, by the host's form of the kernels.

    hidden         (N, C, H, W) float32, float16, or the upper 16 bits of float32 as uint16 for bfloat16
    operands       expert_weight (K, 2, Ce), expert_bias (K, 2), gate_weight (K, Cg), gate_bias (K)
    hidden_offset  bytes by which the map is moved from an address that is a multiple of 64
    """
    views, channels, height, width = hidden.shape
    expert_weight, _, gate_weight, _ = operands
    stored = hidden
    if layout == "channels_last":
        stored = np.zeros((views, height, width, pixel_stride or channels), hidden.dtype)
        stored[..., :channels] = hidden.transpose(0, 2, 3, 1)
        stored[..., channels:] = np.array(0x7FFF, np.uint16) if hidden.dtype == np.uint16 else np.nan  # never used
    buffer = np.zeros(stored.nbytes + 128, np.uint8)
    start = -buffer.ctypes.data % 64 + hidden_offset
    buffer[start : start + stored.nbytes] = np.frombuffer(stored.tobytes(), np.uint8)

    depth, confidence = (_aligned((views, height, width)) for _ in range(2))
    weights = _aligned((views, len(gate_weight), height, width)) if with_weights else None
    call = Sizes(
        TYPES[type_name],
        LAYOUTS[layout],
        *(views, height, width, len(gate_weight), expert_weight.shape[2], gate_weight.shape[1]),
        pixel_stride,
        temperature,
    )
    small = [np.ascontiguousarray(operand, np.float32) for operand in operands]
    pointers = Tensors(
        buffer.ctypes.data + start,
        *(operand.ctypes.data for operand in small),
        *(depth.ctypes.data, confidence.ctypes.data, None if weights is None else weights.ctypes.data),
    )
    status = host.host_mix(ctypes.byref(call), ctypes.byref(pointers))
    assert status == 0, host.host_status_text(status)
    return depth, confidence, weights


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 at an address that is a multiple of 16, as every GPU allocation is."""
    buffer = np.full(int(np.prod(shape)) + 4, np.nan, np.float32)
    start = -buffer.ctypes.data % 16 // 4
    return buffer[start : start + int(np.prod(shape))].reshape(shape)
