"""Bundles: the folder that is built, copied to a robot, inspected and run. Opening, writing, adding engines.

The specification is docs/bundle.md. No file of a bundle is interpreted here but its manifest.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from moe3d_deploy.bundle_files import check_file, check_folder, check_model, entry_of, read_manifest, regular_files
from moe3d_deploy.bundle_staging import clean_up, leftovers, sibling, writer_lock
from moe3d_deploy.disk_errors import remedy
from moe3d_deploy.errors import BundleError, InputError, Moe3dError
from moe3d_deploy.files import atomic_path, atomic_write, remove_partials, sync
from moe3d_deploy.manifest import MANIFEST_NAME, SPLITS, EngineRecord, Manifest, Profile, check_name

Verify = Literal["full", "sizes"]

_BUILDER_TAGS = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
_LONGEST_NAME = 225  # of 255, with what a temporary name adds
_FIRST_FILES = ("model.onnx", *(f"model.{roles[0]}.onnx" for roles in SPLITS.values()))


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: Verify = "full", engines: bool = True) -> "Bundle":
        """Check a bundle before anything else reads from it; see `check` for the arguments.

        Raises BundleError, naming the file and the remedy, for a folder or manifest that is missing or damaged.
        """
        path = Path(path)
        with _read_errors(path):
            bundle = cls(path, read_manifest(path))
        bundle.check(verify=verify, engines=engines)
        return bundle

    def check(self, *, verify: Verify = "full", engines: bool = True) -> None:
        """Check the files that the manifest names and where the ONNX files have their weights.

        verify    "sizes" leaves out the digests
        engines   False leaves out the engines, for a reader that runs the ONNX file: they may be damaged or missing

        Raises BundleError, naming the file and the remedy.
        """
        _check_verify(verify)
        left_out = set() if engines else {engine.file for engine in self.manifest.engines}
        with _read_errors(self.path):
            for name, entry in self.manifest.files.items():
                if name not in left_out:
                    check_file(self.path, name, entry, digest=verify == "full")
            check_model(self.path, self.manifest)

    def engine_faults(self, verify: Verify = "full") -> dict[str, str]:
        """What is wrong with which engine: file name -> one line; empty where all are whole."""
        _check_verify(verify)
        faults = {}
        with _read_errors(self.path):
            for engine in self.manifest.engines:
                try:
                    check_file(self.path, engine.file, self.manifest.files[engine.file], digest=verify == "full")
                except BundleError as error:
                    faults[engine.file] = str(error)
        return faults

    @property
    def model_path(self) -> Path:
        """The ONNX file; of a split model that of its first part."""
        return self.path / self.manifest.model_file

    @property
    def part_paths(self) -> dict[str, Path]:
        """The ONNX files of a split model by the roles of its parts, in the order they run; empty for one file."""
        return {part.role: self.path / part.file for part in self.manifest.parts}

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
            stack.enter_context(writer_lock(self._final))
            stack.callback(clean_up, self._final)
            clean_up(self._final)
            self._check_destination()
            folder = sibling(self._final, "partial")
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
            for name in regular_files(folder):
                check_name(name, "staged file")
                sync(folder / name)
                files[name] = entry_of(folder / name)
            manifest = replace(manifest, files=files)
            manifest.to_json()  # raises for a manifest that no reader accepts
            check_model(folder, manifest)
            for parent in {folder / parent for name in files for parent in Path(name).parents}:
                sync(parent)
            _write_manifest(folder, manifest)
            self._check_destination()
            self._move_in_place(folder)
        self._folder = None
        return Bundle(Path(self._given), manifest)

    def _move_in_place(self, folder: Path) -> None:
        if (self._final / MANIFEST_NAME).exists():
            self._final.rename(sibling(self._final, "old"))  # whatever ends us here, _clean_up puts it back
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


def is_bundle(path: Path | str) -> bool:
    """Whether `path` is to be opened as a bundle, whole or not: a checkpoint or another folder is none.

    A folder with a manifest, one that has lost it (a bundle's file and no checkpoint), or one that a killed writer
    has moved aside; `Bundle.open` says what is wrong with the last two.
    """
    path = Path(path)
    if os.path.lexists(path / MANIFEST_NAME):
        return True
    if os.path.isdir(path):
        is_export = any(os.path.isfile(path / name) for name in _FIRST_FILES)
        return is_export and not os.path.isfile(path / "model.safetensors")
    return not os.path.lexists(path) and bool(leftovers(Path(os.path.realpath(path)), "old"))


def add_engine(
    path: Path | str,
    record: EngineRecord,
    build: Callable[[Path, Manifest], EngineRecord | None],
    *,
    on_drop: Callable[[str], None] | None = None,
) -> Bundle:
    """Add the engine that `build` writes to the path it is given, replacing one of the same file name.

    build     gets the path and the manifest as it is under the lock; may return the record to store, for what is
              known only afterwards (audit, times): it names the same file
    on_drop   gets the file name of each record that went because its engine is missing or has another size

    Whatever happens and whenever the process ends, the bundle stays usable: without the engine or with it.
    Raises BundleError for a bundle that cannot be used or that another writer is at work on.
    """
    path = Path(path)
    check_folder(path)
    with _os_errors(path), writer_lock(Path(os.path.realpath(path))):
        before = Bundle.open(path, verify="sizes", engines=False)
        dropped = before.engine_faults("sizes").keys() - {record.file}
        manifest = _without(before.manifest, dropped)
        final = path / record.file
        final.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path, final.parent):
            remove_partials(folder)
        others = _without(manifest, {record.file})
        with atomic_path(final) as temp:
            built = build(temp, manifest) or record
            if built.file != record.file:
                raise InputError(f"engine {record.file} came back as {built.file}; keep its file name")
            entry = entry_of(temp)
            if entry.size == 0:
                raise BundleError(f"engine {record.file} is empty; build it again")
            engines = tuple(sorted((*others.engines, built), key=lambda engine: engine.file))
            manifest_after = replace(manifest, engines=engines, files={**others.files, record.file: entry})
            manifest_after.to_json()  # a record that no reader accepts stops here, before anything has changed
            if record.file in manifest.files:  # the old entry must not meet the new file
                _write_manifest(path, others)
        _write_manifest(path, manifest_after)
    if on_drop:
        for name in sorted(dropped):
            on_drop(name)
    return Bundle(path, manifest_after)


def _without(manifest: Manifest, names: Collection[str]) -> Manifest:
    """The manifest without these engines."""
    engines = tuple(engine for engine in manifest.engines if engine.file not in names)
    files = {name: entry for name, entry in manifest.files.items() if name not in names}
    return replace(manifest, engines=engines, files=files)


def engine_name(
    model: str,
    profile: Profile,
    precision: str,
    compute_capabilities: Sequence[int],
    builder: str,
    version: str,
    more_profiles: Sequence[Profile] = (),
    part: str | None = None,
) -> str:
    """The file name of an engine, such as `moe3d-1b_1-4-8x392x518_fp16_sm89_rtx1.6.1.plan`.

    The model of a part's engine is followed by `.` and its role: `moe3d-1b.heads_...`. Views, height and width as
    min-opt-max, or one number where the three are equal; scenes first when there can be more than one; several profiles
    joined by `+`. Characters of `model` that no file name of a bundle has become `-`. Raises InputError.
    """
    if builder not in _BUILDER_TAGS:
        raise InputError(f"builder {builder!r} is unknown; use one of {', '.join(_BUILDER_TAGS)}")
    if not compute_capabilities:
        raise InputError("an engine needs at least one compute capability in its name, such as 89")
    shapes = "+".join(map(_shapes_in_a_name, (profile, *more_profiles)))
    capabilities = "-".join(map(str, sorted(set(compute_capabilities))))
    model = re.sub(r"[^A-Za-z0-9_.+-]+", "-", model) + (f".{part}" if part else "")
    name = f"{model}_{shapes}_{precision}_sm{capabilities}_{_BUILDER_TAGS[builder]}{version}.plan"
    try:
        check_name(f"engines/{name}", "engine name")
    except BundleError as error:
        raise InputError(f"{error}; choose another model name, precision or version") from None
    if more_profiles and len(name) > _LONGEST_NAME:
        raise InputError(f"{1 + len(more_profiles)} profiles make a file name of {len(name)} characters: build several")
    return name


def _shapes_in_a_name(profile: Profile) -> str:
    axes = list(zip(profile.min, profile.opt, profile.max, strict=True))
    shown = axes if profile.max[0] > 1 else axes[1:]
    return "x".join("-".join(map(str, axis if len(set(axis)) > 1 else axis[:1])) for axis in shown)


def _check_verify(verify: str) -> None:
    if verify not in ("full", "sizes"):
        raise InputError(f"verify is {verify!r}; use 'full' or 'sizes'")


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"bundle {path} cannot be read: {error}; check its rights or copy it again") from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    atomic_write(folder / MANIFEST_NAME, manifest.to_json().encode("utf-8"))


@contextmanager
def _os_errors(path: Path | str) -> Iterator[None]:
    """A disk that is full or fails is a Moe3dError, a failure; any other OSError is a BundleError: the wrong place."""
    try:
        yield
    except OSError as error:
        what = f"bundle {path} cannot be written: {error}"
        if full := remedy(error):
            raise Moe3dError(f"{what}; {full}") from error
        raise BundleError(f"{what}; check its rights or choose another place") from error
