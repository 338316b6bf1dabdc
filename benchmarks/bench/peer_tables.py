"""Backends and forms of one model on one shape, side by side: time, loading, nodes, memory, against two of them."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe3d_deploy.benchmarks.bench import figures, text
from moe3d_deploy.benchmarks.bench.bootstrap import ratio_of_medians
from moe3d_deploy.benchmarks.bench.report import MEASURED, WHOLE, Case
from moe3d_deploy.benchmarks.bench.text import ABSENT, Table

_EAGER, _WIDESPREAD = ("pytorch", "fp32"), ("onnxruntime-widespread", "fp32")


def tables(cases: Sequence[Case], models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Empty where no model was measured in two forms on one shape."""
    groups: dict[tuple[str, tuple[int, ...]], list[Case]] = {}
    for case in cases:
        if case.status == MEASURED:
            groups.setdefault((_identity(models[case.model]), case.shape), []).append(case)
    compared = [group for group in groups.values() if len(group) > 1]
    rows = [row for group in compared for row in _rows(group)]
    if not rows:
        return []
    header = (
        "model", "backend", "precision", "shape BxSxHxW", "p50", "over eager float32", "over widespread export",
        "load", "first run", "nodes", "peak memory",
    )  # fmt: skip
    note = (
        "One model on one shape, in one run and in turns. Over: the time over that of PyTorch eager in float32, and "
        "over that of the widespread form of export (one size, everything decomposed, float32, ONNX Runtime's "
        "defaults), each the ratio of the medians with its 95 % interval; without one where a side has a single "
        "process. Load: a bundle's with the check of its digests. First run: with torch.compile it compiles, and is no "
        f"part of p50. Peak memory of the device where the model is on one.{_unsettled(itertools.chain(*compared))}"
    )
    return [Table("Beside what else runs it", header, tuple(rows), 4, note)]


def _unsettled(cases: Iterable[Case]) -> str:
    """A sentence on the cases whose times had not settled when the warm-up's budget was used."""
    found = [case for case in cases if not all(item.stable for item in case.rounds)]
    if not found:
        return ""
    which = ", ".join(dict.fromkeys(f"{case.backend} {case.precision}" for case in found))
    return f" Not stable, the times had not settled when the warm-up's budget was used: {which}."


def _rows(group: Sequence[Case]) -> list[tuple[str, ...]]:
    base = {(case.backend, case.precision): case for case in group}
    rows: list[tuple[str, ...]] = []
    for case in group:
        use = figures.memory_use(case)
        rows.append(
            (
                case.model,
                case.backend,
                case.precision,
                text.shape(case.shape),
                text.milliseconds(figures.latency(case).p50),
                _over(base.get(_EAGER), case),
                _over(base.get(_WIDESPREAD), case),
                text.seconds(max(item.load_seconds for item in case.rounds)),
                _first_run(case),
                ABSENT if case.nodes is None else f"{case.nodes:,}",
                text.size(use.driver_bytes or use.peak_bytes),
            )
        )
    return rows


def _over(base: Case | None, case: Case) -> str:
    if base is None or base is case:
        return ABSENT if base is None else "1"
    found = ratio_of_medians(*([item.series[WHOLE] for item in side.rounds] for side in (base, case)))
    if found.beyond_noise is None:
        return f"{found.ratio:.2f}"
    return f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _first_run(case: Case) -> str:
    known = [item.first_run_seconds for item in case.rounds if item.first_run_seconds is not None]
    return text.seconds(max(known)) if known else ABSENT


def _identity(config: Mapping[str, Any]) -> str:
    """The same for a checkpoint and for a bundle of it, which may have left the point head out."""
    return json.dumps({key: value for key, value in config.items() if key != "point_head"}, sort_keys=True)
