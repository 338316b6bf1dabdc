"""The section `price` as tables: what the experts add, in time and in memory, and what could not be measured."""

import math
import statistics

from moe3d_deploy.benchmarks.bench import price_figures, text
from moe3d_deploy.benchmarks.bench.price import BUNDLE, FAILED, MEASURED, SINGLE, Price, PriceCase
from moe3d_deploy.benchmarks.bench.price_figures import PAPER_TIME_SHARE, Estimate, Overhead
from moe3d_deploy.benchmarks.bench.text import ABSENT, Table

_WHAT = ("backend", "precision", "measured", "experts", "shape BxSxHxW")
_WORDS = len(_WHAT)
_UNBOUNDED = 1e6  # an interval that is wider says that nothing is known


def tables(price: Price) -> list[Table]:
    """All of them, without those that would be empty."""
    found = [overheads(price), totals(price), memory(price), absent(price)]
    return [table for table in found if table.rows]


def overheads(price: Price) -> Table:
    rows = tuple(_overhead(item) for item in price_figures.overheads(price.cases))
    header = (
        *_WHAT, "form", "single", "with experts", "ratio of pairs", "added", "whole model", "time share", "FLOP share",
        "price", "goal", "",
    )  # fmt: skip
    note = (
        "VGGT's single head against each form of MoE3D's, on the same weights and the same inputs, in turns within one "
        "process. single, with experts: medians of the part that was measured, head (patch tokens to depth) or model "
        "(images to everything). Ratio: of the two times of every turn, with its 95 % interval, in which neighbouring "
        "runs and processes are not independent. Added: (ratio - 1) x single. Whole model: with VGGT's head, measured "
        "in the same backend on the same shape; without it (head only) there is no share. Time share: added over whole "
        "model. FLOP share: of the arithmetic alone. Price: time share over FLOP share; the goal is at most "
        f'{price_figures.GOALS["cuda"]} on a GPU and {price_figures.GOALS["cpu"]} on a CPU, "not beyond noise" where '
        f"the interval holds the goal. MoE3D's paper gives about {100 * PAPER_TIME_SHARE:.0f} % more time and names "
        f"neither hardware nor resolution nor the number of experts. {_weights_note(price)}"
    )
    return Table("Price of the experts", header, rows, _WORDS + 1, note.strip())


def totals(price: Price) -> Table:
    """The bundles whose time is a total."""
    rows = []
    for case in price.cases:
        if case.part == BUNDLE and case.status == MEASURED:
            (form,) = case.forms
            times = [value for item in case.rounds for value in item.series[form]]
            rows.append((*_what(case), form, text.milliseconds(statistics.median(times)), str(len(times))))
    note = "The whole model of the table above is this, without what the bundle's own form of the head adds."
    return Table("Bundles as totals", (*_WHAT, "form", "median", "runs"), tuple(rows), _WORDS + 1, note)


def memory(price: Price) -> Table:
    rows = []
    for case in price.cases:
        if case.part == BUNDLE or case.status != MEASURED:
            continue
        used = {form: _bytes(case, form) for form in case.forms}
        single = used[SINGLE]
        for form in case.forms:
            if form != SINGLE:
                of_form = used[form]
                added = None if of_form is None or single is None else of_form - single
                by = case.rounds[0].activations_by
                rows.append((*_what(case), form, *map(text.size, (single, of_form, added)), by))
    header = (*_WHAT, "form", "single", "with experts", "added", "counted by")
    note = (
        "The most that one run needs beside weights and inputs. In PyTorch of all tensors alive at once, by its "
        "allocator; in ONNX Runtime what the first run of the form added that is of no file, workspaces included."
    )
    return Table("Memory of the forms", header, tuple(rows), _WORDS + 1, note)


def absent(price: Price) -> Table:
    """Cases that failed, and forms that do not run here."""
    rows = [(*_what(case), "all", case.reason or "") for case in price.cases if case.status == FAILED]
    reasons: dict[tuple[str, str, str], list[PriceCase]] = {}
    for case in price.cases:
        for form, reason in case.missing.items():
            reasons.setdefault((case.backend, form, reason), []).append(case)
    for (backend, form, reason), cases in reasons.items():
        counts = ", ".join(str(count) for count in sorted({case.num_experts for case in cases}))
        rows.append((backend, cases[0].precision, "all", counts, "all", form, reason))
    return Table("Forms without a figure", (*_WHAT, "form", "reason"), tuple(rows), _WORDS + 2)


def interval(found: Estimate | None, percent: bool = False) -> str:
    """ "2.31 % [2.10, 2.50]"; without an interval where it has no end."""
    if found is None:
        return ABSENT
    values = [100 * value if percent else value for value in found]
    unit = " %" if percent else ""
    if not math.isfinite(found.high) or found.high > _UNBOUNDED:
        return f"{values[0]:.2f}{unit} [too few runs]"
    return f"{values[0]:.2f}{unit} [{values[1]:.2f}, {values[2]:.2f}]"


def _overhead(item: Overhead) -> tuple[str, ...]:
    case = item.case
    verdict = ABSENT
    if item.reached is not None:
        verdict = ("reached" if item.reached else "not reached") + ("" if item.sure else ", not beyond noise")
    if not all(found.stable for found in case.rounds):
        verdict += "; not stable"
    ratio = (
        f"{item.ratio.ratio:.4f} [{item.ratio.low:.4f}, {item.ratio.high:.4f}]" if item.ratio.bounded
        else f"{item.ratio.ratio:.4f} [too few runs]"
    )  # fmt: skip
    return (
        *_what(case),
        item.form,
        text.milliseconds(item.single_ms),
        text.milliseconds(item.form_ms),
        ratio,
        _signed_milliseconds(item.added_ms.value),
        text.milliseconds(item.total_ms) if item.total_ms else "head only",
        interval(item.time_share, percent=True),
        f"{item.flop_share:.2%}".replace("%", " %"),
        interval(item.price),
        f"{item.goal:g}",
        verdict,
    )


def _signed_milliseconds(value: float) -> str:
    return text.milliseconds(value) if value >= 0 else f"-{text.milliseconds(-value)}"


def _what(case: PriceCase) -> tuple[str, ...]:
    return (case.backend, case.precision, case.part, str(case.num_experts), text.shape(case.shape))


def _bytes(case: PriceCase, form: str) -> int | None:
    """The most of all processes."""
    found = [item.activations_bytes[form] for item in case.rounds]
    return max((value for value in found if value is not None), default=None)


def _weights_note(price: Price) -> str:
    counts = sorted({case.num_experts for case in price.cases if case.seeded_weights})
    if not counts:
        return ""
    return (
        f"With {' and '.join(map(str, counts))} experts, weights of the last stage that the checkpoint does not have "
        "are random: the arithmetic is the same."
    )
