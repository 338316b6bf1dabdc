"""C++ sources of stand-ins for the GPU's library, and the compiler for them."""

from pathlib import Path

from native_host import NATIVE, run, tool

ENTRY = f"""
#include "{NATIVE / "plugin" / "moe3d_expert_mix.h"}"
extern "C" int host_mix(const moe3d_expert_mix_sizes*, const moe3d_expert_mix_tensors*);
extern "C" const char* host_status_text(int);
extern "C" int moe3d_expert_mix(const moe3d_expert_mix_sizes* sizes, const moe3d_expert_mix_tensors* tensors, void*) {{
    return sizes && tensors ? host_mix(sizes, tensors) : MOE3D_ERROR_NULL;
}}
extern "C" const char* moe3d_error_text(int status) {{
    const char* const text = host_status_text(status);
    return text ? text : "unknown status";
}}
extern "C" int moe3d_abi_version() {{ return MOE3D_ABI_VERSION; }}
"""


def compiled(out: Path, source: str, *options: str | Path) -> Path:
    """`out`, a shared library of C++ `source`."""
    compiler = tool("g++", "compiles a stand-in for the kernel's library")
    text = out.with_suffix(".cpp")
    text.write_text(source, encoding="utf-8")
    run(compiler, "-std=c++17", "-fPIC", "-shared", text, *options, "-o", out)
    return out


def spoilt_entry(status: int, abi_version: int = 1) -> str:
    """Source of a library whose mix answers `status` to everything."""
    return f"""
extern "C" int moe3d_abi_version() {{ return {abi_version}; }}
extern "C" int moe3d_expert_mix(const void*, const void*, void*) {{ return {status}; }}
extern "C" const char* moe3d_error_text(int) {{ return "so it is"; }}
"""
