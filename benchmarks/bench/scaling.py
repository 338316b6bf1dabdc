"""How time and memory grow with views and with pixels: exponents fitted to cases, beside those of the arithmetic.

A sweep is what cases of one model in one backend give that differ in one thing only. All follows from the cases of a
report; nothing is measured here.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench import figures
from moe3d_deploy.benchmarks.bench.bootstrap import student
from moe3d_deploy.benchmarks.bench.report import MEASURED, Case
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.planning import MOST_VIEWS

FEWEST_POINTS = 3
VIEWS, PIXELS = "views", "pixels"

_GLOBAL = "global attention"  # a component of `costs.flops`


class Sweep(NamedTuple):
    """Cases along an axis, VIEWS or PIXELS, in rising order and each place once. `fixed`: what else they have in
    common, such as "252x252"."""

    axis: str
    fixed: str
    cases: tuple[Case, ...]

    @property
    def places(self) -> list[int]:
        """Views, or pixels of a view."""
        return [_place(case, self.axis) for case in self.cases]


class Exponent(NamedTuple):
    """y grows as x to this power: by least squares of the logarithms, and where it lies, 95 times of 100, if the points
    scatter around one power. Points of a sum of powers do not: then the interval tells of the misfit as well."""

    value: float
    low: float
    high: float


class Growth(NamedTuple):
    """A figure along a sweep, and what the arithmetic says of it over the same points (no scatter, so no interval)."""

    quantity: str
    measured: Exponent
    arithmetic: float


class Takeover(NamedTuple):
    """Views from which global attention is at least half: of the arithmetic, and of the time.

    computed   fewest views, None: not within `planning.MOST_VIEWS`
    measured   by a fit of b S + c S^2 to the times; None: beyond the sweep
    """

    computed: int | None
    measured: float | None


def sweeps(cases: Iterable[Case]) -> list[Sweep]:
    """Every sweep with at least FEWEST_POINTS places among the measured cases; views first."""
    found: dict[tuple[str, str, str], dict[int, Case]] = {}
    for axis in (VIEWS, PIXELS):
        for case in cases:
            if case.status == MEASURED:
                batch, views, height, width = case.shape
                fixed = f"{height}x{width}" if axis == VIEWS else f"{views} view{'s' * (views > 1)}"
                fixed += f", {batch} scenes" if batch > 1 else ""
                label = f"{case.model} {case.kind} {case.backend} {case.precision}"
                found.setdefault((axis, label, fixed), {}).setdefault(_place(case, axis), case)
    return [
        Sweep(axis, fixed, tuple(group[place] for place in sorted(group)))
        for (axis, _, fixed), group in found.items()
        if len(group) >= FEWEST_POINTS
    ]


def exponent(x: Sequence[float], y: Sequence[float]) -> Exponent:
    """The power by which y grows with x, both positive, of at least three different x.

    The interval is Student's, with the points less two as degrees of freedom.
    """
    a, b = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    spread = float(((a - a.mean()) ** 2).sum())
    slope = float(((a - a.mean()) * (b - b.mean())).sum()) / spread
    left = b - b.mean() - slope * (a - a.mean())
    freedom = len(a) - 2
    width = student(freedom) * math.sqrt(float((left**2).sum()) / freedom / spread)
    return Exponent(slope, slope - width, slope + width)


def growth(sweep: Sweep) -> list[Growth]:
    """Time against FLOP, peak memory and activations against `moe3d plan`'s prediction."""
    quantities: list[tuple[str, Callable[[Case], float | None], Callable[[Case], float]]] = [
        ("time", lambda case: figures.latency(case).p50, lambda case: sum(case.work.values())),
        ("peak memory", _peak, lambda case: case.predicted.weights_bytes + case.predicted.activations_bytes),
        (
            "activations",
            lambda case: figures.memory_use(case).activations_bytes,
            lambda case: case.predicted.activations_bytes,
        ),
    ]
    found = []
    for name, measured, arithmetic in quantities:
        known = [(measured(case), arithmetic(case)) for case in sweep.cases]
        ys = [y for y, _ in known if y is not None and y > 0]
        if len(ys) == len(known):
            computed = exponent(sweep.places, [y for _, y in known]).value
            found.append(Growth(name, exponent(sweep.places, ys), computed))
    return found


def takeover(config: ModelConfig, sweep: Sweep) -> Takeover:
    """Of a sweep over views of the model."""
    batch, _, height, width = sweep.cases[0].shape
    times = [figures.latency(case).p50 for case in sweep.cases]
    views = measured_takeover(sweep.places, times)
    reached = views if views is not None and views <= sweep.places[-1] else None
    return Takeover(computed_takeover(config, batch, height, width), reached)


def computed_takeover(config: ModelConfig, batch: int, height: int, width: int) -> int | None:
    """Fewest views at which the products of global attention are at least half of all FLOP; None beyond MOST_VIEWS."""
    if not _is_half(config, (batch, MOST_VIEWS, height, width)):
        return None
    low, high = 0, MOST_VIEWS  # at `high` it is half: its share rises with the views
    while high - low > 1:
        middle = (low + high) // 2
        if _is_half(config, (batch, middle, height, width)):
            high = middle
        else:
            low = middle
    return high


def measured_takeover(views: Sequence[int], times: Sequence[float]) -> float | None:
    """Where the part of the time that grows with the square of the views is half: b / c of the fit b S + c S^2, by
    least squares of the relative errors. None where no such part is seen."""
    s, t = np.asarray(views, np.float64), np.asarray(times, np.float64)
    (b, c), *_ = np.linalg.lstsq(np.stack([s / t, s**2 / t], axis=1), np.ones(len(s)), rcond=None)
    if c <= 0:
        return None
    return max(0.0, float(b / c))


def of_models(models: Mapping[str, Mapping[str, object]], case: Case) -> ModelConfig:
    """The case's config, without a point head, which no backend runs for depth and cameras."""
    return dataclasses.replace(ModelConfig.from_dict(dict(models[case.model])), point_head=False)


def _is_half(config: ModelConfig, shape: tuple[int, int, int, int]) -> bool:
    parts = costs.flops(config, *shape)
    return 2 * parts[_GLOBAL] >= sum(parts.values())


def _place(case: Case, axis: str) -> int:
    return case.shape[1] if axis == VIEWS else case.shape[2] * case.shape[3]


def _peak(case: Case) -> float:
    use = figures.memory_use(case)
    return use.driver_bytes or use.peak_bytes
