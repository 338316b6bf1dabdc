"""The folder of a scene's files: made and tried before the work, cleared of an earlier scene before the writing."""

import json
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe3d_deploy.errors import InputError

CAMERAS_FILE = "cameras.json"
_MAX_BYTES = 64 << 20  # of a cameras.json that is read; that of 1000 views has 2 MB
_OWN_NAME = re.compile(
    r"overview\.png|scene\.npz|points\.(ply|glb)|[0-9]{3,}_[^/\0]*_(depth|depth_color|conf|experts|entropy)\.png"
)


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """An OSError in the block becomes an InputError that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{folder}: cannot write the results ({reason}); choose another output folder") from error


def prepare_folder(folder: Path) -> None:
    """Create the folder if it is absent and try a file in it, so that minutes of work do not end in an error.

    Raises InputError for a folder that cannot be written.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")


def remove_earlier_scene(folder: Path) -> None:
    """Remove the cameras.json of an earlier scene, then the files that it lists under names that scenes have.

    Whatever else is in the folder stays, and so do all files of a cameras.json that cannot be understood.
    """
    cameras = folder / CAMERAS_FILE
    names = _listed_files(cameras)
    cameras.unlink(missing_ok=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _listed_files(cameras: Path) -> list[str]:
    try:
        status = cameras.lstat()
    except FileNotFoundError:
        return []
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
        return []
    try:
        document = json.loads(cameras.read_bytes())
    except (ValueError, RecursionError):
        return []
    listed = document.get("files") if isinstance(document, dict) else None
    names = listed if isinstance(listed, list) else []
    return [name for name in names if isinstance(name, str) and _OWN_NAME.fullmatch(name)]
