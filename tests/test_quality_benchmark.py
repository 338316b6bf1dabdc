"""The result file of `benchmarks.quality`: its documented form, from a real run on one small scene per split."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import pytest
import splits
from click.testing import CliRunner

from moe3d_deploy.benchmarks import quality as benchmark
from moe3d_deploy.child import ChildResult
from moe3d_deploy.errors import ExportError, InputError, Moe3dError
from moe3d_deploy.evaluation import Change, Summary
from moe3d_deploy.evaluation.measures import ALIGNMENT
from moe3d_deploy.export import quality
from moe3d_deploy.export.pipeline import ExportOptions

RUNS = {"executed", "twin", "rounded"}
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
        assert row.keys() | row["metrics"]["abs_rel"].keys() | row["bars"]["auc30"].keys() == keys["quality"]
        assert {"abs_rel", "auc30", "accuracy_mean", "expert_share_0"} < row["metrics"].keys()
        assert row["metrics"]["abs_rel"]["worst"] in ("0", "1")
        assert row["bars"]["abs_rel"] == {"bar": 0.08, "reached": False}  # by seeded weights

    rows = report["deployment"]
    assert [(row["precision"], row["run"]) for row in rows] == [
        ("fp16", "executed"), ("fp16", "rounded"), ("bf16", "twin"), ("bf16", "rounded"),
    ]  # fmt: skip
    assert [options.policy.precision for options in asked] == ["fp16", "bf16"]
    assert {options.outputs for options in asked} == {quality.EXPERTS}
    for row in rows:
        change = row["changes"]["abs_rel"]
        assert row.keys() | change.keys() == keys["deployment"] - {"failed", *RUNS}
        assert row["scenes"] == 2
        assert row["within_limits"] == (
            change["typical"] <= row["limits"]["abs_rel"]
            and row["changes"].get("boundary_f1", {"typical": 0})["typical"] <= row["limits"]["boundary_f1"]
        )
    # the same scenes as the first split, in PyTorch float32 too
    assert rows[0]["changes"]["abs_rel"]["reference"] == pytest.approx(
        report["quality"][0]["metrics"]["abs_rel"]["mean"], rel=1e-5
    )
    assert rows[1]["experts_agree"] > 0.98
    assert rows[0]["experts_agree"] is None
    assert str(tmp_path) not in out.read_text()
    assert "| AbsRel | " in benchmark.quality_table(report)
    assert "| bf16 | ONNX Runtime on the float32 twin of the file | " in benchmark.deployment_table(report)


def test_a_split_model_is_judged_by_both_its_files(
    asked: list[ExportOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 split at the encoder, its weights and outputs those of the single file, so the same change."""
    rows = []
    for name, bundle in (("single", exports.bundle().report.bundle), ("split", splits.encoder())):
        monkeypatch.setattr(benchmark, "export_bundle", lambda *_, found=bundle, **__: SimpleNamespace(bundle=found))
        out = tmp_path / f"{name}.json"
        arguments = [str(exports.checkpoint()), "--out", str(out), "--count", "1", "--views", "2", "--no-points"]
        result = CliRunner().invoke(benchmark.main, [*arguments, "--precision", "fp16"], catch_exceptions=False)
        assert result.exit_code == 0
        rows.append(next(row for row in json.loads(out.read_text())["deployment"] if row["run"] == "executed"))
    single, split = rows
    assert split["changes"]["abs_rel"]["found"] == pytest.approx(single["changes"]["abs_rel"]["found"], rel=1e-6)


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


def test_folders_that_are_missing_are_named_before_anything_is_judged(tmp_path: Path) -> None:
    for flags, message in (
        (["--out", f"{tmp_path}/none/x.json"], f"--out {tmp_path}/none/x.json: folder {tmp_path}/none does not exist"),
        (
            ["--out", f"{tmp_path}/x.json", "--workdir", f"{tmp_path}/none"],
            f"--workdir {tmp_path}/none: no such folder",
        ),
    ):
        result = CliRunner().invoke(benchmark.main, ["moe3d-tiny", *flags])
        assert isinstance(result.exception, InputError)
        assert str(result.exception).startswith(message)


# ---- bars and tables


def summary(**means: float) -> dict[str, Summary]:
    return {key: Summary(mean, mean, 64, "7", mean) for key, mean in means.items()}


def test_the_bars_are_those_that_were_set() -> None:
    """Not to be lowered: AbsRel at most 0.08, delta at least 0.93, AUC@30 at least 0.5, in the mean."""
    at_the_bar = summary(abs_rel=0.08, delta1=0.93, auc30=0.5)
    assert benchmark.bars_of(at_the_bar) == {
        "abs_rel": {"bar": 0.08, "reached": True},
        "delta1": {"bar": 0.93, "reached": True},
        "auc30": {"bar": 0.5, "reached": True},
    }
    missed = benchmark.bars_of(summary(abs_rel=0.0801, delta1=0.9299, auc30=0.499))
    assert [bar["reached"] for bar in missed.values()] == [False, False, False]
    assert benchmark.bars_of(summary(abs_rel=0.01)).keys() == {"abs_rel"}  # of single views: no cameras


def example() -> dict[str, Any]:
    """A result of two splits, one of them without an edge in some scenes; a failed export, and a change too large."""

    def row(split: str, abs_rel: float, f1_scenes: int) -> dict[str, Any]:
        found = {
            "abs_rel": Summary(abs_rel, 0.05, 64, "17", 0.31),
            "boundary_f1": Summary(0.25, 0.26, f1_scenes, "3", 0.125),
            "gate_entropy": Summary(1.1, 1.2, 64, None, None),
        }
        metrics = {key: value._asdict() for key, value in found.items()}
        return {"split": split, "metrics": metrics, "bars": benchmark.bars_of(found)}

    def change(reference: float, found: float, change: float, typical: float) -> dict[str, Any]:
        return Change(reference, found, change, None, None, typical)._asdict()

    changes = {
        "abs_rel": change(0.07, 0.0703, 0.0043, 0.0061),
        "boundary_f1": change(0.25, 0.249, -0.001, 0.0012),
        "flying": change(0.01, 0.0125, 0.0025, 0.003),
    }
    run = {"precision": "bf16", "run": "rounded", "label": "16-bit PyTorch", "changes": changes, "experts_agree": 0.998}
    limits = {"abs_rel": 0.005, "boundary_f1": 0.002}
    return {
        "model": {"name": "moe3d-tiny", "origin": "preset:moe3d-tiny trained weights", "parameters": 5_480_000},
        "scenes": {"count": 64, "first_seed": 0, "views": 4, "height": 168, "width": 224},
        "quality": [row("test-seeds", 0.07, 64), row("test-kinds", 0.09, 62)],
        "deployment": [
            {"precision": "fp16", "failed": "no room"},
            {**run, "limits": limits, "within_limits": False},
            {**run, "experts_agree": None, "limits": limits, "within_limits": True},
        ],
    }


def test_the_table_of_quality() -> None:
    assert benchmark.quality_table(example()).splitlines() == [
        "| | test-seeds: mean | median | worst (seed) | test-kinds: mean | median | worst (seed) | bar | reached |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
        "| AbsRel | 0.0700 | 0.0500 | 0.3100 (17) | 0.0900 | 0.0500 | 0.3100 (17) | at most 0.0800 | yes, no |",
        "| boundary F1 | 0.2500 | 0.2600 | 0.1250 (3) | 0.2500 (62 scenes) | 0.2600 | 0.1250 (3) | | |",
        "| gate entropy in nats | 1.1000 | 1.2000 |  | 1.1000 | 1.2000 |  | | |",
        "",
        "moe3d-tiny (preset:moe3d-tiny trained weights, 5.5 M parameters) in PyTorch, float32; seeds 0..63 of each "
        f"split, 4 views of 224x168. {ALIGNMENT}",
    ]


def test_a_measure_of_one_split_alone_keeps_its_columns() -> None:
    report = example()
    del report["quality"][0]["metrics"]["abs_rel"], report["quality"][0]["bars"]["abs_rel"]
    line = benchmark.quality_table(report).splitlines()[2]
    assert line == "| AbsRel | | | | 0.0900 | 0.0500 | 0.3100 (17) | at most 0.0800 | not measured, no |"


def test_the_table_of_deployment() -> None:
    assert benchmark.deployment_table(example()).splitlines() == [
        "| precision | run in | AbsRel | per scene (limit) | boundary F1 | per scene (limit) | flying points "
        "| strongest expert agrees | within limits |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
        "| fp16 | failed: no room | | | | | | | |",
        "| bf16 | 16-bit PyTorch | +0.43 % | 0.61 % (0.5 %) | -0.001 | 0.0012 (0.002) | 1.00 % -> 1.25 % | 99.80 % "
        "| no |",
        "| bf16 | 16-bit PyTorch | +0.43 % | 0.61 % (0.5 %) | -0.001 | 0.0012 (0.002) | 1.00 % -> 1.25 % |  | yes |",
        "",
        "Changes from PyTorch in float32 on the 64 scenes of test-seeds.",
    ]


def test_every_row_of_the_tables_has_as_many_cells_as_the_head() -> None:
    report = example()
    del report["quality"][0]["metrics"]["boundary_f1"]
    del report["deployment"][1]["changes"]["boundary_f1"]
    for table in (benchmark.quality_table(report), benchmark.deployment_table(report)):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) == 1, table
