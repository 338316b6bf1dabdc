"""The files of a bundle: the manifest, whether each file is what it says, where the ONNX file has its weights."""

import os
import stat
from pathlib import Path

from moe3d_deploy.bundle_staging import leftovers
from moe3d_deploy.errors import BundleError
from moe3d_deploy.external_data import external_locations
from moe3d_deploy.files import sha256_file, sha256_pieces
from moe3d_deploy.manifest import MANIFEST_NAME, PIECE_BYTES, FileEntry, Manifest
from moe3d_deploy.strict_json import MAX_BYTES


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`, once nothing below it is a link. Raises BundleError."""
    check_folder(path)
    manifest_path = path / MANIFEST_NAME
    if not os.path.lexists(manifest_path):
        raise BundleError(f"{path} has no {MANIFEST_NAME}, so it is not a bundle; give the folder that was exported")
    if MANIFEST_NAME not in regular_files(path):
        raise BundleError(f"{manifest_path} is not a regular file; copy the bundle again")
    if (size := manifest_path.stat().st_size) > MAX_BYTES:
        raise BundleError(f"{manifest_path} has {size} bytes, more than {MAX_BYTES}; copy the bundle again")
    try:
        text = manifest_path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{manifest_path} is not UTF-8 text; copy the bundle again") from None
    return Manifest.from_json(text, source=str(manifest_path))


def check_folder(path: Path) -> None:
    """Raise BundleError, saying where the bundle is if that is known, unless `path` is a folder."""
    if path.is_dir():
        return
    if path.exists():
        raise BundleError(f"bundle {path} is not a folder; give the folder that was exported")
    if old := leftovers(Path(os.path.realpath(path)), "old"):
        raise BundleError(f"bundle {path} was moved aside for a new one that did not come; rename {old[0]} to it")
    raise BundleError(f"bundle {path} does not exist; give the folder that was exported")


def regular_files(folder: Path) -> list[str]:
    """The files below a folder by their relative names, sorted. Raises BundleError for a link or a special file."""
    names, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise BundleError(f"{entry.path} is a link, which no bundle has; copy the bundle again with cp -rL")
                if entry.is_dir():
                    folders.append(Path(entry.path))
                elif entry.is_file():
                    names.append(Path(entry.path).relative_to(folder).as_posix())
                else:
                    raise BundleError(f"{entry.path} is neither a file nor a folder; copy the bundle again")
    return sorted(names)


def check_file(folder: Path, name: str, entry: FileEntry, digest: bool) -> None:
    """Raise BundleError unless the file is there, is a regular one and has its size and, if asked for, its digest."""
    file = folder / name
    remedy = "copy the bundle again" + (" or build the engine again" if name.startswith("engines/") else "")
    try:
        status = file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{file} is missing; {remedy}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file} is not a regular file; {remedy}")
    if status.st_size != entry.size:
        raise BundleError(f"{file} has {status.st_size} bytes, not {entry.size}; {remedy}")
    if digest and not _has_digest(file, entry):
        raise BundleError(f"{file} is damaged: its SHA-256 is not the manifest's; {remedy}")


def check_model(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError if an ONNX file has weights in a file that the manifest does not name."""
    for name in manifest.model_files:
        for location in external_locations(folder / name):
            if location not in manifest.files:
                raise BundleError(
                    f"{folder / name} has weights in {ascii(location)[:80]}, which is not among the manifest's files; "
                    "copy the bundle again or export it again"
                )


def entry_of(file: Path) -> FileEntry:
    """Size and digests of a file."""
    size = file.stat().st_size
    pieces = sha256_pieces(file, PIECE_BYTES) if size > PIECE_BYTES else []
    return FileEntry(size=size, sha256=sha256_file(file), pieces=tuple(pieces))


def _has_digest(file: Path, entry: FileEntry) -> bool:
    """By the digests of its pieces where there are any: they cover every byte, and all cores can read them."""
    if entry.pieces:
        return tuple(sha256_pieces(file, PIECE_BYTES)) == entry.pieces
    return sha256_file(file) == entry.sha256
