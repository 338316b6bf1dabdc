"""Ctrl-C and kill as exceptions, so that what a command has begun is cleaned up; but never in the middle of an import.

While a library is loaded, its C++ code calls back into Python, and an exception there ends in an abort of the process
or in an ImportError that hides the signal. A signal that comes then waits until the import is over.
"""

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_AGAIN = 0.01  # seconds between two looks at whether the import is over

_waiting: int | None = None  # the signal that came during an import


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP, its number in args; like KeyboardInterrupt no Exception, so that nothing catches it midway."""


@contextmanager
def stop_signals_raise(last: bool) -> Iterator[None]:
    """Within this context the three signals raise: SIGINT KeyboardInterrupt, the others TerminatedError.

    last   the process does no more after this than say how it ended: from then on a signal ends it as by default,
           without the traceback of an error within an error. Else the handlers are those of before
    Only in the main thread, and only a signal for which the program that calls has no handler of its own.
    """
    global _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ours = [number for number in STOP_SIGNALS if before[number] in usual]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
        if _waiting is not None:  # all was done before anyone looked again; the signal is not lost for that
            raise _error(_waiting)
    finally:
        _waiting = None  # nothing is to be sent to a caller whose handlers are back
        for number in ours:
            if signal.getsignal(number) is stop:
                signal.signal(number, signal.SIG_DFL if last else before[number])


def stop(number: int, frame: FrameType | None) -> None:
    """The handler of the three signals."""
    global _waiting
    if not _is_importing(frame):
        _waiting = None
        raise _error(number)
    if _waiting is None:
        _waiting = number
        # threading.Thread takes locks that the interrupted code may hold.
        _thread.start_new_thread(_send_again, (number,))


def _error(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else TerminatedError(number)


def _send_again(number: int) -> None:
    time.sleep(_LOOK_AGAIN)
    while _waiting is not None:
        os.kill(os.getpid(), number)
        time.sleep(_LOOK_AGAIN)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False
