"""A stand-in for the GPU's library: the kernels' code compiled for the CPU behind the C entry's own functions.

A test file takes the fixtures by `pytest_plugins = ["native_fixtures", "native_library"]`.
"""

import ctypes
from pathlib import Path

import pytest
from native_sources import ENTRY, compiled


@pytest.fixture(scope="session")
def stand_in(host: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a library with the C entry's functions that mixes in the CPU's memory."""
    folder = tmp_path_factory.mktemp("stand_in")
    mixes = Path(host._name)
    return compiled(folder / "libmoe3d_expert_mix.so", ENTRY, mixes, f"-Wl,-rpath,{mixes.parent}")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operator take the CPU's tensors, which the stand-in can read and the GPU's library could not."""
    torch_op = pytest.importorskip("moe3d_deploy.native.torch_op", reason="needs torch")
    monkeypatch.setattr(torch_op, "DEVICE_TYPE", "cpu")
