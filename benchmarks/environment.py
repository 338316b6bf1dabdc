"""What a measurement was made on: the machine, the versions and the state of the code. No host name, no absolute path.

Reads the CUDA driver by itself, so that it neither needs nor loads torch or TensorRT.
"""

import ctypes
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moe3d_deploy
from moe3d_deploy.machine import cpu_name

PACKAGES = (
    "click", "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu",
    "onnxscript", "opencv-python-headless", "Pillow", "polygraphy", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "tensorrt_rtx", "torch", "triton",
)  # fmt: skip

_TIMEOUT_SECONDS = 20
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, cuda.h
_RESULTS = "benchmarks/results"  # a result that is not committed yet does not change the code that made it
# Not the middle of a relative path, of a URL or of a fraction.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/-])/(?:[\w.+@~-]+/)*([\w.+@~-]+)/?")


def environment(*, command: Sequence[str] | None = None, revision: str | None = None) -> dict[str, Any]:
    """JSON-able facts for a result file. What cannot be found out is None, never a guess.

    command    the program and its arguments as a user would type them; default: those of this process
    revision   the code's revision where there is no git to ask, such as a copied tree
    """
    command = ["python", *sys.orig_argv[1:]] if command is None else command
    return {
        **_cuda(),
        "driver": _driver_version(),
        "cpu": {
            "name": cpu_name(),
            "logical_cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
        },
        "memory_bytes": _memory_bytes(),
        "system": {"name": platform.system(), "machine": platform.machine()},
        "python": platform.python_version(),
        "moe3d_deploy": moe3d_deploy.__version__,
        "packages": _packages(),
        "git": _git(Path(moe3d_deploy.__file__).resolve().parent.parent, revision),
        "command": shlex.join(without_paths(argument) for argument in command),
    }


def without_paths(text: str) -> str:
    """`text` with the last part of each absolute path in its place."""
    return _ABSOLUTE_PATH.sub(r"\1", text)


def _cuda() -> dict[str, Any]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"gpus": [], "cuda_driver_api": None}
    return read_cuda_driver(driver)


def read_cuda_driver(driver: Any) -> dict[str, Any]:
    """`gpus`, each name, compute_capability ("9.0") and memory_bytes, and `cuda_driver_api` ("13.0").

    driver   the loaded libcuda; a card that does not answer is left out
    """
    if driver.cuInit(0):
        return {"gpus": [], "cuda_driver_api": None}
    number = ctypes.c_int()
    api = None
    if not driver.cuDriverGetVersion(ctypes.byref(number)):
        api = f"{number.value // 1000}.{number.value % 1000 // 10}"
    cards: list[dict[str, Any]] = []
    if driver.cuDeviceGetCount(ctypes.byref(number)):
        return {"gpus": cards, "cuda_driver_api": api}
    for index in range(number.value):
        device, value, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        status = driver.cuDeviceGet(ctypes.byref(device), index)
        status = status or driver.cuDeviceGetName(name, len(name), device)
        status = status or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = []
        for attribute in _COMPUTE_CAPABILITY:
            status = status or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(str(value.value))
        if not status:
            cards.append(
                {
                    "name": name.value.decode(errors="replace"),
                    "compute_capability": ".".join(capability),
                    "memory_bytes": memory.value,
                }
            )
    return {"gpus": cards, "cuda_driver_api": api}


def _driver_version() -> str | None:
    lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return lines.splitlines()[0].strip() if lines else None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _packages() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(root: Path, given: str | None) -> dict[str, Any]:
    """The revision that is checked out and whether files differ from it; both None for an installed package."""
    revision = _output(["git", "-C", str(root), "rev-parse", "HEAD"]) if (root / ".git").exists() else None
    if revision is None:
        return {"revision": given, "dirty": None}
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--", ".", f":!{_RESULTS}"])
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _output(command: Sequence[str]) -> str | None:
    """What a program printed, stripped; None where it is not installed or failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
