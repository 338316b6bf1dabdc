"""The C++ and CUDA parts of engines/native, compiled once for all tests, where the compilers are.

A test file takes these fixtures by `pytest_plugins = ["native_fixtures"]`.
"""

import ctypes
from pathlib import Path

import pytest
from native_host import HEADERS, NATIVE, run, tensorrt_headers, tool


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/host_mix.cpp: the kernels' code on the CPU and the rules beside it."""
    compiler = tool("g++", "compiles the kernels' code for the CPU")
    out = tmp_path_factory.mktemp("native") / "libhost_mix.so"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
    run(compiler, *flags, NATIVE / "tests" / "host_mix.cpp", "-o", out)
    loaded = ctypes.CDLL(str(out))
    loaded.host_status_text.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(build folder, log) of engines/native by CMake, with a plugin per major version of the headers in reach.

    sm_89 as machine code; PTX for 7.5 beside it, which every newer GPU can compile.
    """
    cmake = tool("cmake", "builds engines/native")
    tool("nvcc", "compiles the kernels")
    out = tmp_path_factory.mktemp("native_build")
    newest = {int(version.split(".")[0]): folder for version, folder in tensorrt_headers().items()}
    options = (
        "-DCMAKE_CUDA_ARCHITECTURES=89-real;75-virtual",
        "-DMOE3D_PTXAS_VERBOSE=ON",
        f"-DTENSORRT_INCLUDE_DIR={';'.join(map(str, newest.values()))}",
    )
    return out, run(cmake, "-S", NATIVE, "-B", out, *options) + run(cmake, "--build", out)


@pytest.fixture
def native_plugins(native_build: tuple[Path, str]) -> Path:
    """The build folder, where TensorRT's headers are in reach; else a skip."""
    if not tensorrt_headers():
        pytest.skip(f"{HEADERS} is not set: a folder with TensorRT's public headers, one sub-folder per version")
    return native_build[0]
