"""Tables of a report for the documents, without their headings: what `tables` writes between markers."""

import json
from typing import Any

from moe3d_deploy.benchmarks.bench import peer_tables, scaling_tables
from moe3d_deploy.benchmarks.bench.report import Report
from moe3d_deploy.benchmarks.bench.text import Table


def peers(values: dict[str, Any]) -> str:
    """Every backend and form on the same shapes, side by side, and what could not run here."""
    report = _report(values)
    cases = report.sections.cases
    tables = peer_tables.tables(cases.cases, cases.models) if cases else []
    absent = [f"{case.backend} {case.precision}: {case.reason}" for case in report.cases if case.reason]
    return "\n\n".join([*map(_without_title, tables), *(["Not run: " + "; ".join(absent) + "."] if absent else [])])


def growth(values: dict[str, Any]) -> str:
    """Exponents against views and pixels, and where global attention takes over."""
    cases = _report(values).sections.cases
    return "\n\n".join(map(_without_title, scaling_tables.tables(cases.cases, cases.models) if cases else []))


def _report(values: dict[str, Any]) -> Report:
    return Report.from_json(json.dumps(values).encode(), "the results of moe3d bench")


def _without_title(table: Table) -> str:
    return table.markdown().partition("\n\n")[2]
