"""Files that appear whole or not at all: digests, atomic writes and a lock between processes.

A file is written beside its final name, synced to the disk and renamed. Errors of the operating system (no space,
no permission) pass through as OSError.
"""

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from moe3d_deploy.disk_errors import name_place

_CHUNK_BYTES = 1 << 20
_PARTIAL = re.compile(r"\..*\.partial-[0-9a-f]{8}(\.[^.]*)?", re.DOTALL)


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file as 64 lower-case hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256_pieces(path: Path | str, piece_bytes: int) -> list[str]:
    """The SHA-256 of every `piece_bytes` of a file, in order, the last one shorter; on all cores that may be used.

    A file's whole digest is one chain and takes one core. None for an empty file.
    """
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size

        def piece(start: int) -> str:
            digest = hashlib.sha256()
            end = min(start + piece_bytes, size)
            while start < end and (chunk := os.pread(descriptor, min(_CHUNK_BYTES, end - start), start)):
                digest.update(chunk)
                start += len(chunk)
            return digest.hexdigest()

        return list(pool.map(piece, range(0, size, piece_bytes)))


def atomic_write(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there; a reader sees the old content or the new, never a mixture."""
    with atomic_path(path) as temp:
        temp.write_bytes(data)


@contextmanager
def atomic_path(final: Path | str) -> Iterator[Path]:
    """Give a temporary path in the folder of `final` to write to, and rename it to `final` when the block ends.

    The temporary name is `.<stem>.partial-<8 hex digits><suffix>`: hidden, recognisable, and of the same suffix, for
    writers that look at it. When the block raises, the temporary file is removed and `final` stays as it was; an
    OSError that says that the disk is full gets its name.
    Raises FileNotFoundError when the block has written nothing.
    """
    final = Path(final)
    temp = final.with_name(f".{final.stem}.partial-{secrets.token_hex(4)}{final.suffix}")
    try:
        yield temp
        if not temp.exists():
            raise FileNotFoundError(f"nothing was written for {final}")
        sync(temp)
        os.replace(temp, final)
        sync(final.parent)
    except OSError as error:
        name_place(error, final)
        raise
    finally:
        temp.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what `atomic_path` left in `folder` when its process was killed. Only for one who holds its lock."""
    for entry in folder.iterdir():
        if _PARTIAL.fullmatch(entry.name) and entry.is_file():
            entry.unlink()


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, busy: Exception | None = None) -> Iterator[None]:
    """Hold a lock file for the length of the block; it goes with the process, however that ends.

    Raises `busy`, or else BlockingIOError, at once when another process, or another block of this one, holds it. A
    BlockingIOError of the block itself, such as a pipe's, is then not taken for that.
    """
    try:
        descriptor = _acquire(path)
    except BlockingIOError:
        if busy is None:
            raise
        raise busy from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder removed this file between the open and the lock


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
