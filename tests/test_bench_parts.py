"""One `moe3d bench` of several parts: their order, what is kept when one breaks, and what --peers and --scaling add."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_reports import a_report, a_round

from moe3d_deploy.benchmarks.bench import run
from moe3d_deploy.benchmarks.bench.report import Report
from moe3d_deploy.cli import bench
from moe3d_deploy.cli.bench_parts import measure_parts
from moe3d_deploy.cli.main import main
from moe3d_deploy.cli.progress import Progress

Keep = Callable[[Report], None]


@dataclasses.dataclass
class Made:
    """A part that keeps `report` and then raises `error`, if there is one."""

    name: str
    report: Report
    error: BaseException | None = None

    def run(self, report: Report, keep: Keep, progress: Progress) -> Report:
        keep(self.report)
        if self.error:
            raise self.error
        return self.report


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No case is measured; gives the requests."""
    found: list[dict[str, Any]] = []

    def in_child(request: dict[str, Any], on_event: Any) -> dict[str, Any]:
        found.append(request)
        values = dataclasses.asdict(a_round((1e4, 1e4, 1.1e4)))
        (rates,) = values["ceilings"]["flops_per_second"].values()
        values["ceilings"]["flops_per_second"] = dict.fromkeys(request["types"], rates)
        return values

    monkeypatch.setattr(run.run_cases, "__kwdefaults__", {**(run.run_cases.__kwdefaults__ or {}), "measure": in_child})
    return found


def test_a_report_is_complete_only_when_every_part_is_done(tmp_path: Path) -> None:
    seen = []

    class Looks(Made):
        def run(self, report: Report, keep: Keep, progress: Progress) -> Report:
            seen.append(Report.load(tmp_path / "out").complete)
            return report

    made = a_report()
    report = measure_parts([Made("first", made), Looks("second", made)], tmp_path / "out")
    assert seen == [False]
    assert report.complete
    assert Report.load(tmp_path / "out") == report


def test_ctrl_c_in_a_later_part_leaves_what_the_earlier_ones_found(tmp_path: Path) -> None:
    made = a_report()
    with pytest.raises(KeyboardInterrupt):
        measure_parts([Made("first", made), Made("second", made, KeyboardInterrupt())], tmp_path / "out")
    left = Report.load(tmp_path / "out")
    assert not left.complete
    assert left.cases == made.cases
    assert "Interrupted: only the cases that were finished are here." in (tmp_path / "out" / "report.md").read_text()


def test_all_is_every_part_in_its_order(
    requests: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[str] = []

    def only_names(parts: Any, out: Path | None) -> Report:
        found.extend(part.name for part in parts)
        return a_report()

    monkeypatch.setattr(bench, "measure_parts", only_names)
    assert main(["bench", "moe3d-tiny", "--all", "--shapes", "1x1x28x42"]) == 0
    assert found == ["cases", "price", "parity"]
    capsys.readouterr()


def test_peers_are_measured_in_turns_and_what_cannot_run_is_a_row_and_no_failure(
    requests: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["moe3d-tiny", "--peers", "--shapes", "1x1x28x42", "--processes", "2", "--json"]
    assert main(["bench", *arguments]) == 0
    cases = Report.from_json(capsys.readouterr().out.encode(), "stdout").cases
    rows = {f"{case.backend} {case.precision}": case for case in cases}
    assert {"pytorch fp32", "pytorch bf16", "pytorch-compiled fp32", "onnxruntime-widespread fp32"} <= set(rows)
    assert rows["onnxruntime fp32"].status == "unavailable"
    assert rows["onnxruntime fp32"].reason == (
        "no bundle of this model was named; make one: moe3d-export moe3d-tiny -o bundle"
    )
    order = [request["backend"] + request["options"].get("precision", "") for request in requests]
    half = len(order) // 2
    assert order[:half] == order[half:]  # the first process of every case, then the second of every case
    assert all(request["workdir"] for request in requests)


def test_scaling_adds_two_sweeps_of_one_process_and_says_with_what_options(
    requests: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "moe3d-tiny", "--scaling", "--shapes", "1x1x28x42", "--processes", "3", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["sections"]["cases"]
    shapes = [tuple(case["shape"]) for case in values["cases"]]
    assert shapes[0] == (1, 1, 28, 42)
    views = [shape for shape in shapes[1:] if shape[2:] == shapes[1][2:]]
    assert [shape[1] for shape in views] == [1, 2, 4, 8]
    pixels = {shape[2:] for shape in shapes[1:] if shape[1] == 1}
    assert len(pixels) >= 3
    assert [len(case["rounds"]) for case in values["cases"]] == [3, *[1] * (len(shapes) - 1)]
    assert values["options"]["scaling"]["processes"] == 1
    assert values["options"]["scaling"]["runs"] == 3


def test_scaling_alone_measures_its_sweeps_and_nothing_else(
    requests: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual shapes at the model's own size would take many times as long as both sweeps."""
    alone, beside = [], []
    for flags, found in ((["--scaling"], alone), (["--scaling", "--cases"], beside)):
        assert main(["bench", "moe3d-tiny", *flags, "--json"]) == 0
        cases = Report.from_json(capsys.readouterr().out.encode(), "stdout").cases
        found.extend((case.shape, len(case.rounds)) for case in cases)
    assert {rounds for _, rounds in alone} == {1}
    assert set(alone) < set(beside)
    assert [rounds for _, rounds in beside[:3]] == [3, 3, 3]


def test_a_shape_that_is_asked_for_and_in_a_sweep_is_one_case(
    requests: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "moe3d-tiny", "--scaling", "--shapes", "1x1x224x224", "--json"]) == 0
    cases = Report.from_json(capsys.readouterr().out.encode(), "stdout").cases
    assert [case.shape for case in cases].count((1, 1, 224, 224)) == 1
    assert len(cases[0].rounds) == 3
