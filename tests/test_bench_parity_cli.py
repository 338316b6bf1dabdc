"""`moe3d bench --parity` as a user meets it, on a small checkpoint whose models run in this process."""

import json
from pathlib import Path
from typing import Any

import exports
import pytest
from bench_reports import refused
from bundles import write_bundle
from parities import in_process

from moe3d_deploy.benchmarks.bench import parity_run
from moe3d_deploy.benchmarks.bench.parity_models import Opened, open_model
from moe3d_deploy.benchmarks.bench.report import Report
from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import Moe3dError

SHAPE = ["--shapes", "1x2x28x42"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint whose variants run without a process of their own."""
    instead(monkeypatch, in_process)
    return str(exports.checkpoint())


def instead(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    options = parity_run.run_parity.__kwdefaults__ or {}
    monkeypatch.setattr(parity_run.run_parity, "__kwdefaults__", {**options, "measure": measure})


def test_tables_are_printed_and_nothing_else_is_measured(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", small, "--parity", *SHAPE]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Parity\nbackend  precision  of     shapes  depth max, worst         at   median")
    assert "Latency" not in out
    assert "\nParity by shape\n" in out


def test_the_report_is_written_and_made_again_from_its_json(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["bench", small, "--parity", *SHAPE, "--out", str(out)]) == 0
    report = Report.load(out)
    assert report.complete
    assert report.sections.cases is None
    assert sorted(path.name for path in out.iterdir()) == ["parity.svg", "report.html", "report.json", "report.md"]
    assert str(tmp_path) not in (out / "report.json").read_text()
    assert main(["bench", "--report", str(out), "--out", str(again)]) == 0
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in out.iterdir()
    }
    capsys.readouterr()


def test_a_variant_beyond_its_limits_ends_with_1_and_is_named_with_its_shape(
    small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(model: Any) -> Opened:
        device, run = open_model(model)

        def faulty(pixels: Any) -> Any:
            outputs = run(pixels)
            return {**outputs, "depth": outputs["depth"] * 1.02} if model["precision"] == "fp16" else outputs

        return Opened(device, faulty)

    monkeypatch.setattr(parity_run, "open_model", opened)
    assert main(["bench", small, "--parity", *SHAPE]) == 1
    lines = capsys.readouterr().out.splitlines()
    (beyond,) = [line for line in lines if "(max relative)" in line]
    assert beyond.split()[:5] == ["pytorch", "fp16", "small", "beyond", "1x2x28x42"]
    assert "depth is off by 0.02" in beyond
    assert [line.split()[-1] for line in lines[2:5]] == ["yes", "shapes", "yes"]


def test_ctrl_c_leaves_a_report_of_what_was_finished(
    small: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(function: str, request: dict[str, Any], on_event: Any) -> None:
        if request.get("model", {}).get("precision") == "bf16":
            raise KeyboardInterrupt
        in_process(function, request, on_event)

    instead(monkeypatch, measure)
    assert main(["bench", small, "--parity", *SHAPE, "--out", str(tmp_path / "out")]) == 130
    capsys.readouterr()
    report = Report.load(tmp_path / "out")
    assert not report.complete
    assert report.sections.parity is not None
    assert [len(variant.cells) for variant in report.sections.parity.variants] == [1, 1]
    assert (tmp_path / "out" / "parity.svg").exists()


def test_a_variant_that_fails_ends_with_1(
    small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(function: str, request: dict[str, Any], on_event: Any) -> None:
        if request.get("model", {}).get("precision") == "bf16":
            raise Moe3dError("the process ran out of memory; free some, or use a machine with more")
        in_process(function, request, on_event)

    instead(monkeypatch, measure)
    assert main(["bench", small, "--parity", *SHAPE, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)["sections"]["parity"]
    assert [variant["status"] for variant in values["variants"]] == ["compared", "compared", "failed"]


def test_one_checkpoint_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    write_bundle(bundle)
    expected = "--parity compares with one checkpoint or preset, and {} are named; name the one that the bundles were"
    assert expected.format(0) in refused(capsys, str(bundle), "--parity")
    assert expected.format(2) in refused(capsys, "moe3d-tiny", "moe3d-1b", "--parity")


def test_what_parity_has_no_use_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--parity alone has no use for --runs; leave it out" in refused(
        capsys, "moe3d-tiny", "--parity", "--runs", "3"
    )
    assert "--compare measures nothing and has no use for --parity" in refused(
        capsys, "--compare", "a", "b", "--parity"
    )
    assert "--bisect has no use for --parity" in refused(capsys, "moe3d-tiny", "--bisect", "fp16", "--parity")
    assert "multiple of the patch size 7" in refused(capsys, "moe3d-tiny", "--parity", "--shapes", "1x1x30x42")
