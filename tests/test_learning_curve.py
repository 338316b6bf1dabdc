"""How errors fall with samples: on curves with a known answer, and from two trained stages to the table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_training_phases import LINE, run_folder
from trained_weights import small_preset, trained_checkpoint

from moe3d_deploy.benchmarks import learning_curve
from moe3d_deploy.benchmarks.learning_curve import samples_to, stages_table, trend, trend_text
from moe3d_deploy.benchmarks.training_phases import phase
from moe3d_deploy.cli.main import finish


def scenes(count: int = 100, spread: float = 0.3) -> np.ndarray:
    return np.exp(np.random.default_rng(3).normal(0, spread, count))


def test_a_power_of_the_samples_is_found() -> None:
    samples = [100, 400, 1600]
    errors = np.outer([0.4 * n**-0.25 for n in samples], scenes() / scenes().mean())
    assert trend(samples, errors) == pytest.approx((0.25, 0.25, 0.25)), "every scene falls alike"


def test_scenes_that_fall_unlike_widen_the_interval() -> None:
    errors = np.stack([scenes(), 0.9 * scenes() * np.exp(np.random.default_rng(4).normal(0, 0.2, 100))])
    power, low, high = trend([1000, 2000], errors)
    assert low < power < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 * 1.05 / (math.sqrt(100) * math.log(2)), rel=0.25)


def test_the_way_to_a_bar() -> None:
    """0.4 n^-0.25: 0.04 at 10,000 samples, 0.02 at 160,000."""
    assert samples_to(0.02, 0.25, 10_000, 0.04) == pytest.approx(160_000)
    assert samples_to(0.04, 0.25, 10_000, 0.04) == 10_000
    assert samples_to(0.02, 0.0, 10_000, 0.04) == samples_to(0.02, -0.1, 10_000, 0.04) == math.inf


def report(later: float) -> dict[str, object]:
    def errors(factor: float) -> dict[str, dict[str, list[float]]]:
        figures = {key: [factor, 3 * factor] for key in learning_curve.KEPT}
        return {"test-seeds": figures, "test-kinds": figures}

    def stage(samples: int, factor: float) -> dict[str, object]:
        phases = [
            {"steps": 1, "samples": samples - 600, "seconds": samples}, {"steps": 1, "samples": 600, "seconds": 0}
        ]  # fmt: skip
        return {"phases": phases, "errors": errors(factor)}

    size = {"views": 4, "height": 84, "width": 112}
    return {
        "scenes": {"count": 2, **size},
        "stages": [stage(3600, 0.16), stage(7200, later)],
        "last_at_own_size": {"views": 4, "height": 168, "width": 224, "errors": errors(2 * later)},
    }


def test_the_table_and_what_it_means() -> None:
    """From 0.32 to 0.16 in one doubling; from 0.32 at the own size two more to 0.08, 28,800 samples at one a second."""
    told = report(0.08)
    table = stages_table(told).splitlines()
    assert table[2:4] == [
        "| 3,600 | 1.0 | 0.3200, 0.3200 | 32.00 %, 32.00 % | 0.3200, 0.3200 | 0.3200, 0.3200 |",
        "| 7,200 | 2.0 | 0.1600, 0.1600 | 16.00 %, 16.00 % | 0.1600, 0.1600 | 0.1600, 0.1600 |",
    ]
    assert "4 views of 112x84" in table[-1]
    assert trend_text(told).splitlines()[0] == (
        "- `test-seeds`: twice the samples take 50.0 % off AbsRel (50.0 to 50.0 %). From the 0.3200 of the last row's "
        "weights at 224x168, 0.08 then takes 29,000 samples in all (29,000 to 29,000), 8 hours at their pace (8 to 8)."
    )


def test_no_fall_is_told_as_such() -> None:
    assert "0.08 then takes infinitely many samples in all (" in trend_text(report(0.17))


def run(*arguments: str | Path) -> int:
    return finish("learning-curve", lambda: learning_curve.main, list(map(str, arguments)))


def test_two_stages_of_a_training_are_judged_on_the_same_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_preset(tmp_path / "weights", monkeypatch)
    first = run_folder(tmp_path / "first", LINE, seed=1)
    second = run_folder(tmp_path / "second", LINE, source=str(first / "checkpoint"), from_scratch=False)
    stages = [trained_checkpoint(folder / "checkpoint") for folder in (first, second)]
    out = tmp_path / "curve.json"
    assert run(*stages, "--count", 2, "--views", 2, "--height", 28, "--width", 35, "--out", out) == 0
    told = json.loads(out.read_text())
    assert [stage["phases"] for stage in told["stages"]] == [[phase(first)], [phase(first), phase(second)]]
    before, after = (stage["errors"] for stage in told["stages"])
    assert before == after, "these are the same weights"
    assert [len(before[split]["abs_rel"]) for split in ("test-seeds", "test-kinds")] == [2, 2]
    assert told["scenes"] == {"count": 2, "first_seed": 0, "views": 2, "height": 28, "width": 35}
    own = told["last_at_own_size"]
    assert (own["views"], own["height"], own["width"]) == (2, 21, 28)
    assert own["errors"] != after
    assert str(tmp_path) not in out.read_text()
    assert "| 2,400 | 0.1 |" in stages_table(told)


def test_stages_that_make_no_curve_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_preset(tmp_path / "weights", monkeypatch)
    stage = trained_checkpoint(run_folder(tmp_path / "first", LINE) / "checkpoint")
    other = trained_checkpoint(tmp_path / "other" / "checkpoint")
    out = tmp_path / "curve.json"
    assert run(stage, stage, "--out", tmp_path / "none" / "curve.json") == 2
    assert f"--out {tmp_path}/none/curve.json: folder {tmp_path}/none does not exist; create it" in (
        capsys.readouterr().err
    )
    for sources, message in (
        ([stage], "name two or more trainings"),
        ([stage, stage], "name two or more trainings"),
        ([stage, other], "of these weights no training is known"),
        (["moe3d-tiny", stage], "of these weights no training is known"),
    ):
        assert run(*sources, "--out", out) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()
