"""The TensorRT plugin's shared library: told from its file whether it is one, and registered with TensorRT.

A plugin is code: it comes from the path that the caller names, never from a bundle.
"""

import ctypes
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.files import sha256_file
from moe3d_deploy.manifest import MANIFEST_NAME
from moe3d_deploy.native.elf import NotLoadableError, exported_names
from moe3d_deploy.trt.features import version_of
from moe3d_deploy.trt.watch import Messages, one_line, reason

OPERATOR = ("ExpertMix", "1", "")  # its creator's name, version and namespace: engines/native/plugin/expert_mix_rules.h

_ENTRY = "getCreators"  # what TensorRT looks up
_MAJOR = re.compile(r"moe3d_plugin_for_tensorrt_([0-9]+)")
_BUILD = "build it as docs/plugin.md says"

# SHA-256 of the library that this process has registered; its registry takes no second plugin of a name.
_registered: list[str] = []


@dataclass(frozen=True)
class PluginLibrary:
    """A library that looks right from outside. `major` is the TensorRT that it was compiled for."""

    path: Path
    sha256: str
    major: int

    @classmethod
    def of(cls, path: Path) -> "PluginLibrary":
        """Look into the file at `path`; nothing of it is loaded. Raises InputError, in one line."""
        for folder in path.resolve().parents:
            if (folder / MANIFEST_NAME).exists():
                raise InputError(
                    f"plugin library {path} lies in the bundle {folder}, and no code is loaded from a bundle; give one "
                    "that you built, from another place"
                )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"plugin library {path} cannot be read: {error.strerror}; {_BUILD}") from None
        try:
            names = exported_names(content)
        except NotLoadableError as error:
            raise InputError(f"plugin library {path} {error}; {_BUILD}") from None
        if _ENTRY not in names:
            raise InputError(
                f"plugin library {path} exports no {_ENTRY}, so it is no TensorRT plugin (libmoe3d_expert_mix.so is "
                f"PyTorch's); {_BUILD}"
            )
        majors = {int(match[1]) for name in names if (match := _MAJOR.fullmatch(name))}
        if len(majors) != 1:
            raise InputError(
                f"plugin library {path} does not say which TensorRT it is for, so it is not this version's "
                f"libmoe3d_plugin_trt*.so; {_BUILD}"
            )
        return cls(path.absolute(), hashlib.sha256(content).hexdigest(), majors.pop())

    def check_version(self, version: str) -> None:
        """Raise InputError for a TensorRT of another major version: there is one library per major."""
        if version_of(version)[:1] != (self.major,):
            needed = version_of(version)[0] if version_of(version) else "N"
            raise InputError(
                f"plugin library {self.path} is for TensorRT {self.major}, here is {version}; give "
                f"libmoe3d_plugin_trt{needed}.so"
            )

    def register(self, trt: Any) -> None:
        """Let the loaded library `trt` (module tensorrt) know the plugin; once per process, which keeps it to its end.

        Raises EngineError where TensorRT does not take it, or this process has another one.
        """
        if _registered == [self.sha256]:
            return
        if _registered:
            raise EngineError(
                f"this process already has the plugin library of SHA-256 {_registered[0]}, so it cannot take "
                f"{self.path}; start another process"
            )
        if sha256_file(self.path) != self.sha256:
            raise EngineError(f"plugin library {self.path} has changed since it was looked at; start again")
        messages = Messages()
        with messages.captured():
            registry = trt.get_plugin_registry()
            handle = registry.load_library(str(self.path))
        if handle is None:
            why = reason(messages.errors) or _linker_error(self.path)
            raise EngineError(f"TensorRT {trt.__version__} does not load plugin library {self.path}: {why}; {_BUILD}")
        if registry.get_creator(*OPERATOR) is None:
            raise EngineError(f"plugin library {self.path} brings no plugin {OPERATOR[0]}; {_BUILD}")
        _registered.append(self.sha256)


def _linker_error(path: Path) -> str:
    """Why a library that TensorRT did not take, without a word, cannot be loaded at all."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return one_line(str(error))
    return "it gives no reason; a plugin of that name may be registered already"
