"""Bundles: the folder that is built, copied to a robot, inspected and run. Opening, writing, adding engines.

The specification is docs/bundle.md. No file of a bundle is interpreted here but its manifest.
"""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.files import atomic_path, atomic_write, exclusive_lock, remove_partials, sha256_file, sync
from moe3d_deploy.manifest import MANIFEST_NAME, MAX_BYTES, EngineRecord, FileEntry, Manifest, Profile, check_name

_BUILDER_TAGS = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: Literal["full", "sizes"] = "full") -> "Bundle":
        """Check a bundle before anything else reads from it; "sizes" leaves out the digests.

        Raises BundleError, naming the file and the remedy, for a folder or manifest that is missing or damaged.
        """
        if verify not in ("full", "sizes"):
            raise InputError(f"verify is {verify!r}; use 'full' or 'sizes'")
        path = Path(path)
        try:
            manifest = _read_manifest(path)
            for name, entry in manifest.files.items():
                _check_file(path, name, entry, digest=verify == "full")
        except OSError as error:
            raise BundleError(f"bundle {path} cannot be read: {error}; check its rights or copy it again") from error
        return cls(path, manifest)

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.path / self.manifest.model_file

    def engine_path(self, record: EngineRecord) -> Path:
        """The file of one of this bundle's engines. Raises InputError for a record that is not its own."""
        if record not in self.manifest.engines:
            raise InputError(f"{record.file} is no engine of bundle {self.path}; take one of its manifest")
        return self.path / record.file


class BundleWriter:
    """Write a bundle that appears whole or not at all.

        with BundleWriter("bundle") as writer:
            onnx.save(model, writer.folder / "model.onnx")
            bundle = writer.commit(manifest)

    Everything is staged in a hidden folder beside the final one, which is removed when the block ends without a
    commit. What a killed writer left for the same name is removed at the start of the next one.
    """

    def __init__(self, path: Path | str, overwrite: bool = False) -> None:
        """Raises InputError when `path` cannot be written; see `overwrite` in docs/bundle.md."""
        self._given = path
        self._final = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._stack = ExitStack()
        self._folder: Path | None = None
        with _os_errors(path):
            self._check_destination()

    def __enter__(self) -> "BundleWriter":
        """Raises BundleError when another writer is at work on the same bundle."""
        with _os_errors(self._given), ExitStack() as stack:
            stack.enter_context(_writer_lock(self._final))
            stack.callback(_clean_up, self._final)
            _clean_up(self._final)
            self._check_destination()
            folder = _sibling(self._final, "partial")
            folder.mkdir()
            self._folder = folder
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder = None
        with _os_errors(self._given):
            self._stack.close()

    @property
    def folder(self) -> Path:
        """Where the files go until the commit, under the names they will have."""
        if self._folder is None:
            raise InputError(f"the writer of bundle {self._given} is closed; use it in its with block, before commit")
        return self._folder

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash and sync every staged file, write the manifest (its `files` is filled in here), move it all in place.

        Raises BundleError for a staged file that no reader would accept or a manifest that names a missing file.
        """
        folder = self.folder
        with _os_errors(self._given):
            files = {}
            for name in _regular_files(folder):
                check_name(name, "staged file")
                sync(folder / name)
                files[name] = _entry(folder / name)
            manifest = replace(manifest, files=files)
            for parent in {folder / parent for name in files for parent in Path(name).parents}:
                sync(parent)
            _write_manifest(folder, manifest)
            self._check_destination()
            self._move_in_place(folder)
        self._folder = None
        return Bundle(Path(self._given), manifest)

    def _move_in_place(self, folder: Path) -> None:
        if (self._final / MANIFEST_NAME).exists():
            self._final.rename(_sibling(self._final, "old"))  # whatever ends us here, _clean_up puts it back
        folder.rename(self._final)
        sync(self._final.parent)

    def _check_destination(self) -> None:
        final, given = self._final, self._given
        if not final.parent.is_dir():
            raise InputError(f"folder {final.parent} does not exist; create it, then write bundle {given} again")
        if os.path.ismount(final):
            raise InputError(f"{given} is a mount point, which cannot be replaced; write to a folder inside it")
        if not final.exists() or (final.is_dir() and not any(final.iterdir())):
            return
        if not (final / MANIFEST_NAME).is_file():
            raise InputError(f"{given} exists and is not a bundle, so it is never overwritten; choose another name")
        if not self._overwrite:
            raise InputError(f"bundle {given} exists; choose another name or ask for it to be overwritten")


def add_engine(path: Path | str, record: EngineRecord, build: Callable[[Path], EngineRecord | None]) -> Bundle:
    """Add the engine that `build` writes to the path it is given, replacing one of the same file name.

    `build` may return the record to store, for what is known only afterwards (audit, times); it names the same file.
    Whatever happens and whenever the process ends, the bundle stays valid: without the engine or with it.
    Raises BundleError for a bundle that cannot be used or that another writer is at work on.
    """
    path = Path(path)
    _check_folder(path)
    with _os_errors(path), _writer_lock(Path(os.path.realpath(path))):
        manifest = Bundle.open(path, verify="sizes").manifest
        final = path / record.file
        final.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path, final.parent):
            remove_partials(folder)
        others = tuple(engine for engine in manifest.engines if engine.file != record.file)
        files = {name: entry for name, entry in manifest.files.items() if name != record.file}
        with atomic_path(final) as temp:
            built = build(temp) or record
            if built.file != record.file:
                raise InputError(f"engine {record.file} came back as {built.file}; keep its file name")
            entry = _entry(temp)
            if entry.size == 0:
                raise BundleError(f"engine {record.file} is empty; build it again")
            engines = tuple(sorted((*others, built), key=lambda engine: engine.file))
            manifest_after = replace(manifest, engines=engines, files={**files, record.file: entry})
            manifest_after.to_json()  # a record that no reader accepts stops here, before anything has changed
            if record.file in manifest.files:  # the old entry must not meet the new file
                _write_manifest(path, replace(manifest, engines=others, files=files))
        _write_manifest(path, manifest_after)
    return Bundle(path, manifest_after)


def engine_name(
    model: str, profile: Profile, precision: str, compute_capabilities: Sequence[int], builder: str, version: str
) -> str:
    """The file name of an engine, such as `moe3d-1b_1-4-8x392x518_fp16_sm89_rtx1.6.1.plan`.

    Views, height and width as min-opt-max, or one number where the three are equal; scenes first when there can be
    more than one. Characters of `model` that no file name of a bundle has become `-`. Raises InputError.
    """
    if builder not in _BUILDER_TAGS:
        raise InputError(f"builder {builder!r} is unknown; use one of {', '.join(_BUILDER_TAGS)}")
    if not compute_capabilities:
        raise InputError("an engine needs at least one compute capability in its name, such as 89")
    axes = list(zip(profile.min, profile.opt, profile.max, strict=True))
    shown = axes if profile.max[0] > 1 else axes[1:]
    shapes = "x".join("-".join(map(str, axis if len(set(axis)) > 1 else axis[:1])) for axis in shown)
    capabilities = "-".join(map(str, sorted(set(compute_capabilities))))
    model = re.sub(r"[^A-Za-z0-9_.+-]+", "-", model)
    name = f"{model}_{shapes}_{precision}_sm{capabilities}_{_BUILDER_TAGS[builder]}{version}.plan"
    try:
        check_name(f"engines/{name}", "engine name")
    except BundleError as error:
        raise InputError(f"{error}; choose another model name, precision or version") from None
    return name


def _read_manifest(path: Path) -> Manifest:
    _check_folder(path)
    manifest_path = path / MANIFEST_NAME
    if not os.path.lexists(manifest_path):
        raise BundleError(f"{path} has no {MANIFEST_NAME}, so it is not a bundle; give the folder that was exported")
    if MANIFEST_NAME not in _regular_files(path):
        raise BundleError(f"{manifest_path} is not a regular file; copy the bundle again")
    if (size := manifest_path.stat().st_size) > MAX_BYTES:
        raise BundleError(f"{manifest_path} has {size} bytes, more than {MAX_BYTES}; copy the bundle again")
    try:
        text = manifest_path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{manifest_path} is not UTF-8 text; copy the bundle again") from None
    return Manifest.from_json(text, source=str(manifest_path))


def _check_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise BundleError(f"bundle {path} is not a folder; give the folder that was exported")
    if old := _leftovers(Path(os.path.realpath(path)), "old"):
        raise BundleError(f"bundle {path} was moved aside for a new one that did not come; rename {old[0]} to it")
    raise BundleError(f"bundle {path} does not exist; give the folder that was exported")


def _regular_files(folder: Path) -> list[str]:
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


def _check_file(folder: Path, name: str, entry: FileEntry, digest: bool) -> None:
    file = folder / name
    try:
        status = file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{file} is missing; copy the bundle again") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file} is not a regular file; copy the bundle again")
    if status.st_size != entry.size:
        raise BundleError(f"{file} has {status.st_size} bytes, not {entry.size}; copy the bundle again")
    if digest and sha256_file(file) != entry.sha256:
        raise BundleError(f"{file} is damaged: its SHA-256 is not the manifest's; copy the bundle again")


def _entry(file: Path) -> FileEntry:
    return FileEntry(size=file.stat().st_size, sha256=sha256_file(file))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    atomic_write(folder / MANIFEST_NAME, manifest.to_json().encode("utf-8"))


@contextmanager
def _os_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"bundle {path} cannot be written: {error}; check space and rights, then repeat") from error


@contextmanager
def _writer_lock(final: Path) -> Iterator[None]:
    """One writer at a time for one bundle name. The lock lies beside the bundle, which is replaced as a whole."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(final.with_name(f".{final.name}.lock")))
        except BlockingIOError:
            raise BundleError(f"bundle {final} is being written by another process; wait until it has ended") from None
        yield


def _sibling(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{secrets.token_hex(8)}")


def _leftovers(final: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(f'.{final.name}.{kind}-')}[0-9a-f]{{16}}")
    if not final.parent.is_dir():
        return []
    return [entry for entry in final.parent.iterdir() if pattern.fullmatch(entry.name)]


def _clean_up(final: Path) -> None:
    """Remove staged and replaced folders of this name; put the old bundle back if its successor never came."""
    for folder in _leftovers(final, "partial"):
        shutil.rmtree(folder)
    for folder in _leftovers(final, "old"):
        if (final / MANIFEST_NAME).exists():
            shutil.rmtree(folder)
        else:
            folder.rename(final)
