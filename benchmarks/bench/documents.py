"""Tables of a report for the documents, without their headings: what `tables` writes between markers."""

import json
from typing import Any

from moe3d_deploy.benchmarks.bench import parity_tables, peer_tables, price_tables, scaling_tables
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


def price(values: dict[str, Any]) -> str:
    """What the experts add in time and in memory, and which forms had no figure."""
    found = _report(values).sections.price
    return "\n\n".join(map(_without_title, price_tables.tables(found) if found else []))


def parity(values: dict[str, Any]) -> str:
    """How far every variant is from the reference, over all shapes."""
    found = _report(values).sections.parity
    tables = [parity_tables.summary(found), parity_tables.scenes(found)] if found else []
    return "\n\n".join(map(_without_title, tables))


def _report(values: dict[str, Any]) -> Report:
    return Report.from_json(json.dumps(values).encode(), "the results of moe3d bench")


def _without_title(table: Table) -> str:
    return table.markdown().partition("\n\n")[2]
