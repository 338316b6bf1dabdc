"""What follows from a case's raw figures: percentiles, throughput, rates, ratios. Everything that a report shows."""

import statistics
from dataclasses import dataclass

from moe3d_deploy.benchmarks.bench.ceilings import best
from moe3d_deploy.benchmarks.bench.report import PIPELINE_WHOLE, WHOLE, Case, Ceilings, Round
from moe3d_deploy.benchmarks.timing import per_second, percentiles

RUN_STAGES = ("upload", "model", "download", WHOLE)
PIPELINE_STAGES = ("decode", "preprocess", WHOLE, "post", PIPELINE_WHOLE)


@dataclass(frozen=True)
class Latency:
    """Of all runs of all processes, milliseconds of WHOLE; `medians_ms` has one for every process.

    scenes_per_second, views_per_second   over all of the runs' time
    """

    p50: float
    p90: float
    p99: float
    runs: int
    medians_ms: tuple[float, ...]
    stable: bool
    scenes_per_second: float
    views_per_second: float


@dataclass(frozen=True)
class MemoryUse:
    """Bytes, of the process that took the most. `other_bytes`: the peak of the runs, or the peak, beside weights and
    activations; negative where part of the weights' file was not in memory. Ratios are measured over predicted."""

    peak_bytes: int
    weights_bytes: int
    activations_bytes: int | None
    other_bytes: int
    driver_bytes: int | None
    predicted_bytes: int
    peak_ratio: float
    weights_ratio: float
    activations_ratio: float | None
    activations_by: str | None


def latency(case: Case) -> Latency:
    """Of a case that has rounds."""
    times, (batch, views) = case.pooled(), case.shape[:2]
    return Latency(
        **percentiles(times),
        runs=len(times),
        medians_ms=tuple(statistics.median(item.series[WHOLE]) for item in case.rounds),
        stable=all(item.stable for item in case.rounds),
        scenes_per_second=per_second(batch, times),
        views_per_second=per_second(batch * views, times),
    )


def stages(case: Case) -> dict[str, float | None]:
    """Medians in milliseconds of every stage of a run and of the whole way; None for those that were not measured."""
    found: dict[str, float | None] = {}
    for name in ("decode", "preprocess", "post", PIPELINE_WHOLE):
        found[name] = _median([item.pipeline[name] for item in case.rounds if item.pipeline])
    for name in RUN_STAGES:
        found[name] = _median([item.series[name] for item in case.rounds if name in item.series])
    order = ("decode", "preprocess", *RUN_STAGES, "post", PIPELINE_WHOLE)
    return {name: found[name] for name in order}


def memory_use(case: Case) -> MemoryUse:
    """Of a case that has rounds."""
    worst = max((item.memory for item in case.rounds), key=lambda memory: memory.peak_bytes)
    activations, predicted = worst.activations_bytes, case.predicted
    total = worst.peak_bytes if worst.run_peak_bytes is None else worst.run_peak_bytes
    driver = [item.memory.device.driver_bytes for item in case.rounds if item.memory.device]
    if driver:  # the model is there, and what the host holds is not its matter
        total = max(driver)
    expected = predicted.weights_bytes + predicted.activations_bytes
    return MemoryUse(
        peak_bytes=worst.peak_bytes,
        weights_bytes=worst.weights_bytes,
        activations_bytes=activations,
        other_bytes=total - worst.weights_bytes - (activations or 0),
        driver_bytes=max(driver, default=None),
        predicted_bytes=expected,
        peak_ratio=(max(driver) if driver else worst.peak_bytes) / expected,
        weights_ratio=worst.weights_bytes / predicted.weights_bytes,
        activations_ratio=None if activations is None else activations / predicted.activations_bytes,
        activations_by=worst.activations_by,
    )


def ceilings(rounds: tuple[Round, ...]) -> Ceilings:
    """The best that any of the processes reached."""
    found = rounds[0].ceilings
    for item in rounds[1:]:
        found = best(found, item.ceilings)
    return found


def reached_flops(case: Case) -> float:
    """FLOP/s at the median of WHOLE."""
    return 1e3 * sum(case.work.values()) / max(latency(case).p50, 1e-6)


def flops_ceiling(case: Case) -> float:
    """FLOP/s of the case's mix of types at the rates measured beside it."""
    rates = ceilings(case.rounds).flops_per_second
    return sum(case.work.values()) / sum(count / rates[kind].best for kind, count in case.work.items())


def intensity(case: Case) -> float:
    """FLOP for every byte that has to move at the least."""
    return sum(case.work.values()) / case.traffic_bytes


def _median(series: list[tuple[float, ...]]) -> float | None:
    return statistics.median([value for times in series for value in times]) if series else None
