"""Packages of optional extras: missing is one error, installed and broken another."""

import importlib
from typing import Any

from moe3d_deploy.errors import EXTRA_OF, MissingExtraError, Moe3dError


def load_package(name: str) -> Any:
    """Import a package, a key of EXTRA_OF.

    Raises MissingExtraError if it is not installed, Moe3dError if it cannot be loaded.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library that ctypes cannot load
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingExtraError(name, EXTRA_OF[name]) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Moe3dError(f"{name} is installed but cannot be loaded: {reason}; install it again") from error
