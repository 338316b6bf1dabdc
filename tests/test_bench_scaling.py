"""Growth with views and pixels: planted powers are found, the arithmetic's are its own, sweeps end in time."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
import pytest
from bench_reports import MEMORY, a_case, a_report, a_round
from test_bench_run import a_source

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench import plots, scaling_plot, scaling_tables
from moe3d_deploy.benchmarks.bench.report import Case, Predicted, Report, Shape
from moe3d_deploy.benchmarks.bench.scaling import (
    PIXELS,
    VIEWS,
    Sweep,
    computed_takeover,
    exponent,
    growth,
    measured_takeover,
    of_models,
    sweeps,
    takeover,
)
from moe3d_deploy.benchmarks.bench.scaling_shapes import sweep_shapes
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import Range, ShapeRanges
from moe3d_deploy.planning import MOST_VIEWS

TINY = dataclasses.replace(PRESETS["moe3d-tiny"], point_head=False)
SIDES = (56, 112, 168, 224)
_COUNTS = (1, 2, 4, 8)


def at(shape: Shape, milliseconds: float, *, peak: float = 1e8, activations: float = 1e7, **changes: object) -> Case:
    """A case with the arithmetic's work, 1e7 bytes of predicted weights and 1e6 of activations per view."""
    memory = dataclasses.replace(MEMORY, peak_bytes=round(peak), activations_bytes=round(activations))
    case = a_case(
        [a_round((milliseconds,) * 3, memory=memory)],
        shape,
        work={"float32": costs.total_flops(TINY, *shape[1:], batch=shape[0])},
        predicted=Predicted("eager", 10_000_000, 1_000_000 * shape[1]),
    )
    return dataclasses.replace(case, **changes)  # type: ignore[arg-type]


def over_views(power: float = 1.5, counts: Sequence[int] = _COUNTS) -> list[Case]:
    """Time grows as this power of the views, the peak as the power 0.5, activations as 0.75."""
    return [at((1, s, 56, 56), 100 * s**power, peak=1e9 * s**0.5, activations=1e8 * s**0.75) for s in counts]


def over_pixels(power: float = 1.25) -> list[Case]:
    return [at((1, 1, side, side), 1e-3 * (side * side) ** power) for side in SIDES]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7, 2.0])
def test_a_planted_power_is_found_without_an_interval_to_speak_of(power: float) -> None:
    found = exponent([1, 2, 4, 8, 16], [3 * s**power for s in (1, 2, 4, 8, 16)])
    assert found == pytest.approx((power, power, power), abs=1e-9)


def test_the_interval_is_students() -> None:
    """ln x = 0, 1, 2 and ln y = 0, 1, 3: slope 3/2, what is left over 1/6, -1/3, 1/6, so its squares 1/6 with one
    degree of freedom; the slope's standard error is sqrt(1/6 / 2), Student's 97.5th percentile 12.706."""
    found = exponent([1, math.e, math.e**2], [1, math.e, math.e**3])
    width = 12.706 * math.sqrt(1 / 12)
    assert found == pytest.approx((1.5, 1.5 - width, 1.5 + width), rel=1e-6)


def test_intervals_of_planted_powers_with_noise_hold_the_power_19_times_of_20() -> None:
    random, held, rounds = np.random.default_rng(0), 0, 2000
    views = [1, 2, 4, 8, 16]
    for noise in np.exp(0.05 * random.standard_normal((rounds, len(views)))):
        found = exponent(views, [s**1.5 * factor for s, factor in zip(views, noise, strict=True)])
        held += found.low <= 1.5 <= found.high
    assert 0.93 < held / rounds < 0.97  # 0.95, and four standard errors of 0.005 to both sides


def test_every_figure_of_a_sweep_grows_as_planted() -> None:
    (sweep,) = sweeps(over_views())
    found = {item.quantity: item for item in growth(sweep)}
    assert list(found) == ["time", "peak memory", "activations"]
    assert found["time"].measured.value == pytest.approx(1.5)
    assert found["peak memory"].measured.value == pytest.approx(0.5)
    assert found["activations"].measured.value == pytest.approx(0.75)


def test_the_arithmetics_exponents_are_those_of_the_costs() -> None:
    (sweep,) = sweeps(over_views())
    found = {item.quantity: item.arithmetic for item in growth(sweep)}
    flops = [costs.total_flops(TINY, s, 56, 56) for s in _COUNTS]
    assert found["time"] == pytest.approx(slope(_COUNTS, flops))
    assert found["peak memory"] == pytest.approx(slope(_COUNTS, [10 + s for s in _COUNTS]))
    assert found["activations"] == pytest.approx(1)
    (sweep,) = sweeps(over_pixels())
    flops = [costs.total_flops(TINY, 1, side, side) for side in SIDES]
    assert growth(sweep)[0].arithmetic == pytest.approx(slope([side**2 for side in SIDES], flops))


def test_what_was_not_measured_everywhere_has_no_exponent() -> None:
    """As activations in ONNX Runtime without a peak that the kernel resets."""
    unknown = a_round((5.0,), memory=dataclasses.replace(MEMORY, activations_bytes=None, activations_by=None))
    cases = [*over_views()[:3], at((1, 8, 56, 56), 1, rounds=(unknown,))]
    (sweep,) = sweeps(cases)
    assert [item.quantity for item in growth(sweep)] == ["time", "peak memory"]


def test_a_sweep_needs_three_places() -> None:
    assert sweeps(over_views(counts=(1, 2))) == []
    assert sweeps([*over_views(counts=(1, 2)), *over_views(counts=(2, 1))]) == []  # the same two places again
    (sweep,) = sweeps(over_views(counts=(4, 1, 2)))
    assert (sweep.axis, sweep.fixed, sweep.places) == (VIEWS, "56x56", [1, 2, 4])


def test_a_case_that_failed_is_no_place() -> None:
    cases = over_views(counts=(1, 2, 4))
    lost = dataclasses.replace(cases[2], status="failed", reason="no memory", rounds=())
    assert sweeps([*cases[:2], lost]) == []


@pytest.mark.parametrize(
    "change",
    [{"backend": "onnxruntime"}, {"precision": "bf16"}, {"kind": "widespread"}, {"shape": (2, 4, 56, 56)},
     {"shape": (1, 4, 56, 70)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_cases_that_differ_in_more_than_one_thing_are_no_sweep(change: dict[str, object]) -> None:
    first, second, third = over_views(counts=(1, 2, 4))
    assert sweeps([first, second, dataclasses.replace(third, **change)]) == []  # type: ignore[arg-type]


def test_one_case_is_a_place_of_both_sweeps() -> None:
    found = sweeps([*over_pixels(), *over_views()])
    assert [(sweep.axis, sweep.fixed, sweep.places) for sweep in found] == [
        (VIEWS, "56x56", [1, 2, 4, 8]),
        (PIXELS, "1 view", [side * side for side in SIDES]),
    ]


@pytest.mark.parametrize(("height", "width"), [(224, 224), (112, 168)])
def test_takeover_by_arithmetic_is_where_two_products_are_half_of_all(height: int, width: int) -> None:
    """Q K^T and the map times V: 4 FLOP for every pair of tokens of a scene, channel and block."""
    aggregator = TINY.aggregator
    tokens = 1 + aggregator.num_register_tokens + height * width // TINY.patch_size**2

    def share(views: int) -> float:
        products = 4 * aggregator.depth * aggregator.embed_dim * (views * tokens) ** 2
        return products / costs.total_flops(TINY, views, height, width)

    found = computed_takeover(TINY, 1, height, width)
    assert found is not None
    assert share(found) >= 0.5 > share(found - 1)
    assert computed_takeover(TINY, 3, height, width) == found  # scenes do not see each other


def test_takeover_beyond_what_is_searched_is_none() -> None:
    deep = dataclasses.replace(TINY, vit=dataclasses.replace(TINY.vit, depth=400))
    parts = costs.flops(deep, 1, MOST_VIEWS, 14, 14)
    assert 2 * parts["global attention"] < sum(parts.values())
    assert computed_takeover(deep, 1, 14, 14) is None


def test_takeover_by_time_is_that_of_planted_parts() -> None:
    """60 S + 10 S^2: as large as each other at 6 views."""
    times = [60 * s + 10 * s**2 for s in _COUNTS]
    assert measured_takeover(_COUNTS, times) == pytest.approx(6)
    assert measured_takeover(_COUNTS, [60 * s - s**2 for s in _COUNTS]) is None


def sweep_of(times: Sequence[float]) -> Sweep:
    (sweep,) = sweeps([at((1, s, 56, 56), time) for s, time in zip(_COUNTS, times, strict=False)])
    return sweep


def test_a_measured_takeover_beyond_the_sweep_is_not_told() -> None:
    times = [60 * s + 10 * s**2 for s in _COUNTS]
    assert takeover(TINY, sweep_of(times)).measured == pytest.approx(6)
    assert takeover(TINY, sweep_of(times[:3])).measured is None  # 4 views were the most
    assert takeover(TINY, sweep_of([60.0 * s for s in _COUNTS])).measured is None
    assert takeover(TINY, sweep_of(times)).computed == computed_takeover(TINY, 1, 56, 56)


def test_tables_say_it() -> None:
    cases = [at((1, s, 56, 56), 60 * s + 10 * s**2) for s in _COUNTS]
    report = a_report(*cases, *over_pixels(1.25)[1:])
    again = Report.from_json(report.to_json(), "report.json")
    assert again.sections.cases is not None
    exponents, takeovers = scaling_tables.tables(again.cases, again.sections.cases.models)
    assert exponents.title == "Growth with views and pixels"
    rows = {(row[3], row[6]): row for row in exponents.rows}
    assert rows["pixels", "time"][:6] == (
        "moe3d-tiny", "pytorch", "fp32", "pixels", "1 view", "3136, 12544, 28224, 50176",
    )  # fmt: skip
    flops = [costs.total_flops(TINY, s, 56, 56) for s in _COUNTS]
    found = exponent(_COUNTS, [60 * s + 10 * s**2 for s in _COUNTS])
    interval = f"{found.low:.2f} to {found.high:.2f}"
    arithmetic = f"{slope(_COUNTS, flops):.2f}"
    assert rows["views", "time"][5:] == ("1, 2, 4, 8", "time", f"{found.value:.2f}", interval, arithmetic)
    (row,) = takeovers.rows
    config = of_models(again.sections.cases.models, again.cases[0])
    assert row == (
        "moe3d-tiny", "pytorch", "fp32", "views", "56x56", "8", str(computed_takeover(config, 1, 56, 56)), "6",
    )  # fmt: skip


def test_a_takeover_that_the_sweep_does_not_reach_says_so() -> None:
    report = a_report(*over_views(1.0, (1, 2, 4)))
    assert report.sections.cases is not None
    _, takeovers = scaling_tables.tables(report.cases, report.sections.cases.models)
    assert takeovers.rows[0][-1] == "beyond the sweep"


def test_without_a_sweep_there_is_no_table_and_no_plot() -> None:
    report = a_report(*over_views(counts=(1, 2)))
    assert report.sections.cases is not None
    assert scaling_tables.tables(report.cases, report.sections.cases.models) == []
    assert scaling_plot.plots(report.cases) == {}


def test_plots_have_the_sweeps_and_the_line_of_the_arithmetic() -> None:
    both = [*over_views(), *(dataclasses.replace(case, backend="onnxruntime") for case in over_views()), *over_pixels()]
    report = a_report(*both)
    made = scaling_plot.plots(report.cases)
    assert sorted(made) == ["scaling_pixels.svg", "scaling_views.svg"]
    assert made == scaling_plot.plots(Report.from_json(report.to_json(), "report.json").cases)
    for text in made.values():
        ElementTree.fromstring(text)
        assert "FLOP, through the first point" in text
    assert "moe3d-tiny onnxruntime fp32 56x56" in made["scaling_views.svg"]
    assert "moe3d-tiny pytorch fp32 1 view" in made["scaling_pixels.svg"]


def preset(name: str) -> ModelConfig:
    return dataclasses.replace(PRESETS[name], point_head=False)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("device", "cores", "flops_per_second"), [
    ("cpu", 1, 90e9), ("cpu", 2, 180e9), ("cpu", 16, 1440e9), ("cuda", 8, 20e12),
])  # fmt: skip
def test_the_sweeps_of_every_preset_end_within_ten_minutes(
    name: str, device: str, cores: int, flops_per_second: float
) -> None:
    """At the rates that the estimate is made with, six runs of each shape; and both sweeps are there."""
    config = preset(name)
    source = a_source(source=name, config=config, weights=config, ranges=ShapeRanges.of(config))
    shapes = sweep_shapes(source, device, cores)
    work = sum(costs.total_flops(config, s, h, w, batch=b) for b, s, h, w in shapes)
    assert 6 * work / flops_per_second <= 600
    found = sweeps([at(shape, 1.0) for shape in shapes])
    assert [sweep.axis for sweep in found] == [VIEWS, PIXELS]
    assert found[0].places == ([1, 2, 4, 8] if device == "cpu" else [1, 2, 4, 8, 16, 32])
    assert len(set(shapes)) == len(shapes)


def test_a_full_size_sweep_on_two_cores_is_known() -> None:
    """By hand: 518 pixels are 37 patches; half of those and, with 2 cores, all of the views, are 18, so 252 pixels."""
    config = preset("moe3d-1b")
    shapes = sweep_shapes(a_source(config=config, weights=config, ranges=ShapeRanges.of(config)), "cpu", 2)
    assert shapes[:4] == [(1, count, 252, 252) for count in (1, 2, 4, 8)]
    assert shapes[4:] == [(1, 1, 140, 140), (1, 1, 392, 392)]


def fixed(**changes: Range) -> ShapeRanges:
    plain = ShapeRanges(Range(1, None), Range(1, None), Range(14, None, 14), Range(14, None, 14))
    return dataclasses.replace(plain, **changes)


def test_a_bundle_of_one_size_has_a_sweep_over_views_alone() -> None:
    side = round(TINY.pos_embed_grid * 0.5) * TINY.patch_size
    ranges = fixed(height=Range(side, side, 14), width=Range(side, side, 14))
    assert sweep_shapes(a_source(ranges=ranges), "cpu", 2) == [(1, count, side, side) for count in (1, 2, 4, 8)]


def test_a_bundle_of_one_view_has_a_sweep_over_sizes_alone() -> None:
    shapes = sweep_shapes(a_source(ranges=fixed(views=Range(1, 1))), "cpu", 2)
    assert {shape[:2] for shape in shapes} == {(1, 1)}
    assert [shape[2] for shape in shapes] == sorted(shape[2] for shape in shapes)
    assert len(shapes) >= 3


def test_a_bundle_that_takes_no_sweep_is_refused() -> None:
    ranges = fixed(views=Range(2, 3), height=Range(28, 28, 14))
    with pytest.raises(InputError) as caught:
        sweep_shapes(a_source(kind="bundle", source="some/bundle", ranges=ranges), "cpu", 2)
    assert str(caught.value) == (
        "--scaling: bundle some/bundle takes fewer than 3 of the views or sizes of a sweep; leave --scaling out, or "
        "name a checkpoint or a bundle of several sizes"
    )


def test_many_lines_of_a_plot_all_look_different() -> None:
    styles = list(itertools.islice(plots._styles(), 42))
    assert len({(style["color"], style["marker"]) for style in styles}) == 42
