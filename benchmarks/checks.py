"""One check, run in a process of its own under a time limit, so that a crash or a hang is its result and no more.

A check is a function of one CheckRun. It records figures as it gets them and names what is wrong; what it recorded
before a crash is kept. Exceptions that no one expects end as status "error".
"""

import importlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.errors import MissingExtraError, Moe3dError

PASSED, FAILED, SKIPPED, ERROR = "passed", "failed", "skipped", "error"


@dataclass(frozen=True)
class Check:
    """An entry of the registry.

    target         "package.module:function", the function takes a CheckRun
    limit_seconds  after which the check is ended
    question       what the check answers, for people
    """

    name: str
    target: str
    limit_seconds: float
    question: str


@dataclass
class Outcome:
    """What is known of a check so far; `reason` is one line, absent for a check that passed."""

    status: str = ERROR
    reason: str | None = "the run ended before this check did"
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    peak_host_bytes: int | None = None
    step: str = ""


class _Skip(Exception):
    """Ends a check that cannot run here; never leaves this module."""


class _TimeLimit(Exception):
    """Raised by the alarm in the process that waits."""


class CheckRun:
    """What a check gets to work with.

    bundle   the bundle the user named, or None
    work     a folder for files of this whole run; checks find there what earlier ones left
    """

    def __init__(self, bundle: Path | None, work: Path, emit: Emit) -> None:
        self.bundle = bundle
        self.work = work
        self._emit = emit

    def step(self, text: str) -> None:
        """Say what is being done: progress for people, and the place in the message of a crash."""
        self._emit({"step": text})

    def record(self, **figures: Any) -> None:
        """Add or replace JSON-able figures of the result, at once."""
        self._emit({"figures": figures})

    def fail(self, message: str) -> None:
        """Note in one line what is wrong; the check goes on and ends as failed."""
        self._emit({"failure": message})

    def note(self, message: str) -> None:
        """Say in one line what the reader of a result has to know although it is no failure."""
        self._emit({"note": message})

    def skip(self, reason: str) -> NoReturn:
        """End the check: it cannot be run here."""
        raise _Skip(reason)


def execute(
    check: Check, *, bundle: Path | None, work: Path, on_change: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """Run a check to its outcome; whatever it does, this returns. Only for the main thread.

    on_change   called with the outcome so far, each time something is added to it
    """
    outcome, started = Outcome(), time.perf_counter()

    def tell() -> None:
        outcome.seconds = round(time.perf_counter() - started, 2)
        on_change(outcome)

    def on_event(event: dict[str, Any]) -> None:
        outcome.figures.update(event.get("figures", {}))
        outcome.step = event.get("step", outcome.step)
        outcome.failures += [event["failure"]] if "failure" in event else []
        outcome.notes += [event["note"]] if "note" in event else []
        tell()

    tell()

    function = f"{__name__}:{run_in_this_process.__name__}"
    request = {"target": check.target, "bundle": bundle and str(bundle.absolute()), "work": str(work.absolute())}
    try:
        with _time_limit(check.limit_seconds):
            child = run_in_child(function, request, title="its process", on_event=on_event)
    except _TimeLimit:
        outcome.reason = _at(outcome.step, f"took longer than its limit of {check.limit_seconds:g} s")
    except (Moe3dError, OSError, ValueError) as error:  # a ValueError: killed while it was writing a line
        outcome.reason = _at(outcome.step, " ".join(str(error).split()))
    else:
        outcome.peak_host_bytes = child.peak_bytes
        outcome.status, outcome.reason = _verdict(outcome.failures, child.value["skipped"])
    tell()
    return outcome


def run_in_this_process(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The other side of `execute`."""
    module, _, name = request["target"].partition(":")
    run = CheckRun(request["bundle"] and Path(request["bundle"]), Path(request["work"]), emit)
    try:
        getattr(importlib.import_module(module), name)(run)
    except (_Skip, MissingExtraError) as reason:
        return {"skipped": str(reason)}
    except ModuleNotFoundError as error:
        if str(error.name).startswith("moe3d_deploy"):
            raise
        return {"skipped": f"{error.name} is not installed"}
    return {"skipped": None}


def _verdict(failures: list[str], skipped: str | None) -> tuple[str, str | None]:
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        return FAILED, failures[0] + more
    return (PASSED, None) if skipped is None else (SKIPPED, skipped)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimeLimit in the block after `seconds`; run_in_child then stops its child."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise _TimeLimit

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _at(step: str, message: str) -> str:
    return f"{message} (at: {step})" if step else message
