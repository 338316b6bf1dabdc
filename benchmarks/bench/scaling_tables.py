"""Sweeps as tables: fitted exponents beside the arithmetic's, and where global attention takes over."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe3d_deploy.benchmarks.bench import scaling, text
from moe3d_deploy.benchmarks.bench.report import Case
from moe3d_deploy.benchmarks.bench.scaling import VIEWS, Sweep
from moe3d_deploy.benchmarks.bench.text import Table
from moe3d_deploy.planning import MOST_VIEWS

_WHAT = ("model", "backend", "precision", "against", "at")


def tables(cases: Sequence[Case], models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Empty where no cases make a sweep."""
    found = scaling.sweeps(cases)
    over_views = [sweep for sweep in found if sweep.axis == VIEWS]
    return [table for table in (exponents(found), takeovers(over_views, models)) if table.rows]


def exponents(sweeps: Sequence[Sweep]) -> Table:
    rows = []
    for sweep in sweeps:
        places = ", ".join(map(str, sweep.places))
        for growth in scaling.growth(sweep):
            measured = growth.measured
            interval = f"{measured.low:.2f} to {measured.high:.2f}"
            rows.append(
                (*_what(sweep), places, growth.quantity, f"{measured.value:.2f}", interval, f"{growth.arithmetic:.2f}")
            )
    header = (*_WHAT, "points", "of", "exponent", "95 % interval", "arithmetic's")
    note = (
        "y grows as x to this power, by least squares of logarithms over the points of this report. The arithmetic's "
        "is fitted over the same points: of time the FLOP of the formulas, of memory what `moe3d plan` predicts. "
        "Neither is one power throughout, so the interval tells of that as well; of three points it is wide."
    )
    return Table("Growth with views and pixels", header, tuple(rows), len(_WHAT) + 2, note)


def takeovers(sweeps: Sequence[Sweep], models: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for sweep in sweeps:
        found = scaling.takeover(scaling.of_models(models, sweep.cases[0]), sweep)
        computed = f"beyond {MOST_VIEWS}" if found.computed is None else str(found.computed)
        measured = "beyond the sweep" if found.measured is None else text.number(found.measured, 3)
        rows.append((*_what(sweep), str(sweep.places[-1]), computed, measured))
    header = (*_WHAT, "most views of the sweep", "views, by FLOP", "views, by time")
    note = (
        "From so many views on global attention is half of a run: by FLOP its two products are half of all. By time "
        "the part that grows with the square of the views is, of a fit of b S + c S² to the medians."
    )
    return Table("Where global attention takes over", header, tuple(rows), len(_WHAT), note)


def _what(sweep: Sweep) -> tuple[str, ...]:
    case = sweep.cases[0]
    return case.model, case.backend, case.precision, sweep.axis, sweep.fixed
