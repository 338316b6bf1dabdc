"""What the survival tests share besides their fixtures (survival_fixtures.py): commands, disks, and what must be left.

The rows of the matrix are `survival_table.ROWS`; `@pytest.mark.survival(row=..., how=...)` says which one a test is of.
"""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from moe3d_deploy.benchmarks.commands import Command, Ended

MOE3D = [sys.executable, "-m", "moe3d_deploy"]
TESTS = Path(__file__).resolve().parent
Setup = Callable[[], None]
Printed = Callable[[str, int], None]
Refused = Callable[..., str]

_NOBODY = 65534


def moe3d(arguments: Sequence[object], folder: Path, *, setup: Setup | None = None, **options: str) -> Ended:
    """Run `moe3d` to its end in `folder`."""
    return run_program(MOE3D, arguments, folder, setup=setup, **options)


def quick_export(finished: Path) -> list[str]:
    """The program that exports without tracing; its first arguments are SOURCE and options, as of moe3d-export."""
    return [sys.executable, str(TESTS / "quick_export.py"), str(finished)]


def run_program(
    program: Sequence[str], arguments: Sequence[object], folder: Path, *, setup: Setup | None = None, **options: str
) -> Ended:
    with start(program, arguments, folder, setup=setup, environment=options) as command:
        return command.wait()


def start(
    program: Sequence[str],
    arguments: Sequence[object],
    folder: Path,
    *,
    setup: Setup | None = None,
    terminal: bool = False,
    environment: dict[str, str] | None = None,
) -> Command:
    """Start a program in `folder`; its TMPDIR lies beside that."""
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    variables = {"PYTHONPATH": paths, **(environment or {})}
    words = [str(argument) for argument in arguments]
    return Command(words, folder, scratch, program=program, environment=variables, setup=setup, terminal=terminal)


def assert_one_line(ended: Ended, code: int, *, names: str = "") -> str:
    """The command failed as DESIGN.md says: its code, one error line, no traceback, nothing left anywhere."""
    assert ended.code == code, ended.errors
    assert "Traceback" not in "\n".join(ended.errors), ended.errors
    errors = [line for line in ended.errors if line.startswith(("moe3d: ", "moe3d-export: "))]
    assert errors == [ended.error], ended.errors
    assert names in ended.error
    assert_nothing_left(ended)
    return ended.error


def assert_nothing_left(ended: Ended) -> None:
    assert ended.processes == []
    assert ended.temporary == []


def wait_until_handled(command: Command) -> None:
    """Until the command line handles signals; before, in its first tenth of a second, Python itself answers."""
    while command.running():
        caught = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{command.pid}/status").read_text())
        if caught and int(caught[0], 16) & 1 << signal.SIGTERM - 1:
            return
        time.sleep(0.002)


def hidden(folder: Path) -> list[str]:
    """Every hidden name below a folder: locks, staged files and folders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def largest_file(size: int) -> Setup:
    """Files end at `size` bytes: a write beyond fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def most_memory(size: int) -> Setup:
    """The process may map `size` bytes in all."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `folder`, which is made. Skips the test where mounting is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder)]
    if why := _failure(command):
        pytest.skip(f"a small file system cannot be mounted here: {why}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Setup | None]:
    """Nothing in `folder` can be changed within the block, by commands with the setup that is given.

    By a read-only mount; where that is not allowed by permission bits, which bind any user but root. Skips the test
    for a root that may neither mount nor run a program as somebody else.
    """
    if os.getuid() != 0:
        modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")]}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        try:
            yield None
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        return
    bind = f"mount --bind {_quoted(folder)} {_quoted(folder)} && mount -o remount,bind,ro {_quoted(folder)}"
    why = _failure(["sh", "-c", bind])
    if not why:
        try:
            yield None
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    as_nobody: Setup = lambda: os.setuid(_NOBODY)  # noqa: E731
    if _failure(
        [sys.executable, "-c", "import moe3d_deploy, os, sys; os.listdir(sys.argv[1])", str(folder)], as_nobody
    ):
        pytest.skip(f"root may write anywhere, cannot mount ({why}) and others cannot run this Python")
    yield as_nobody


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'"


def _failure(command: list[str], setup: Setup | None = None) -> str:
    """Why a command failed; empty where it did not."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=setup)
    return "" if done.returncode == 0 else (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
