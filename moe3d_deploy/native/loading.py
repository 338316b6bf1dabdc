"""The shared library of the expert-mix kernel: where it is, whether it is one, and its C function through ctypes.

The interface is that of engines/native/plugin/moe3d_expert_mix.h. No torch, no CUDA runtime, no GPU is needed to load
the library, only to run a mix.
"""

import ctypes
import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import sha256_file

VARIABLE = "MOE3D_NATIVE"  # environment variable: the library's path
FILE_NAME = "libmoe3d_expert_mix.so"
PACKAGE_FOLDER = Path(__file__).resolve().parent / "lib"  # where `moe3d_deploy.native build` puts it
BUILD_COMMAND = "python -m moe3d_deploy.native build"

ABI_VERSION = 1  # MOE3D_ABI_VERSION of the header that the structures below were written from
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # enum moe3d_type
NCHW, CHANNELS_LAST = 0, 1  # enum moe3d_layout
MAX_EXPERTS = 16
WIDTH_STEP = 8  # channels: widths of experts and gate are multiples of it
ALIGNMENT_BYTES = 16  # of a channels-last map's address

_FUNCTIONS = ("moe3d_expert_mix", "moe3d_error_text", "moe3d_abi_version")


class Sizes(ctypes.Structure):
    """struct moe3d_expert_mix_sizes."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("views", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("expert_width", ctypes.c_int64),
        ("gate_width", ctypes.c_int64),
        ("pixel_stride", ctypes.c_int64),
        ("temperature", ctypes.c_float),
    ]


class Tensors(ctypes.Structure):
    """struct moe3d_expert_mix_tensors, addresses as integers."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("expert_weight", ctypes.c_void_p),
        ("expert_bias", ctypes.c_void_p),
        ("gate_weight", ctypes.c_void_p),
        ("gate_bias", ctypes.c_void_p),
        ("depth", ctypes.c_void_p),
        ("confidence", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Found:
    """A library's path; `named_by` is the environment variable that names it, None where it was looked for."""

    path: Path
    named_by: str | None = None


def find() -> Found | None:
    """What MOE3D_NATIVE names, else the library that was built into this package, else an installed one, else None.

    Nothing is loaded, and a path that the variable names need not exist.
    """
    if named := os.environ.get(VARIABLE):
        return Found(Path(named), VARIABLE)
    return next((Found(path) for path in _usual_places() if path.is_file()), None)


@functools.cache
def load(path: Path) -> "ExpertMixLibrary":
    """The library at `path`, loaded and checked once per process.

    Raises InputError where there is no file, Moe3dError for a file that is no such library or speaks another ABI.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; build the expert-mix kernel with: {BUILD_COMMAND}")
    return ExpertMixLibrary(path)


class ExpertMixLibrary:
    """The C functions of a loaded library. May be used from several threads at once."""

    def __init__(self, path: Path) -> None:
        """Load `path` and check its ABI. Raises Moe3dError."""
        self.path = path
        try:
            self._functions: Any = ctypes.CDLL(str(path.absolute()))
        except OSError as error:
            reason = " ".join(str(error).split())
            raise Moe3dError(f"{path} cannot be loaded: {reason}; build it again with: {BUILD_COMMAND}") from error
        for name in _FUNCTIONS:
            if not hasattr(self._functions, name):
                raise Moe3dError(
                    f"{path} has no function {name}, so it is not this version's {FILE_NAME} (a TensorRT plugin is "
                    f"another file); build that with: {BUILD_COMMAND}"
                )
        if (version := int(self._functions.moe3d_abi_version())) != ABI_VERSION:
            raise Moe3dError(
                f"{path} has version {version} of the C interface, this version of moe3d-deploy has {ABI_VERSION}; "
                f"build it again with: {BUILD_COMMAND}"
            )
        self._functions.moe3d_expert_mix.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._functions.moe3d_expert_mix.restype = ctypes.c_int
        self._functions.moe3d_error_text.argtypes = [ctypes.c_int]
        self._functions.moe3d_error_text.restype = ctypes.c_char_p
        if wrong := _abi_fault(self):
            raise Moe3dError(
                f"{path} is of another version of this package: {wrong}; build it again with: {BUILD_COMMAND}"
            )

    def mix(self, sizes: Sizes, tensors: Tensors, stream: int | None) -> None:
        """Queue a mix on a cudaStream_t of the current device. Raises Moe3dError with the library's reason."""
        if status := self.status(sizes, tensors, stream):
            raise Moe3dError(f"the expert mix was not started: {self.text(status)} ({self.path.name}, status {status})")

    def status(self, sizes: Sizes, tensors: Tensors, stream: int | None = None) -> int:
        """What moe3d_expert_mix returns: 0, or a moe3d_status."""
        return int(self._functions.moe3d_expert_mix(ctypes.byref(sizes), ctypes.byref(tensors), stream))

    def text(self, status: int) -> str:
        """The library's line on a status."""
        return str(self._functions.moe3d_error_text(status).decode(errors="replace"))

    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256_file(self.path)


def _abi_fault(library: ExpertMixLibrary) -> str | None:
    """What is wrong with the library's layout of the two structures, or None: a number alone may have been forgotten.

    Each field in turn gets a value that the interface refuses, and the refusal has to be that field's. Everything is
    refused before a device is needed, so nothing is launched.
    """
    if status := library.status((probe := _plausible_mix()).sizes, probe.tensors):
        return f"a mix of no view gives status {status}, expected 0"
    for field, value, expected in _REFUSED_SIZES:
        probe = _plausible_mix()
        setattr(probe.sizes, field, value)
        if (status := library.status(probe.sizes, probe.tensors)) != expected:
            return f"a wrong {field} gives status {status}, expected {expected}"
    probe = _plausible_mix()
    probe.sizes.views = 2**31  # more blocks than a grid has, which is seen last: not even a wrong library launches one
    for field, address, expected in _REFUSED_TENSORS:
        # Addresses as an allocator gives them; nothing lies there.
        probe.tensors = Tensors(*(4096 * (i + 1) for i in range(len(Tensors._fields_))))
        setattr(probe.tensors, field, address)
        if (status := library.status(probe.sizes, probe.tensors)) != expected:
            return f"a wrong address of {field} gives status {status}, expected {expected}"
    return None


# A field, a value that it may not have, and the moe3d_status that says so.
_REFUSED_SIZES: tuple[tuple[str, float, int], ...] = (
    ("type", 3, 2),
    ("layout", 2, 3),
    ("experts", MAX_EXPERTS + 1, 4),
    ("expert_width", 12, 5),
    ("gate_width", 12, 5),
    ("views", -1, 6),
    ("height", -1, 6),
    ("width", -1, 6),
    ("pixel_stride", 8, 7),
    ("temperature", 0.0, 8),
)
_REFUSED_TENSORS: tuple[tuple[str, int | None, int], ...] = (
    ("hidden", None, 1),
    ("confidence", None, 1),
    ("weights", 4096 + 2, 9),
    ("weights", 4096, 10),
)


class _Probe(ctypes.Structure):
    """Both structures with zeros behind them: what a library reads there is the same in every run."""

    _fields_ = [
        ("sizes", Sizes),
        ("behind_sizes", ctypes.c_uint64 * 8),
        ("tensors", Tensors),
        ("behind_tensors", ctypes.c_uint64 * 8),
    ]


def _plausible_mix() -> _Probe:
    """A mix of no view, which is nothing to do."""
    return _Probe(sizes=Sizes(TYPES["float16"], NCHW, 0, 8, 8, 4, 32, 32, 0, 1.0))


def _usual_places() -> Iterator[Path]:
    """The package's folder, then what `cmake --install` fills under the prefixes that people use."""
    yield PACKAGE_FOLDER / FILE_NAME
    folders = ["lib", "lib64"]
    if triplet := sysconfig.get_config_var("MULTIARCH"):  # Debian's
        folders.append(f"lib/{triplet}")
    for prefix in (Path(sys.prefix), Path.home() / ".local", Path("/usr/local"), Path("/usr")):
        for folder in folders:
            yield prefix / folder / FILE_NAME
