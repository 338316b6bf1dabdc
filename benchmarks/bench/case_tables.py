"""The section `cases` as tables: latency, stages, memory, ceilings, the machine's state."""

from collections.abc import Sequence
from typing import Any

from moe3d_deploy.benchmarks.bench import figures, text
from moe3d_deploy.benchmarks.bench.report import MEASURED, Case
from moe3d_deploy.benchmarks.bench.text import ABSENT, Table

_WHAT = ("model", "backend", "precision", "shape BxSxHxW")
_WORDS = len(_WHAT)


def tables(cases: Sequence[Case]) -> list[Table]:
    """All of them, without those that would be empty."""
    measured = [case for case in cases if case.status == MEASURED]
    ran = [case for case in cases if case.rounds]
    found = [latency(cases), troubles(cases)]
    found += [stages(measured), memory(measured)] if measured else []
    found += [ceilings(ran), conditions(ran)] if ran else []
    return [table for table in found if table.rows]


def latency(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        if case.status != MEASURED:
            rows.append((*_what(case), *[ABSENT] * 7, case.status))
            continue
        found = figures.latency(case)
        medians = " ".join(text.number(value, 3) for value in found.medians_ms)
        percentiles = (found.p50, found.p90, found.p99)
        rows.append(
            (
                *_what(case),
                *map(text.milliseconds, percentiles),
                text.number(found.scenes_per_second, 3),
                text.number(found.views_per_second, 3),
                str(found.runs),
                medians,
                "" if found.stable else "not stable",
            )
        )
    header = (*_WHAT, "p50", "p90", "p99", "scenes/s", "views/s", "runs", "medians of the processes, ms", "")
    note = (
        "Images in host memory to outputs in host memory; new random images in every run. Of fewer than a hundred runs "
        "p99 is little more than the slowest. Not stable: the times had not settled when the warm-up's budget was used."
    )
    return Table("Latency", header, tuple(rows), _WORDS, note)


def troubles(cases: Sequence[Case]) -> Table:
    rows = [(*_what(case), case.status, case.reason or "") for case in cases if case.status != MEASURED]
    return Table("Cases without a figure to use", (*_WHAT, "status", "reason"), tuple(rows), _WORDS + 2)


def stages(cases: Sequence[Case]) -> Table:
    rows = tuple((*_what(case), *map(text.milliseconds, figures.stages(case).values())) for case in cases)
    photographs = sorted({item.photographs for case in cases for item in case.rounds if item.photographs})
    note = "Medians. inference is upload, model and download; whole is from image files to the files of `moe3d run`"
    note += f" ({'; '.join(photographs)}). " if photographs else ". "
    note += f"{ABSENT}: the backend has no such stage, or no photograph becomes a view of this shape."
    return Table("Stages", (*_WHAT, *figures.stages(cases[0])), rows, _WORDS, note)


def memory(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        use = figures.memory_use(case)
        rows.append(
            (
                *_what(case),
                text.size(use.peak_bytes),
                text.size(use.driver_bytes),
                text.size(use.weights_bytes),
                text.size(use.activations_bytes),
                text.size(use.other_bytes),
                text.size(use.predicted_bytes),
                text.ratio(use.peak_ratio),
                text.ratio(use.weights_ratio),
                text.ratio(use.activations_ratio),
            )
        )
    header = (
        "peak, host", "device, driver", "weights", "activations", "other", "predicted peak",
        "peak / predicted", "weights / predicted", "activations / predicted",
    )  # fmt: skip
    note = (
        "Beside what the process held before it loaded the model. Activations: in PyTorch by its allocator; in ONNX "
        "Runtime what the first run added that is of no file, workspaces included. Other is the runs' peak without "
        "weights and activations. Predicted by `moe3d plan`, which counts tensors alone."
    )
    return Table("Memory", (*_WHAT, *header), tuple(rows), _WORDS, note)


def ceilings(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        found = figures.ceilings(case.rounds)
        reached = figures.reached_flops(case)
        of_all = (text.rate(reached, "FLOP"), f"{text.number(100 * reached / figures.flops_ceiling(case), 2)} %")
        for index, (kind, work) in enumerate(case.work.items()):
            rates = found.flops_per_second[kind]
            rows.append(
                (
                    *_what(case),
                    text.rate(found.copy_bytes_per_second, "B"),
                    text.rate(rates.matmul, "FLOP"),
                    text.rate(rates.convolution, "FLOP") if rates.convolution else text.ABSENT,
                    kind,
                    text.number(work / 1e9),
                    *(of_all if index == 0 else (text.ABSENT, text.ABSENT)),
                )
            )
    header = (*_WHAT, "copy", "matmul", "convolution", "type", "GFLOP of a run", "reached", "of the ceiling")
    note = (
        "The fastest run of each, in the library and the processes that ran the model. Read and written bytes count. A "
        "row for every type that computes; what was reached is of all of them together."
    )
    return Table("Ceilings", header, tuple(rows), _WORDS, note)


def conditions(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        states = [state for item in case.rounds for state in (item.before, item.after)]
        first = case.rounds[0]
        rows.append(
            (
                *_what(case),
                first.device,
                str(first.threads),
                "on" if first.cuda_graph else "off",
                _range([item.cores_used for item in case.rounds]),
                _range([item.load_seconds for item in case.rounds]),
                _range([(state.get("load_average") or [None])[0] for state in states]),
                _range([state.get("cpu_mhz") for state in states]),
                ", ".join(sorted({str(state.get("governor") or ABSENT) for state in states})),
                _range([state.get("cpu_celsius") for state in states]),
                _range([(state.get("gpu") or {}).get("sm_mhz") for state in states]),
                _range([(state.get("gpu") or {}).get("celsius") for state in states]),
            )
        )
    header = (
        "device", "threads", "CUDA graph", "cores used", "load, s", "load average", "CPU MHz", "governor", "CPU °C",
        "GPU MHz", "GPU °C",
    )  # fmt: skip
    note = (
        f"Lowest..highest, before and after the runs of every process; {ABSENT} cannot be read here. Cores used below "
        "the threads: something else had the processor, or part of the run is not parallel."
    )
    return Table("Conditions", (*_WHAT, *header), tuple(rows), _WORDS, note)


def _what(case: Case) -> tuple[str, str, str, str]:
    return case.model, case.backend, case.precision, text.shape(case.shape)


def _range(values: Sequence[Any]) -> str:
    known = [float(value) for value in values if value is not None]
    if not known:
        return ABSENT
    low, high = text.number(min(known), 3), text.number(max(known), 3)
    return low if low == high else f"{low}..{high}"
