"""The folder of a scene's files: tried before the work, written as a whole or not at all."""

import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe3d_deploy.disk_errors import remedy
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import exclusive_lock, sync

CAMERAS_FILE = "cameras.json"
_JOURNAL = ".moe3d-files.json"  # while a scene takes the place of another: the files of both
_LOCK = ".moe3d-writing.lock"
_STAGING = re.compile(r"\.moe3d-writing-[0-9a-f]{8}")
_MAX_BYTES = 64 << 20  # of a cameras.json that is read; that of 1000 views has 2 MB
_OWN_NAME = re.compile(
    r"overview\.png|scene(_original)?\.npz|scene\.rrd|points\.(ply|glb)|sparse/0/(cameras|images|points3D)\.(bin|txt)"
    r"|[0-9]{3,}_[^/\0]*_(depth|depth_color|conf|experts|entropy)\.png"
)


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """An OSError in the block becomes an error that names the folder.

    A Moe3dError, which is a failure, where the disk is full or fails; else an InputError: the folder is the wrong one.
    """
    try:
        yield
    except OSError as error:
        what = f"{folder}: cannot write the results ({error.strerror or error})"
        if full := remedy(error):
            raise Moe3dError(f"{what}; {full}") from error
        raise InputError(f"{what}; choose another output folder") from error


def prepare_folder(folder: Path) -> None:
    """Create the folder if it is absent and try a file in it, so that minutes of work do not end in an error.

    Raises InputError for a folder that cannot be written, Moe3dError for a disk that is full.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")


@contextmanager
def staged_scene(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write a scene to, and put its files into `folder` in the end, cameras.json last.

    When the block raises, or the process is killed in it, the earlier scene stays as it was. After the block that
    cameras.json goes, then the files that it lists, and the new ones are renamed to their place: a folder with a
    cameras.json never holds files of two scenes. Whatever else is in the folder stays. A process that is killed in the
    middle of that leaves no cameras.json, and a list by which the next one removes its files.
    Raises InputError where another process writes to the folder, or something stands in the place of a file; OSError.
    """
    with _one_writer(folder):
        for left in folder.iterdir():  # by a process that was killed
            if _STAGING.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
        staging = folder / f".moe3d-writing-{secrets.token_hex(4)}"
        staging.mkdir()
        try:
            yield staging
            _replace_scene(folder, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def remove_earlier_scene(folder: Path) -> None:
    """Remove the cameras.json of an earlier scene, then the files that it lists under names that scenes have.

    Whatever else is in the folder stays, and so do all files of a cameras.json that cannot be understood.
    Raises InputError where another process writes to the folder, or OSError.
    """
    with _one_writer(folder):
        _remove(folder, _earlier_files(folder))
        (folder / _JOURNAL).unlink(missing_ok=True)


def is_grouped_scene(folder: Path) -> bool:
    """Whether `folder` holds a scene that was written as one of several by size into the folder that it is in now."""
    group = _listing(folder / CAMERAS_FILE).get("group_of")
    return group is not None and group == folder.parent.resolve().name


def _replace_scene(folder: Path, staging: Path) -> None:
    new = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    new.remove(CAMERAS_FILE)
    old = _earlier_files(folder)
    _check_room(folder, [*new, CAMERAS_FILE], set(old))
    for name in (*new, CAMERAS_FILE):
        sync(staging / name)
    (staging / _JOURNAL).write_text(json.dumps({"files": sorted({*old, *new})}))
    sync(staging / _JOURNAL)
    os.replace(staging / _JOURNAL, folder / _JOURNAL)
    sync(folder)
    _remove(folder, old)
    for name in new:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    for place in {(folder / name).parent for name in new}:
        sync(place)
    os.replace(staging / CAMERAS_FILE, folder / CAMERAS_FILE)
    (folder / _JOURNAL).unlink()
    sync(folder)


def _remove(folder: Path, names: list[str]) -> None:
    """Remove cameras.json, then the files, then sub-folders that have become empty."""
    (folder / CAMERAS_FILE).unlink(missing_ok=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    places = {place for name in names for place in (folder / name).parents if folder in place.parents}
    for place in sorted(places, reverse=True):
        with suppress(OSError):  # not there, or not empty
            place.rmdir()


def _check_room(folder: Path, new: list[str], old: set[str]) -> None:
    """Find what would stop the renaming before it begins, and files of others that it would replace in sub-folders."""
    for name in new:
        if stat.S_ISDIR(_mode(folder / name)):
            raise InputError(f"{folder / name} is a folder where a file of the scene belongs; move it away")
        if (folder / name).parent != folder and (folder / name).exists() and name not in old:
            raise InputError(
                f"{(folder / name).parent} holds a model that is not of this program; "
                "move it away or choose another output folder"
            )


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    busy = InputError(f"{folder}: another process writes results there; wait for it or choose another output folder")
    with exclusive_lock(folder / _LOCK, busy):
        yield


def _earlier_files(folder: Path) -> list[str]:
    """What an earlier scene has listed, and what a process that was killed between two scenes has left."""
    return _listed_files(folder / CAMERAS_FILE) + _listed_files(folder / _JOURNAL)


def _listed_files(listing: Path) -> list[str]:
    """The files that a cameras.json or journal lists under names that scenes have; none where it makes no sense."""
    listed = _listing(listing).get("files")
    names = listed if isinstance(listed, list) else []
    return [name for name in names if isinstance(name, str) and _OWN_NAME.fullmatch(name)]


def _listing(file: Path) -> dict[str, Any]:
    """What a cameras.json or journal says; nothing where there is none or it makes no sense."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return {}
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
        return {}
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
