"""`moe3d bench` as a GPU check: its report is kept, and what is wrong in it fails the check."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from recorder import Recorder
from trainings import tiny_checkpoint

from moe3d_deploy.benchmarks import checks_bench
from moe3d_deploy.errors import Moe3dError

QUICK = ("--shapes", "1x1x28x42", "--runs", "1", "--budget", "0", "--processes", "1")


@pytest.fixture
def run(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def ends_with(monkeypatch: pytest.MonkeyPatch, code: int, stdout: str, stderr: str = "") -> None:
    ended = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(checks_bench.subprocess, "run", lambda *args, **options: ended)


def test_the_whole_report_is_a_figure(run: Recorder, tmp_path: Path) -> None:
    checks_bench.bench(run, [str(tiny_checkpoint(tmp_path / "tiny"))], QUICK)
    assert run.failures == []
    (case,) = run.figures["report"]["sections"]["cases"]["cases"]
    assert (case["status"], case["shape"]) == ("measured", [1, 1, 28, 42])


def test_rows_without_figures_fail_and_those_that_cannot_run_here_do_not(
    run: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(status: str, **more: Any) -> dict[str, Any]:
        return {"backend": "pytorch", "precision": "fp16", "status": status, "reason": f"why {status}", **more}

    cases = [row(status, shape=[1, 2, 28, 42]) for status in ("measured", "unavailable", "failed", "impossible")]
    variants = [row(status) for status in ("compared", "not run", "failed")]
    report = {"sections": {"cases": {"cases": cases}, "parity": {"variants": variants}}}
    ends_with(monkeypatch, 1, json.dumps(report))
    checks_bench.bench(run, ["some"], ())
    assert run.failures == [
        "pytorch fp16 1x2x28x42: why failed",
        "pytorch fp16 1x2x28x42: why impossible",
        "pytorch fp16: why failed",
    ]


def test_values_outside_their_limits_fail(run: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with(monkeypatch, 1, json.dumps({"sections": {"cases": None}}))
    checks_bench.bench(run, ["some"], ())
    assert run.failures == ["moe3d bench ended with 1: a value leaves the limits of its precision"]


@pytest.mark.parametrize(("said", "last"), [("first\nError: no such preset\n", "Error: no such preset"), ("", "ended")])
def test_a_command_without_a_report_is_an_error(
    run: Recorder, monkeypatch: pytest.MonkeyPatch, said: str, last: str
) -> None:
    ends_with(monkeypatch, 2, "", said)
    with pytest.raises(Moe3dError, match=f"^moe3d bench: {last}"):
        checks_bench.bench(run, ["some"], ())
