"""What the experts add to the whole model's time, as bars with their intervals, beside the arithmetic and the paper."""

from collections.abc import Sequence
from typing import Any

from moe3d_deploy.benchmarks.bench.plots import COLOURS, INK, finish, svg
from moe3d_deploy.benchmarks.bench.price import FORMS, SINGLE, Price
from moe3d_deploy.benchmarks.bench.price_figures import PAPER_TIME_SHARE, Overhead, overheads

_BAR_INCHES = 0.24
_LEAST_INCHES = 2.0
_WIDEST = 3  # times the longest bar: an interval beyond it is cut


def plots(price: Price) -> dict[str, str]:
    """SVG by file name; empty where no whole model was measured."""
    items = [item for item in overheads(price.cases) if item.time_share is not None]
    if not items:
        return {}
    height = max(_LEAST_INCHES, 1 + _BAR_INCHES * len(items))
    return {"overhead.svg": svg(_draw, items, height=height)}


def _draw(axes: Any, items: Sequence[Overhead]) -> None:
    places = list(range(len(items)))
    shares = [item.time_share for item in items if item.time_share is not None]
    limit = 100 * _WIDEST * max(*(abs(share.value) for share in shares), PAPER_TIME_SHARE)
    for form, colour in zip([form for form in FORMS if form != SINGLE], COLOURS, strict=False):
        of_form = [
            (place, share) for place, item, share in zip(places, items, shares, strict=True) if item.form == form
        ]
        if not of_form:
            continue
        values = [100 * share.value for _, share in of_form]
        below = [value - max(-limit, 100 * share.low) for value, (_, share) in zip(values, of_form, strict=True)]
        above = [min(limit, 100 * share.high) - value for value, (_, share) in zip(values, of_form, strict=True)]
        bars = {"color": colour, "alpha": 0.8, "height": 0.7, "label": form}
        errors = {"ecolor": INK, "capsize": 2, "elinewidth": 1}
        axes.barh([place for place, _ in of_form], values, xerr=[below, above], error_kw=errors, **bars)
    arithmetic = [100 * item.flop_share for item in items]
    axes.plot(arithmetic, places, color=INK, marker="D", markersize=4, linestyle="none", label="share of the FLOP")
    axes.axvline(
        100 * PAPER_TIME_SHARE,
        color=INK,
        linestyle=":",
        linewidth=1,
        label="MoE3D's paper, hardware and resolution unknown",
    )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(places, [_label(item) for item in items], fontsize="small")
    axes.invert_yaxis()
    axes.set_title("What the experts add to the whole model's time, %", loc="right")
    finish(axes)


def _label(item: Overhead) -> str:
    case = item.case
    return f"{case.backend}, {case.part}, K = {case.num_experts}, {'x'.join(map(str, case.shape))}"
