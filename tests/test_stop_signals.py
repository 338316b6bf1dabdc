"""Signals as exceptions, in a program that goes on afterwards. Whole commands: test_survival_signals.py."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from moe3d_deploy.stop_signals import STOP_SIGNALS, TerminatedError, stop_signals_raise

LOOKS = 0.3  # seconds in which a signal that waits for an import would be sent several times


def signal_in_an_import(number: signal.Signals = signal.SIGTERM) -> None:
    code = compile("signal.raise_signal(number)", "<frozen importlib._bootstrap>", "exec")
    exec(code, {"signal": signal, "number": number})


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The signals that reach the caller's own handler; it has one for SIGTERM where the context has none."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield []
    signal.signal(signal.SIGTERM, before)


def test_a_signal_raises_and_the_handlers_come_back(told: list[int]) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(TerminatedError, match="15"), stop_signals_raise(last=False):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signals_raise(last=False):
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_in_an_import_is_raised_after_it(told: list[int]) -> None:
    def command() -> None:
        with stop_signals_raise(last=False):
            signal_in_an_import()
            time.sleep(10)

    with pytest.raises(TerminatedError):
        command()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_still_waits_at_the_end_is_raised_there(
    number: signal.Signals, error: type[BaseException], told: list[int]
) -> None:
    """A command that has little left to do is through before the signal is sent again."""
    with pytest.raises(error), stop_signals_raise(last=False):
        signal_in_an_import(number)


def test_a_signal_that_still_waits_is_not_sent_to_a_caller_that_goes_on(told: list[int]) -> None:
    def command() -> None:
        with stop_signals_raise(last=False):
            signal_in_an_import()
            raise ValueError("of the command")

    with pytest.raises(ValueError, match="of the command"):
        command()

    def tell(number: int, frame: Any) -> None:
        told.append(number)

    signal.signal(signal.SIGTERM, tell)
    time.sleep(LOOKS)
    assert told == []
