"""Timing statistics on timers whose every time is known."""

from collections.abc import Iterator
from itertools import chain, cycle, repeat

import pytest

from moe3d_deploy.benchmarks.timing import (
    Effort,
    Timer,
    collect,
    collect_parts,
    interleave,
    measure,
    per_second,
    percentiles,
    warm_up,
)


def timer(times: Iterator[float]) -> Timer:
    return lambda: next(times)


def test_median_and_spread_are_those_of_the_runs_after_the_warm_up() -> None:
    """A constant time ends the warm-up after its two windows of three; then eleven runs of 1 to 11 ms."""
    times = chain(repeat(5.0, 6), map(float, range(11, 0, -1)))
    timing = measure(timer(times), effort=Effort(min_runs=11, max_runs=11))
    assert timing == (6.0, 2.0, 10.0, 11, 6, True)  # of 1..11: ranks 6, 2 and 10 are exact percentiles


def test_warm_up_goes_on_while_times_fall() -> None:
    """1000, 900, ..., 100, then 100 for ever: with run 13 the medians of the two windows are still 200 and 100."""
    times = chain(map(float, range(1000, 0, -100)), repeat(100.0))
    runs, stable = warm_up(timer(times), Effort())
    assert (runs, stable) == (14, True)  # runs 9 to 14: 200 100 100 | 100 100 100


def test_times_that_never_settle_end_the_warm_up_and_are_marked() -> None:
    times = cycle([100.0, 100.0, 100.0, 200.0, 200.0, 200.0])
    timing = measure(timer(times), effort=Effort(min_runs=2, max_runs=2, warmup_budget_ms=900, stable_within=-1))
    assert (timing.warmup_runs, timing.stable) == (6, False)


@pytest.mark.parametrize(
    ("milliseconds", "runs"),
    [
        (1.0, 40),  # the cap
        (100.0, 20),  # the budget: 20 x 100 ms
        (5000.0, 10),  # the least, although the first run alone is beyond the budget
    ],
)
def test_number_of_runs_follows_the_budget_between_its_bounds(milliseconds: float, runs: int) -> None:
    effort = Effort(min_runs=10, max_runs=40, budget_ms=2000)
    assert measure(timer(repeat(milliseconds)), effort=effort).runs == runs


def test_ratio_is_taken_pair_by_pair_so_a_common_drift_cancels() -> None:
    """Both calls slow down together, fourfold in all; the second takes 1.5 times as long throughout."""
    drift = [1.0 + 0.1 * i for i in range(30)]
    first = chain(repeat(1.0, 6), drift)
    second = chain(repeat(1.5, 6), (1.5 * t for t in drift))
    ratio = interleave(timer(first), timer(second), effort=Effort(min_runs=30, max_runs=30))
    assert ratio[:3] == pytest.approx((1.5, 1.5, 1.5), rel=1e-12)  # float64 rounding
    assert (ratio.first.runs, ratio.second.runs) == (30, 30)
    assert ratio.second.median_ms == pytest.approx(1.5 * ratio.first.median_ms)


def test_interleaved_calls_take_turns() -> None:
    order: list[str] = []

    def named(name: str) -> Timer:
        def run() -> float:
            order.append(name)
            return 1.0

        return run

    interleave(named("a"), named("b"), effort=Effort(min_runs=3, max_runs=3))
    assert "".join(order) == "aaaaaa" + "bbbbbb" + "ababab"


def test_a_call_that_takes_long_is_warm_when_its_budget_is_used() -> None:
    """20 s a run and a budget of 10: one run, not the two windows of three."""
    assert warm_up(timer(repeat(20_000.0)), Effort(warmup_budget_ms=10_000)) == (1, False)


def test_every_run_is_kept_in_its_order_without_the_warm_up() -> None:
    series = collect(timer(chain(repeat(5.0, 6), [3.0, 1.0, 2.0])), effort=Effort(min_runs=3, max_runs=3))
    assert series == ((3.0, 1.0, 2.0), 6, True)


def test_parts_are_kept_run_by_run_and_warm_up_goes_by_the_whole() -> None:
    """The whole settles at once, the part never does."""
    parts = iter([{"part": float(i), "whole": 10.0} for i in range(9)])
    found = collect_parts(lambda: next(parts), whole="whole", effort=Effort(min_runs=3, max_runs=3))
    assert found["part"] == ((6.0, 7.0, 8.0), 6, True)
    assert found["whole"] == ((10.0, 10.0, 10.0), 6, True)


def test_percentiles_lie_between_runs() -> None:
    """Of 1..101: the 51st, the 91st and the 100th; of 10 and 20, half way, 9/10 and 99/100 of the way."""
    assert percentiles([float(i) for i in range(101, 0, -1)]) == {"p50": 51.0, "p90": 91.0, "p99": 100.0}
    assert percentiles([10.0, 20.0]) == pytest.approx({"p50": 15.0, "p90": 19.0, "p99": 19.9})


def test_throughput_counts_slow_runs_for_what_they_take() -> None:
    """Eight views in each of three runs that take a second in all."""
    assert per_second(8, [100.0, 100.0, 800.0]) == pytest.approx(24.0)
