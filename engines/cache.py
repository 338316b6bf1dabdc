"""Engines kept on this machine by what they were built from, so that the same build is done once.

An entry is a folder `<key>` of engine.plan, record.json, build.log and turn, a number that rises with its use. It is
staged beside its final name and renamed, so it is whole or not there; the digest in its record is compared with the
file before anybody gets it. One process at a time works on a key: the others wait, and then find what it has built.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe3d_deploy import __version__, strict_json, trt
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import Moe3dWarning
from moe3d_deploy.external_data import external_locations
from moe3d_deploy.files import exclusive_lock, sha256_file, sync

LIMIT_BYTES = 10 * 10**9  # three engines of moe3d-1b

_FORMAT = 1
_PLAN, _RECORD, _LOG, _TURN = "engine.plan", "record.json", "build.log", "turn"
_KEY = re.compile("[0-9a-f]{64}")
_WAIT_SECONDS = 0.1


def engine_key(
    onnx_path: Path,
    profiles: Sequence[ShapeProfile],
    *,
    builder: str,
    builder_version: str,
    compute_capabilities: Sequence[trt.Capability],
    flags: trt.BuildFlags,
    plugin: Path | None = None,
) -> str:
    """What an engine is built from, as 64 hex digits: the content of the ONNX file and of its weights, the shapes, the
    builder and its version, the GPUs, the flags, the plugin library, and this version of moe3d-deploy."""
    weights = {location: sha256_file(onnx_path.parent / location) for location in external_locations(onnx_path)}
    parts = {
        "format": [_FORMAT, __version__],
        "onnx": sha256_file(onnx_path),
        "weights": weights,
        "profiles": [profile.as_dict() for profile in profiles],
        "builder": [builder, builder_version],
        "compute_capabilities": sorted(map(list, compute_capabilities)),
        "flags": flags.asked(),
        "plugin": sha256_file(plugin) if plugin else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class EngineCache:
    """A folder of engines, made when it is first needed; the oldest go when it holds more than `limit_bytes`.

    on_note   gets a line when there is something to know: waiting for another builder, a damaged entry
    """

    folder: Path
    limit_bytes: int = LIMIT_BYTES
    on_note: Callable[[str], None] | None = None

    @contextlib.contextmanager
    def entry(self, key: str) -> Iterator["Entry | None"]:
        """Hold the key for the length of the block; waits while another process, perhaps building it, holds it.

        None, with a warning, where the folder cannot be used: the build goes on without it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock(stack, key)
                self._remove_partials(key)
            except OSError as error:
                _warn(f"engine cache {self.folder} cannot be used: {error.strerror}; building without it")
                stack.close()
                yield None
                return
            yield Entry(self, key)

    def _lock(self, stack: contextlib.ExitStack, key: str) -> None:
        waiting = False
        while True:
            try:
                stack.enter_context(exclusive_lock(self._lock_path(key)))
                return
            except BlockingIOError:
                if not waiting:
                    self.note("another process builds this very engine: waiting for it")
                waiting = True
                time.sleep(_WAIT_SECONDS)

    def _lock_path(self, key: str) -> Path:
        return self.folder / f".{key}.lock"

    def _partial(self, key: str) -> Path:
        """A new name for what is not an entry yet, or no more."""
        return self.folder / f".{key}.partial-{secrets.token_hex(4)}"

    def _remove_partials(self, key: str) -> None:
        """What killed processes have left of this key; only for one who holds its lock."""
        for path in self.folder.glob(f".{key}.partial-*"):
            shutil.rmtree(path)

    def _remove(self, key: str) -> None:
        """Remove an entry, at no moment a part of it; only for one who holds its lock."""
        gone = self._partial(key)
        (self.folder / key).rename(gone)
        shutil.rmtree(gone)

    def _entries(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]

    def next_turn(self) -> str:
        """A number above those of all entries: that of the one used last. No clock is asked, since clocks jump."""
        return str(1 + max(map(_turn, self._entries()), default=0))

    def note(self, line: str) -> None:
        if self.on_note:
            self.on_note(line)

    def trim(self) -> None:
        """Remove the entries used longest ago until the rest is within the limit, and what killed processes have left.

        What is held, by this process or another, stays.
        """
        for path in self.folder.glob(".*.partial-*"):
            key = path.name[1:].partition(".")[0]
            with contextlib.suppress(BlockingIOError), exclusive_lock(self._lock_path(key)):
                self._remove_partials(key)
        entries = self._entries()
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
        total = sum(sizes.values())
        for path in sorted(entries, key=_turn):
            if total <= self.limit_bytes:
                return
            with contextlib.suppress(BlockingIOError), exclusive_lock(self._lock_path(path.name)):
                self._remove(path.name)
                total -= sizes[path]


class Entry:
    """One key of a cache, held by this process."""

    def __init__(self, cache: EngineCache, key: str) -> None:
        self._cache, self._key = cache, key
        self._path = cache.folder / key

    @property
    def failed_log(self) -> Path:
        """Where the messages of a build go until it has succeeded; those of one that failed stay there."""
        return self._cache.folder / f"{self._key[:16]}.log"

    def fetch(self, plan: Path, log: Path) -> dict[str, Any] | None:
        """Copy the engine and its log to these paths and return its record; None where there is none.

        A damaged entry is removed, with a note. An OSError is of the disk that is copied to.
        """
        if not self._path.is_dir():
            return None
        try:
            record = strict_json.parse((self._path / _RECORD).read_bytes())
            size, digest, built = record["size"], record["sha256"], record["built"]
            whole = (self._path / _PLAN).stat().st_size == size and isinstance(built, dict)
        except (OSError, strict_json.JsonError, KeyError, TypeError):
            whole = False
        if not whole:
            self._drop()
            return None
        shutil.copyfile(self._path / _PLAN, plan)
        if sha256_file(plan) != digest:
            plan.unlink()
            self._drop()
            return None
        with contextlib.suppress(OSError):  # neither is worth an error
            shutil.copyfile(self._path / _LOG, log)
            (self._path / _TURN).write_text(self._cache.next_turn())
        return built

    def _drop(self) -> None:
        self._cache.note("the cached engine is damaged: building it again")
        with contextlib.suppress(OSError):
            self._cache._remove(self._key)

    def store(self, plan: Path, built: dict[str, Any], log: Path) -> None:
        """Keep a good engine. What the disk has against it is a warning: the engine itself is there."""
        staged = self._cache._partial(self._key)
        record = {"size": plan.stat().st_size, "sha256": sha256_file(plan), "built": built}
        try:
            staged.mkdir()
            shutil.copyfile(plan, staged / _PLAN)
            if log.exists():
                shutil.copyfile(log, staged / _LOG)
            (staged / _RECORD).write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")
            (staged / _TURN).write_text(self._cache.next_turn())
            for path in (*staged.iterdir(), staged):
                sync(path)
            if self._path.exists():
                self._cache._remove(self._key)
            staged.rename(self._path)
            sync(self._cache.folder)
        except OSError as error:
            _warn(f"engine cache {self._cache.folder} does not keep this engine: {error.strerror}")
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process trims as well, or the disk is not well
            self._cache.trim()


def _turn(entry: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((entry / _TURN).read_text())
    return 0


def _warn(line: str) -> None:
    warnings.warn(line, Moe3dWarning, stacklevel=3)
