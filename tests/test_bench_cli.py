"""`moe3d bench` as a user meets it; the measuring itself is replaced by figures that were made up."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_reports import a_case, a_report, a_round, refused

from moe3d_deploy.benchmarks.bench import folder, run
from moe3d_deploy.benchmarks.bench.report import Report
from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import MissingExtraError, Moe3dError

Request = dict[str, Any]
MADE = ["latency.svg", "memory.svg", "report.html", "report.json", "report.md", "roofline.svg"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """No case is measured: each takes 10 s, which any machine reaches. Gives the requests."""
    requests: list[Request] = []

    def in_child(request: Request, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        requests.append(request)
        on_event({"step": "runs"})
        return dataclasses.asdict(a_round((1e4, 1e4, 1.1e4)))

    monkeypatch.setattr(run.run_cases, "__kwdefaults__", {**(run.run_cases.__kwdefaults__ or {}), "measure": in_child})
    return requests


def instead(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    monkeypatch.setattr(run.run_cases, "__kwdefaults__", {**(run.run_cases.__kwdefaults__ or {}), "measure": measure})


def test_tables_are_printed(measured: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42,1x2x28x42", "--shapes", "2x1x28x42"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Latency\nmodel       backend  precision  shape BxSxHxW      p50")
    assert [request["shape"] for request in measured[:3]] == [[1, 1, 28, 42], [1, 2, 28, 42], [2, 1, 28, 42]]
    assert len(measured) == 9  # three processes each
    for title in ("Stages", "Memory", "Ceilings", "Conditions"):
        assert f"\n{title}\n" in out


def test_options_reach_the_measurement(measured: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--views", "3", "--threads", "2", "--runs", "8", "--budget", "4", "--processes", "2"]
    own = ["--seed", "5", "--view-chunk", "1", "--backend", "pytorch"]
    assert main(["bench", "moe3d-tiny", *options, *own]) == 0
    request, _ = measured
    assert request["shape"][:2] == [1, 3]
    assert (request["threads"], request["backend"]) == (2, "pytorch")
    assert (request["effort"]["min_runs"], request["effort"]["budget_ms"]) == (4, 2000.0)
    assert request["options"] == {"seed": 5, "view_chunk": 1}
    capsys.readouterr()


def test_json_is_the_report(measured: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42", "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out.encode(), "stdout")
    assert [case.label for case in report.cases] == ["moe3d-tiny pytorch fp32 1x1x28x42"]


def test_out_is_the_folder_and_report_makes_it_again(
    measured: list[Request], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42", "--out", str(out)]) == 0
    assert f"written to {out}" in capsys.readouterr().err
    assert main(["bench", "--report", str(out / "report.json"), "--out", str(again)]) == 0
    assert capsys.readouterr().out.startswith(f"6 files in {again}: report.json, report.md")
    assert sorted(path.name for path in out.iterdir()) == MADE
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in out.iterdir()
    }


def test_a_time_that_cannot_be_true_ends_with_1_after_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A microsecond a run."""
    instead(monkeypatch, lambda request, on_event: dataclasses.asdict(a_round((0.001,) * 3)))
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42", "--out", str(tmp_path / "out")]) == 1
    (case,) = Report.load(tmp_path / "out").cases
    assert case.status == "impossible"
    assert "the time is wrong" in capsys.readouterr().out


def test_a_case_that_fails_ends_with_1_and_the_others_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(request: Request, on_event: Any) -> dict[str, Any]:
        if request["shape"][1] == 2:
            raise Moe3dError("the case's process ran out of memory; free some, or use a machine with more")
        return dataclasses.asdict(a_round((1e4,) * 3))

    instead(monkeypatch, measure)
    out = tmp_path / "out"
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42,1x2x28x42,1x3x28x42", "--out", str(out)]) == 1
    assert [case.status for case in Report.load(out).cases] == ["measured", "failed", "measured"]
    assert "ran out of memory" in capsys.readouterr().out


def test_ctrl_c_leaves_a_whole_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(request: Request, on_event: Any) -> dict[str, Any]:
        if request["shape"][1] == 2:
            raise KeyboardInterrupt
        return dataclasses.asdict(a_round((1e4,) * 3))

    instead(monkeypatch, measure)
    out = tmp_path / "out"
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42,1x2x28x42", "--out", str(out)]) == 130
    assert capsys.readouterr().err.endswith("moe3d: interrupted\n")
    report = Report.load(out)
    assert not report.complete
    assert [case.shape[1] for case in report.cases] == [1]
    assert sorted(path.name for path in out.iterdir()) == MADE


def test_plots_that_cannot_be_drawn_are_known_before_measuring(
    measured: list[Request], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> None:
        raise MissingExtraError(package, "bench")

    monkeypatch.setattr(folder, "require", missing)
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42", "--out", str(tmp_path / "out")]) == 1
    assert "matplotlib is not installed: pip install 'moe3d-deploy[bench]'" in capsys.readouterr().err
    assert measured == []


def test_a_folder_that_cannot_be_is_known_before_measuring(
    measured: list[Request], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "moe3d-tiny", "--shapes", "1x1x28x42", "--out", str(tmp_path / "file")]) != 0
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert measured == []


def test_compare_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, factor in (("a", 1.0), ("b", 1.1)):
        rounds = [a_round([factor * value for value in (10.0, 10.1, 9.9, 10.0)]) for _ in range(3)]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_bytes(a_report(a_case(rounds)).to_json())
    assert main(["bench", "--compare", *map(str, files)]) == 0
    assert "moe3d-tiny pytorch fp32 1x1x196x252  slower by 10.0 % [" in capsys.readouterr().out
    assert main(["bench", "--compare", *map(str, files), "--json"]) == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert change["ratio"] == pytest.approx(1.1)
    assert change["beyond_noise"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to measure; name a bundle, a checkpoint or a preset, such as moe3d-tiny"),
        (["nowhere"], "nowhere: no such file or folder, nor a preset"),
        (["moe3d-tiny", "--shapes", "1x1x28"], "expected BxSxHxW"),
        (["moe3d-tiny", "--shapes", "1x1x28x41"], "width 41 is not a multiple of the patch size 7"),
        (["moe3d-tiny", "--views", "1,x"], "--views '1,x': expected numbers of views, such as 1,2,4"),
        (["moe3d-tiny", "--views", "1", "--shapes", "1x1x28x42"], "--views and --shapes both say what is run"),
        (["moe3d-tiny", "--backend", "onnxruntime"], "moe3d-tiny runs in pytorch, which --backend leaves out; make"),
        (
            ["moe3d-tiny", "--peers", "--peer", "pytorch"],
            "--peers means all of them and --peer some; leave one of",
        ),
        (["moe3d-tiny", "--peer", "tensorrt"], "tensorrt is a peer of a bundle, and none is named; name one"),
        (["--report", "r.json", "--peer", "pytorch", "--out", "o"], "has no use for --peer; leave one of them out"),
        (["moe3d-tiny", "--anyway"], "--anyway is for --compare; leave it out"),
        (["moe3d-tiny", "--report", "r.json", "--out", "o"], "--report measures nothing and has no use for moe3d-tiny"),
        (["--report", "r.json", "--runs", "3", "--out", "o"], "--report measures nothing and has no use for --runs"),
        (["--report", "r.json"], "say where with --out FOLDER"),
        (["--report", "r.json", "--out", "o"], "r.json: no such report; give a report.json or the folder that holds"),
        (["--compare", "a", "b", "--out", "o"], "--compare measures nothing and has no use for --out"),
        (["--compare", "a", "b"], "a: no such report"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, measured: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *arguments)
    assert measured == []


def test_a_checkpoint_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is replaced: a process of its own loads the smallest model, runs it and measures the ceilings."""
    import exports

    few = ["--shapes", "1x2x28x42", "--runs", "2", "--budget", "0", "--processes", "1", "--threads", "1"]
    assert main(["bench", str(exports.checkpoint()), *few, "--out", str(tmp_path / "out")]) == 0
    (case,) = Report.load(tmp_path / "out").cases
    (item,) = case.rounds
    assert case.label == "small pytorch fp32 1x2x28x42"
    assert set(item.series) == {"upload", "model", "download", "inference"}
    assert len(item.series["inference"]) == 2
    assert item.pipeline is not None
    assert item.pipeline["post"][0] > 0
    assert item.memory.peak_bytes > 0
    assert item.memory.activations_by == "allocator"
    assert item.threads == 1
    assert item.before["load_average"] is not None
    assert "small  pytorch  fp32       1x2x28x42" in capsys.readouterr().out


def test_a_process_that_dies_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel ends one that has taken all memory."""
    import exports

    monkeypatch.setattr(run, "_CHILD", "bench_reports:die")
    few = ["--shapes", "1x1x28x42", "--processes", "1"]
    assert main(["bench", str(exports.checkpoint()), *few, "--out", str(tmp_path / "out")]) == 1
    (case,) = Report.load(tmp_path / "out").cases
    assert (case.status, case.rounds) == ("failed", ())
    assert case.reason == (
        "the case's process was killed; the machine probably ran out of memory (see `dmesg`): free some and try again"
    )
