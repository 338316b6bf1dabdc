"""What one `moe3d bench` measures, part after part, into one report that is on the disk after every finished step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe3d_deploy.cli.progress import Progress

if TYPE_CHECKING:
    from moe3d_deploy.benchmarks.bench.report import Report


class Part(Protocol):
    """Something that is measured, and fills one section of the report.

    name   of the part in messages
    """

    name: str

    def run(self, report: Report, keep: Callable[[Report], None], progress: Progress) -> Report:
        """Measure; `report` with this part's section filled.

        keep   wants the report after every finished step. Whatever `Report.complete` says, it is kept as incomplete

        What cannot be measured is an entry of the section with its reason. What raises ends the command, and what was
        kept stays on the disk.
        """


def measure_parts(parts: Sequence[Part], out: Path | None) -> Report:
    """Run the parts in their order; `complete` only when all of them are done.

    out   a folder: report.json is written there after every step, and all files of the report however this ends

    Raises what a part raises, KeyboardInterrupt among it, and MissingExtraError or OSError before anything is measured.
    """
    from moe3d_deploy.benchmarks.bench.folder import require_plots, write_data, write_report
    from moe3d_deploy.benchmarks.bench.report import Report, Sections
    from moe3d_deploy.benchmarks.environment import environment

    if out:
        require_plots()
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before it takes minutes
    progress = Progress()
    latest: list[Report] = []

    def keep(report: Report) -> None:
        latest[:] = [dataclasses.replace(report, complete=False)]
        if out:
            write_data(latest[0], out)

    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = Report(False, started, environment(), Sections())
    try:
        for part in parts:
            report = part.run(report, keep, progress)
            keep(report)
        report = dataclasses.replace(report, complete=True)
        latest[:] = [report]
        return report
    finally:
        if out and latest:
            write_report(latest[0], out)
