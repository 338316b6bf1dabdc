"""Devices that a model may run on: peak rates, memory bandwidth and memory, each with where the figures are from.

Peaks are of dense products: what a vendor gives with sparsity is halved. No run reaches them.
"""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

from moe3d_deploy.cuda_driver import Capability
from moe3d_deploy.errors import InputError
from moe3d_deploy.machine import cpu_name, memory_bytes, memory_limit_bytes, usable_cores

CPU = "cpu"
_BY_HAND = "FLOPS,BANDWIDTH,MEMORY"
_NUMBER = re.compile(r"\d{1,20}(\.\d{0,20})?(e\+?\d{1,2})?", re.IGNORECASE)

_MEASURE_SECONDS = 0.5  # for each of the two figures of a CPU
_MATRIX_SIDE = 1024  # float32: 4 MB each, in the cache of a current processor
_COPIED_BYTES = 128 << 20  # beyond the cache of a current processor


@dataclass(frozen=True)
class Device:
    """A processor and its memory.

    flops      FLOP/s of dense products per type: float32 without tensor cores and without TF32, as engines are built
               here; float16 and bfloat16 on tensor cores with float32 sums. A type that is missing has no fast path.
    bandwidth  bytes/s between memory and processor
    memory     bytes; a GB of a datasheet is taken for 1e9 bytes, which leaves some of it for the driver
    measured   the rates are what one library reached, not peaks: another may be quicker
    compute_capability   (major, minor) of a GPU, as NVIDIA's list of CUDA GPUs has it; None for others and if unknown
    """

    name: str
    title: str
    flops: dict[str, float]
    bandwidth: float
    memory: float
    source: str
    measured: bool = False
    compute_capability: Capability | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, rates in FLOP/s and bytes/s, memory in bytes."""
        return {
            "name": self.name,
            "title": self.title,
            "flops_per_second": self.flops,
            "bytes_per_second": self.bandwidth,
            "memory_bytes": self.memory,
            "source": self.source,
            "measured": self.measured,
            "compute_capability": list(self.compute_capability) if self.compute_capability else None,
        }


def _gpu(
    name: str,
    title: str,
    capability: Capability,
    float32: float,
    tensor: float,
    bandwidth: float,
    memory: float,
    source: str,
    bf16: bool = True,
) -> Device:
    """Rates in TFLOP/s, bandwidth in GB/s, memory in GB."""
    flops = {"float32": float32 * 1e12, "float16": tensor * 1e12}
    if bf16:
        flops["bfloat16"] = tensor * 1e12
    return Device(name, title, flops, bandwidth * 1e9, memory * 1e9, source, compute_capability=capability)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h200", "NVIDIA H200 SXM", (9, 0), 67, 989.5, 4800, 141,
             "NVIDIA H200 datasheet; 16 bits: half of the 1,979 TFLOPS with sparsity"),
        _gpu("h100", "NVIDIA H100 SXM, 80 GB", (9, 0), 67, 989.5, 3350, 80,
             "NVIDIA H100 datasheet; 16 bits: half of the 1,979 TFLOPS with sparsity"),
        _gpu("a100", "NVIDIA A100 SXM, 80 GB", (8, 0), 19.5, 312, 2039, 80,
             "NVIDIA A100 datasheet; 16 bits: 312 TFLOPS dense"),
        _gpu("l4", "NVIDIA L4", (8, 9), 30.3, 121, 300, 24,
             "NVIDIA L4 datasheet; 16 bits: half of the 242 TFLOPS with sparsity"),
        _gpu("t4", "NVIDIA T4", (7, 5), 8.1, 65, 320, 16,
             "NVIDIA T4 datasheet; 16 bits: 65 TFLOPS mixed precision; Turing has no bfloat16", bf16=False),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 82.6, 165.2, 1008, 24,
             "NVIDIA Ada architecture whitepaper; 16 bits: dense with float32 sums; half sums are twice as fast"),
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 35.6, 71, 936, 24,
             "NVIDIA GA102 architecture whitepaper; 16 bits: dense with float32 sums; half sums are twice as fast"),
        _gpu("thor", "NVIDIA Jetson Thor T5000", (11, 0), 8.0, 258.75, 273, 128,
             "Jetson Thor datasheet; 16 bits: 1/8 of the 2,070 TFLOPS of sparse FP4; float32: 2,560 cores at 1.57 GHz"),
        _gpu("orin", "NVIDIA Jetson AGX Orin 64GB", (8, 7), 5.3, 42.5, 204.8, 64,
             "Jetson AGX Orin technical brief; 16 bits: 1/4 of the GPU's 170 TOPS of sparse INT8"),
        _gpu("orin-nx-16", "NVIDIA Jetson Orin NX 16GB at 918 MHz", (8, 7), 1.88, 15, 102.4, 16,
             "Jetson Orin NX datasheet; 16 bits: 1/4 of the GPU's 60 TOPS of sparse INT8; MAXN SUPER mode is faster"),
    )
}  # fmt: skip


def find_device(text: str) -> Device:
    """The device that `text` names: a key of DEVICES, "cpu" (measured, about a second), or FLOPS,BANDWIDTH,MEMORY.

    The figures of the last are FLOP/s of every type, bytes/s and bytes, such as 165e12,1.0e12,24e9.
    Raises InputError for anything else.
    """
    if text == CPU:
        return measured_cpu()
    if text in DEVICES:
        return DEVICES[text]
    parts = text.split(",")
    if len(parts) == 1:
        raise InputError(f"device {text!r} is unknown; choose from {', '.join((*DEVICES, CPU))}, or give {_BY_HAND}")
    if len(parts) != 3 or not all(_NUMBER.fullmatch(part) and 0 < float(part) < math.inf for part in parts):
        raise InputError(f"device {text!r}: expected {_BY_HAND} in FLOP/s, bytes/s and bytes, as 165e12,1.0e12,24e9")
    flops, bandwidth, memory = (float(part) for part in parts)
    every_type = dict.fromkeys(("float32", "float16", "bfloat16"), flops)
    return Device("given", "given by hand", every_type, bandwidth, memory, "given by hand, one rate for every type")


def measured_cpu() -> Device:
    """This machine's processor: the best of numpy's float32 products and of copies, each tried for half a second.

    ONNX Runtime computes float16 in float32 on a CPU, and has no bfloat16 products there. An instruction for products
    of bytes does four for each of float32: their rate is a bound, not measured.
    """
    import numpy as np

    random = np.random.default_rng(0)
    a, b = random.random((2, _MATRIX_SIDE, _MATRIX_SIDE), np.float32)
    product = np.empty_like(a)
    rate = 2 * _MATRIX_SIDE**3 / _shortest(lambda: np.matmul(a, b, out=product))
    source, target = np.zeros((2, _COPIED_BYTES), np.uint8) + np.uint8(1)
    bandwidth = 2 * _COPIED_BYTES / _shortest(lambda: np.copyto(target, source))
    return Device(
        CPU,
        f"{cpu_name()}, {usable_cores()} cores",
        {"float32": rate, "float16": rate, "int8": 4 * rate},
        bandwidth,
        min(memory_bytes(), memory_limit_bytes() or memory_bytes()),
        "measured now: numpy's float32 product of two 1024 x 1024 matrices, a copy of 128 MiB (read + write)",
        measured=True,
    )


def _shortest(call: Any) -> float:
    """Seconds of the quickest of the calls that fit into the time; at least three."""
    best, count = math.inf, 0
    end = time.perf_counter() + _MEASURE_SECONDS
    while count < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best
