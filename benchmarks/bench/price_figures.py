"""What follows from the series of `price`: how much slower a form is, its share of the whole, its price and the goal.

added        (form / single - 1) x single, of the pairs of every turn
time share   added / the whole model's time with VGGT's head
FLOP share   added FLOP / the whole model's FLOP with VGGT's head
price        time share / FLOP share: 1 where a FLOP of the experts takes as long as any other
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe3d_deploy.benchmarks.bench.bootstrap import RatioInterval, ratio_of_pairs
from moe3d_deploy.benchmarks.bench.price import BUNDLE, HEAD, MEASURED, MODEL, SINGLE, PriceCase

GOALS = {"cuda": 1.25, "cpu": 1.5}  # of the price, by the device
PAPER_TIME_SHARE = 0.07  # MoE3D's paper; it names neither hardware nor resolution


class Estimate(NamedTuple):
    """A value, and where it lies 95 times of 100."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        return Estimate(*(factor * number for number in self))


@dataclass(frozen=True)
class Overhead:
    """One form of a case against the single head in the same turns, milliseconds.

    total_ms     of the whole model with VGGT's head; None where none was measured on this shape. Its own spread is in
                 no interval: of a share of some percent it moves nothing
    total_of     the part that it comes from, MODEL or BUNDLE
    price        None without a time share, and for experts so narrow that they add no FLOP
    reached      whether the price is at most `goal`; `sure`: whether its whole interval lies on that side
    """

    case: PriceCase
    form: str
    ratio: RatioInterval
    single_ms: float
    form_ms: float
    added_ms: Estimate
    total_ms: float | None
    total_of: str | None
    time_share: Estimate | None
    flop_share: float
    price: Estimate | None
    goal: float

    @property
    def reached(self) -> bool | None:
        return None if self.price is None else self.price.value <= self.goal

    @property
    def sure(self) -> bool:
        return self.price is not None and not self.price.low <= self.goal < self.price.high


def flop_share(case: PriceCase) -> float:
    """Added FLOP over those of the whole model with VGGT's head."""
    return (case.experts_flop - case.single_flop) / case.single_flop


def overheads(cases: Sequence[PriceCase]) -> list[Overhead]:
    """One for every form of every measured case of a head or a model, in their order."""
    return list(_overheads(cases))


def _overheads(cases: Sequence[PriceCase]) -> Iterator[Overhead]:
    measured = [case for case in cases if case.status == MEASURED]
    for case in measured:
        if case.part == BUNDLE:
            continue
        total, origin = _total(case, measured)
        single = _median(case, SINGLE)
        for form in case.forms:
            if form == SINGLE:
                continue
            ratio = _ratio(case, form)
            added = Estimate(*((value - 1) * single for value in ratio[:3]))
            share = flop_share(case)
            time_share = added.scaled(1 / total) if total else None
            yield Overhead(
                case=case,
                form=form,
                ratio=ratio,
                single_ms=single,
                form_ms=_median(case, form),
                added_ms=added,
                total_ms=total,
                total_of=origin,
                time_share=time_share,
                flop_share=share,
                price=time_share.scaled(1 / share) if time_share and share > 0 else None,
                goal=GOALS[case.rounds[0].device],
            )


def _total(case: PriceCase, measured: Sequence[PriceCase]) -> tuple[float | None, str | None]:
    """Milliseconds of the whole model with VGGT's head on the case's shape in its backend, and the part with them."""
    for other in measured:
        if (other.backend, other.precision, other.shape) != (case.backend, case.precision, case.shape):
            continue
        if other.part == MODEL:
            return _median(other, SINGLE), MODEL
        if other.part == BUNDLE:
            (form,) = other.forms
            added = 0.0 if form == SINGLE else _added_in_bundle(other, form, measured)
            if added is not None:
                return _median(other, form) - added, BUNDLE
    return None, None


def _added_in_bundle(bundle: PriceCase, form: str, measured: Sequence[PriceCase]) -> float | None:
    """What the bundle's own form adds, which is in its time: that of the heads beside it."""
    for case in measured:
        key = (case.part, case.backend, case.precision, case.shape, case.num_experts)
        if key == (HEAD, bundle.backend, bundle.precision, bundle.shape, bundle.num_experts) and form in case.forms:
            return (_ratio(case, form).ratio - 1) * _median(case, SINGLE)
    return None


def _ratio(case: PriceCase, form: str) -> RatioInterval:
    return ratio_of_pairs(
        [[b / a for a, b in zip(item.series[SINGLE], item.series[form], strict=True)] for item in case.rounds]
    )


def _median(case: PriceCase, form: str) -> float:
    """Of all turns of all processes, milliseconds."""
    return statistics.median(value for item in case.rounds for value in item.series[form])
