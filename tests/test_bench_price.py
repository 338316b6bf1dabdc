"""The price of the experts: what is measured, what follows from it, and the report of it. Nothing large runs."""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from bench_reports import ENVIRONMENT, STATE, a_report
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench import folder, price_tables
from moe3d_deploy.benchmarks.bench.bootstrap import ratio_of_pairs
from moe3d_deploy.benchmarks.bench.price import Price, PriceCase, PriceRound
from moe3d_deploy.benchmarks.bench.price_figures import flop_share, overheads
from moe3d_deploy.benchmarks.bench.price_measure import measure
from moe3d_deploy.benchmarks.bench.report import Report, Sections
from moe3d_deploy.benchmarks.timing import Effort, Timer
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import InputError, Moe3dError

EQUAL = {"single": 1.0, "plain": 2.0, "merged": 2.0}  # a form's depth: single is another function


class Sleeper:
    """Forms that take a given time, and give a depth of one number."""

    device, threads, activations_by = "cpu", 1, "allocator"

    def __init__(self, milliseconds: dict[str, float], depths: dict[str, float]) -> None:
        self.forms = tuple(milliseconds)
        self.order: list[str] = []
        self.seeds: list[int] = []
        self._milliseconds, self._depths = milliseconds, depths

    def renew(self, seed: int) -> None:
        self.seeds.append(seed)

    def timer(self, form: str) -> Timer:
        def timed() -> float:
            self.order.append(form)
            started = time.perf_counter()
            time.sleep(self._milliseconds[form] / 1e3)
            return 1e3 * (time.perf_counter() - started)

        return timed

    def activations(self, form: str) -> tuple[list[NDArray[Any]], int | None]:
        return [np.full((1, 2, 2), self._depths[form]), np.ones((1, 2, 2))], 100


def quick(turns: int) -> Effort:
    return Effort(turns, turns, warmup_budget_ms=0)


def a_price_round(series: dict[str, Sequence[float]], **changes: Any) -> PriceRound:
    plain = PriceRound(
        seed=0,
        device="cpu",
        threads=2,
        warmup_turns=6,
        stable=True,
        series={form: tuple(times) for form, times in series.items()},
        activations_bytes={form: 50_000_000 + 1_000_000 * i for i, form in enumerate(series)},
        activations_by="allocator",
        before=STATE,
        after=STATE,
    )
    return dataclasses.replace(plain, **changes)


def a_price_case(rounds: Sequence[PriceRound] = (), **changes: Any) -> PriceCase:
    """A head of four experts, which add 10 of 1000 FLOP."""
    values: dict[str, Any] = {
        "backend": "pytorch",
        "precision": "fp32",
        "part": "head",
        "num_experts": 4,
        "shape": (1, 1, 196, 252),
        "single_flop": 1000,
        "experts_flop": 1010,
        "seeded_weights": False,
        "missing": {},
        "status": "measured",
        "reason": None,
        "rounds": tuple(rounds) or (a_price_round({"single": (10.0,) * 4, "merged": (11.0,) * 4}),),
    }
    return PriceCase(**{**values, **changes})


def a_price(*cases: PriceCase) -> Price:
    return Price("moe3d-tiny", PRESETS["moe3d-tiny"].to_dict(), {"runs": 4}, cases)


def price_report(*cases: PriceCase) -> Report:
    return dataclasses.replace(a_report(), sections=Sections(price=a_price(*cases)), environment=ENVIRONMENT)


def noise(random: np.random.Generator, factor: float) -> list[list[float]]:
    """Ratios of pairs in three processes of 20 turns: processes differ by 1 %, turns by 2 %, neighbours correlated by
    0.8."""
    rounds = []
    for _ in range(3):
        steps = random.standard_normal(20)
        for i in range(1, 20):
            steps[i] = 0.8 * steps[i - 1] + 0.6 * steps[i]
        rounds.append(list(factor * np.exp(0.01 * random.standard_normal() + 0.02 * steps)))
    return rounds


def test_a_form_that_sleeps_longer_is_slower_by_that() -> None:
    """20 ms and 30 ms, each a little longer than asked for: 1.5 but for a few percent, and never no difference."""
    sleeper = Sleeper({"single": 20, "plain": 30, "merged": 20}, EQUAL)
    rounds = [measure(sleeper, seed=seed, effort=quick(8), limit=1e-3) for seed in (0, 100)]
    plain, merged = overheads([a_price_case(rounds)])
    assert plain.form == "plain"
    assert plain.ratio.ratio == pytest.approx(1.5, rel=0.1)
    assert plain.ratio.low <= plain.ratio.ratio <= plain.ratio.high
    assert merged.ratio.ratio == pytest.approx(1.0, rel=0.1)
    assert plain.added_ms.value == pytest.approx(10, rel=0.4)


@pytest.mark.parametrize("factor", [1.0, 1.05, 1.5])
def test_the_interval_holds_the_planted_ratio_95_times_of_100(factor: float) -> None:
    """Of 300 measurements; 0.9 is four standard errors of that share below 0.95."""
    random = np.random.default_rng(5)
    found = [ratio_of_pairs(noise(random, factor)) for _ in range(300)]
    assert np.mean([item.low <= factor <= item.high for item in found]) >= 0.9
    if factor == 1.5:
        assert all(item.low > 1 for item in found)


def test_what_both_calls_of_a_pair_meet_is_no_noise() -> None:
    """A machine that is three times slower in one process, and doubles its time within each: the pairs say 1.1."""
    single = [[factor * (1 + 0.1 * i) for i in range(10)] for factor in (10.0, 30.0, 10.0)]
    pairs = [[1.1 * value / value for value in times] for times in single]
    found = ratio_of_pairs(pairs)
    assert (found.low, found.ratio, found.high) == pytest.approx((1.1, 1.1, 1.1))
    assert found.beyond_noise is True


def test_the_interval_of_one_process_gives_no_verdict_and_of_two_turns_no_bound() -> None:
    assert ratio_of_pairs([[1.1, 1.12, 1.11, 1.1, 1.13, 1.12]]).beyond_noise is None
    (item,) = overheads([a_price_case([a_price_round({"single": (10.0,), "merged": (11.0,)})])])
    assert item.ratio.high > 1e6
    (row,) = price_tables.overheads(a_price(item.case)).rows
    assert "1.1000 [too few runs]" in row


def test_every_turn_has_one_input_for_all_forms_and_every_other_turn_goes_backwards() -> None:
    sleeper = Sleeper({"single": 0, "plain": 0, "merged": 0}, EQUAL)
    found = measure(sleeper, seed=7, effort=quick(3), limit=1e-3)
    forwards = ["single", "plain", "merged"]
    assert sleeper.order == (forwards + forwards[::-1]) * 2  # one turn of warm-up, three that count
    assert sleeper.seeds == [7, 8, 9, 10, 11]
    assert (found.warmup_turns, {len(times) for times in found.series.values()}) == (1, {3})
    assert found.activations_bytes == {"single": 100, "plain": 100, "merged": 100}


@pytest.mark.parametrize(
    ("depths", "said"),
    [
        ({**EQUAL, "merged": 2.1}, "merged: off by 0.05 of the plain form, limit 0.001"),
        ({**EQUAL, "merged": float("nan")}, "merged: an output is not finite"),
        ({**EQUAL, "single": float("inf")}, "single: an output is not finite"),
    ],
)
def test_forms_that_disagree_are_not_timed(depths: dict[str, float], said: str) -> None:
    sleeper = Sleeper(dict.fromkeys(EQUAL, 0), depths)
    with pytest.raises(Moe3dError) as caught:
        measure(sleeper, seed=0, effort=quick(2), limit=1e-3)
    assert str(caught.value) == f"the forms do not give one result, so their times say nothing: {said}"
    assert sleeper.order == []


def test_the_shares_follow_from_the_times() -> None:
    """The model 100 ms with VGGT's head and 103 merged; the head alone 10 and 12. 10 of 1000 FLOP more: 1 %."""
    model = a_price_case([a_price_round({"single": (100.0,) * 4, "merged": (103.0,) * 4})] * 2, part="model")
    head = a_price_case([a_price_round({"single": (10.0,) * 4, "merged": (12.0,) * 4})] * 2)
    of_model, of_head = overheads([model, head])
    assert of_model.time_share is not None
    assert of_model.time_share.value == pytest.approx(0.03)
    assert of_model.price is not None
    assert of_model.price.value == pytest.approx(3.0)
    assert (of_model.reached, of_model.sure) == (False, True)
    assert of_head.added_ms.value == pytest.approx(2.0)
    assert (of_head.total_ms, of_head.total_of) == (100.0, "model")
    assert of_head.time_share is not None
    assert of_head.time_share.value == pytest.approx(0.02)
    assert of_head.price is not None
    assert of_head.price.value == pytest.approx(2.0)


def test_a_bundle_is_a_total_without_what_its_own_form_adds() -> None:
    """The bundle takes 102 ms with its function, which adds 2 ms to a head of 10: VGGT's would take 100."""
    head = a_price_case([a_price_round({"single": (10.0,) * 3, "function": (12.0,) * 3})] * 2, backend="onnxruntime")
    bundle = a_price_case([a_price_round({"function": (102.0,) * 3})], backend="onnxruntime", part="bundle")
    other = dataclasses.replace(head, num_experts=8, experts_flop=1020)
    found = overheads([bundle, head, other])
    assert [(item.case.num_experts, item.total_of) for item in found] == [(4, "bundle"), (8, "bundle")]
    assert [item.total_ms for item in found] == pytest.approx([100.0, 100.0])


def test_without_a_total_on_the_shape_there_is_no_share() -> None:
    model = a_price_case(part="model", shape=(1, 2, 196, 252))
    head = a_price_case()
    (item,) = [item for item in overheads([model, head]) if item.case.part == "head"]
    assert (item.total_ms, item.time_share, item.price, item.reached) == (None, None, None, None)
    (row,) = price_tables.overheads(a_price(head)).rows
    assert "head only" in row


def test_the_goal_is_that_of_the_device() -> None:
    """A price of 1.3: within 1.5 on a CPU, above 1.25 on a GPU. Equal pairs leave no doubt."""
    verdicts = {}
    for device in ("cpu", "cuda"):
        times = {"single": (100.0,) * 4, "merged": (101.3,) * 4}
        (item,) = overheads([a_price_case([a_price_round(times, device=device)] * 2, part="model")])
        verdicts[device] = (item.goal, item.reached, item.sure)
    assert verdicts == {"cpu": (1.5, True, True), "cuda": (1.25, False, True)}


def test_a_goal_inside_the_interval_is_not_beyond_noise() -> None:
    rounds = [a_price_round({"single": (100.0,) * 4, "merged": (value,) * 4}) for value in (100.5, 102.0)]
    price = a_price(a_price_case(rounds, part="model"))
    (row,) = price_tables.overheads(price).rows
    assert row[-1] == "reached, not beyond noise"


def test_experts_that_add_no_arithmetic_have_no_price() -> None:
    (item,) = overheads([a_price_case(part="model", experts_flop=990)])
    assert item.time_share is not None
    assert (item.price, item.reached) == (None, None)
    assert flop_share(item.case) == pytest.approx(-0.01)


def test_the_report_comes_out_of_its_json() -> None:
    model = a_price_case(part="model", missing={"kernel": "the kernel needs a GPU"}, seeded_weights=True)
    failed = a_price_case(status="failed", reason="ran out of memory")
    report = price_report(model, a_price_case(), failed)
    again = Report.from_json(report.to_json(), "x")
    assert again == report
    files = folder.files(report)
    assert folder.files(again) == files
    assert set(files) == {"report.json", "report.md", "report.html", "overhead.svg"}
    text = files["report.md"].decode()
    for said in (
        "## Price of the experts", "## Memory of the forms", "ran out of memory", "the kernel needs a GPU",
        "about 7 % more time and names neither hardware nor resolution", "With 4 experts, weights of the last stage",
        "| 10 ms | 11 ms | 1.1000 ", "| 50 MB | 51 MB | 1 MB | allocator |",
    ):  # fmt: skip
        assert said in text
    plot = files["overhead.svg"].decode()
    assert "currentColor" in plot
    assert "share of the FLOP" in plot
    assert "pytorch, model, K = 4, 1x1x196x252" in plot


def test_no_bars_without_a_total() -> None:
    assert set(folder.files(price_report(a_price_case()))) == {"report.json", "report.md", "report.html"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("part", "tail"), "part must be one of head, model, bundle"),
        (("status", "fine"), "status must not be 'fine'"),
        (("rounds", []), "rounds must not be empty"),
        (("single_flop", 0), "single_flop, experts_flop must be positive"),
        (("shape", [1, 1, 28]), "shape must have 4 entries, not 3"),
        (("surprise", 1), "is unknown"),
    ],
)
def test_a_report_that_cannot_be_is_refused(change: tuple[str, Any], said: str) -> None:
    values = json.loads(price_report(a_price_case()).to_json())
    values["sections"]["price"]["cases"][0][change[0]] = change[1]
    with pytest.raises(InputError, match=said):
        Report.from_json(json.dumps(values).encode(), "x")


def test_a_head_without_the_single_form_is_refused() -> None:
    values = json.loads(price_report(a_price_case()).to_json())
    for key in ("series", "activations_bytes"):
        del values["sections"]["price"]["cases"][0]["rounds"][0][key]["single"]
    with pytest.raises(InputError, match="must have the single head and another form"):
        Report.from_json(json.dumps(values).encode(), "x")
