"""The result file of `benchmarks.quality`: its documented form, from a real run on one small scene per split."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import pytest
from click.testing import CliRunner

from moe3d_deploy.benchmarks import quality as benchmark
from moe3d_deploy.child import ChildResult
from moe3d_deploy.errors import ExportError, InputError, Moe3dError
from moe3d_deploy.export import quality
from moe3d_deploy.export.pipeline import ExportOptions

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ExportOptions]:
    """Stages run here; every export gives the fp16 bundle, and that of fp32 fails. Returns what was asked for."""
    options_seen: list[ExportOptions] = []

    def run(function: str, request: dict[str, Any], *, title: str, on_event: Any, failure: Any) -> ChildResult:
        module, _, name = function.partition(":")
        return ChildResult(getattr(importlib.import_module(module), name)(request, on_event), 0.1, 1)

    def export_bundle(spec: Any, path: Path, options: ExportOptions, *, on_event: Any) -> SimpleNamespace:
        options_seen.append(options)
        on_event({"stage": "export", "step": 0, "total": 1, "detail": "trace"})
        if options.policy.precision == "fp32":
            raise ExportError("stage export failed: no room in /elsewhere/somebody/scratch")
        return SimpleNamespace(bundle=exports.bundle().report.bundle)

    monkeypatch.setattr(benchmark, "run_in_child", run)
    monkeypatch.setattr(benchmark, "export_bundle", export_bundle)
    return options_seen


def documented() -> dict[str, set[str]]:
    """The keys of the table of the page, with those that their rows list."""
    table = PAGE.partition("The file:")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    return {key: set(re.findall(r"`(\w+)`", text)) for key, text in rows}


def test_the_result_has_its_documented_form(asked: list[ExportOptions], tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    precisions = [word for name in ("fp16", "bf16") for word in ("--precision", name)]
    arguments = [str(exports.checkpoint()), "--out", str(out), "--count", "2", "--views", "2", *precisions]
    result = CliRunner().invoke(benchmark.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == ""

    report = json.loads(out.read_text())
    keys = documented()
    assert set(report) == set(keys)
    assert report["format_version"] == 1
    assert report["model"].keys() == keys["model"]
    assert report["model"]["origin"] == "seeded:small seed 0"
    assert report["scenes"] == {"count": 2, "first_seed": 0, "views": 2, "height": 28, "width": 42}

    assert [row["split"] for row in report["quality"]] == ["test-seeds", "test-kinds"]
    for row in report["quality"]:
        assert row.keys() == {"split", "metrics"}
        assert {"abs_rel", "auc30", "accuracy_mean", "expert_share_0"} < row["metrics"].keys()
        assert row["metrics"]["abs_rel"].keys() == {"mean", "median", "scenes", "worst"}
        assert row["metrics"]["abs_rel"]["worst"] in ("0", "1")

    rows = report["deployment"]
    assert [(row["precision"], row["run"]) for row in rows] == [
        ("fp16", "executed"), ("fp16", "rounded"), ("bf16", "twin"), ("bf16", "rounded"),
    ]  # fmt: skip
    assert [options.policy.precision for options in asked] == ["fp16", "bf16"]
    assert {options.outputs for options in asked} == {quality.EXPERTS}
    for row in rows:
        assert row.keys() <= keys["deployment"]
        assert row["scenes"] == 2
        assert row["changes"]["abs_rel"].keys() == {"reference", "found", "change", "low", "high"}
        change = row["changes"]["abs_rel"]
        assert row["within_limits"] == (
            abs(change["change"]) <= row["limits"]["abs_rel"]
            and abs(row["changes"].get("boundary_f1", {"change": 0})["change"]) <= row["limits"]["boundary_f1"]
        )
    # the same scenes as the first split, in PyTorch float32 too
    assert rows[0]["changes"]["abs_rel"]["reference"] == pytest.approx(
        report["quality"][0]["metrics"]["abs_rel"]["mean"], rel=1e-5
    )
    assert rows[1]["experts_agree"] > 0.98
    assert rows[0]["experts_agree"] is None
    assert str(tmp_path) not in out.read_text()


@pytest.mark.usefixtures("asked")
def test_an_export_that_fails_is_recorded_and_fails_the_run(tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    arguments = [str(exports.checkpoint()), "--out", str(out), "--count", "1", "--views", "1", "--no-points"]
    result = CliRunner().invoke(benchmark.main, [*arguments, "--precision", "fp32"])
    assert isinstance(result.exception, Moe3dError)
    assert str(result.exception) == "fp32: stage export failed: no room in scratch"
    report = json.loads(out.read_text())
    assert report["deployment"] == [{"precision": "fp32", "failed": "stage export failed: no room in scratch"}]
    assert "accuracy_mean" not in report["quality"][0]["metrics"]
    assert "auc30" not in report["quality"][0]["metrics"]  # of a single view


def test_an_unknown_precision_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(benchmark.main, ["moe3d-tiny", "--out", str(tmp_path / "x.json"), "--precision", "fp8"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith("--precision fp8: no such precision; choose from fp32, fp16,")
