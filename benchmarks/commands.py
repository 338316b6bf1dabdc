"""A command of this project as a user runs it, in a process of its own with a TMPDIR of its own, and what it leaves.

For tests and campaigns that interrupt, kill and starve commands. Linux only: processes are found through /proc.
"""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from moe3d_deploy.errors import Moe3dError

MOE3D = (sys.executable, "-m", "moe3d_deploy")
_ENDED_SECONDS = 5.0  # how long children of a dead command may take to follow it
_REWRITE = re.compile(r"\r|\x1b\[2K")  # what progress bars put before their line


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what is left of it.

    code        exit code as a shell has it: 128 + n after signal n
    error       the last line on stderr, without progress bars
    errors      every line on stderr that is not progress
    temporary   names in its TMPDIR, but for the empty cache folder that torch makes there
    processes   its processes that are still alive
    """

    code: int
    stdout: str
    errors: list[str]
    temporary: list[str]
    processes: list[int]
    seconds: float

    @property
    def error(self) -> str:
        return self.errors[-1] if self.errors else ""


class Command:
    """A started command; leaving the block ends it and everything it has started.

        with Command(["export", "moe3d-tiny", "-o", "bundle"], folder) as command:
            command.wait_for("trace")
            command.send(signal.SIGINT)
            ended = command.wait()

    arguments   of `moe3d`, or with `program` of another one
    folder      the working folder; TMPDIR is made inside `scratch`
    terminal    stderr is a terminal, so there are progress bars to wait for
    setup       called in the child before the program starts, to set limits
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        folder: Path,
        scratch: Path,
        *,
        program: Sequence[str] = MOE3D,
        environment: Mapping[str, str] | None = None,
        terminal: bool = False,
        setup: Callable[[], None] | None = None,
    ) -> None:
        self._temporary = scratch / f"tmp-{os.getpid()}-{time.monotonic_ns()}"
        self._temporary.mkdir()
        self._temporary.chmod(0o777)
        self._started = time.monotonic()
        self._said = bytearray()
        reader, writer = pty.openpty() if terminal else os.pipe()
        self._process = subprocess.Popen(
            [*program, *(os.fspath(argument) for argument in arguments)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=writer,
            env={**os.environ, **(environment or {}), "TMPDIR": str(self._temporary)},
            start_new_session=True,
            preexec_fn=lambda: _prepare(setup),
        )
        os.close(writer)
        self._out = bytearray()
        stdout = self._process.stdout
        if stdout is None:
            raise Moe3dError("the command was started without a pipe")
        self._readers = [
            threading.Thread(target=_drain, args=(reader, self._said), daemon=True),
            threading.Thread(target=_drain, args=(os.dup(stdout.fileno()), self._out), daemon=True),
        ]
        stdout.close()
        for thread in self._readers:
            thread.start()

    def __enter__(self) -> "Command":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in {self._process.pid, *self.processes()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> str:
        """What is on stderr so far."""
        return self._said.decode(errors="replace")

    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait_for(self, pattern: str, seconds: float = 120.0) -> bool:
        """Wait until stderr has `pattern`; False if the command ended without it. Raises Moe3dError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.said):
            if not self.running():
                return re.search(pattern, self.said) is not None
            if time.monotonic() > deadline:
                raise Moe3dError(f"{pattern!r} did not come within {seconds} s; stderr ends in {self.said[-200:]!r}")
            time.sleep(0.005)
        return True

    def wait(self, seconds: float = 180.0) -> Ended:
        """Wait for the end of the command, then see what is left. Raises Moe3dError after `seconds`."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Moe3dError(f"the command did not end within {seconds} s; it said {self.said[-200:]!r}") from None
        took = time.monotonic() - self._started
        deadline = time.monotonic() + _ENDED_SECONDS
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not alive:  # else they may hold the pipes open for ever
            for thread in self._readers:
                thread.join(_ENDED_SECONDS)
        return Ended(
            code if code >= 0 else 128 - code,
            self._out.decode(errors="replace"),
            _lines(self.said),
            sorted(path.name for path in self._temporary.iterdir() if not _is_torchs_cache(path)),
            alive,
            took,
        )

    def processes(self) -> list[int]:
        """Every process, however far down and in whatever session, that has this command's TMPDIR."""
        mark, found = f"TMPDIR={self._temporary}".encode(), []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
            except OSError:
                continue  # it ended meanwhile, or is another user's
        return [pid for pid in found if pid != os.getpid() and _is_alive(pid)]


def _prepare(setup: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what nohup starts ignores this
    if setup:
        setup()


def _drain(descriptor: int, into: bytearray) -> None:
    with contextlib.suppress(OSError):  # a terminal whose other side is closed
        while piece := os.read(descriptor, 1 << 16):
            into += piece
    os.close(descriptor)


def _lines(text: str) -> list[str]:
    """The lines that stay on a terminal: of each, what stands after the last time it was rewritten."""
    kept = (_REWRITE.split(line.rstrip("\r"))[-1].rstrip() for line in text.split("\n"))
    return [line for line in kept if line]


def _is_torchs_cache(path: Path) -> bool:
    return path.name.startswith("torchinductor_") and path.is_dir() and not any(path.iterdir())


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
