"""Building engines/native where CMake and nvcc are: the kernels, the C entry, the choice of architectures.

No kernel runs here: that needs a GPU.
"""

import ctypes
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from native_host import NATIVE, Tensors, run, sizes, tensors, tool

pytest_plugins = ["native_fixtures"]

# 3 types; NCHW with 4 and 1 pixels a thread and channels last, each for 4, 8 and 16 experts; two with weights in place.
KERNELS = 3 * (3 * 3 + 2)


def ptxas_report(log: str) -> dict[str, dict[str, tuple[int, int]]]:
    """{architecture: {kernel: (registers, bytes of spills and stack)}} from a build with MOE3D_PTXAS_VERBOSE."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    report: dict[str, dict[str, tuple[int, int]]] = {}
    for kernel, architecture, stack, stores, loads, registers in found:
        report.setdefault(architecture, {})[kernel] = (int(registers), int(stack) + int(stores) + int(loads))
    return report


def assert_kernels_fit(kernels: dict[str, tuple[int, int]]) -> None:
    """No spills, and with 128 registers a multiprocessor of 65,536 holds 512 threads."""
    assert len(kernels) == KERNELS
    for kernel, (registers, spills) in kernels.items():
        assert spills == 0, kernel
        assert registers <= 128, kernel


def test_kernels_compile_without_warnings_and_spills(native_build: tuple[Path, str]) -> None:
    _, log = native_build
    assert "warning" not in log
    report = ptxas_report(log)
    assert list(report) == ["sm_89"]
    assert_kernels_fit(report["sm_89"])


@pytest.mark.full
def test_kernels_compile_for_every_architecture_that_nvcc_offers(tmp_path: Path) -> None:
    """The default build. Slow: about 10 s of CPU an architecture."""
    tool("cmake", "builds engines/native")
    nvcc = tool("nvcc", "compiles the kernels")
    offered = {code for code in run(nvcc, "--list-gpu-code").split() if int(code.removeprefix("sm_")) >= 75}
    configured = run("cmake", "-S", NATIVE, "-B", tmp_path, "-DMOE3D_PTXAS_VERBOSE=ON", "-DMOE3D_BUILD_TESTS=OFF")
    newest = max(int(code.removeprefix("sm_")) for code in offered)
    assert re.search(rf"Architectures: .*;{newest}-real;{newest}-virtual\n", configured)
    report = ptxas_report(run("cmake", "--build", tmp_path, "--target", "moe3d_expert_mix"))
    assert set(report) == offered
    for kernels in report.values():
        assert_kernels_fit(kernels)


def test_maps_are_read_in_the_widest_accesses(tmp_path: Path) -> None:
    """In the kernels' PTX: 4 pixels or 16 bytes of channels at once, past the caches; the weights 16 bytes at once."""
    nvcc = tool("nvcc", "compiles the kernels")
    ptx = tmp_path / "kernels.ptx"
    run(nvcc, "-std=c++17", "-O3", "-arch=compute_75", "-ptx", NATIVE / "plugin" / "expert_mix_kernel.cu", "-o", ptx)
    bodies = re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", ptx.read_text(encoding="utf-8"), re.DOTALL)
    assert len(bodies) == KERNELS
    for name, body in bodies:
        accesses = Counter(re.findall(r"\b(?:ld|st)\.(?!param)\S+", body))
        # Neither local memory nor accesses whose memory space the compiler could not tell.
        assert {access.split(".")[1] for access in accesses} <= {"global", "shared"}, name
        if name.endswith("Lb0EEEvNS_8OperandsIT_EE"):  # weights in place
            assert "ld.shared.v4.f32" not in accesses
            continue
        assert accesses["ld.shared.v4.f32"] >= 4, name
        if "planar" in name and re.search(r"Li4ELi\d+ELb1", name):
            assert accesses["ld.global.cs.v4.u32" if "IfLi" in name else "ld.global.cs.v2.u32"] == 16, name
            assert accesses["st.global.cg.v4.f32"] == 3, name
            assert accesses["st.global.f32"] == 0, name
        elif "channels_last" in name:
            assert accesses["ld.global.cs.v4.u32"] == 8, name


def test_a_build_without_tensorrt_says_that_it_leaves_the_plugin_out(native_build: tuple[Path, str]) -> None:
    built, log = native_build
    if list(built.glob("libmoe3d_plugin_*")):
        pytest.skip("TensorRT's headers are in reach")
    assert "TensorRT plugin: left out, no NvInfer.h found; set TENSORRT_INCLUDE_DIR or MOE3D_FETCH_TENSORRT" in log


def test_the_c_entry_exports_its_functions_alone(native_build: tuple[Path, str]) -> None:
    """Nothing of the CUDA runtime that is linked in gets in the way of the process's own."""
    exported = run(tool("nm", "lists symbols"), "-D", "--defined-only", native_build[0] / "libmoe3d_expert_mix.so")
    names = sorted(line.split()[-1] for line in exported.splitlines())
    assert names == ["moe3d_abi_version", "moe3d_error_text", "moe3d_expert_mix"]


@pytest.fixture
def entry(native_build: tuple[Path, str]) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(native_build[0] / "libmoe3d_expert_mix.so"))
    loaded.moe3d_error_text.restype = ctypes.c_char_p
    loaded.moe3d_expert_mix.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return loaded


def test_the_c_entry_checks_before_it_needs_a_device(entry: ctypes.CDLL) -> None:
    def text(call: object, pointers: object) -> str:
        status = entry.moe3d_expert_mix(call and ctypes.byref(call), pointers and ctypes.byref(pointers), None)  # type: ignore[arg-type]
        return str(entry.moe3d_error_text(status).decode())

    assert "a required pointer is null" in text(None, None)
    assert "a required pointer is null" in text(sizes(), None)
    assert "a required pointer is null" in text(sizes(), Tensors())
    assert "expected 1 to 16" in text(sizes(experts=17), tensors())
    assert "a pointer is misaligned" in text(sizes(layout=1), tensors(hidden=4104))
    assert text(sizes(views=0), Tensors()) == "ok"


def test_a_launch_that_cuda_refuses_returns_its_reason(entry: ctypes.CDLL) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a CUDA driver: a launch with these made-up pointers would start")
    status = entry.moe3d_expert_mix(ctypes.byref(sizes()), ctypes.byref(tensors()), None)
    assert status > 1000
    assert b"CUDA" in entry.moe3d_error_text(status)
    assert entry.moe3d_error_text(99) == b"unknown status"


def cmake_script(tmp_path: Path, text: str) -> str:
    script = tmp_path / "script.cmake"
    script.write_text(f'list(APPEND CMAKE_MODULE_PATH "{NATIVE / "cmake"}")\n{text}\n', encoding="utf-8")
    return run(tool("cmake", "builds engines/native"), "-P", script)


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        ("50 60 75 80 87 90", "75-real;80-real;87-real;90-real;90-virtual"),
        ("75 80 100 110 103 120", "75-real;80-real;100-real;103-real;110-real;120-real;120-virtual"),
    ],
)
def test_architectures_follow_the_nvcc_found(tmp_path: Path, listed: str, chosen: str) -> None:
    """All from 7.5 up as machine code and the newest as PTX; nvcc's list need not be in order."""
    nvcc = tmp_path / "nvcc"
    lines = "".join(f"echo compute_{number}\n" for number in listed.split())
    nvcc.write_text(f"#!/bin/sh\n{lines}", encoding="utf-8")
    nvcc.chmod(0o755)
    got = cmake_script(
        tmp_path,
        f'set(CMAKE_CUDA_COMPILER "{nvcc}")\ninclude(CudaArchitectures)\n'
        "moe3d_cuda_architectures(chosen)\nmessage(STATUS ${chosen})".replace("${chosen}", '"${chosen}"'),
    )
    assert got == f"-- {chosen}\n"


@pytest.mark.parametrize("prefix", ["NV_TENSORRT_{}", "TRT_{}_ENTERPRISE"])
def test_versions_of_tensorrt_are_read_from_its_headers(tmp_path: Path, prefix: str) -> None:
    """Both ways in which headers of 10 and 11 write it."""
    lines = [f"#define {prefix.format(part)} {value}" for part, value in (("MAJOR", 10), ("MINOR", 13), ("PATCH", 3))]
    lines.append("#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.")
    (tmp_path / "NvInferVersion.h").write_text("\n".join(lines), encoding="utf-8")
    got = cmake_script(
        tmp_path,
        f"include(TensorRTHeaders)\nmoe3d_tensorrt_version({tmp_path} major minor)\n"
        'message(STATUS "${major} ${minor}")',
    )
    assert got == "-- 10 13\n"


def test_an_install_brings_the_entry_and_its_header(native_build: tuple[Path, str], tmp_path: Path) -> None:
    run("cmake", "--install", native_build[0], "--prefix", tmp_path)
    assert list(tmp_path.rglob("libmoe3d_expert_mix.so"))
    header = tmp_path / "include" / "moe3d_expert_mix.h"
    assert header.read_bytes() == (NATIVE / "plugin" / "moe3d_expert_mix.h").read_bytes()


def test_the_installed_header_and_entry_serve_a_c_program(native_build: tuple[Path, str], tmp_path: Path) -> None:
    source = tmp_path / "use.c"
    source.write_text(
        "#include <stdio.h>\n"
        '#include "moe3d_expert_mix.h"\n'
        "int main(void) { puts(moe3d_error_text(moe3d_expert_mix(0, 0, 0))); return 0; }\n",
        encoding="utf-8",
    )
    program = tmp_path / "use"
    compiler = shutil.which("gcc") or tool("cc", "compiles C")
    built = native_build[0]
    run(
        compiler,
        source,
        f"-I{NATIVE / 'plugin'}",
        f"-L{built}",
        "-lmoe3d_expert_mix",
        f"-Wl,-rpath,{built}",
        "-o",
        program,
    )
    assert run(program) == "a required pointer is null; only `weights` may be\n"


def test_the_documented_registers_are_the_compilers(native_build: tuple[Path, str]) -> None:
    if "release 13.0," not in run(tool("nvcc", "compiles the kernels"), "--version"):
        pytest.skip("docs/plugin.md has the registers by CUDA 13.0")
    registers = {kernel: count for kernel, (count, _) in ptxas_report(native_build[1])["sm_89"].items()}
    page = (NATIVE.parent.parent / "docs" / "plugin.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (NCHW|channels last)(?:, (\d) pixels?)?, (\d+) experts \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M
    )
    assert len(rows) == 9
    for layout, pixels, experts, *documented in rows:
        kernel = "channels_last" if layout == "channels last" else "planar"
        bounds = f"Li{pixels}E" * bool(pixels) + f"Li{experts}ELb1E"
        compiled = [
            next(count for name, count in registers.items() if f"{kernel}_kernelI{type_}{bounds}" in name)
            for type_ in ("f", "NS_4HalfE", "NS_8BFloat16E")
        ]
        assert [int(count) for count in documented] == compiled, (layout, pixels, experts)
