"""A bundle appears whole or not at all, and replaces only what it was asked to replace."""

import os
from pathlib import Path

import pytest
from bundles import NEW, OLD, content, siblings, write_bundle
from manifests import ENGINE, example_manifest

from moe3d_deploy import bundle as bundle_module
from moe3d_deploy import bundle_staging
from moe3d_deploy.bundle import Bundle, BundleWriter
from moe3d_deploy.errors import BundleError, InputError, Moe3dError
from moe3d_deploy.manifest import MANIFEST_NAME

pytest_plugins = ["bundle_fixtures"]


def test_nothing_is_under_the_final_name_before_the_commit_and_nothing_else_after_it(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with BundleWriter(path) as writer:
        assert writer.folder.parent == tmp_path
        assert writer.folder.name.startswith(".bundle.partial-")
        (writer.folder / "model.onnx").write_bytes(OLD)
        assert not path.exists()
        written = writer.commit(example_manifest())
        assert Bundle.open(path) == written
    assert siblings(path) == ["bundle"]


def test_a_block_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_leaves_only_the_old_bundle(bundle: Path, error: type[BaseException]) -> None:
    before = content(bundle)

    def fail_half_way() -> None:
        with BundleWriter(bundle, overwrite=True) as writer:
            (writer.folder / "engines").mkdir()
            (writer.folder / "engines" / "half.plan").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert content(bundle) == before
    assert siblings(bundle) == ["bundle"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_interrupt_in_either_rename_of_an_overwrite_leaves_only_the_old_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    before = content(bundle)
    rename, calls = Path.rename, 0

    def interrupted(source: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(bundle, NEW, overwrite=True)
    assert content(bundle) == before
    assert siblings(bundle) == ["bundle"]


def test_an_existing_bundle_is_replaced_only_when_asked(bundle: Path) -> None:
    with pytest.raises(InputError, match="exists; choose another name or ask for it to be overwritten"):
        BundleWriter(bundle)
    write_bundle(bundle, NEW, overwrite=True)
    assert Bundle.open(bundle).model_path.read_bytes() == NEW
    assert not (bundle / ENGINE).exists(), "an engine of the old model is left"
    assert siblings(bundle) == ["bundle"]


def test_a_damaged_bundle_can_be_replaced(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).write_bytes(b"")
    write_bundle(bundle, NEW, overwrite=True)
    Bundle.open(bundle)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photos"
    if kind == "folder":
        path.mkdir()
        (path / "a.jpg").write_bytes(b"precious")
    else:
        path.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists and is not a bundle, so it is never overwritten"):
        BundleWriter(path, overwrite=True)


def test_an_empty_folder_may_become_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle")
    Bundle.open(tmp_path / "bundle")


def test_a_missing_parent_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder .*/absent does not exist; create it"):
        BundleWriter(tmp_path / "absent" / "bundle")


def test_a_mount_point_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(InputError, match="is a mount point, which cannot be replaced; write to a folder inside it"):
        BundleWriter(tmp_path)


def test_everything_is_synced_before_the_bundle_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    move = BundleWriter._move_in_place

    def record(path: Path) -> None:
        synced.add("/".join(path.parts[len(tmp_path.parts) + 1 :]))

    def move_when_synced(writer: BundleWriter, folder: Path) -> None:
        names = {name for name in synced if ".partial-" not in name}
        assert names == {"", "model.onnx", "engines", "engines/a", "engines/a/b.plan"}
        assert any(name.startswith(".manifest.partial-") for name in synced)
        move(writer, folder)

    monkeypatch.setattr("moe3d_deploy.bundle.sync", record)
    monkeypatch.setattr("moe3d_deploy.files.sync", record)
    monkeypatch.setattr(BundleWriter, "_move_in_place", move_when_synced)
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "engines" / "a").mkdir(parents=True)
        (writer.folder / "engines" / "a" / "b.plan").write_bytes(b"engine")
        (writer.folder / "model.onnx").write_bytes(OLD)
        writer.commit(example_manifest())


def test_files_that_appear_in_the_destination_meanwhile_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with BundleWriter(path, overwrite=True) as writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
        path.mkdir()
        (path / "a.jpg").write_bytes(b"precious")
        with pytest.raises(InputError, match="is not a bundle"):
            writer.commit(example_manifest())
    assert content(path) == {"a.jpg": b"precious"}
    assert siblings(path) == ["bundle"]


@pytest.mark.parametrize(
    ("name", "message"), [("a b.onnx", "staged file 'a b.onnx'"), (MANIFEST_NAME, "cannot be the manifest")]
)
def test_a_staged_name_that_no_reader_accepts_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
        (writer.folder / name).write_bytes(b"x")
        with pytest.raises(BundleError, match=message):
            writer.commit(example_manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_staged_link_is_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "model.onnx").symlink_to("/dev/null")
        with pytest.raises(BundleError, match=r"model\.onnx is a link"):
            writer.commit(example_manifest())


def test_a_bundle_without_its_model_is_not_committed(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer, pytest.raises(BundleError, match=r"'model\.onnx' is not among"):
        writer.commit(example_manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_writer_serves_one_commit_inside_its_block(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "bundle")
    with pytest.raises(InputError, match="is closed; use it in its with block, before commit"):
        writer.commit(example_manifest())
    with writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
        writer.commit(example_manifest())
        with pytest.raises(InputError, match="is closed"):
            writer.commit(example_manifest())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.onnx")

    monkeypatch.setattr("moe3d_deploy.bundle.sync", full)
    with pytest.raises(Moe3dError, match="cannot be written: .*No space left on device.*make room or choose") as error:
        write_bundle(tmp_path / "bundle")
    assert error.value.exit_code == 1, "a failure, no bad input"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "step", "commits"),
    [
        (os.path, "ismount", True),
        (bundle_module, "writer_lock", True),
        (bundle_module, "sync", True),
        (bundle_staging.shutil, "rmtree", False),  # has something to do only without a commit
    ],
)
def test_a_disk_that_fails_at_the_start_in_the_commit_or_at_the_end_is_told_with_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, step: str, commits: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    def write() -> None:
        with BundleWriter(tmp_path / "bundle") as writer:
            (writer.folder / "model.onnx").write_bytes(OLD)
            if commits:
                writer.commit(example_manifest())

    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(Moe3dError) as error:
        write()
    expected = f"bundle {tmp_path / 'bundle'} cannot be written: [Errno 5] Input/output error; "
    assert str(error.value) == expected + "check the disk (see `dmesg`) or choose another place"
    assert error.value.exit_code == 1


def test_a_writer_that_was_left_has_no_folder_any_more(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        assert writer.folder.is_dir()
    with pytest.raises(InputError, match="is closed; use it in its with block, before commit"):
        writer.folder  # noqa: B018
