"""The errors and warnings of this project. Each message is one line: what is wrong with which input, and what to do."""

import importlib.util

# Which extra brings a package, by the name it is imported by. Polygraphy comes with either TensorRT's extra.
EXTRA_OF = {
    "torch": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "sympy": "export",
    "onnxruntime": "cpu",
    "tensorrt": "trt",
    "tensorrt_rtx": "rtx",
    "rerun": "viz",
    "matplotlib": "bench",
    "scipy": "train",
    "skimage": "train",
    "tensorboard": "train",
}


class Moe3dWarning(UserWarning):
    """What goes on, but should be known; the command line shows its message alone (`cli.notices`)."""


class Moe3dError(Exception):
    """Base class; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(Moe3dError):
    """An argument, image or shape that cannot be used."""

    exit_code = 2


class CheckpointError(Moe3dError):
    """Weights or their config that cannot be used."""

    exit_code = 2


class BundleError(Moe3dError):
    """A bundle folder that is missing, damaged or not of a format this version reads."""

    exit_code = 2


class ExportError(Moe3dError):
    """An export that failed or did not pass its verification."""


class EngineError(Moe3dError):
    """An engine that cannot be built, loaded or run."""


class MissingExtraError(Moe3dError):
    """A package of an optional extra that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'moe3d-deploy[{extra}]'")


def require(package: str) -> None:
    """Raise MissingExtraError unless `package`, a key of EXTRA_OF, is installed; imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, EXTRA_OF[package])


def first_line(error: Exception) -> str:
    """The first line of another library's message that says something; its class where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
