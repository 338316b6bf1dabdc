"""What a person is told about the speed of a run: training alone counts, and the last lap alone."""

import pytest

from moe3d_deploy.training import meter
from moe3d_deploy.training.meter import Meter, time_left


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(meter, "time", made)
    return made


def test_the_pace_is_that_of_the_last_lap(clock: Clock) -> None:
    """The first lap compiles: its steps take 10 s, later ones 2 s."""
    run = Meter()
    paces = []
    for seconds in (10.0, 10.0, 2.0, 2.0, 2.0):
        clock.now += seconds
        run.steps += 1
        paces.append(run.pace)
        if run.steps == 2:
            run.lap()
    assert paces == [10, 10, 10, 10, 2]


def test_a_lap_has_its_seconds_waits_and_steps_and_no_pauses(clock: Clock) -> None:
    run = Meter()
    for _ in range(3):
        clock.now += 4
        run.steps += 1
        run.waited += 0.5
    with run.paused():  # a validation
        clock.now += 60
    assert run.lap() == (12, 1.5, 3)
    clock.now += 1
    assert run.lap() == (1, 0, 0)


def test_a_validation_that_fails_ends_its_pause(clock: Clock) -> None:
    def fail() -> None:
        with run.paused():
            clock.now += 60
            raise ValueError("x")

    run = Meter()
    with pytest.raises(ValueError, match="x"):
        fail()
    clock.now += 1
    run.steps += 1
    assert run.pace == 1


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s left"), (89.4, "89 s left"), (90, "2 min left"), (5399, "90 min left"), (5400, "1.5 h left"),
])  # fmt: skip
def test_time_left_has_the_unit_of_its_size(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
