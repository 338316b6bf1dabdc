"""Two reports against each other: what became slower or faster beyond noise, case by case."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moe3d_deploy.benchmarks.bench.bootstrap import RatioInterval, ratio_of_medians
from moe3d_deploy.benchmarks.bench.figures import memory_use
from moe3d_deploy.benchmarks.bench.report import MEASURED, WHOLE, Case, Report
from moe3d_deploy.errors import InputError

_OF_MACHINE = ("cpu", "memory_bytes", "gpus", "driver", "system", "python", "packages")
_ABSENT = "none"


class Change(NamedTuple):
    """One case in both reports. `latency` of WHOLE; `peak` is the second's peak memory over the first's."""

    label: str
    latency: RatioInterval
    peak: float
    processes: tuple[int, int]


class Comparison(NamedTuple):
    """`unmatched`: a line for every case that one of the reports lacks or has no figure of."""

    changes: list[Change]
    unmatched: list[str]
    differences: list[str]


def compare(first: Report, second: Report, *, anyway: bool = False) -> Comparison:
    """Every case that both have measured.

    Raises InputError where machine, versions, threads or models differ, unless `anyway` (then they are told), and where
    no case is in both.
    """
    found = list(differences(first, second))
    if found and not anyway:
        raise InputError(f"the reports are not of one setting: {'; '.join(found)}; compare them nevertheless: --anyway")
    pairs, unmatched = _pairs(first, second)
    if not pairs:
        raise InputError("the reports have no measured case in common; measure the same models, backends and shapes")
    changes = []
    for a, b in pairs:
        latency = ratio_of_medians(*([item.series[WHOLE] for item in case.rounds] for case in (a, b)))
        peaks = [memory_use(case).peak_bytes for case in (a, b)]
        changes.append(Change(a.label, latency, peaks[1] / max(peaks[0], 1), (len(a.rounds), len(b.rounds))))
    return Comparison(changes, unmatched, found)


def differences(first: Report, second: Report) -> Iterator[str]:
    """What makes two reports incomparable, a line each: machine, versions, configs and threads. Not the revision: that
    is what a comparison is about."""
    for key in _OF_MACHINE:
        yield from _differing(key, first.environment.get(key), second.environment.get(key))
    models = [report.sections.cases.models if report.sections.cases else {} for report in (first, second)]
    for name in models[0].keys() & models[1].keys():
        if models[0][name] != models[1][name]:
            yield f"config of {name} differs"
    for a, b in _pairs(first, second)[0]:
        for what in ("threads", "device", "cuda_graph"):
            values = [sorted({str(getattr(item, what)) for item in case.rounds}) for case in (a, b)]
            if values[0] != values[1]:
                yield f"{what} of {a.label}: {', '.join(values[0])} and {', '.join(values[1])}"


def lines(comparison: Comparison) -> Iterator[str]:
    """For people."""
    for difference in comparison.differences:
        yield f"not equal: {difference}"
    width = max(len(change.label) for change in comparison.changes)
    for change in comparison.changes:
        peak = f"peak memory {100 * (change.peak - 1):+.0f} %"
        yield f"{change.label:{width}}  {change.latency}  {peak}"
    yield from comparison.unmatched
    if any(min(change.processes) == 1 for change in comparison.changes):
        yield (
            "One process on a side: how much processes differ from each other is not in the interval; measure with "
            "--processes 3 or more"
        )


def as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "changes": [
            {
                "case": change.label,
                "ratio": change.latency.ratio,
                "interval": [change.latency.low, change.latency.high],
                "beyond_noise": change.latency.beyond_noise,
                "peak_memory_ratio": change.peak,
                "processes": list(change.processes),
            }
            for change in comparison.changes
        ],
        "unmatched": comparison.unmatched,
        "differences": comparison.differences,
    }


def _pairs(first: Report, second: Report) -> tuple[list[tuple[Case, Case]], list[str]]:
    """Cases of the same label that both have measured, and lines on the others."""
    cases = [{case.label: case for case in report.cases} for report in (first, second)]
    pairs, lacking = [], []
    for label in dict.fromkeys([*cases[0], *cases[1]]):
        a, b = cases[0].get(label), cases[1].get(label)
        if a and b and a.status == b.status == MEASURED:
            pairs.append((a, b))
            continue
        states = [case.status if case else "absent" for case in (a, b)]
        lacking.append(f"{label}: {states[0]} in the first report, {states[1]} in the second")
    return pairs, lacking


def _differing(key: str, first: Any, second: Any) -> Iterator[str]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for name in dict.fromkeys([*first, *second]):
            yield from _differing(f"{key} {name}", first.get(name), second.get(name))
    elif first != second:
        yield f"{key} {_ABSENT if first is None else first} and {_ABSENT if second is None else second}"
