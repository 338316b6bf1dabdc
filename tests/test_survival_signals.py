"""Survival matrix: Ctrl-C, `kill` and a closed terminal, at every stage of every command."""

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from survival import MOE3D, Printed, assert_nothing_left, assert_one_line, content, hidden, moe3d, quick_export, start
from survival import wait_until_handled as wait

from moe3d_deploy.benchmarks.commands import Command, Ended
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.checkpoint import open_checkpoint

pytest_plugins = ["survival_fixtures"]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SAID = {INT: "interrupted", TERM: "terminated", HUP: "terminated"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def assert_stopped(ended: Ended, number: signal.Signals, printed: Printed) -> None:
    line = assert_one_line(ended, 128 + number)
    assert line.endswith(f": {SAID[number]}")
    printed(line, ended.code)


@pytest.mark.survival(row="interrupted", how="an export, in each of its stages; there was an old bundle")
@pytest.mark.parametrize(("stage", "number"), [
    ("export .* load", TERM), ("export .* write", INT), ("reference ", HUP), ("execute ", INT), ("round ", TERM),
])  # fmt: skip
def test_a_stopped_export_leaves_the_old_bundle(
    stage: str, number: signal.Signals, checkpoint: Path, finished: Path, folder: Path, printed: Printed
) -> None:
    shutil.copytree(finished, folder / "bundle")
    before = content(folder)
    arguments = [checkpoint, "-o", "bundle", "--builder", "none", "--overwrite"]
    with start(quick_export(finished), arguments, folder, terminal=True) as command:
        assert command.wait_for(rf"\x1b\[2K{stage}")
        command.send(number)
        assert_stopped(command.wait(), number, printed)
    assert content(folder) == before
    assert hidden(folder) == []


@pytest.mark.survival(row="interrupted", how="an export while the tracer is at work; there was no bundle")
@pytest.mark.parametrize("number", [INT, TERM])
def test_a_stopped_tracer_leaves_nothing(
    number: signal.Signals, checkpoint: Path, folder: Path, printed: Printed
) -> None:
    arguments = ["export", checkpoint, "-o", "bundle", "--builder", "none", "--no-verify"]
    with start(MOE3D, arguments, folder, terminal=True) as command:
        assert command.wait_for(r"export .* trace")
        time.sleep(0.5)
        command.send(number)
        assert_stopped(command.wait(), number, printed)
    assert list(folder.iterdir()) == []


@pytest.mark.survival(row="interrupted", how="an engine build: the bundle stays, without this engine")
@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_stopped_build_leaves_the_bundle(number: signal.Signals, plain: Path, printed: Printed) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    before = content(plain)
    with start(MOE3D, ["export", plain, "--views", "1:2:4"], plain.parent, terminal=True) as command:
        assert command.wait_for(r"engine .*/")
        command.send(number)
        assert_stopped(command.wait(), number, printed)
    assert content(plain) == before
    assert hidden(plain.parent) == []


def sweep(
    number: signal.Signals, moments: int, begin: Callable[[], Command], check: Callable[[], None], printed: Printed
) -> None:
    """Stop a command at `moments` moments spread over the time that it takes."""
    with begin() as command:
        wait(command)
        started = time.monotonic()
        whole = command.wait()
    seconds = time.monotonic() - started
    assert whole.code == 0
    check()
    stopped = 0
    for index in range(moments):
        with begin() as command:
            wait(command)
            time.sleep(seconds * index / moments)
            command.send(number)
            ended = command.wait()
        if ended.code and ended.stdout.count("\n") < whole.stdout.count("\n"):  # else all was done and said
            assert_stopped(ended, number, printed if not stopped else lambda text, code: None)
            stopped += 1
        assert_nothing_left(ended)
        check()
    assert stopped >= moments // 2 - 1, "the signals came too late to show anything"


@pytest.mark.survival(row="interrupted", how="`moe3d run` at 6 moments spread over its time")
@pytest.mark.parametrize("number", [INT, TERM])
def test_a_stopped_run_leaves_whole_files(
    number: signal.Signals, finished: Path, folder: Path, photo: Path, printed: Printed
) -> None:
    """A folder that has cameras.json is complete: it lists its files.

    A stop in the moment in which the files are put in place leaves a list of them, by which the next run cleans up.
    """

    def check() -> None:
        assert [name for name in hidden(folder) if not re.fullmatch(r"out/\.moe3d-[a-z]+\.json", name)] == []
        cameras = folder / "out" / "cameras.json"
        if cameras.exists():
            names = json.loads(cameras.read_text())["files"]
            assert names
            assert [name for name in names if not (folder / "out" / name).is_file()] == []

    arguments = ["run", finished, *[photo] * 8, "-o", "out"]
    sweep(number, 6, lambda: start(MOE3D, arguments, folder), check, printed)
    assert moe3d(arguments, folder).code == 0
    assert hidden(folder) == []


@pytest.mark.survival(row="interrupted", how="`moe3d convert` at 4 moments spread over its time")
@pytest.mark.parametrize("number", [INT, TERM])
def test_a_stopped_convert_leaves_a_whole_checkpoint_or_none(
    number: signal.Signals, checkpoint: Path, folder: Path, printed: Printed
) -> None:
    def check() -> None:
        assert hidden(folder) == []
        if (folder / "out").exists() and any((folder / "out").iterdir()):
            open_checkpoint(folder / "out")

    arguments = ["convert", checkpoint, "-o", "out", "--keep-vggt", "--overwrite"]
    sweep(number, 4, lambda: start(MOE3D, arguments, folder), check, printed)


@pytest.mark.survival(row="interrupted", how="`moe3d inspect` at 4 moments spread over its time")
def test_a_stopped_inspect_says_so(finished: Path, folder: Path, printed: Printed) -> None:
    sweep(INT, 4, lambda: start(MOE3D, ["inspect", finished], folder), lambda: None, printed)


LIBRARY = """
import os, signal, sys, time
try:
    os.kill(os.getpid(), int(sys.argv[1]))
    for _ in range(20):  # as long as a large library takes, and as often as an impatient user
        time.sleep(0.01)
        os.kill(os.getpid(), int(sys.argv[1]))
except BaseException:
    os.abort()  # what C++ does with an exception that it did not expect
"""

LOADING = """
import sys, time, click
from moe3d_deploy.cli import main

def command(number):
    import library
    print("loaded", flush=True)
    time.sleep(30)

sys.exit(main.finish("moe3d", lambda: click.Command("x", callback=command, params=[click.Argument(["number"])])))
"""


@pytest.mark.survival(row="interrupted", how="while a library is being loaded, whose C++ code aborts on an exception")
@pytest.mark.parametrize("number", [INT, TERM])
def test_a_signal_during_an_import_waits_for_its_end(number: signal.Signals, folder: Path, printed: Printed) -> None:
    (folder / "library.py").write_text(LIBRARY)
    with start([sys.executable, "-c", LOADING], [int(number)], folder) as command:
        ended = command.wait()
    assert_stopped(ended, number, printed)
    assert ended.stdout == "loaded\n"
    assert ended.seconds < 20


@pytest.mark.survival(row="interrupted twice", how="Ctrl-C every 30 ms until the export has ended, in 2 stages")
@pytest.mark.parametrize("stage", ["export .* load", "reference "])
def test_an_impatient_ctrl_c_shows_no_traceback(
    stage: str, checkpoint: Path, finished: Path, folder: Path, printed: Printed
) -> None:
    shutil.copytree(finished, folder / "bundle")
    before = content(folder / "bundle")
    arguments = [checkpoint, "-o", "bundle", "--builder", "none", "--overwrite"]
    with start(quick_export(finished), arguments, folder, terminal=True) as command:
        assert command.wait_for(rf"\x1b\[2K{stage}")
        while command.running():
            command.send(INT)
            time.sleep(0.03)
        ended = command.wait()
    assert ended.code == 130
    assert "Traceback" not in "\n".join(ended.errors)
    printed(ended.error, ended.code)
    assert ended.processes == []
    assert content(folder / "bundle") == before
    Bundle.open(folder / "bundle")
    with start(quick_export(finished), [*arguments, "--no-verify"], folder) as command:
        assert command.wait().code == 0
    assert hidden(folder) == [], "the next export has cleaned up"
