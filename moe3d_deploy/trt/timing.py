"""A builder's timing cache in a file: read before a build, added to after it, by one process at a time."""

import time
from pathlib import Path
from typing import Any

from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.files import atomic_write, exclusive_lock

_WAIT_SECONDS = 0.1


def set_timing_cache(config: Any, path: Path, title: str) -> None:
    """Give the file's timings to an IBuilderConfig; a file that is not there yet gives none.

    Raises EngineError for a file that is damaged, or of another version or GPU, InputError for one that cannot be read.
    """
    cache = config.create_timing_cache(_content(path))
    if cache is None or not config.set_timing_cache(cache, False):
        raise EngineError(
            f"timing cache {path} is damaged, or of another {title} or GPU; name another file, or delete it"
        )


def save_timing_cache(config: Any, path: Path) -> None:
    """Put what the build has timed into the file, with what another build has added to it meanwhile.

    Raises InputError where the file cannot be written.
    """
    cache = config.get_timing_cache()
    if cache is None:
        return
    lock = path.with_name(f".{path.name}.lock")
    try:
        while True:
            try:
                with exclusive_lock(lock):
                    if others := config.create_timing_cache(_content(path)):
                        cache.combine(others, False)
                    atomic_write(path, bytes(cache.serialize()))
                return
            except BlockingIOError:
                time.sleep(_WAIT_SECONDS)
    except OSError as error:
        raise InputError(f"timing cache {path} cannot be written: {error.strerror}; name another file") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(f"timing cache {path} cannot be read: {error.strerror}; name another file") from None
