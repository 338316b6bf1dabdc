"""Measure all cases, each in processes of its own, in turns; the report is on the disk after every one of them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moe3d_deploy.benchmarks.bench import plausible
from moe3d_deploy.benchmarks.bench.cases import Planned
from moe3d_deploy.benchmarks.bench.report import FAILED, IMPOSSIBLE, MEASURED, Case, Cases, Report, Round, Sections
from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.benchmarks.timing import Effort
from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.strict_fields import read

Measure = Callable[[dict[str, Any], Emit], dict[str, Any]]
Tell = Callable[[str, str], None]

_MOST_RUNS = 400  # of a process, however fast they are
_RUNS_OF_A_SWEEP = 3
_CHILD = "moe3d_deploy.benchmarks.bench.measure:measure_case"


@dataclass(frozen=True)
class Options:
    """How long to measure. `runs`, at the least, and `budget_seconds` are of a case, shared by its processes.

    pipeline_runs   of the whole way from files to files, in each process
    """

    runs: int = 12
    budget_seconds: float = 15.0
    processes: int = 3
    pipeline_runs: int = 2
    threads: int | None = None
    seed: int = 0

    @property
    def effort(self) -> Effort:
        """Of one process. The warm-up may take half as long as the runs."""
        budget_ms = 1e3 * self.budget_seconds / self.processes
        least = math.ceil(self.runs / self.processes)
        return Effort(least, max(least, _MOST_RUNS), budget_ms=budget_ms, warmup_budget_ms=budget_ms / 2)


def sweep_options(options: Options) -> Options:
    """Of a sweep, whose points need no interval: one process, few runs, nothing from files to files."""
    runs = min(_RUNS_OF_A_SWEEP, options.runs)
    budget = options.budget_seconds / options.processes
    return dataclasses.replace(options, runs=runs, budget_seconds=budget, processes=1, pipeline_runs=0)


def in_child(request: dict[str, Any], on_event: Emit) -> dict[str, Any]:
    """Measure one case in a process of its own; see `run_in_child` for what it raises."""
    return run_in_child(_CHILD, request, title="the case's process", on_event=on_event).value


def run_cases(
    planned: Sequence[Planned],
    options: Options,
    *,
    environment: dict[str, Any],
    measure: Measure = in_child,
    keep: Callable[[Report], None] = lambda report: None,
    tell: Tell = lambda label, text: None,
    workdir: Path | None = None,
) -> Report:
    """Measure and return the report.

    Every case gets its first process, then every case its second one, and so on: what drifts meets all alike. A case
    that fails in one, or whose figures are impossible, gets no more. One that this machine cannot run gets none.

    workdir   for files that a peer needs
    keep   gets the report after every process, marked as not complete, and the whole one at the end
    tell   gets (case, what is being done)

    What interrupts it (KeyboardInterrupt and the like) passes through, and `keep` has what was finished.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    cases: dict[int, Case] = {}

    recorded = dataclasses.asdict(options)
    if own := next((item.options for item in planned if item.options), None):
        recorded["scaling"] = dataclasses.asdict(own)

    def report(complete: bool) -> Report:
        # A peer may have left a head out: the config is the source's.
        ordered = sorted(planned, key=lambda item: not item.peer)
        models = {item.source.name: item.source.weights.to_dict() for item in ordered}
        section = Cases(models, recorded, tuple(cases[i] for i in sorted(cases)))
        return Report(complete, started, environment, Sections(section))

    for process in range(max([(item.options or options).processes for item in planned], default=0)):
        for i, item in enumerate(planned):
            own, before = item.options or options, cases.get(i)
            if process >= own.processes or (before and before.status != MEASURED):
                continue
            cases[i] = item.absent() if item.missing else _measured(item, before, process, own, measure, tell, workdir)
            keep(report(complete=False))
    whole = report(complete=True)
    keep(whole)
    return whole


def _measured(
    item: Planned,
    before: Case | None,
    process: int,
    options: Options,
    measure: Measure,
    tell: Tell,
    workdir: Path | None,
) -> Case:
    """The case with one process more."""
    label = item.label
    rounds, nodes = (before.rounds, before.nodes) if before else ((), None)

    def on_event(event: dict[str, Any]) -> None:
        tell(label, event["step"])

    try:
        values = dict(measure(_request(item, process, options, workdir), on_event))
    except (Moe3dError, OSError, ValueError) as error:  # a ValueError: killed while it was writing a line
        reason = reason_of(error)
        tell(label, reason)
        return item.case(rounds, status=FAILED, reason=reason, nodes=nodes)
    nodes = values.pop("nodes", nodes)
    case = item.case((*rounds, read(Round, as_json_has_it(values), "")), status=MEASURED, nodes=nodes)
    if found := tuple(plausible.findings(case.rounds[-1], case.work, case.weight_bytes)):
        case = dataclasses.replace(case, status=IMPOSSIBLE, reason=plausible.reason(found[0]), findings=found)
        tell(label, f"impossible: {case.reason}")
    return case


def _request(item: Planned, process: int, options: Options, workdir: Path | None) -> dict[str, Any]:
    return {
        "backend": item.source.backend,
        "source": item.source.source,
        "options": item.source.options,
        "shape": list(item.shape),
        "types": sorted(item.case(reason="not measured").work),
        "workdir": str(workdir) if workdir else None,
        "threads": options.threads,
        "seed": options.seed + process,
        "effort": dataclasses.asdict(options.effort),
        "pipeline_runs": options.pipeline_runs,
        "preprocessing": dataclasses.asdict(item.source.preprocessing),
    }


def as_json_has_it(values: Any) -> Any:
    """Tuples as the lists that JSON has."""
    if isinstance(values, dict):
        return {key: as_json_has_it(value) for key, value in values.items()}
    return [as_json_has_it(value) for value in values] if isinstance(values, (list, tuple)) else values


def reason_of(error: Exception) -> str:
    """Why something has no figure, in one line without paths of this machine."""
    return without_paths(" ".join(str(error).split())) or type(error).__name__
