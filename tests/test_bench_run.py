"""`moe3d bench` over all cases: turns, failures, impossible times, interrupts; no model is run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from bench_reports import CEILINGS, ENVIRONMENT, a_round

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench.cases import Planned, Source, plan_cases, views_shapes
from moe3d_deploy.benchmarks.bench.report import Report
from moe3d_deploy.benchmarks.bench.run import Options, run_cases
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.manifest import Preprocessing, Range, ShapeRanges
from moe3d_deploy.memory import activation_bytes

TINY = dataclasses.replace(PRESETS["moe3d-tiny"], point_head=False)
SHAPES = [(1, 1, 196, 252), (1, 2, 196, 252)]
Event = Callable[[dict[str, Any]], None]


def a_source(**changes: Any) -> Source:
    plain = Source(
        source="moe3d-tiny",
        name="moe3d-tiny",
        kind="preset",
        backend="pytorch",
        precision="fp32",
        config=TINY,
        weights=TINY,
        preprocessing=Preprocessing.of(TINY),
        ranges=ShapeRanges.of(TINY),
    )
    return dataclasses.replace(plain, **changes)


def least_ms(views: int) -> float:
    """Of a run at CEILINGS."""
    return 1e3 * costs.total_flops(TINY, views, 196, 252) / CEILINGS.flops_per_second["float32"].best


def as_json(milliseconds: float) -> dict[str, Any]:
    return dataclasses.asdict(a_round((milliseconds,) * 3))


def planned() -> list[Planned]:
    return plan_cases([a_source()], SHAPES)


def run(measure: Any, processes: int = 2, **options: Any) -> Report:
    return run_cases(planned(), Options(processes=processes), environment=ENVIRONMENT, measure=measure, **options)


def test_cases_take_turns_and_every_process_has_inputs_of_its_own() -> None:
    asked = []

    def measure(request: dict[str, Any], on_event: Event) -> dict[str, Any]:
        asked.append((request["shape"][1], request["seed"]))
        return as_json(2 * least_ms(2))

    report = run(measure)
    assert asked == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert report.complete
    assert [case.status for case in report.cases] == ["measured", "measured"]
    assert [len(case.rounds) for case in report.cases] == [2, 2]


def test_runs_and_budget_are_shared_by_the_processes() -> None:
    effort = Options(runs=10, budget_seconds=9.0, processes=3).effort
    assert (effort.min_runs, effort.budget_ms, effort.warmup_budget_ms) == (4, 3000.0, 1500.0)


def test_a_case_that_fails_is_a_row_and_the_others_run() -> None:
    def measure(request: dict[str, Any], on_event: Event) -> dict[str, Any]:
        if request["shape"][1] == 1:
            raise Moe3dError("its process was killed; free some of /mnt/big/memory")
        return as_json(2 * least_ms(2))

    first, second = run(measure).cases
    assert (first.status, first.rounds) == ("failed", ())
    assert first.reason == "its process was killed; free some of memory"  # no absolute path
    assert (second.status, len(second.rounds)) == ("measured", 2)


def test_a_case_that_fails_gets_no_further_process() -> None:
    calls = []

    def measure(request: dict[str, Any], on_event: Event) -> dict[str, Any]:
        calls.append(request["shape"][1])
        raise Moe3dError("no")

    run(measure)
    assert calls == [1, 2]


def test_a_time_that_beats_the_ceiling_makes_the_case_impossible() -> None:
    def measure(request: dict[str, Any], on_event: Event) -> dict[str, Any]:
        return as_json(0.9 * least_ms(request["shape"][1]))

    first, _ = run(measure).cases
    assert first.status == "impossible"
    assert {(found.stage, found.kind) for found in first.findings} == {("model", "compute"), ("inference", "compute")}
    assert first.findings[0].reached == pytest.approx(CEILINGS.flops_per_second["float32"].best / 0.9)
    assert first.reason is not None
    assert "111.1 GFLOP/s, and the fastest product or convolution here reached 100.0: the time is wrong" in first.reason
    assert len(first.rounds) == 1


def test_a_time_at_the_ceiling_is_believed() -> None:
    def measure(request: dict[str, Any], on_event: Event) -> dict[str, Any]:
        return as_json(1.001 * least_ms(request["shape"][1]))

    assert [case.status for case in run(measure).cases] == ["measured", "measured"]


def test_an_interrupt_leaves_a_whole_report_of_what_was_finished() -> None:
    kept: list[Report] = []

    def measure(request: dict[str, Any], on_event: Event) -> dict[str, Any]:
        if request["shape"][1] == 2:
            raise KeyboardInterrupt
        return as_json(2 * least_ms(1))

    with pytest.raises(KeyboardInterrupt):
        run(measure, keep=kept.append)
    last = kept[-1]
    assert not last.complete
    assert [case.shape[1] for case in last.cases] == [1]
    assert Report.from_json(last.to_json(), "x") == last


def test_the_arithmetic_is_beside_the_figures() -> None:
    case = planned()[1].case(reason="not measured")
    assert case.work == {"float32": costs.total_flops(TINY, 2, 196, 252)}
    assert case.weight_bytes == case.predicted.weights_bytes == costs.weight_bytes(TINY)
    assert case.predicted.activations_bytes == activation_bytes(TINY, SHAPES[1], form="eager")


def test_a_16_bit_bundle_is_held_to_float32_on_a_cpu() -> None:
    """ONNX Runtime computes it in float32 there; its weights are read as they are stored."""
    source = a_source(kind="bundle", backend="onnxruntime", precision="fp16")
    (item,) = plan_cases([source], SHAPES[:1])
    case = item.case(reason="not measured")
    assert case.work == {"float32": costs.total_flops(TINY, 1, 196, 252)}
    assert case.weight_bytes < costs.weight_bytes(TINY)
    assert case.predicted.activations_bytes == activation_bytes(TINY, SHAPES[0], form="fused")


def test_default_shapes_are_those_that_the_bundle_takes() -> None:
    assert [shape[1] for shape in a_source().default_shapes()] == [1, 2, 4]
    height, width = a_source().default_shapes()[0][2:]
    fixed = ShapeRanges(Range(1, 1), Range(2, 2), Range(height, height), Range(width, width))
    assert a_source(ranges=fixed).default_shapes() == [(1, 2, height, width)]
    other = ShapeRanges(Range(1, 1), Range(3, 3), Range(28, 28), Range(42, 42))
    assert a_source(ranges=other).default_shapes() == [(1, 3, 28, 42)]


def test_views_are_of_the_usual_size() -> None:
    usual = a_source().default_shapes()[0]
    assert views_shapes([a_source()], [3, 5]) == [(1, 3, *usual[2:]), (1, 5, *usual[2:])]


def test_a_shape_that_is_not_taken_is_refused_before_anything_runs() -> None:
    ranges = ShapeRanges(Range(1, None), Range(1, 4), Range(196, 196), Range(252, 252))
    source = a_source(kind="bundle", source="some/bundle", ranges=ranges)
    with pytest.raises(InputError) as caught:
        plan_cases([source], [(1, 8, 196, 252)])
    assert str(caught.value) == (
        "shape 1x8x196x252: bundle some/bundle does not take it; it takes batch 1 and more, views 1 to 4, "
        "height 196, width 252"
    )
    with pytest.raises(InputError, match=r"height 200 is not a multiple of the patch size 7; nearest: 196 and 203"):
        plan_cases([a_source()], [(1, 1, 200, 252)])


def test_two_cases_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"a and b are both moe3d-tiny pytorch fp32 1x1x196x252: .* --compare"):
        plan_cases([a_source(source="a"), a_source(source="b")], SHAPES)
