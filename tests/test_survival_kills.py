"""Survival matrix: processes that are killed, that die or that meet; what they leave is whole, the next one cleans up.

The campaigns with many kills of whole exports are `python -m moe3d_deploy.benchmarks.reliability`.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from survival import MOE3D, Printed, assert_nothing_left, assert_one_line, content, hidden, moe3d, quick_export, start

from moe3d_deploy.benchmarks.kill_campaign import Campaign, kill_builds, kill_exports
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import GRACE_SECONDS

pytest_plugins = ["survival_fixtures"]
SOURCE_PATHS = os.pathsep.join([str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)])
ENVIRONMENT = {"PYTHONPATH": SOURCE_PATHS}
KILLS = 3


def assert_survived(campaign: Campaign) -> None:
    assert campaign.faults == []
    assert campaign.next_succeeded == len(campaign.moments) == KILLS
    assert campaign.stray == 0


@pytest.mark.survival(
    row="killed during an export",
    how="kill -9 at 3 random moments, then the same command again; more in the campaign below",
)
def test_killed_exports_leave_nothing_half_written(checkpoint: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "kills").mkdir()
    campaign = kill_exports(
        checkpoint, tmp_path / "kills", KILLS, program=quick_export(finished), flags=["--no-verify"],
        environment=ENVIRONMENT,
    )  # fmt: skip
    assert_survived(campaign)


@pytest.mark.survival(
    row="killed during an engine build",
    how="kill -9 at 3 random moments, then the same command again; more in the campaign below",
)
def test_killed_builds_leave_a_whole_bundle(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    (tmp_path / "kills").mkdir()
    assert_survived(kill_builds(finished, tmp_path / "kills", KILLS, environment=ENVIRONMENT))


def stop_in_export(checkpoint: Path, finished: Path, folder: Path, *flags: str):  # type: ignore[no-untyped-def]
    """An export that is within its first stage, and waits there."""
    command = start(
        quick_export(finished), [checkpoint, "-o", "bundle", "--builder", "none", *flags], folder, terminal=True
    )
    assert command.wait_for(r"export .* write")
    (child,) = [pid for pid in command.processes() if pid != command.pid]
    os.kill(child, signal.SIGSTOP)
    return command, child


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.mark.survival(
    row="two writers", how="a second export to the name of one that is at work, and a build in its bundle"
)
def test_the_second_of_two_exports_is_refused_and_the_first_undisturbed(
    checkpoint: Path, finished: Path, folder: Path, printed: Printed
) -> None:
    shutil.copytree(finished, folder / "bundle")
    first, child = stop_in_export(checkpoint, finished, folder, "--overwrite", "--no-verify")
    with first:
        second = [checkpoint, "-o", "bundle", "--builder", "none", "--overwrite", "--no-verify"]
        with start(quick_export(finished), second, folder) as command:
            line = assert_one_line(command.wait(), 2, names="is being written by another process")
        printed(line, 2)
        assert_one_line(moe3d(["export", "bundle", "--views", "1"], folder), 2, names="is being written by another")
        os.kill(child, signal.SIGCONT)
        assert first.wait().code == 0
    assert Bundle.open(folder / "bundle").manifest.verification.status == "skipped", "the first one's"
    assert hidden(folder) == []


@pytest.mark.survival(row="two writers", how="two runs of different photographs into one output folder at once")
def test_two_runs_into_one_folder_leave_whole_files(finished: Path, folder: Path, photo: Path) -> None:
    photos = [photo.with_name(f"{name}.png") for name in ("ada", "bob")]
    for path in photos:
        shutil.copy(photo, path)
    one, other = (["run", finished, path, "-o", "out"] for path in photos)
    with start(MOE3D, one, folder) as first, start(MOE3D, other, folder) as second:
        ended = [first.wait(), second.wait()]
    codes = [one.code for one in ended]
    assert 0 in codes, ended
    assert set(codes) <= {0, 2}, "the second one may be refused"
    assert hidden(folder) == []
    cameras = json.loads((folder / "out" / "cameras.json").read_text())
    assert sorted(content(folder / "out")) == sorted([*cameras["files"], "cameras.json"])
    (view,) = cameras["views"]
    images = [name for name in cameras["files"] if name.startswith("000_")]
    assert len(images) > 1
    assert {name.split("_")[1] for name in images} == {Path(view["name"]).stem}, "all of one scene"
    for name in cameras["files"]:
        path = folder / "out" / name
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                assert all(arrays[key].size for key in arrays)


@pytest.mark.survival(
    row="dying child process",
    how="the child of an export is killed or ends with a signal of its own",
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_child_that_dies_is_one_line_and_nothing_is_left(
    number: signal.Signals, checkpoint: Path, finished: Path, folder: Path, printed: Printed
) -> None:
    command, child = stop_in_export(checkpoint, finished, folder)
    with command:
        os.kill(child, number)
        os.kill(child, signal.SIGCONT)
        printed(assert_one_line(command.wait(), 1, names="stage export of the export"), 1)
    assert list(folder.iterdir()) == []


@pytest.mark.survival(
    row="dying child process", how="the child of an engine build is killed; the bundle stays as it was"
)
def test_a_builder_that_dies_is_one_line_and_the_bundle_stays(plain: Path, printed: Printed) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    before = content(plain)
    with start(MOE3D, ["export", plain, "--views", "1:2:4"], plain.parent, terminal=True) as command:
        assert command.wait_for(r"engine .*/")
        for pid in command.processes():
            if pid != command.pid:
                os.kill(pid, signal.SIGKILL)
        printed(assert_one_line(command.wait(), 1, names="killed"), 1)
    assert content(plain) == before
    assert hidden(plain.parent) == []


@pytest.mark.survival(row="hung child process", how="the child of an export hangs (SIGSTOP), then one Ctrl-C")
def test_a_hung_child_is_ended_by_ctrl_c(checkpoint: Path, finished: Path, folder: Path, printed: Printed) -> None:
    command, _ = stop_in_export(checkpoint, finished, folder)
    with command:
        started = time.monotonic()
        command.send(signal.SIGINT)
        ended = command.wait()
    assert time.monotonic() - started < GRACE_SECONDS + 5, "the grace, and a moment to clean up"
    assert ended.code == 130
    printed(ended.error, ended.code)
    assert_nothing_left(ended)
    assert list(folder.iterdir()) == []
