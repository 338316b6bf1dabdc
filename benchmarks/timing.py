"""Times of a repeated call: warm up until they are stable, then a median with its spread. numpy only.

A timer is a function without arguments that runs the call once and returns its milliseconds, so that nothing here
knows what is timed or by which clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Timer = Callable[[], float]

_WINDOW = 3  # runs whose median is compared with that of the runs before them


@dataclass(frozen=True)
class Effort:
    """How long to measure; a budget is of the measured time itself and never cuts below the smallest number of runs.

    stable_within   warm-up ends when the medians of two neighbouring windows differ by no more than this share
    """

    min_runs: int = 10
    max_runs: int = 100
    budget_ms: float = 5_000.0
    warmup_budget_ms: float = 10_000.0
    stable_within: float = 0.02


class Timing(NamedTuple):
    """Milliseconds of one call. `stable` False: the warm-up ran out of its budget before the times settled."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    warmup_runs: int
    stable: bool


class Ratio(NamedTuple):
    """The second call's time over the first's, each pair of runs by itself."""

    median: float
    p10: float
    p90: float
    first: Timing
    second: Timing


def measure(timer: Timer, *, effort: Effort | None = None) -> Timing:
    """Warm up, then run until the budget or `max_runs` is used up."""
    effort = effort or Effort()
    warmup_runs, stable = warm_up(timer, effort)
    times: list[float] = []
    while len(times) < effort.min_runs or (len(times) < effort.max_runs and sum(times) < effort.budget_ms):
        times.append(timer())
    return _timing(times, warmup_runs, stable)


def interleave(first: Timer, second: Timer, *, effort: Effort | None = None) -> Ratio:
    """Warm both up, then run them in turn, so that a clock that drifts meets both alike."""
    effort = effort or Effort()
    warm = [warm_up(timer, effort) for timer in (first, second)]
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < effort.min_runs or (
        len(times[0]) < effort.max_runs and sum(times[0]) + sum(times[1]) < effort.budget_ms
    ):
        times[0].append(first())
        times[1].append(second())
    ratios = np.asarray(times[1]) / np.asarray(times[0])
    p10, median, p90 = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    return Ratio(median, p10, p90, *(_timing(t, *w) for t, w in zip(times, warm, strict=True)))


def warm_up(timer: Timer, effort: Effort) -> tuple[int, bool]:
    """Run until two neighbouring windows agree; returns the number of runs and whether they did."""
    times: list[float] = []
    while True:
        times.append(timer())
        if len(times) >= 2 * _WINDOW:
            before, now = np.median(times[-2 * _WINDOW : -_WINDOW]), np.median(times[-_WINDOW:])
            if abs(now - before) <= effort.stable_within * before:
                return len(times), True
            if sum(times) >= effort.warmup_budget_ms:
                return len(times), False


def _timing(times: list[float], warmup_runs: int, stable: bool) -> Timing:
    p10, median, p90 = (float(value) for value in np.percentile(times, (10, 50, 90)))
    return Timing(median, p10, p90, len(times), warmup_runs, stable)
