"""Ask a library in a process of its own: one that crashes, hangs or prints while it loads is an answer like another.

Each question is a name of QUESTIONS. All are asked at once; the processes end with their parent or their time.
"""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

from moe3d_deploy import cuda_driver

_GRACE_SECONDS = 5  # after which a process whose parent is gone ends by itself
_REASON_CHARACTERS = 300

# The child imports from where the parent does; `python -m` would put the working folder, whatever lies in it, first.
_START = "import sys; del sys.path[0]; from moe3d_deploy.probe import _main; _main()"


@dataclass(frozen=True)
class Answer:
    """What was found out (JSON-able), or in one line why nothing was: one of the two is None."""

    value: dict[str, Any] | None
    fault: str | None = None


def ask(names: Iterable[str], timeout_seconds: float) -> dict[str, Answer]:
    """Ask every question of `names` in a process of its own, all at once; each gets `timeout_seconds`."""
    with ExitStack() as stack:
        asked = {name: stack.enter_context(_Question(name, timeout_seconds)) for name in names}
        return {name: question.answer() for name, question in asked.items()}


class _Question:
    """A running process and what it writes. Not pipes: nobody has to read meanwhile, and nobody can keep one waiting.
    In memory, for this has to work where the disk is full.
    """

    def __init__(self, name: str, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._end = time.monotonic() + timeout_seconds
        self._out = os.memfd_create(f"moe3d-{name}-out")
        self._log = os.memfd_create(f"moe3d-{name}-log")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, name, str(math.ceil(timeout_seconds) + _GRACE_SECONDS)],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )

    def __enter__(self) -> "_Question":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)  # with whatever the library has started
        self._process.wait()
        os.close(self._out)
        os.close(self._log)

    def answer(self) -> Answer:
        try:
            code = self._process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Answer(None, f"does not load within {self._timeout:g} s")
        if text := _content(self._out):
            return Answer(**json.loads(text))
        return Answer(None, self._why(code))

    def _why(self, code: int) -> str:
        if code < 0:
            return f"ends the process that loads it with {signal.Signals(-code).name}"
        lines = [line.strip() for line in _content(self._log).splitlines() if line.strip()]
        return _short(f"ends the process that loads it with code {code}" + (f": {lines[-1]}" if lines else ""))


def _package(module: str) -> dict[str, Any]:
    loaded = importlib.import_module(module)
    version = getattr(loaded, "__version__", None)
    return {"version": None if version is None else str(version)}


def _onnxruntime() -> dict[str, Any]:
    ort = importlib.import_module("onnxruntime")
    return {"version": ort.__version__, "providers": list(ort.get_available_providers())}


def _cuda() -> dict[str, Any]:
    return {**asdict(cuda_driver.query()), "version": cuda_driver.driver_version()}


PACKAGES = ("numpy", "cv2", "PIL", "click", "torch", "onnx", "tensorrt", "tensorrt_rtx")
"""Names of modules that are only loaded, beside `onnxruntime`, which is asked for its providers too."""

QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: lambda name=name: _package(name) for name in PACKAGES},  # type: ignore[misc]
    "onnxruntime": _onnxruntime,
    "cuda": _cuda,
}


def _main() -> None:
    signal.alarm(int(sys.argv[2]))
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    try:
        answer = Answer(QUESTIONS[sys.argv[1]]())
    except Exception as error:  # noqa: BLE001  it is the answer
        name, text = type(error).__name__, " ".join(str(error).split())
        answer = Answer(None, _short(f"does not load: {name}: {text}" if text else f"does not load: {name}"))
    with channel:
        json.dump(asdict(answer), channel)


def _content(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def _short(text: str) -> str:
    return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 3] + "..."
