"""The CUDA driver, asked without torch, TensorRT or CUDA's runtime: is it there, does it start, which GPUs has it."""

import ctypes
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Capability = tuple[int, int]

_LIBRARY = "libcuda.so.1"
_CAPABILITY_ATTRIBUTES = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, cuda.h
_NAME_BYTES = 256
_TOOL_SECONDS = 20


@dataclass(frozen=True)
class Gpu:
    """One device: its name, compute capability such as (9, 0), and memory in bytes."""

    name: str
    compute_capability: Capability
    memory_bytes: int


@dataclass(frozen=True)
class CudaDriver:
    """What the driver said.

    status   cuInit's answer, a CUresult of cuda.h: 0 is success, 100 no device; None where there is no driver
    api      the newest CUDA version that the driver supports, such as "13.0"; None where it does not say
    gpus     the devices this process sees; one that does not answer is left out
    """

    status: int | None
    api: str | None
    gpus: tuple[Gpu, ...]


def query() -> CudaDriver:
    """Ask the driver of this machine. It starts in this process and stays: do not fork afterwards."""
    library = _load()
    return CudaDriver(None, None, ()) if library is None else read(library)


def read(library: Any) -> CudaDriver:
    """What the loaded libcuda `library` says."""
    if status := library.cuInit(0):
        return CudaDriver(status, None, ())
    number, api = ctypes.c_int(), None
    if not library.cuDriverGetVersion(ctypes.byref(number)):
        api = f"{number.value // 1000}.{number.value % 1000 // 10}"
    gpus = []
    for device, capability in _devices(library):
        name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
        failed = library.cuDeviceGetName(name, _NAME_BYTES, device)
        if not failed and not library.cuDeviceTotalMem_v2(ctypes.byref(memory), device):
            gpus.append(Gpu(name.value.decode(errors="replace"), capability, memory.value))
    return CudaDriver(0, api, tuple(gpus))


def compute_capabilities() -> list[Capability]:
    """The compute capability of every CUDA device this process sees; empty without a driver or a device."""
    library = _load()
    if library is None or library.cuInit(0):
        return []
    return [capability for _, capability in _devices(library)]


def driver_version() -> str | None:
    """The driver's own version, such as "580.10.01", from nvidia-smi; None where that is missing or fails."""
    return nvidia_smi("driver_version")


def nvidia_smi(*fields: str) -> str | None:
    """The line nvidia-smi has of `fields` for the first GPU, by commas, without units; None where it is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines and done.returncode == 0 else None


def _load() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def _devices(library: Any) -> Iterator[tuple[ctypes.c_int, Capability]]:
    """The devices of a started driver that answer, by handle, with their compute capabilities."""
    count = ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(count)):
        return
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        failed = library.cuDeviceGet(ctypes.byref(device), index)
        for value, attribute in zip((major, minor), _CAPABILITY_ATTRIBUTES, strict=True):
            failed = failed or library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        if not failed:
            yield device, (major.value, minor.value)
