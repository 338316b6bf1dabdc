"""What a measurement was made on: the machine, the versions and the state of the code. No host name, no absolute path.

Neither needs nor loads torch or TensorRT: the CUDA driver is asked directly.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moe3d_deploy
from moe3d_deploy import cuda_driver
from moe3d_deploy.machine import cpu_name, memory_bytes, usable_cores

PACKAGES = (
    "click", "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu",
    "onnxscript", "opencv-python-headless", "Pillow", "polygraphy", "scikit-image", "scipy", "tensorrt",
    "tensorrt-cu12", "tensorrt-cu13", "tensorrt_rtx", "torch", "triton",
)  # fmt: skip

_TIMEOUT_SECONDS = 20
_RESULTS = "benchmarks/results"  # a result that is not committed yet does not change the code that made it
# Not the middle of a relative path, of a URL or of a fraction.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/-])/(?:[\w.+@~-]+/)*([\w.+@~-]+)/?")


def environment(*, command: Sequence[str] | None = None, revision: str | None = None) -> dict[str, Any]:
    """JSON-able facts for a result file. What cannot be found out is None, never a guess.

    command    the program and its arguments as a user would type them; default: those of this process
    revision   the code's revision where there is no git to ask, such as a copied tree
    """
    command = _typed(sys.orig_argv) if command is None else command
    return {
        **_cuda(),
        "driver": cuda_driver.driver_version(),
        "cpu": {
            "name": cpu_name(),
            "logical_cores": os.cpu_count(),
            "usable_cores": usable_cores(),
        },
        "memory_bytes": memory_bytes(),
        "system": {"name": platform.system(), "machine": platform.machine()},
        "python": platform.python_version(),
        "moe3d_deploy": moe3d_deploy.__version__,
        "packages": _packages(),
        "git": _git(Path(moe3d_deploy.__file__).resolve().parent.parent, revision),
        "command": shlex.join(without_paths(argument) for argument in command),
    }


def _typed(arguments: Sequence[str]) -> list[str]:
    """The command line of a process as a user types it: a script on the PATH, such as `moe3d`, by its name alone."""
    script = Path(arguments[1]) if len(arguments) > 1 else Path()
    return list(arguments[1:]) if script.is_absolute() and not script.suffix else ["python", *arguments[1:]]


def revision_text(git: Mapping[str, Any]) -> str:
    """The `git` of an environment in words."""
    return f"{(git['revision'] or 'unknown')[:12]}{' with uncommitted changes' if git.get('dirty') else ''}"


def without_paths(text: str) -> str:
    """`text` with the last part of each absolute path in its place."""
    return _ABSOLUTE_PATH.sub(r"\1", text)


def _cuda() -> dict[str, Any]:
    """`gpus`, each name, compute_capability ("9.0") and memory_bytes, and `cuda_driver_api` ("13.0")."""
    found = cuda_driver.query()
    gpus = [
        {
            "name": gpu.name,
            "compute_capability": "{}.{}".format(*gpu.compute_capability),
            "memory_bytes": gpu.memory_bytes,
        }
        for gpu in found.gpus
    ]
    return {"gpus": gpus, "cuda_driver_api": found.api}


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
