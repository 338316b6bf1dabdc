"""What all tests share: where the golden files lie, and what this machine cannot run."""

import ctypes
import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("bundles", "models", "engine_models")

# Before torch is imported. Its threads otherwise spin while they wait for each other; on a machine that is busy with
# something else, that makes small models 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The golden files."""
    return Path(__file__).parent / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where the CUDA driver finds no device; `-ra` prints the reason."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and (reason := _why_no_gpu()):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {reason}"))


def _why_no_gpu() -> str | None:
    """Ask the driver itself: torch may be a CPU build beside a usable GPU, and its import takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver (libcuda.so.1)"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value == 0:
        return f"the CUDA driver reports status {status} and {count.value} devices"
    return None
