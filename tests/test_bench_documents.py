"""The tables of the documents that come from a report of `moe3d bench`."""

import dataclasses
import json
from typing import Any

from bench_reports import a_case, a_report, a_round
from parities import a_cell, a_parity, a_variant
from test_bench_price import a_price, a_price_case

from moe3d_deploy.benchmarks.bench import documents
from moe3d_deploy.benchmarks.bench.report import Report, Sections


def values(report: Report) -> dict[str, Any]:
    """As a result file holds it."""
    return json.loads(report.to_json())


def test_peers_have_a_row_each_and_what_cannot_run_is_told() -> None:
    half = a_case([a_round((5.0, 5.0, 5.0))], precision="bf16")
    absent = a_case(precision="fp16", status="unavailable", reason="half is for GPUs", rounds=())
    found = documents.peers(values(a_report(a_case(), half, absent)))
    assert "## " not in found
    assert [line.split(" | ")[2] for line in found.splitlines() if line.startswith("| moe3d-tiny")] == ["fp32", "bf16"]
    assert found.endswith("Not run: pytorch fp16: half is for GPUs.")


def test_growth_has_an_exponent_per_axis_that_has_points() -> None:
    cases = [a_case([a_round((10.0 * views,) * 3)], (1, views, 196, 252)) for views in (1, 2, 4)]
    found = documents.growth(values(a_report(*cases)))
    assert "| views |" in found
    assert "| pixels |" not in found
    assert "1.00" in found
    assert documents.growth(values(a_report(a_case()))) == ""


def test_price_and_parity_have_their_tables_and_nothing_without_their_section() -> None:
    empty = a_report(a_case())
    price = dataclasses.replace(empty, sections=Sections(price=a_price(a_price_case())))
    assert documents.price(values(empty)) == documents.parity(values(empty)) == ""
    assert "| merged |" in documents.price(values(price))
    parity = a_parity(a_variant([a_cell(1e-4), a_cell(4e-4), a_cell(2e-4)]))
    found = documents.parity(values(dataclasses.replace(empty, sections=Sections(parity=parity))))
    assert "| 0.0004 |" in found
    assert "experts agree" in found
