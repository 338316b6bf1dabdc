"""The ratio of two medians with an interval that knows how timings of one machine hang together.

Two things make timings alike. Neighbouring runs are: a clock, another process, a warm cache last longer than a run. So
runs are drawn in blocks of neighbours (a circular block bootstrap), whose length grows with the root of their number.
And processes differ as a whole, by where memory came to lie or which core they got, more than the runs of any one of
them tell. So the medians of the processes are what is compared, their spread gives a second standard error, and the
larger of the two counts. A few processes have a spread that is itself uncertain: Student's distribution widens the
interval for that. With one process on either side there is an interval of the blocks, and no verdict.

How often two equal series are told apart, and a changed one is found: docs/benchmarks.md.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000

Rounds = Sequence[Sequence[float]]  # the runs of every process

# The 97.5th percentile of Student's distribution: of a table, by degrees of freedom; then to 0.1 % by the first terms
# of its expansion around the normal distribution's, 1.95996.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.95996
_NOTHING_KNOWN = 100.0  # a ratio whose interval reaches this says nothing


class RatioInterval(NamedTuple):
    """The second median over the first and where it lies, 95 times of 100. `beyond_noise` None: nothing can be said."""

    ratio: float
    low: float
    high: float
    beyond_noise: bool | None

    @property
    def bounded(self) -> bool:
        """Whether there were runs enough for an interval that tells something."""
        return self.high < _NOTHING_KNOWN

    def __str__(self) -> str:
        """ "slower by 5.1 % [4.2, 6.0]"."""
        change, low, high = (100 * (value - 1) for value in self[:3])
        if not self.bounded:
            return f"{change:+.1f} %, too few runs for an interval: no verdict"
        if self.beyond_noise is None:
            return f"{change:+.1f} % [{low:+.1f}, {high:+.1f}] within one process: no verdict"
        if not self.beyond_noise:
            return f"no change beyond noise: {change:+.1f} % [{low:+.1f}, {high:+.1f}]"
        if change > 0:
            return f"slower by {change:.1f} % [{low:.1f}, {high:.1f}]"
        return f"faster by {-change:.1f} % [{-high:.1f}, {-low:.1f}]"


def ratio_of_medians(first: Rounds, second: Rounds, *, seed: int = 0) -> RatioInterval:
    """Compare the runs of two reports, milliseconds. The same numbers give the same interval."""
    sides = [[np.asarray(times, np.float64) for times in rounds] for rounds in (first, second)]
    return _interval(sides, seed)


def ratio_of_pairs(ratios: Rounds, *, seed: int = 0) -> RatioInterval:
    """The ratio of two calls that ran in turns in the same processes, from the ratio of every pair of runs.

    What both calls of a pair meet, such as a slow minute or where memory came to lie, is no noise here.
    """
    return _interval([[np.asarray(values, np.float64) for values in ratios]], seed)


def _interval(sides: list[list[NDArray[np.float64]]], seed: int) -> RatioInterval:
    """Of the last side's median over the first side's, or of the only side's own."""
    random = np.random.default_rng(seed)
    logs = [np.log([np.median(times) for times in side]) for side in sides]
    change = float(logs[-1].mean() - (logs[0].mean() if len(sides) > 1 else 0))
    of_blocks = math.sqrt(sum(_block_variance(times, random) / len(side) ** 2 for side in sides for times in side))
    counts = [len(side) for side in sides]
    freedom = sum(counts) - len(counts)
    if min(counts) == 1:
        blocks = sum(_blocks(len(times)) for side in sides for times in side)
        runs_freedom = blocks - sum(counts)
        width = student(runs_freedom) * of_blocks if runs_freedom > 0 else math.inf
        return RatioInterval(math.exp(change), math.exp(change - width), _exp(change + width), None)
    variance = sum(float(((log - log.mean()) ** 2).sum()) for log in logs) / freedom
    of_processes = math.sqrt(variance * sum(1 / count for count in counts))
    width = student(freedom) * max(of_blocks, of_processes)
    return RatioInterval(math.exp(change), math.exp(change - width), _exp(change + width), abs(change) > width)


def student(freedom: int) -> float:
    """What 97.5 % of Student's distribution lie below."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _block_variance(times: NDArray[np.float64], random: np.random.Generator) -> float:
    """Of the logarithm of the median of one process, over draws of its runs in blocks that go round at the end."""
    count, blocks = len(times), _blocks(len(times))
    length = -(-count // blocks)
    starts = random.integers(0, count, (DRAWS, blocks))
    index = (starts[:, :, None] + np.arange(length)) % count
    medians = np.median(times[index.reshape(DRAWS, -1)[:, :count]], axis=1)
    return float(np.log(medians).var())


def _blocks(count: int) -> int:
    """Into how many blocks so many runs go."""
    return -(-count // math.isqrt(count))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # below the largest float
