"""`moe3d bench --compare` tells a real change from noise, on recorded series; and refuses what is not comparable."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_reports import ENVIRONMENT, MEMORY, a_case, a_report, a_round

from moe3d_deploy.benchmarks.bench.bootstrap import Rounds, ratio_of_medians, student
from moe3d_deploy.benchmarks.bench.compare import as_json, compare, lines
from moe3d_deploy.errors import InputError

RECORDED = json.loads((Path(__file__).parent / "data" / "bench_series.json").read_text(encoding="utf-8"))
SERIES = ("matmul", "model")


def halves(name: str, how: str) -> tuple[Rounds, Rounds]:
    """Two reports of the same thing: the processes in turns, as they would be in one run, or one half after the other,
    as two runs are."""
    rounds = RECORDED[name]
    half = len(rounds) // 2
    return (rounds[::2], rounds[1::2]) if how == "in turns" else (rounds[:half], rounds[half:])


def scaled(rounds: Rounds, factor: float) -> Rounds:
    return [[factor * value for value in times] for times in rounds]


def noise(random: np.random.Generator, factor: float = 1.0) -> Rounds:
    """Three processes of 20 runs whose medians differ by 1 % and whose runs by 2 %, neighbours correlated by 0.8; one
    run of ten is up to a half slower."""
    rounds = []
    for _ in range(3):
        steps = random.standard_normal(20)
        for i in range(1, 20):
            steps[i] = 0.8 * steps[i - 1] + 0.6 * steps[i]
        late = (random.random(20) < 0.1) * random.exponential(0.2, 20)
        rounds.append(list(10 * factor * (1 + 0.01 * random.standard_normal()) * (1 + 0.02 * steps + late)))
    return rounds


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("how", ["in turns", "one after the other"])
def test_recorded_noise_is_no_change(name: str, how: str) -> None:
    found = ratio_of_medians(*halves(name, how))
    assert found.beyond_noise is False, str(found)
    assert str(found).startswith("no change beyond noise: ")


@pytest.mark.parametrize("how", ["in turns", "one after the other"])
@pytest.mark.parametrize("factor", [1.05, 1 / 1.05])
def test_a_real_five_percent_is_found_in_recorded_noise(how: str, factor: float) -> None:
    """The processes' medians lie within 6 % of each other."""
    first, second = halves("matmul", how)
    found = ratio_of_medians(first, scaled(second, factor))
    assert found.beyond_noise is True, str(found)
    assert found.low < factor < found.high
    assert str(found).startswith("slower by " if factor > 1 else "faster by ")


def test_equal_series_are_rarely_told_apart_and_a_changed_one_mostly_is() -> None:
    """By construction at most 5 of 100 false alarms: of 150 pairs more than 13 come in 2 of 100 such tests."""
    random = np.random.default_rng(0)
    alarms = sum(bool(ratio_of_medians(noise(random), noise(random)).beyond_noise) for _ in range(150))
    found = sum(bool(ratio_of_medians(noise(random), noise(random, 1.05)).beyond_noise) for _ in range(50))
    assert alarms <= 13
    assert found >= 35


def test_the_interval_is_students_of_the_processes_where_they_differ() -> None:
    """Medians 100, 101, 102 and 110, 111.1, 112.2, runs without noise. By hand: both have a variance of the logarithms
    of 9.80e-5, so the error is sqrt(9.80e-5 * 2 / 3) = 0.00808, and t of 4 is 2.776: 10 % within a factor of 1.0227."""
    first = [[value] * 9 for value in (100.0, 101.0, 102.0)]
    found = ratio_of_medians(first, scaled(first, 1.1))
    assert found.ratio == pytest.approx(1.1)
    assert found.high / found.ratio == pytest.approx(1.0227, abs=2e-4)
    assert found.ratio / found.low == pytest.approx(1.0227, abs=2e-4)
    assert str(found) == "slower by 10.0 % [7.6, 12.5]"


def test_noise_of_the_runs_counts_where_processes_happen_to_agree() -> None:
    """Equal processes with runs from 5 to 15: no spread of medians, and still no certainty."""
    times = [5.0, 15.0, 6.0, 14.0, 10.0, 9.0, 11.0, 7.0, 13.0] * 2
    found = ratio_of_medians([times] * 3, scaled([times] * 3, 1.05))
    assert found.beyond_noise is False


def test_runs_that_drift_have_a_wider_interval_than_the_same_in_disorder() -> None:
    """Where neighbours are alike there are fewer runs to count."""
    drifting = np.linspace(10, 12, 64)
    disorder = np.random.default_rng(0).permutation(drifting)
    width = {}
    for name, times in (("drift", list(drifting)), ("disorder", list(disorder))):
        found = ratio_of_medians([times] * 2, [times] * 2)
        width[name] = found.high - found.low
    assert width["drift"] > 2 * width["disorder"]


def test_the_same_series_give_the_same_interval() -> None:
    first, second = halves("model", "in turns")
    assert ratio_of_medians(first, second) == ratio_of_medians(first, second)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (4, 2.776), (11, 2.201), (20, 2.086), (60, 2.000)])
def test_student_is_that_of_the_tables(freedom: int, expected: float) -> None:
    """Two-sided 5 %, from printed tables."""
    assert student(freedom) == pytest.approx(expected, rel=1e-3)


def test_one_process_gives_an_interval_and_no_verdict() -> None:
    times = [10.0, 10.1, 9.9] * 10
    found = ratio_of_medians([times], scaled([times], 1.5))
    assert found.beyond_noise is None
    assert found.low < 1.5 < found.high
    assert str(found).endswith(" within one process: no verdict")
    single = ratio_of_medians([[10.0]], [[11.0]])
    assert single.beyond_noise is None
    assert math.isfinite(single.high)
    assert str(single) == "+10.0 %, too few runs for an interval: no verdict"


def test_a_comparison_has_every_case_of_both() -> None:
    rounds = [a_round((10.0, 10.1, 9.9)) for _ in range(3)]
    more = dataclasses.replace(MEMORY, peak_bytes=180_000_000)
    slower = [a_round((12.0, 12.1, 11.9), memory=more) for _ in range(3)]
    first = a_report(a_case(rounds), a_case(rounds, (1, 2, 196, 252)))
    lost = dataclasses.replace(a_case(), shape=(1, 2, 196, 252), status="failed", reason="died", rounds=())
    found = compare(first, a_report(a_case(slower), lost))
    (change,) = found.changes
    assert change.latency.beyond_noise is True
    assert change.peak == pytest.approx(1.5)
    text = "\n".join(lines(found))
    assert "moe3d-tiny pytorch fp32 1x1x196x252  slower by 20.0 % [" in text
    assert "peak memory +50 %" in text
    assert "moe3d-tiny pytorch fp32 1x2x196x252: measured in the first report, failed in the second" in text
    json.dumps(as_json(found), allow_nan=False)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"packages": {"numpy": "2.3.0", "torch": "2.14.0"}}, "packages torch 2.13.0 and 2.14.0"),
        ({"packages": {"numpy": "2.3.0"}}, "packages torch 2.13.0 and none"),
        ({"cpu": {**ENVIRONMENT["cpu"], "name": "Another"}}, "cpu name A Processor and Another"),
        ({"memory_bytes": 1}, f"memory_bytes {8 << 30} and 1"),
        ({"gpus": [{"name": "A Card"}]}, "gpus [] and [{'name': 'A Card'}]"),
        ({"python": "3.12.0"}, "python 3.11.2 and 3.12.0"),
    ],
)
def test_other_machines_and_versions_are_refused_unless_asked_for(environment: dict[str, Any], said: str) -> None:
    first, second = a_report(a_case()), a_report(a_case(), environment=environment)
    with pytest.raises(InputError) as caught:
        compare(first, second)
    assert str(caught.value) == (f"the reports are not of one setting: {said}; compare them nevertheless: --anyway")
    found = compare(first, second, anyway=True)
    assert found.differences == [said]
    assert next(lines(found)) == f"not equal: {said}"


def test_another_revision_is_what_a_comparison_is_about() -> None:
    second = a_report(a_case(), environment={"git": {"revision": "f" * 40, "dirty": True}, "moe3d_deploy": "0.2.0"})
    assert compare(a_report(a_case()), second).differences == []


def test_other_threads_and_another_model_are_refused() -> None:
    first = a_report(a_case())
    with pytest.raises(InputError, match=r"threads of moe3d-tiny pytorch fp32 1x1x196x252: 2 and 4"):
        compare(first, a_report(a_case([a_round(threads=4)])))
    other = a_report(a_case())
    assert other.sections.cases is not None
    other.sections.cases.models["moe3d-tiny"]["img_size"] *= 2
    with pytest.raises(InputError, match=r"config of moe3d-tiny differs"):
        compare(first, other)


def test_reports_without_a_common_case_are_refused() -> None:
    with pytest.raises(InputError, match=r"no measured case in common; measure the same models, backends and shapes"):
        compare(a_report(a_case()), a_report(a_case(shape=(1, 3, 196, 252))))
