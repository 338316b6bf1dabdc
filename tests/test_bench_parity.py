"""The section `parity` of a report: what follows from its figures, its tables, its plot, its JSON."""

import dataclasses
import json
import math
from typing import Any
from xml.etree import ElementTree

import pytest
from bench_reports import a_case, a_report
from parities import SHAPES, a_cell, a_parity, a_variant

from moe3d_deploy.benchmarks.bench import parity_plot, parity_tables
from moe3d_deploy.benchmarks.bench.folder import all_tables, files
from moe3d_deploy.benchmarks.bench.parity import (
    FAILED,
    LEFT_OUT,
    NOT_RUN,
    Cell,
    Parity,
    error_of,
    faults,
    keeps_limits,
    spread,
)
from moe3d_deploy.benchmarks.bench.report import Report, Sections
from moe3d_deploy.errors import InputError

DEPTH_MAX = error_of("depth", "max")


def a_report_of(parity: Parity) -> Report:
    return dataclasses.replace(a_report(), sections=Sections(parity=parity))


def varied() -> Parity:
    """Sound, beyond its limits, left out at a shape, failed at one, not run."""
    return a_parity(
        a_variant([a_cell(1e-4), a_cell(4e-4), a_cell(2e-4)]),
        a_variant([a_cell(1e-4), a_cell(0.02), a_cell(None)], name="wrong"),
        a_variant([a_cell(1e-4), Cell(LEFT_OUT, "not in the bundle's range", None), a_cell(0.0)], name="static"),
        a_variant([a_cell(1e-4), Cell(FAILED, "ran out of memory", None), a_cell(0.0)], name="large"),
        a_variant([], name="engine.plan", backend="tensorrt", device=None, status=NOT_RUN, reason="no NVIDIA GPU"),
    )


def test_the_worst_shape_is_named_and_the_median_is_of_all() -> None:
    parity = varied()
    assert spread(parity, parity.variants[0], DEPTH_MAX) == (4e-4, SHAPES[1], 2e-4)
    assert spread(parity, parity.variants[2], DEPTH_MAX) == (1e-4, SHAPES[0], 5e-5)  # of the two that were compared
    assert spread(parity, parity.variants[0], lambda found: found.boundary_f1, lowest=True) == (1.0, SHAPES[0], 1.0)
    assert spread(parity, parity.variants[4], DEPTH_MAX) is None


def test_the_lowest_score_is_the_worst() -> None:
    parity = a_parity(a_variant([a_cell(0.0), a_cell(0.0, boundary_f1=0.9), a_cell(0.0, boundary_f1=None)]))
    assert spread(parity, parity.variants[0], lambda found: found.boundary_f1, lowest=True) == (0.9, SHAPES[1], 0.95)


def test_a_value_that_is_not_finite_is_the_worst_and_leaves_the_limits() -> None:
    parity = varied()
    found = spread(parity, parity.variants[1], DEPTH_MAX)
    assert found == (math.inf, SHAPES[2], 0.02)
    assert faults(parity, parity.variants[1]) == [
        (SHAPES[1], "depth is off by 0.02 (max relative), the limit is 0.01"),
        (SHAPES[2], "depth is off by inf (max relative), the limit is 0.01"),
    ]


def test_a_mean_beyond_its_limit_is_a_fault_too() -> None:
    parity = a_parity(a_variant([a_cell(5e-3, mean=1.1e-3)]))
    assert faults(parity, parity.variants[0]) == [
        (SHAPES[0], "depth is off by 0.0011 (mean relative), the limit is 0.001")
    ]


def test_what_did_not_run_neither_keeps_nor_breaks_limits() -> None:
    parity = varied()
    assert [keeps_limits(parity, variant) for variant in parity.variants] == [True, False, True, True, None]


@pytest.mark.parametrize(("place", "sound"), list(enumerate([True, False, True, False, True])))
def test_only_faults_and_failures_are_unsound(place: int, sound: bool) -> None:
    assert a_parity(varied().variants[place]).sound == sound


def test_a_reference_that_did_not_run_is_unsound() -> None:
    assert not a_parity(varied().variants[0], reference="ran out of memory").sound


def test_a_report_survives_its_json_and_gives_the_same_tables() -> None:
    report = a_report(a_case())
    report = dataclasses.replace(report, sections=dataclasses.replace(report.sections, parity=varied()))
    again = Report.from_json(report.to_json(), "report.json")
    assert again == report
    assert again.to_json() == report.to_json()
    assert all_tables(again) == all_tables(report)
    assert [table.title for table in all_tables(report)].index("Latency") == 0


def test_a_report_without_parity_has_no_key_of_it() -> None:
    data = a_report(a_case()).to_json()
    assert "parity" not in json.loads(data)["sections"]
    assert Report.from_json(data, "report.json").sections.parity is None


def edited(place: str, **changes: Any) -> bytes:
    data = json.loads(a_report_of(varied()).to_json())
    parity = data["sections"]["parity"]
    first = parity["variants"][0]
    {"parity": parity, "variant": first, "cell": first["cells"][0], "found": first["cells"][0]["found"]}[place].update(
        changes
    )
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("parity", {"extra": 1}, "sections.parity.'extra' is unknown"),
        ("parity", {"config": {"img_size": 15}}, "img_size must be a multiple of patch_size"),
        ("parity", {"inputs": []}, "sections.parity.variants[0].cells must not be more than the inputs"),
        ("variant", {"status": "measured"}, "sections.parity.variants[0].status must not be 'measured'"),
        ("variant", {"limits": {"depth": {"max": 1.0}}}, "limits must have '*'"),
        ("variant", {"limits": {"*": {"p99": 1.0}}}, "limits.* must have the keys max and mean alone"),
        ("cell", {"reason": "why"}, "cells[0].reason must be that of what is not compared"),
        ("cell", {"found": None}, "cells[0].found must be that of what is compared"),
        ("found", {"errors": {}}, "cells[0].found.errors must have 'depth'"),
        ("found", {"abs_rel": "1"}, "cells[0].found.abs_rel must be float"),
        (
            "found",
            {"errors": {"depth": {"max": -1.0, "mean": 0.0, "p99": 0.0}}},
            "max must be finite and not negative",
        ),
    ],
)
def test_what_no_measurement_writes_is_refused(place: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Report.from_json(edited(place, **changes), "report.json")
    assert message in str(caught.value)


def test_tables_say_what_was_compared_and_what_was_not() -> None:
    found = {table.title: table for table in parity_tables.tables(varied())}
    first = found["Parity"].rows
    assert first[0] == (
        "onnxruntime", "fp16", "bundle", "3 of 3", "0.0004", "1x3x28x28", "0.0002", "0", "yes"
    )  # fmt: skip
    assert [row[-1] for row in first] == ["yes", "no, at 2 shapes", "yes", "yes", "not run"]
    assert "moe3d-tiny in float64 PyTorch on cpu" in found["Parity"].note
    troubles = [row[3:] for row in found["Parity: not compared, and beyond the limits"].rows]
    assert troubles == [
        ("beyond", "1x3x28x28", "depth is off by 0.02 (max relative), the limit is 0.01"),
        ("beyond", "2x1x14x14", "depth is off by inf (max relative), the limit is 0.01"),
        ("left out", "1x3x28x28", "not in the bundle's range"),
        ("failed", "1x3x28x28", "ran out of memory"),
        ("not run", "all", "no NVIDIA GPU"),
    ]
    by_shape = found["Parity by shape"].rows
    assert by_shape[2][0] == "2x1x14x14"
    assert by_shape[2][3:] == ("0.0002", "not finite", "0", "0")
    assert [row[0] for row in found["Parity by output"].rows].count("onnxruntime") == 8


def test_an_unfinished_measurement_has_tables() -> None:
    parity = a_parity(a_variant([a_cell(1e-4)]))
    assert parity_tables.summary(parity).rows[0][3] == "1 of 3"
    assert parity_tables.shapes(parity).rows[1][-1] == "–"
    empty = dataclasses.replace(parity, variants=())
    assert [table.title for table in parity_tables.tables(empty)] == ["Parity by shape"]
    assert parity_plot.plots(empty) == {}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_heat_map_has_every_shape_and_marks_what_leaves_the_limits() -> None:
    svg = parity_plot.plots(varied())["parity.svg"]
    found = texts(svg)
    assert {"1x1x28x42", "1x3x28x28", "2x1x14x14"} <= set(found)
    assert found.count("1e-04") == 4
    assert "inf" in found
    assert svg.count("stroke: #d1242f") == 3  # two places and the legend
    assert "currentColor" in svg
    sound = parity_plot.plots(a_parity(varied().variants[0]))["parity.svg"]
    assert "#d1242f" not in sound


def test_the_same_report_gives_the_same_bytes() -> None:
    first, second = files(a_report_of(varied())), files(a_report_of(varied()))
    assert first == second
    assert sorted(first) == ["parity.svg", "report.html", "report.json", "report.md"]
    assert b"![parity](parity.svg)" in first["report.md"]
