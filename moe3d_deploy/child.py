"""Run one function in a process of its own, so that memory peaks do not add and a crash is an error message.

The parent starts a Python, writes the request as JSON to its standard input and reads JSON lines: {"event": ...} while
it works, then {"result": ...} or {"error": ...}. The function is called as function(request, emit) and returns a
JSON-able dict.
"""

import ctypes
import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moe3d_deploy import errors
from moe3d_deploy.errors import Moe3dError

Emit = Callable[[dict[str, Any]], None]

GRACE_SECONDS = 10.0  # between asking a child to stop and killing it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# The child imports from where the parent does; `python -m` would put the working folder, whatever lies in it, first.
_START = "import sys; del sys.path[0]; from moe3d_deploy.child import _main; _main()"


@dataclass(frozen=True)
class ChildResult:
    """What the function returned, and what it cost: wall-clock seconds and peak resident bytes."""

    value: dict[str, Any]
    seconds: float
    peak_bytes: int


def run_in_child(
    function: str,
    request: dict[str, Any],
    *,
    title: str | None = None,
    on_event: Emit | None = None,
    failure: type[Moe3dError] = Moe3dError,
) -> ChildResult:
    """Call "package.module:function" in a new process; `title` is what errors call it.

    A Moe3dError raised there is raised here as the same class, and an OSError as an OSError; any other end of the child
    raises `failure` with its exception or the last line it wrote. The child's traceback is the cause of the error. An
    interrupt of the parent stops the child before it is passed on; a killed parent takes the child with it.
    """
    started = time.perf_counter()
    title = title or function
    command = [sys.executable, "-c", _START, function, str(os.getpid())]
    with tempfile.TemporaryFile() as log:
        # A session of its own: the terminal's Ctrl-C reaches the parent alone, which then stops the child.
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        try:
            outcome = _converse(child, request, on_event)
        except BaseException:
            _stop(child)
            raise
        if outcome is None:
            raise failure(_death_notice(title, child.returncode, log))
    if "error" in outcome:
        raise _error(title, outcome["error"], failure) from ChildTraceback(outcome["error"]["traceback"])
    return ChildResult(outcome["result"], time.perf_counter() - started, outcome["peak_bytes"])


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Not getrusage: its figure starts from the parent's at the time of the fork, here perhaps a whole model.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


class ChildTraceback(Exception):
    """Shown by Python as the cause of an error that came from a child."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _error(title: str, error: dict[str, Any], failure: type[Moe3dError]) -> Exception:
    """The exception of the parent for what the child's _describe says of its own."""
    name, message = error["kind"], error["message"]
    if is_out_of_memory(name, message, error.get("errno")):
        return failure(f"{title} ran out of memory; free some, or use a machine with more")
    if name == OSError.__name__:
        return OSError(error["errno"], *filter(None, (message, error["filename"])))
    kind = getattr(errors, name, None)
    if kind:
        return kind.__new__(kind, message)  # the message is complete: no class's own wording again
    return failure(f"{title} failed: {name}: {' '.join(message.split())}" if message else f"{title} failed: {name}")


def is_out_of_memory(kind: str, message: str, number: int | None = None) -> bool:
    """Whether an exception (its class, message and errno) says that memory ran out.

    Libraries say so in their own ways: torch's allocator, C++, and the loader of a library that cannot be mapped.
    """
    if kind in ("MemoryError", "OutOfMemoryError") or number == errno.ENOMEM:
        return True
    signs = ("alloc_cpu.cpp", "std::bad_alloc", "failed to map segment", "Cannot allocate memory")
    return kind in ("RuntimeError", "ImportError") and any(sign in message for sign in signs)


def _converse(child: "subprocess.Popen[str]", request: dict[str, Any], on_event: Emit | None) -> dict[str, Any] | None:
    """Send the request, pass events on, return the last message (None if the child ended without one)."""
    outcome = None
    try:
        with child.stdin as pipe:  # type: ignore[union-attr]
            json.dump(request, pipe)
    except BrokenPipeError:
        pass  # it died before reading; what it wrote says why
    for line in child.stdout:  # type: ignore[union-attr]
        if not line.endswith("\n"):
            break  # it died in the middle of a message
        message = json.loads(line)
        if "event" not in message:
            outcome = message
        elif on_event:
            on_event(message["event"])
    child.wait()
    return outcome


def _stop(child: "subprocess.Popen[str]") -> None:
    """Ask the child to end, and end it; a second interrupt only shortens the grace."""
    try:
        child.send_signal(signal.SIGINT)
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        child.kill()
        child.wait()


def _death_notice(title: str, code: int, log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        return f"{title} was killed; the machine probably ran out of memory (see `dmesg`): free some and try again"
    if any("std::bad_alloc" in line for line in lines):  # a library that ends the process by itself
        return f"{title} ran out of memory; free some, or use a machine with more"
    return f"{title} ended with code {code}: {lines[-1] if lines else 'no message'}"


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):  # the parent died before that took effect
        sys.exit(1)
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is not part of the conversation

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    module, _, name = sys.argv[1].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        result = function(json.load(sys.stdin), lambda event: send({"event": event}))
        send({"result": result, "peak_bytes": peak_bytes()})
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001  it travels to the parent whole
        send({"error": _describe(error)})


def _describe(error: Exception) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, OSError) and error.errno:
        filename = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
        described |= {"kind": "OSError", "message": error.strerror, "errno": error.errno, "filename": filename}
    return described | {"traceback": traceback.format_exc()}
