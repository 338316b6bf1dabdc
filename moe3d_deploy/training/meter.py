"""How fast a run goes: time per step, and the share of it spent waiting for samples."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Time of a lap, which is the steps from one line of the log to the next."""

    def __init__(self) -> None:
        self.steps, self.waited = 0, 0.0  # of this lap, so far; both are added to from outside
        self._started = time.monotonic()
        self._before: float | None = None

    @property
    def pace(self) -> float:
        """Seconds per step of the last lap; of this one, if it is the first."""
        return self._seconds() / max(self.steps, 1) if self._before is None else self._before

    def lap(self) -> tuple[float, float, int]:
        """Seconds, seconds waited, steps; starts anew."""
        seconds, waited, steps = self._seconds(), self.waited, self.steps
        self._before = seconds / max(steps, 1)
        self._started, self.waited, self.steps = time.monotonic(), 0.0, 0
        return seconds, waited, steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context no time passes for the meter."""
        entered = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - entered

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)


def time_left(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
