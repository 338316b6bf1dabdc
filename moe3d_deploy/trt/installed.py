"""Which builders are installed, which GPUs are there, and loading a builder's library with Polygraphy over it."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe3d_deploy.child import is_out_of_memory
from moe3d_deploy.cuda_driver import Capability, compute_capabilities
from moe3d_deploy.errors import EngineError, InputError, MissingExtraError
from moe3d_deploy.trt.watch import one_line

RTX_CAPABILITIES: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (12, 0))
"""What a TensorRT-RTX engine is built for unless told otherwise, whatever GPU the building machine has."""

OUT_OF_MEMORY = "it ran out of memory; free some, or use a machine with more"


class _Library(NamedTuple):
    title: str
    module: str
    distributions: tuple[str, ...]
    extra: str


_LIBRARIES = {
    "tensorrt": _Library("TensorRT", "tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "trt"),
    "tensorrt-rtx": _Library("TensorRT-RTX", "tensorrt_rtx", ("tensorrt_rtx",), "rtx"),
}


def title(builder: str) -> str:
    """The product's name, such as TensorRT-RTX. InputError for a builder that does not exist."""
    if builder not in _LIBRARIES:
        raise InputError(f"builder {builder!r} is unknown; use one of {', '.join(_LIBRARIES)}")
    return _LIBRARIES[builder].title


def available() -> dict[str, str]:
    """The installed builders and their versions; a library without package metadata is imported to ask it."""
    return {builder: _version(lib) for builder, lib in _LIBRARIES.items() if _is_installed(lib.module)}


def require(builder: str) -> None:
    """Raise MissingExtraError unless `builder` and Polygraphy are installed, InputError if there is no such builder."""
    title(builder)
    for package in (_LIBRARIES[builder].module, "polygraphy"):
        if not _is_installed(package):
            raise MissingExtraError(package, _LIBRARIES[builder].extra)


def visible_gpus() -> list[Capability]:
    """The compute capability of every CUDA device this process sees; empty without a driver or a device."""
    return compute_capabilities()


def load(builder: str) -> Any:
    """Import the library and Polygraphy over it; Polygraphy reads its choice from the environment, once.

    Returns the module tensorrt or tensorrt_rtx. EngineError where it does not load or this process uses the other one.
    """
    use_rtx = builder == "tensorrt-rtx"
    name, before = "POLYGRAPHY_USE_TENSORRT_RTX", os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX")
    os.environ[name] = str(int(use_rtx))
    try:
        trt = importlib.import_module(_LIBRARIES[builder].module)
        from polygraphy import config
    except (ImportError, OSError) as error:
        if says_memory_ran_out(str(error)) or _lacks_memory(_LIBRARIES[builder], str(error)):
            raise EngineError(f"{title(builder)} does not load: {OUT_OF_MEMORY}") from None
        raise EngineError(f"{title(builder)} does not load: {one_line(str(error))}; install it again") from None
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    if bool(config.USE_TENSORRT_RTX) is not use_rtx:
        raise EngineError(
            f"this process already uses the other builder, so it cannot use {title(builder)}; start another process"
        )
    return trt


def says_memory_ran_out(message: str) -> bool:
    """Whether a message of TensorRT's, or of the loader of its library, is about memory that could not be had."""
    return is_out_of_memory(RuntimeError.__name__, message)


def _lacks_memory(library: _Library, message: str) -> bool:
    """Whether the file that the loader "cannot open" is installed and there is no memory to map it.

    The package tries to load its files first and hides what went wrong; the loader then looks for them elsewhere.
    """
    missing = re.match(r"([\w.+-]+): cannot open shared object file", message)
    spec = importlib.util.find_spec(library.module)
    if missing is None or spec is None or spec.origin is None:
        return False
    packages = Path(spec.origin).parent.parent
    for path in packages.glob(f"{library.module}*/{missing[1]}"):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            return says_memory_ran_out(str(error))
    return False


def target_capabilities(builder: str, asked: Sequence[Capability] | None = None) -> tuple[Capability, ...]:
    """What to build for: `asked`, each once, or the builder's default. TensorRT builds for the first visible GPU.

    No library is loaded, so whether TensorRT-RTX knows what was asked shows in the build. EngineError or InputError.
    """
    if builder == "tensorrt":
        gpus = visible_gpus()
        if not gpus:
            raise EngineError("TensorRT builds for the GPU of this machine and none is visible; use tensorrt-rtx")
        if asked is not None and list(asked) != gpus[:1]:
            here = "sm{}{}".format(*gpus[0])
            raise InputError(f"TensorRT builds for this machine's GPU, {here}, alone; leave --target out")
        return (gpus[0],)
    return RTX_CAPABILITIES if asked is None else tuple(dict.fromkeys((major, minor) for major, minor in asked))


def resolve_capabilities(trt: Any, builder: str, asked: Sequence[Capability] | None) -> tuple[Capability, ...]:
    """`target_capabilities`, checked against what the loaded library `trt` can build."""
    wanted = target_capabilities(builder, asked)
    if builder == "tensorrt":
        return wanted
    known = [int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    unknown = [pair for pair in wanted if 10 * pair[0] + pair[1] not in known or not 0 <= pair[1] <= 9]
    if unknown or not wanted:
        raise InputError(
            f"compute capability {'{}.{}'.format(*unknown[0]) if unknown else '(none)'}: TensorRT-RTX "
            f"{trt.__version__} builds for {', '.join(str(n / 10) for n in known)}; "
            "for another GPU build with TensorRT on its machine"
        )
    return wanted


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def _version(library: _Library) -> str:
    for name in library.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module(library.module).__version__)
