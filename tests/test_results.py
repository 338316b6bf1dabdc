"""The measurements in `benchmarks/results`: what they promise, and the tools that make tables of them."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe3d_deploy.benchmarks import activation_memory, demo, export_costs, tables
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.memory import activation_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "export_cpu.json"

# What a full-size fp16 export may cost on 2 cores: seconds and bytes, without and for the engine.
EXPORT_SECONDS, EXPORT_PEAK = 6 * 60, 9e9
ENGINE_SECONDS, ENGINE_PEAK = 3 * 60, 10e9


def row_of(model: str, precision: str) -> dict[str, Any]:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return next(row for row in rows if (row["model"], row["precision"]) == (model, precision))


def test_every_case_was_measured_and_succeeded() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert [f"{row['model']}:{row['precision']}" for row in rows] == list(export_costs.CASES)
    assert [row for row in rows if "failed" in row] == []


def test_a_full_size_export_stays_within_its_limits() -> None:
    row = row_of("moe3d-1b", "fp16")
    stages = row["stages"].values()
    assert sum(stage["seconds"] for stage in stages) <= EXPORT_SECONDS
    assert max(stage["peak_bytes"] for stage in stages) <= EXPORT_PEAK
    assert row["engine"]["seconds"] <= ENGINE_SECONDS
    assert row["engine"]["peak_bytes"] <= ENGINE_PEAK


def test_results_name_no_folder_of_a_machine() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    assert re.search(r"(?<![\w.])/(home|root|tmp|work)/", text) is None


def test_the_worst_error_is_taken_over_all_shapes() -> None:
    cases = [
        {"errors": {"executed": {"depth": {"max": 1e-3, "mean": 5e-4}}}},
        {"errors": {"executed": {"depth": {"max": 4e-4, "mean": 9e-4}}}},
    ]
    assert export_costs.worst_errors(cases) == {"executed": {"depth": {"max": 1e-3, "mean": 9e-4}}}


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command fails as one does that the kernel ends: with nothing said."""

    def run(arguments: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(arguments, returncode=-9, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.usefixtures("no_runs")
def test_a_failed_case_is_recorded_beside_the_others_and_fails_the_run(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    out.write_text(json.dumps({"rows": [{"model": "moe3d-tiny", "precision": "fp32", "kept": True}]}))

    result = CliRunner().invoke(export_costs.main, ["--out", str(out), "--only", "moe3d-tiny:fp16"])

    assert isinstance(result.exception, Moe3dError)
    assert str(result.exception) == "moe3d-tiny:fp16: exit code -9"
    kept, failed = json.loads(out.read_text())["rows"]
    assert kept["kept"]
    assert failed["failed"] == "exit code -9"


def test_a_case_that_does_not_exist_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(export_costs.main, ["--out", str(tmp_path / "x.json"), "--only", "moe3d-tiny:fp8"])
    assert isinstance(result.exception, InputError)
    assert "moe3d-tiny:fp8: no such case" in str(result.exception)


def test_a_table_without_results_says_so(tmp_path: Path) -> None:
    text = "<!-- table: export_costs results/none.json -->\n<!-- end table -->"
    with pytest.raises(InputError, match=r"none\.json does not exist; measure it first"):
        tables.render(text, tmp_path)


def test_an_unknown_table_is_named() -> None:
    text = "<!-- table: speed results/export_cpu.json -->\n<!-- end table -->"
    with pytest.raises(InputError, match="table 'speed' is unknown; choose from export_costs"):
        tables.render(text, ROOT)


def test_the_demo_leaves_a_folder_that_is_not_its_own_alone(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("years of work")

    result = CliRunner().invoke(demo.main, ["--out", str(tmp_path)])

    assert isinstance(result.exception, InputError)
    assert "is not an earlier demo; choose another --out" in str(result.exception)
    assert (tmp_path / "results" / "thesis.txt").read_text() == "years of work"


@pytest.mark.usefixtures("no_runs")
def test_a_step_of_the_demo_that_fails_ends_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.main, ["--out", str(tmp_path / "demo")])
    assert isinstance(result.exception, Moe3dError)
    assert str(result.exception) == "moe3d convert failed, see above"


def test_published_activation_memory_is_that_of_this_code_and_within_its_bound() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "memory_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == sum(len(shapes) for *_, shapes in activation_memory.CASES)
    for row in rows:
        config, shape = activation_memory.MODELS[row["model"]], tuple(row["shape"])
        predicted = activation_bytes(config, shape, form=row["form"], precision=row["precision"])
        assert row["predicted_bytes"] == predicted
        assert row["measured_bytes"] > 256e6
        assert abs(predicted / row["measured_bytes"] - 1) <= 0.15
