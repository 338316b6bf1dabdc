"""Ending a run between two steps: on Ctrl-C, SIGTERM or a closed terminal, or when its time is over."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from moe3d_deploy.stop_signals import STOP_SIGNALS


class StopRequest:
    """Within this context the first signal only asks for the end; the second does what it did before, at once."""

    def __init__(self, minutes: float | None = None) -> None:
        self.number: signal.Signals | None = None
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.number is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.number = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
