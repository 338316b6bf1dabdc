"""Learning rate and temperature at steps computed by hand."""

import math
from pathlib import Path

import pytest
from trainings import run, short, tiny_checkpoint

from moe3d_deploy.checkpoint import open_checkpoint
from moe3d_deploy.errors import InputError
from moe3d_deploy.training.logs import read_log
from moe3d_deploy.training.schedules import learning_rate_factor, temperature_at


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),  # the warm-up's last step
        (4, 1.0),  # the cosine's first: cos 0
        (7, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45 degrees
        (10, 0.55),  # half way: the mean of 1 and the floor
        (16, 0.1),
        (1000, 0.1),
    ],
)
def test_learning_rate_rises_then_follows_half_a_cosine(step: int, factor: float) -> None:
    assert learning_rate_factor(step, warmup=4, total=16, floor=0.1) == pytest.approx(factor, rel=1e-12)


def test_learning_rate_without_warm_up_starts_at_its_largest() -> None:
    assert learning_rate_factor(0, warmup=0, total=10) == 1


def test_learning_rate_never_rises_after_the_warm_up_and_is_never_zero_in_a_run() -> None:
    factors = [learning_rate_factor(step, 5, 50) for step in range(50)]
    assert factors[:5] == sorted(factors[:5])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert min(factors) > 0


@pytest.mark.parametrize(("step", "value"), [(0, 4.0), (2, 2.0), (4, 1.0), (6, 0.5), (8, 0.25), (20, 0.25)])
def test_temperature_falls_by_equal_factors_to_the_last_step(step: int, value: float) -> None:
    assert temperature_at(step, total=9, start=4.0, end=0.25) == pytest.approx(value, rel=1e-12)


def test_constant_temperature_has_no_rounding() -> None:
    assert {temperature_at(step, 7, 0.7, 0.7) for step in range(7)} == {0.7}


def test_a_run_of_one_step_has_the_last_temperature() -> None:
    assert temperature_at(0, 1, 4.0, 0.5) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learning_rate_factor(0, 9, 8), "warm-up of 9 steps in a run of 8"),
        (lambda: learning_rate_factor(0, -1, 8), "warm-up of -1 steps in a run of 8"),
        (lambda: learning_rate_factor(0, 0, 0), "in a run of 0"),
        (lambda: learning_rate_factor(0, 1, 8, 1.5), "floor of the learning rate is 1.5"),
        (lambda: learning_rate_factor(-1, 1, 8), "step -1 is negative"),
        (lambda: temperature_at(0, 0, 1, 1), "a run of 0 steps"),
        (lambda: temperature_at(0, 5, 0, 1), "gate temperature must be a number > 0, got 0"),
        (lambda: temperature_at(0, 5, 1, math.nan), "gate temperature must be a number > 0, got nan"),
        (lambda: temperature_at(-2, 5, 1, 1), "step -2 is negative"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


def test_a_new_phase_keeps_the_temperature_of_its_source(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    run(short(checkpoint, steps=1, temperature=(2.0, 0.5)), tmp_path / "first")
    source = tmp_path / "first" / "checkpoint"
    for name, scratch, given, expected in (
        ("kept", False, None, 0.5), ("given", False, (0.7, 0.7), 0.7), ("fresh", True, None, 1.0),
    ):  # fmt: skip
        run(short(source, steps=1, from_scratch=scratch, temperature=given), tmp_path / name)
        (line,) = read_log(tmp_path / name / "train.jsonl", "step")
        moe = open_checkpoint(tmp_path / name / "checkpoint").config.moe
        assert moe is not None
        assert (line["temperature"], moe.temperature) == (expected, expected)
