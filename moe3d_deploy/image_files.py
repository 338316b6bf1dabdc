"""Which files the inputs name, and their bytes. What the bytes hold is not its subject.

Nothing but a regular file is ever opened: a pipe would make the reader wait, and opening a device may do something.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from moe3d_deploy.errors import InputError
from moe3d_deploy.image_decode import image_suffixes

PathLike = str | bytes | os.PathLike[str]

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts")
    + (".mpg", ".mpeg", ".vob", ".flv", ".wmv", ".asf", ".ogv")
)
MAX_FILE_BYTES = 1 << 30  # an uncompressed 16-bit RGB picture of the most pixels that are decoded

_NOT_THERE = "is neither a file nor a folder; check the path"
_FOLDER = "is a folder; name the files in it"
_EMPTY = "is empty (0 bytes); copy or record it again"
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def find_images(inputs: PathLike | Sequence[PathLike]) -> list[Path]:
    """List the image files that `inputs` name: files, folders and glob patterns, in the order given.

    A folder or a pattern gives its files with an image suffix in natural order (frame_2 before frame_10);
    folders are not searched recursively, hidden files are left out. A file named itself is taken as it is.
    Raises InputError for an input that is missing or holds no image, for a broken link, pipe or device under an
    image's name, and when there are no inputs.
    """
    found = [path for item in as_list(inputs) for path in expand(item, image_suffixes())]
    if not found:
        raise InputError("no images given; name at least one image file, folder or pattern")
    return found


def as_list(paths: PathLike | Sequence[PathLike]) -> list[PathLike]:
    """A single path is a sequence of one, not of its characters."""
    return [paths] if isinstance(paths, (str, bytes, os.PathLike)) else list(paths)


def expand(item: PathLike, *suffixes: frozenset[str]) -> list[Path]:
    """The files that one input names. A folder or pattern gives those with the first `suffixes` of which it has any.

    Raises InputError as `find_images` does.
    """
    name = os.fsdecode(item)
    fault = fault_of(name)
    if fault is None:
        return [Path(name)]
    if fault == _FOLDER:
        return _expand_folder(name, suffixes)
    if fault != _NOT_THERE or not re.search(r"[*?[]", name) or "\0" in name:
        raise InputError(f'"{shown(name)}" {fault}')
    candidates = list(glob.iglob(name, recursive=True))
    found = next(filter(None, (_files(candidates, kind) for kind in suffixes)), None)
    if not found:
        raise InputError(f'pattern "{shown(name)}" matches no image file; check the path')
    return found


def fault_of(path: PathLike) -> str | None:
    """Why `path` cannot be read as a file, as the end of a sentence; None for a regular file. It opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a NUL byte
        return _NOT_THERE
    except OSError as error:
        if error.errno == errno.ENOENT and os.path.islink(path):
            return f'is a link to "{shown(os.readlink(os.fsdecode(path)))}", which does not exist; mend or remove it'
        return _NOT_THERE if error.errno in _MISSING else f"cannot be read: {error.strerror}"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return _FOLDER
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}, not a file; save what it gives to a file first"


def read_file(path: PathLike, label: str) -> bytes:
    """All bytes of a regular file; `label`, such as `image "a.png"`, is what errors call it.

    They are read at once, so that a decoder does not see a file change, or shrink under a memory mapping.
    Raises InputError for what is no regular file, cannot be read, is empty or has more than MAX_FILE_BYTES.
    """
    with open_file(path, label) as file:
        return read_stream(file, label)


def open_file(path: PathLike, label: str) -> BinaryIO:
    """A regular file, opened for reading. Raises InputError for what is none, is empty or cannot be read."""
    if fault := fault_of(path):
        raise InputError(f"{label} {fault}")
    try:
        # not to wait if it has become a pipe since
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115  handed on
    except OSError as error:
        raise InputError(f"{label} cannot be read: {error.strerror}") from error
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return file
    file.close()
    if stat.S_ISREG(status.st_mode):
        raise InputError(f"{label} {_EMPTY}")
    raise InputError(f"{label} was replaced while it was opened; try again")


def read_stream(stream: BinaryIO, label: str) -> bytes:
    """All bytes of a stream, at least one and at most MAX_FILE_BYTES. Raises InputError."""
    try:
        data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{label} cannot be read: {error.strerror or error}") from error
    if not data:
        raise InputError(f"{label} {_EMPTY}")
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{label} has more than {MAX_FILE_BYTES} bytes; save it compressed, as PNG or JPEG")
    return data


def shown(path: PathLike) -> str:
    """A path or name as text for people and files of text: what is not printable is escaped, on one line."""
    return "".join(char if char.isprintable() else _escaped(char) for char in os.fsdecode(path))


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte that is no UTF-8, as Python holds it in file names
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def _expand_folder(folder: str, suffixes: tuple[frozenset[str], ...]) -> list[Path]:
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as error:
        raise InputError(f'folder "{shown(folder)}" cannot be read: {error.strerror}') from error
    found = next(filter(None, (_files((os.path.join(folder, n) for n in names), kind) for kind in suffixes)), None)
    if not found:
        raise InputError(f'folder "{shown(folder)}" holds no image; its sub-folders are not searched')
    return found


def _files(candidates: Iterable[str], suffixes: frozenset[str]) -> list[Path]:
    """Those of `candidates` with one of the suffixes, without folders, in natural order."""
    paths = [Path(path) for path in candidates if os.path.splitext(path)[1].lower() in suffixes]
    faults = [(path, fault_of(path)) for path in paths]
    for path, fault in faults:
        if fault not in (None, _FOLDER):
            raise InputError(f'"{shown(path)}" {fault}')
    return sorted((path for path, fault in faults if fault is None), key=_natural_key)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    """Digits compare as numbers, letters without case; the path itself decides between equals."""
    parts = re.split(r"([0-9]+)", str(path).lower())  # digits at the odd places
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)
