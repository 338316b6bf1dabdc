"""Times of a repeated call: warm up until they are stable, then a median with its spread. numpy only.

A timer is a function without arguments that runs the call once and returns its milliseconds, so that nothing here
knows what is timed or by which clock.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Timer = Callable[[], float]

_WINDOW = 3  # runs whose median is compared with that of the runs before them


@dataclass(frozen=True)
class Effort:
    """How long to measure; `budget_ms` is of the measured time itself and never cuts below the smallest number of runs.

    stable_within       warm-up ends when the medians of two neighbouring windows differ by no more than this share
    warmup_budget_ms    or, unstable, with the run that uses this up: of a call that takes long, the first
    """

    min_runs: int = 10
    max_runs: int = 100
    budget_ms: float = 5_000.0
    warmup_budget_ms: float = 10_000.0
    stable_within: float = 0.02


class Series(NamedTuple):
    """Every run's milliseconds in the order they were taken, without the warm-up; for `stable` see Timing."""

    times_ms: tuple[float, ...]
    warmup_runs: int
    stable: bool


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
    return _timing(*collect(timer, effort=effort))


def collect(timer: Timer, *, effort: Effort | None = None) -> Series:
    """The runs of `measure` one by one."""
    effort = effort or Effort()
    warmup_runs, stable = warm_up(timer, effort)
    times: list[float] = []
    while len(times) < effort.min_runs or (len(times) < effort.max_runs and sum(times) < effort.budget_ms):
        times.append(timer())
    return Series(tuple(times), warmup_runs, stable)


def collect_parts(
    run: Callable[[], Mapping[str, float]], *, whole: str, effort: Effort | None = None
) -> dict[str, Series]:
    """`collect` of a call that times its own parts: `run` returns milliseconds by name, among them those of `whole`.

    Warm-up and budget go by `whole`. Every series has an entry of every run.
    """
    passes: list[Mapping[str, float]] = []

    def timer() -> float:
        passes.append(run())
        return passes[-1][whole]

    series = collect(timer, effort=effort)
    kept = passes[series.warmup_runs :]
    return {name: series._replace(times_ms=tuple(parts[name] for parts in kept)) for name in kept[0]}


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """ "p50", "p90" and "p99" of runs, by linear interpolation. Of fewer than a hundred, p99 is near the slowest."""
    values = np.percentile(times_ms, (50, 90, 99))
    return {name: float(value) for name, value in zip(("p50", "p90", "p99"), values, strict=True)}


def per_second(items: int, times_ms: Sequence[float]) -> float:
    """Throughput of runs one after the other, each of `items` scenes or views: all of them over all of the time."""
    return 1e3 * items * len(times_ms) / sum(times_ms)


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


def _timing(times: Sequence[float], warmup_runs: int, stable: bool) -> Timing:
    p10, median, p90 = (float(value) for value in np.percentile(times, (10, 50, 90)))
    return Timing(median, p10, p90, len(times), warmup_runs, stable)
