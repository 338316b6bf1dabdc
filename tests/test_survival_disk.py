"""Survival matrix: a disk that is full at any write, and folders that cannot be written."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from survival import (
    MOE3D,
    Printed,
    assert_nothing_left,
    assert_one_line,
    content,
    disk,
    hidden,
    largest_file,
    moe3d,
    quick_export,
    read_only,
    run_program,
)

from moe3d_deploy.benchmarks.commands import Ended
from moe3d_deploy.bundle import Bundle

pytest_plugins = ["survival_fixtures"]
KIB = 1 << 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def assert_refused(ended: Ended, printed: Printed, code: int = 1) -> None:
    """One line about the disk (1, a failure) or the folder (2, bad input), with the remedy."""
    line = assert_one_line(ended, code, names="make room" if code == 1 else "")
    assert re.search("choose another|to another", line), "the remedy"
    assert "internal error" not in line
    printed(line, ended.code)


# ---- disk full, by the largest size that a file may have


@pytest.mark.survival(
    row="disk full", how="files of an export may have at most 0, 64 or 420 KiB; there was an old bundle"
)
@pytest.mark.parametrize("size", [0, 64 * KIB, 420 * KIB])
def test_an_export_onto_a_full_disk_leaves_the_old_bundle(
    size: int, checkpoint: Path, finished: Path, folder: Path, printed: Printed
) -> None:
    shutil.copytree(finished, folder / "bundle")
    before = content(folder)
    arguments = [checkpoint, "-o", "bundle", "--builder", "none", "--overwrite", "--no-verify"]
    ended = run_program(quick_export(finished), arguments, folder, setup=largest_file(size))
    assert_refused(ended, printed)
    assert content(folder) == before
    assert hidden(folder) == []


@pytest.mark.survival(row="disk full", how="the arrays of the verification do not fit, the model does")
def test_a_verification_onto_a_full_disk_leaves_nothing(
    checkpoint: Path, finished: Path, folder: Path, printed: Printed
) -> None:
    arguments = [checkpoint, "-o", "bundle", "--builder", "none"]
    with disk(folder / "disk", 800 * KIB) as small:
        ended = run_program(quick_export(finished), arguments, small)
        assert_refused(ended, printed)
        assert list(small.iterdir()) == []


@pytest.mark.survival(row="disk full", how="an engine does not fit: files of at most 0 or 8 MB")
@pytest.mark.parametrize("size", [0, 8000 * KIB])
def test_a_build_onto_a_full_disk_leaves_the_bundle(size: int, plain: Path, printed: Printed) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    before = content(plain)
    ended = moe3d(["export", plain, "--views", "1:2:4"], plain.parent, setup=largest_file(size))
    assert_refused(ended, printed)
    assert content(plain) == before
    assert hidden(plain.parent) == []


@pytest.mark.survival(row="disk full", how="an engine on a file system with room for a part of it")
def test_a_build_on_a_small_disk_leaves_the_bundle(finished: Path, folder: Path, printed: Printed) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    with disk(folder / "disk", 5000 * KIB) as small:
        shutil.copytree(finished, small / "bundle")
        before = content(small)
        assert_refused(moe3d(["export", "bundle", "--views", "1:2:4"], small), printed)
        assert content(small) == before
        assert hidden(small) == []
        Bundle.open(small / "bundle")


def sizes(whole: dict[str, bytes], folder: str) -> list[int]:
    """Below the size of every file that was written once, so that each write fails once; and 0."""
    return sorted({0, *(len(data) - 1 for name, data in whole.items() if name.startswith(folder))})


def assert_every_write_fails_once(arguments: Sequence[object], folder: Path, out: str, printed: Printed) -> None:
    """Run to the end once, then with every file size that makes another write fail: no part of a file is left."""
    assert moe3d(arguments, folder).code == 0
    whole = content(folder)
    assert whole
    for size in sizes(whole, out):
        shutil.rmtree(folder / out)
        ended = moe3d(arguments, folder, setup=largest_file(size))
        assert_refused(ended, printed)
        assert hidden(folder) == []
        left = content(folder)
        assert {name for name in left if name.startswith(out)} <= {n for n in whole if len(whole[n]) <= size}
        assert f"{out}/cameras.json" not in left or left.keys() == whole.keys()
    assert moe3d(arguments, folder).code == 0, "there is room again"
    assert content(folder).keys() == whole.keys()


@pytest.mark.survival(row="disk full", how="`moe3d run`, once for every file that it writes: that one does not fit")
def test_every_file_of_a_run_may_not_fit(finished: Path, folder: Path, photo: Path, printed: Printed) -> None:
    assert_every_write_fails_once(["run", finished, photo, "-o", "out"], folder, "out", printed)


@pytest.mark.survival(row="disk full", how="`moe3d convert`, at every file that it writes")
def test_every_file_of_a_convert_may_not_fit(checkpoint: Path, folder: Path, printed: Printed) -> None:
    arguments = ["convert", checkpoint, "-o", "out", "--keep-vggt"]
    assert moe3d(arguments, folder).code == 0
    whole = content(folder)
    for size in [*sizes(whole, "out"), 300 * KIB]:
        shutil.rmtree(folder / "out", ignore_errors=True)  # absent where a refusal has left nothing
        ended = moe3d(arguments, folder, setup=largest_file(size))
        assert_refused(ended, printed)
        assert "out" in ended.error, "the line names the folder or the file"
        assert content(folder) == {}, "no config without its weights"


@pytest.mark.survival(row="disk full", how="`moe3d run` onto file systems of 4 to 64 kB")
@pytest.mark.parametrize("size", [4 * KIB, 16 * KIB, 64 * KIB])
def test_a_run_onto_a_small_disk_leaves_no_part_of_a_file(
    size: int, finished: Path, folder: Path, photo: Path, printed: Printed
) -> None:
    with disk(folder / "disk", size) as small:
        assert_refused(moe3d(["run", finished, photo, "-o", "out"], small), printed)
        assert hidden(small) == []
        assert not (small / "out" / "cameras.json").exists()


@pytest.mark.survival(row="disk full", how="stdout is a full disk")
def test_a_report_onto_a_full_disk_is_one_line(finished: Path, folder: Path, printed: Printed) -> None:
    program = ["sh", "-c", 'exec "$0" "$@" >/dev/full', *MOE3D]
    ended = run_program(program, ["inspect", finished], folder)
    assert_refused(ended, printed)


# ---- folders that cannot be written


COMMANDS: dict[str, list[str]] = {
    "export": ["export", "{checkpoint}", "-o", "bundle", "--builder", "none", "--no-verify", "--overwrite"],
    "new export": ["export", "{checkpoint}", "-o", "other", "--builder", "none", "--no-verify"],
    "build": ["export", "bundle", "--views", "1:2:4"],
    "run": ["run", "bundle", "photo.png", "-o", "out"],
    "convert": ["convert", "{checkpoint}", "-o", "converted", "--keep-vggt"],
}


@pytest.mark.survival(row="read-only folder", how="every command that writes, in a folder that is mounted read-only")
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_read_only_folder_is_one_line_and_nothing_changes(
    kind: str, plain: Path, checkpoint: Path, photo: Path, printed: Printed
) -> None:
    folder = plain.parent
    shutil.copy(photo, folder)
    before = content(folder)
    arguments = [word.format(checkpoint=checkpoint) for word in COMMANDS[kind]]
    with read_only(folder) as setup:
        ended = moe3d(arguments, folder, setup=setup)
    assert_refused(ended, printed, 2)
    assert ended.seconds < 60, "before the work"
    assert content(folder) == before
    assert hidden(folder) == []


@pytest.mark.survival(
    row="read-only folder", how="`moe3d inspect` and `moe3d run` of a bundle on a read-only medium work"
)
def test_a_bundle_on_a_read_only_medium_is_read(plain: Path, folder: Path, photo: Path) -> None:
    with read_only(plain.parent) as setup:
        folder.chmod(0o777)
        for arguments in (["inspect", plain], ["run", plain, photo, "-o", folder / "out", "--formats", "npz"]):
            ended = moe3d(arguments, folder, setup=setup)
            assert ended.code == 0, ended.errors
            assert_nothing_left(ended)
