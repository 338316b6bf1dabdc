"""The TensorRT plugin, compiled against TensorRT's public headers and driven through its creator, without a GPU.

Set MOE3D_TENSORRT_HEADERS to a folder with one sub-folder per version (the repository's include/ or what is in it).
"""

import re
from pathlib import Path

import pytest
from native_host import HEADERS, NATIVE, run, tensorrt_headers, tool

pytest_plugins = ["native_fixtures"]


def plugins(built: Path) -> list[Path]:
    found = sorted(built.glob("libmoe3d_plugin_trt*.so"))
    assert found
    return found


def test_the_source_compiles_against_every_version_of_the_headers(tmp_path: Path) -> None:
    """Without a warning, and without needing any symbol of TensorRT."""
    if not tensorrt_headers():
        pytest.skip(f"{HEADERS} is not set: a folder with TensorRT's public headers, one sub-folder per version")
    compiler = tool("g++", "compiles the plugin")
    nvcc = Path(tool("nvcc", "brings the CUDA headers that TensorRT's include")).resolve()
    cuda = next(
        folder for folder in (*nvcc.parents, Path("/usr/local/cuda")) if (folder / "include" / "cuda.h").exists()
    )
    for version, folder in tensorrt_headers().items():
        made = tmp_path / f"{version}.o"
        flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-isystem", folder)
        source = NATIVE / "plugin" / "expert_mix_plugin.cpp"
        run(compiler, *flags, "-isystem", cuda / "include", "-c", source, "-o", made)
        needed = run(tool("nm", "lists symbols"), "-C", "--undefined-only", made)
        assert "moe3d_expert_mix" in needed
        assert not re.search("nvinfer|NvInfer|TensorRT|getPluginRegistry|getLogger", needed), version


def test_there_is_a_plugin_for_each_major_version(native_plugins: Path) -> None:
    majors = {int(version.split(".")[0]) for version in tensorrt_headers()}
    assert [path.name for path in plugins(native_plugins)] == [f"libmoe3d_plugin_trt{m}.so" for m in sorted(majors)]


def test_a_plugin_exports_what_tensorrt_looks_up_and_needs_none_of_its_symbols(native_plugins: Path) -> None:
    nm = tool("nm", "lists symbols")
    for path in plugins(native_plugins):
        exported = run(nm, "-D", "--defined-only", path)
        mark = f"moe3d_plugin_for_tensorrt_{path.stem.split('trt')[1]}"
        assert sorted(line.split()[-1] for line in exported.splitlines()) == ["getCreators", mark, "setLoggerFinder"]
        needed = {line.split()[-1] for line in run(nm, "-D", "--undefined-only", path).splitlines()}
        foreign = {
            symbol for symbol in needed if "@GLIBC" not in symbol and "@CXXABI" not in symbol and "@GCC" not in symbol
        }
        assert foreign <= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}, foreign


def test_the_harness_drives_each_plugin_without_a_device(native_plugins: Path) -> None:
    """Shapes, types and formats, attributes, serialisation, clones, errors and the launch's checks."""
    for path in plugins(native_plugins):
        harness = native_plugins / path.stem.replace("libmoe3d_plugin", "moe3d_plugin_harness")
        printed = run(harness, path)
        assert "FAILED" not in printed
        assert len(re.findall("^ok: ", printed, re.MULTILINE)) == 16
        assert re.search(rf"headers of TensorRT {path.stem.split('trt')[1]}\.\d+: 16 checks, 0 failed\n$", printed)


def test_the_harness_fails_on_what_is_no_plugin(native_plugins: Path) -> None:
    harness = sorted(native_plugins.glob("moe3d_plugin_harness_trt*"))[0]
    with pytest.raises(AssertionError, match="does not export getCreators and setLoggerFinder"):
        run(harness, native_plugins / "libmoe3d_expert_mix.so")
