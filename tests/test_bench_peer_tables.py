"""The table of what else runs a model, of planted series."""

import dataclasses
from typing import Any

import exports
import numpy as np
from bench_reports import a_case, a_report, a_round
from test_bench_run import TINY

from moe3d_deploy.benchmarks.bench import peer_tables


def planted() -> list[Any]:
    """Three processes each: eager 10 ms, the widespread file 20 ms, a bundle of the model 5 ms, with 1 % of noise."""

    def rounds(milliseconds: float, **changes: Any) -> list[Any]:
        times = np.array([0.99, 1.0, 1.01]) * milliseconds
        return [a_round(tuple(np.roll(times, i).tolist()), **changes) for i in range(3)]

    return [
        a_case(rounds(10.0, first_run_seconds=0.25)),
        a_case(rounds(20.0, load_seconds=25.0), kind="widespread", backend="onnxruntime-widespread", nodes=20_664),
        a_case(rounds(5.0), kind="bundle", backend="onnxruntime", precision="fp16", nodes=4_321),
        a_case(rounds(7.0), shape=(1, 2, 196, 252)),  # alone on its shape
        a_case(status="unavailable", reason="no GPU", rounds=(), precision="fp16"),
    ]


def test_the_table_has_the_ratios_of_planted_series() -> None:
    report = a_report(*(dataclasses.replace(case, rounds=()) if case.reason else case for case in planted()))
    assert report.sections.cases is not None
    (table,) = peer_tables.tables(report.cases, report.sections.cases.models)
    column = table.header.index
    eager, wide, bundle = table.rows
    over_eager = [row[column("over eager float32")] for row in table.rows]
    over_wide = [row[column("over widespread export")] for row in table.rows]
    assert [cell.split(" ")[0] for cell in over_eager] == ["1", "2.00", "0.50"]
    assert [cell.split(" ")[0] for cell in over_wide] == ["0.50", "1", "0.25"]
    low, high = (float(text) for text in over_eager[1].partition("[")[2].rstrip("]").split(", "))
    assert 1.9 < low <= 2 <= high < 2.1
    assert [row[column("nodes")] for row in table.rows] == ["–", "20,664", "4,321"]
    assert (wide[column("load")], eager[column("first run")], bundle[column("first run")]) == ("25.0 s", "0.2 s", "–")


def test_of_single_processes_there_is_a_ratio_without_an_interval() -> None:
    cases = [a_case([a_round((10.0, 10.0))]), a_case([a_round((15.0, 15.0))], backend="onnxruntime")]
    (table,) = peer_tables.tables(cases, {"moe3d-tiny": TINY.to_dict()})
    assert table.rows[1][table.header.index("over eager float32")] == "1.50"
    assert table.rows[1][table.header.index("over widespread export")] == "–"


def test_without_anything_to_compare_there_is_no_table() -> None:
    alone = [a_case(), a_case(shape=(1, 2, 196, 252))]
    assert peer_tables.tables(alone, {"moe3d-tiny": TINY.to_dict()}) == []


def test_another_model_on_the_same_shape_is_nothing_to_compare_with() -> None:
    cases = [a_case(), a_case(model="other", backend="onnxruntime")]
    models = {"moe3d-tiny": TINY.to_dict(), "other": exports.MOE.to_dict()}
    assert peer_tables.tables(cases, models) == []
    with_point_head = dataclasses.replace(TINY, point_head=True).to_dict()
    (table,) = peer_tables.tables(cases, {"moe3d-tiny": TINY.to_dict(), "other": with_point_head})
    assert len(table.rows) == 2


def test_the_note_names_what_had_not_settled() -> None:
    def note(cases: list[Any]) -> str:
        report = a_report(*(dataclasses.replace(case, rounds=()) if case.reason else case for case in cases))
        assert report.sections.cases is not None
        (table,) = peer_tables.tables(report.cases, report.sections.cases.models)
        return table.note

    cases = planted()
    assert "settled" not in note(cases)
    for index in (1, 3):  # of these the second is compared with nothing
        first, *rest = cases[index].rounds
        cases[index] = dataclasses.replace(cases[index], rounds=(*rest, dataclasses.replace(first, stable=False)))
    assert note(cases).endswith("when the warm-up's budget was used: onnxruntime-widespread fp32.")
