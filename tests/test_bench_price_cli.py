"""`moe3d bench --price` as a user meets it; but for one test, made-up figures stand in for the measuring."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest
from test_bench_price_run import Request, made_up, no_export

from moe3d_deploy.benchmarks.bench.price_run import run_price
from moe3d_deploy.benchmarks.bench.report import Report
from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import Moe3dError


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """No head is run or exported. Gives the requests."""
    requests: list[Request] = []

    def in_child(request: Request, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        requests.append(request)
        return made_up(request, on_event)

    defaults = {**(run_price.__kwdefaults__ or {}), "measure": in_child, "export": no_export}
    monkeypatch.setattr(run_price, "__kwdefaults__", defaults)
    return requests


def test_the_price_alone_is_all_that_is_measured(
    measured: list[Request], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--price", "--views", "1", "--experts", "3", "--processes", "2", "--out", str(tmp_path / "out")]
    assert main(["bench", str(exports.checkpoint()), *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Price of the experts\n")
    report = Report.load(tmp_path / "out")
    assert report.complete
    assert report.sections.cases is None
    assert report.sections.price is not None
    assert report.sections.price.model == "small"
    assert {(case.backend, case.part, case.num_experts) for case in report.sections.price.cases} == {
        ("pytorch", "model", 2), ("pytorch", "head", 2), ("pytorch", "head", 3),
        ("onnxruntime", "head", 2), ("onnxruntime", "head", 3),
    }  # fmt: skip
    assert (tmp_path / "out" / "overhead.svg").exists()
    again = tmp_path / "again"
    assert main(["bench", "--report", str(tmp_path / "out"), "--out", str(again)]) == 0
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
    }


def test_options_reach_the_measurement(measured: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--shapes", "1x2x28x42", "--threads", "2", "--runs", "8", "--budget", "4", "--processes", "2"]
    assert main(["bench", str(exports.checkpoint()), "--price", "--experts", "2", "--backend", "pytorch", *flags]) == 0
    assert len(measured) == 4  # model and head, two processes
    request = measured[0]
    assert (request["shape"], request["threads"], request["backend"]) == ([1, 2, 28, 42], 2, "pytorch")
    assert (request["effort"]["min_runs"], request["effort"]["budget_ms"]) == (4, 2000.0)
    capsys.readouterr()


def test_a_checkpoint_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is replaced: processes of their own load the smallest model and its head, and run every form."""
    few = ["--shapes", "1x1x28x42", "--runs", "2", "--budget", "0", "--processes", "1", "--threads", "1"]
    flags = ["--price", "--experts", "2", "--backend", "pytorch", "--out", str(tmp_path / "out")]
    assert main(["bench", str(exports.checkpoint()), *few, *flags]) == 0
    price = Report.load(tmp_path / "out").sections.price
    assert price is not None
    assert [case.part for case in price.cases] == ["model", "head"]
    for case in price.cases:
        (item,) = case.rounds
        assert {form: len(times) for form, times in item.series.items()} == {"single": 2, "plain": 2, "merged": 2}
        assert (item.device, item.threads) == ("cpu", 1)
        assert all(item.activations_bytes.values())
    assert "Forms without a figure" in capsys.readouterr().out


def test_a_failed_case_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(request: Request, on_event: Any) -> dict[str, Any]:
        raise Moe3dError("it broke")

    defaults = {**(run_price.__kwdefaults__ or {}), "measure": broken, "export": no_export}
    monkeypatch.setattr(run_price, "__kwdefaults__", defaults)
    flags = ["--price", "--views", "1", "--experts", "2", "--backend", "pytorch", "--json"]
    assert main(["bench", str(exports.checkpoint()), *flags]) == 1
    values = json.loads(capsys.readouterr().out)
    assert {case["reason"] for case in values["sections"]["price"]["cases"]} == {"it broke"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--price"], "one checkpoint or preset, and 0 are named"),
        (["moe3d-tiny", "vggt-1b", "--price"], "one checkpoint or preset, and 2 are named"),
        (["moe3d-tiny", "--experts", "2"], "--experts is for --price; leave it out"),
        (["moe3d-tiny", "--price", "--experts", "1"], "--experts '1': expected numbers of experts, at least 2 each"),
        (["moe3d-tiny", "--price", "--experts", "2,x"], "--experts '2,x': expected numbers of experts"),
        (["moe3d-tiny", "--price", "--views", "1", "--shapes", "1x1x28x42"], "--views and --shapes both say"),
        (["moe3d-tiny", "--price", "--shapes", "1x1x28x41"], "width 41 is not a multiple of the patch size 7"),
        (["moe3d-tiny", "--price", "--view-chunk", "1"], "has no use for --view-chunk; leave it out"),
        (["--compare", "a", "b", "--price"], "--compare measures nothing and has no use for --price"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, measured: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert said in captured.err
    assert measured == []
