"""Whether a time can be true: a model does a known amount of work, and the machine's rates were measured beside it."""

import statistics
from collections.abc import Iterator, Mapping

from moe3d_deploy.benchmarks.bench.report import WHOLE, Finding, Round

_CACHE_BYTES = 1280 << 20  # more than the largest cache of a processor, 1,152 MB
_SHORTEST_SECONDS = 1e-9  # a run of no time at all still has a rate that can be written down


def findings(item: Round, work: Mapping[str, int], weight_bytes: int) -> Iterator[Finding]:
    """What beats a ceiling, by the medians of the model's stage and of the whole run.

    work           FLOP of a run by the type that computes them
    weight_bytes   read at least once in a run

    "compute": all FLOP over the time, against the same work at the measured rates. "memory": the weights over the time,
    against a copy's rate, which counts a byte that is read and one that is written as two; only where the weights are
    more than what stays in a processor's caches from run to run.
    """
    ceilings, total = item.ceilings, sum(work.values())
    least = sum(count / ceilings.flops_per_second[kind].best for kind, count in work.items())
    for stage in ("model", WHOLE):
        if stage not in item.series:
            continue
        seconds = statistics.median(item.series[stage]) / 1e3
        if seconds < least:
            yield Finding(stage, "compute", _rate(total, seconds), total / least)
        if seconds * ceilings.copy_bytes_per_second < weight_bytes and weight_bytes > _CACHE_BYTES:
            yield Finding(stage, "memory", _rate(weight_bytes, seconds), ceilings.copy_bytes_per_second)


def reason(found: Finding) -> str:
    """The finding as a sentence."""
    if found.kind == "compute":
        return (
            f"{found.stage}: {found.reached / 1e9:,.1f} GFLOP/s, and the fastest product or convolution here reached "
            f"{found.ceiling / 1e9:,.1f}: the time is wrong"
        )
    return (
        f"{found.stage}: weights at {found.reached / 1e9:,.1f} GB/s, and the fastest copy here reached "
        f"{found.ceiling / 1e9:,.1f}: the time is wrong"
    )


def _rate(amount: int, seconds: float) -> float:
    return amount / max(seconds, _SHORTEST_SECONDS)
