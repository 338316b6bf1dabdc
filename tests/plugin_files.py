"""Plugin libraries for tests: ELF files with the names that a plugin exports, written without a compiler."""

import platform
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe3d_deploy.trt import installed

MACHINE = {"x86_64": 62, "aarch64": 183}[platform.machine()]


def shared_library(
    names: Sequence[str], *, machine: int = MACHINE, kind: int = 3, undefined: Sequence[str] = ()
) -> bytes:
    """A 64-bit ELF file whose dynamic symbols are `names`, and `undefined`, which it needs from others.

    Written by hand from the ELF-64 specification: header, string table, symbol table, three section headers.
    """
    texts = b"\0" + b"".join(name.encode() + b"\0" for name in (*names, *undefined))
    symbols, position = bytes(24), 1
    for name in (*names, *undefined):
        section = 0 if name in undefined else 1
        symbols += struct.pack("<IBBHQQ", position, 0x12, 0, section, 0x1000, 8)  # a global function
        position += len(name) + 1
    start, table = 64, 64 + len(texts)
    headers = table + len(symbols)
    sections = [
        bytes(64),
        struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, start, len(texts), 0, 0, 1, 0),  # SHT_STRTAB
        struct.pack("<IIQQQQIIQQ", 0, 11, 0, 0, table, len(symbols), 1, 1, 8, 24),  # SHT_DYNSYM, its strings in 1
    ]
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 0, headers, 0, 64, 0, 0, 64, len(sections), 1)
    return header + texts + symbols + b"".join(sections)


def plugin_file(path: Path, major: int = 10, more: Sequence[str] = ()) -> Path:
    """A file that looks like the plugin library for that TensorRT; other `more` gives it another digest."""
    names = ["getCreators", "setLoggerFinder", f"moe3d_plugin_for_tensorrt_{major}", *more]
    path.write_bytes(shared_library(names))
    return path


def load_polygraphy() -> None:
    """Polygraphy as the engine tests have it: it asks once, when it is imported, for which library it is."""
    pytest.importorskip("tensorrt_rtx", reason="keeps a builder's messages: pip install 'moe3d-deploy[rtx]'")
    installed.load("tensorrt-rtx")


class FakeTensorRT:
    """Stands in for the module tensorrt: its plugin registry, and every call of it in order."""

    def __init__(self, version: str = "10.16.1.11", *, takes: bool = True, creator: bool = True) -> None:
        self.__version__ = version
        self.__name__ = "tensorrt"
        self.calls: list[Any] = []
        self._takes, self._creator = takes, creator

    def get_plugin_registry(self) -> Any:
        return SimpleNamespace(load_library=self._load_library, get_creator=self._get_creator)

    def _load_library(self, path: str) -> object:
        self.calls.append(("load_library", path))
        return object() if self._takes else None

    def _get_creator(self, name: str, version: str, namespace: str) -> object:
        self.calls.append(("get_creator", name, version, namespace))
        return object() if self._creator else None
