"""Follow a builder at work: progress, cancelling, Ctrl-C, its messages, and one line from its errors."""

import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moe3d_deploy import stop_signals
from moe3d_deploy.errors import EngineError

Progress = Callable[[str, int, int], None]
"""progress(phase, step, total): phases nest and repeat; within one run of a phase the steps rise from 0 to total."""


class Watch:
    """Between the builder's progress callbacks and the caller's: counts, cancels, keeps exceptions out of C++."""

    def __init__(self, progress: Progress | None, cancelled: Callable[[], bool] | None) -> None:
        self._progress, self._cancelled = progress, cancelled
        self._totals: dict[str, int] = {}
        self._lock = threading.Lock()  # the builder may report from several threads
        self._interrupted = self._stopped = False
        self._error: BaseException | None = None

    def start(self, phase: str, steps: int) -> None:
        self._totals[phase] = steps
        self._report(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        """Note that step `step` (from 0) is done; False tells the builder to give up."""
        self._report(phase, step + 1)
        return not self.stopping

    @property
    def stopping(self) -> bool:
        """Whether the build is to end: interrupted, cancelled, or a function of the caller's has failed."""
        return bool(self._interrupted or self._stopped or self._error)

    def _report(self, phase: str, done: int) -> None:
        with self._lock:
            self.guard(self._progress, phase, done, self._totals.get(phase, done))
            self._stopped = bool(self.guard(self._cancelled)) or self._stopped

    def guard(self, call: Callable[..., Any] | None, *args: Any) -> Any:
        """Call the caller's function, if there is one; what it raises must wait until the builder has returned."""
        try:
            return call(*args) if call else None
        except BaseException as error:  # noqa: BLE001  raised by raise_if_stopped
            self._error = self._error or error

    def raise_if_stopped(self, model: str) -> None:
        """Raise what ended the build, if something did."""
        if self._interrupted:
            raise KeyboardInterrupt
        if self._error:
            raise self._error
        if self._stopped:
            raise EngineError(f"{model}: the engine build was cancelled; there is no engine")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn Ctrl-C into a flag: an exception must not pass through the builder. Another handler stays in place."""
        before = signal.getsignal(signal.SIGINT)
        usual = before in (signal.default_int_handler, stop_signals.stop)
        if not usual or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True


class Messages(logging.Handler):
    """Polygraphy's and the library's messages, kept off stdout: INFO and above, errors, the compiled layers."""

    def __init__(self, log: Callable[[str], object] | None = None) -> None:
        super().__init__()
        self._log = log
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.listing = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = str(record.msg)
        if text.startswith("Layers:"):
            self.listing = text
        if record.levelno < 10:  # TensorRT's VERBOSE
            return
        if record.levelno >= logging.ERROR:
            self.errors.append(text)
        for line in text.splitlines():
            self.lines.append(line)
            if self._log:
                self._log(line)

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Within the block, messages come here and nowhere else."""
        from polygraphy.logger import G_LOGGER

        target = logging.getLogger("Polygraphy")
        before = (target.level, target.propagate, target.handlers[:])
        names = ("use_python_logging_system", "colors", "letter")
        style = {name: getattr(G_LOGGER, name) for name in names}
        target.level, target.propagate, target.handlers[:] = 1, False, [self]
        for name in names:
            setattr(G_LOGGER, name, name == "use_python_logging_system")
        try:
            with G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
                yield
        finally:
            for name in names:
                setattr(G_LOGGER, name, style[name])
            target.level, target.propagate, target.handlers[:] = before


def reason(errors: Sequence[str]) -> str:
    """One line from the library's errors: the node the parser stopped at, or the builder's first error."""
    weights = [text.partition(": ")[2] for text in errors if text.startswith("WeightsContext")]
    if weights:
        return one_line(f"{weights[0]}; put the weight file that belongs to it beside it")
    if any("MODEL_DESERIALIZE_FAILED" in text for text in errors):
        return "the file is damaged or no ONNX file; export it again"
    for text in errors:
        if match := re.match(r"In node -?\d+ with name: (.*?) and operator: (.*?) \(\w+\): (.*)", text, re.DOTALL):
            return one_line('node "{}" ({}): {}'.format(*match.groups()))
    return one_line(errors[0]) if errors else ""


def one_line(text: str) -> str:
    """A message without the library's own source lines, its error codes and links; at most 300 characters."""
    text = re.sub(r"\bIn \S+ at /\S+:\d+ ?|^\w+::\w+: Error Code \d+: |\(See https?:[^)]*\)", "", text)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
