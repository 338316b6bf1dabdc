"""Build the expert-mix library from the sources in this package: one call of nvcc, for those without CMake."""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

import moe3d_deploy
from moe3d_deploy import cuda_driver
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import atomic_path
from moe3d_deploy.native.loading import FILE_NAME, PACKAGE_FOLDER, ExpertMixLibrary

SOURCES = Path(moe3d_deploy.__file__).resolve().parent / "engines" / "native" / "plugin"
OLDEST = 75  # compute capability times 10: TensorRT's floor, and that of engines/native/cmake


def build(out: Path = PACKAGE_FOLDER, architectures: Sequence[int] = ()) -> Path:
    """Build libmoe3d_expert_mix.so into the folder `out`, which is made, and return its path.

    architectures   compute capabilities times 10, such as 89; none: those of this machine's GPUs, without a GPU
                    every one that nvcc offers. The newest is added as PTX, which later GPUs compile.

    What is there stays until the new file is whole and has passed the ABI check. Takes about 10 s an architecture.
    Raises InputError for architectures that nvcc lacks, Moe3dError where there is no nvcc or it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise Moe3dError("nvcc was not found; install the CUDA toolkit, or set CUDA_HOME to where it is")
    listed = run_compiler([nvcc, "--list-gpu-arch"])
    offered = sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed))
    here = [10 * major + minor for major, minor in cuda_driver.compute_capabilities()]
    chosen = choose_architectures(architectures, offered, here)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / FILE_NAME) as temp:
        run_compiler(compile_command(nvcc, chosen, temp))
        ExpertMixLibrary(temp)
    return out / FILE_NAME


def find_nvcc() -> str | None:
    """nvcc where CUDACXX, CUDA_HOME or CUDA_PATH say, else on the PATH, else where it is usually installed."""
    if (named := os.environ.get("CUDACXX")) and (found := shutil.which(named)):
        return found
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc", path=os.pathsep.join(map(str, folders))) if folders else None
    return found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def choose_architectures(asked: Collection[int], offered: Collection[int], here: Collection[int]) -> list[int]:
    """What to compile for, in ascending order: `asked`, else for the GPUs that are `here`, else all `offered`.

    A GPU that is newer than nvcc gets the newest that it can run, whose PTX its driver compiles.
    """
    usable = [number for number in offered if number >= OLDEST]
    if not usable:
        raise Moe3dError(f"nvcc names no compute capability from {OLDEST} up; install CUDA 11 or newer")
    if unknown := sorted(set(asked) - set(usable)):
        raise InputError(f"architecture {unknown[0]} is none that nvcc offers; choose from {_listed(usable)}")
    if asked:
        return sorted(set(asked))
    chosen = set()
    for capability in here:
        older = [number for number in usable if number <= capability]
        if not older:
            raise Moe3dError(
                f"this GPU is of compute capability {capability / 10:.1f}; nvcc offers {_listed(usable)}: "
                "name an architecture to build for another machine"
            )
        chosen.add(max(older))
    return sorted(chosen or usable)


def compile_command(nvcc: str, architectures: Sequence[int], out: Path) -> list[str]:
    """As engines/native/CMakeLists.txt builds it: the CUDA runtime linked in, the exported names of c_entry.map."""
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    newest = max(architectures)
    return [
        nvcc,
        "-std=c++17",
        "-O3",
        "--shared",
        "--threads=0",
        "--cudart=static",
        "-Xcompiler=-fPIC",
        f"-Xlinker=--version-script={SOURCES / 'c_entry.map'}",
        "-Xlinker=-z,defs",
        *codes,
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
        str(SOURCES / "expert_mix_kernel.cu"),
        "-o",
        str(out),
    ]


def run_compiler(command: Sequence[str]) -> str:
    """What a compiler, or what calls one, printed. Raises Moe3dError with its first line about an error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
        told = [line for line in lines if re.search(r"error|fatal", line, re.IGNORECASE)]
        reason = (told or lines[-1:] or ["no message"])[0]
        raise Moe3dError(f"{Path(command[0]).name} ended with code {done.returncode}: {reason}")
    return done.stdout


def _listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, numbers))
