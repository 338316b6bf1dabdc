"""Checkpoint to bundle by stand-ins for the stages: whatever goes wrong, nothing half-written stays."""

import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import MOE

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import ChildResult
from moe3d_deploy.errors import BundleError, CheckpointError, ExportError, InputError, MissingExtraError, Moe3dError
from moe3d_deploy.export import pipeline, verify
from moe3d_deploy.export.pipeline import ExportOptions, ExportReport, export_bundle
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.manifest import Manifest

# ---- stages that stand in for the real ones, to make each of them fail

Change = Callable[[dict[str, Any], dict[str, Any]], None]
"""Alters what a stage returns, and the arrays it saves, or raises."""


class Stages:
    """What the children would do, at once: equal results of ones, unless there is a `change` for a stage."""

    def __init__(self) -> None:
        self.change: dict[str, Change] = {}
        self.ran: list[str] = []
        self.folders: set[Path] = set()

    def run(
        self, function: str, request: dict[str, Any], *, title: str, on_event: Any, failure: type[Moe3dError]
    ) -> ChildResult:
        assert failure is ExportError
        name = function.partition(":")[2]
        self.ran.append(name)
        folder = Path(request["folder"])
        self.folders.add(folder)
        value: dict[str, Any] = {}
        if name == "export_stage":
            (folder / "model.onnx").write_bytes(b"model")
            (folder / "model.onnx.data").write_bytes(b"weights")
            value = {
                "name": "small",
                "config": MOE.to_dict(),
                "checkpoint": {"origin": "seeded", "sha256": "0" * 64, "licence": "none"},
                "torch": "2.13.0",
            }
        elif name == "rounded":
            value = {"shares": {"depth_head.gate: addmm": 0.1}}
        arrays = {output: np.ones((1, 1)) for output in request.get("names", ())}
        if name in self.change:
            self.change[name](value, arrays)
        for index in range(len(request.get("shapes", ()))):
            verify._save(request, name, index, arrays)
        return ChildResult(value, 1.0, 1_000_000)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stand_in = Stages()
    monkeypatch.setattr(pipeline, "run_in_child", stand_in.run)
    return stand_in


def export(path: Path, *, overwrite: bool = False, **options: Any) -> ExportReport:
    return export_bundle(SourceSpec("moe3d-tiny"), path, ExportOptions(**options), overwrite=overwrite)


def raising(error: BaseException) -> Change:
    def change(result: dict[str, Any], arrays: dict[str, Any]) -> None:
        raise error

    return change


def off(output: str, factor: float) -> Change:
    """The stage's result of one output is `factor` times what it should be."""
    return lambda result, arrays: arrays.update({output: arrays[output] * factor})


def shares(value: float) -> Change:
    return lambda result, arrays: result["shares"].update({"depth_head.projects.0: convolution": value})


def test_the_stages_are_those_that_the_precision_needs(stages: Stages, tmp_path: Path) -> None:
    export(tmp_path / "fp16")
    assert stages.ran == ["export_stage", "reference", "executed", "rounded"]
    stages.ran.clear()
    report = export(tmp_path / "fp32", policy=PrecisionPolicy("fp32"))
    assert stages.ran == ["export_stage", "reference", "executed"]
    assert report.bundle.manifest.precision == "fp32"
    assert report.bundle.manifest.verification.headroom == {}
    assert report.bundle.manifest.verification.limits == {"*": {"max": 5e-5}}


def test_an_export_without_verification_says_so(stages: Stages, tmp_path: Path) -> None:
    manifest = export(tmp_path / "bundle", verify=False).bundle.manifest
    assert stages.ran == ["export_stage"]
    assert (manifest.verification.status, manifest.verification.cases) == ("skipped", ())
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["verification"]["status"] == "skipped"


def test_options_reach_the_manifest(stages: Stages, tmp_path: Path) -> None:
    shapes = ((1, 1, 2, 2),)
    manifest = export(
        tmp_path / "b", merge=False, outputs=("pose_enc", "expert_weights"), shapes=shapes
    ).bundle.manifest
    assert not manifest.merged_experts
    assert [(t.name, t.shape) for t in manifest.outputs[4:]] == [
        ("pose_enc", ("B", "S", 9)),
        ("expert_weights", ("B", "S", 2, "H", "W")),
    ]
    assert [case["shape_in_patches"] for case in manifest.verification.cases] == [[1, 1, 2, 2]]
    assert set(manifest.verification.cases[0]["errors"]["executed"]) >= {"pose_enc", "expert_weights"}


@pytest.mark.parametrize("merge", [True, False])
def test_a_model_without_experts_is_not_merged(merge: bool, stages: Stages, tmp_path: Path) -> None:
    stages.change["export_stage"] = lambda facts, arrays: facts["config"].update({"moe": None})
    assert not export(tmp_path / "bundle", merge=merge).bundle.manifest.merged_experts


def origin(text: str) -> Change:
    return lambda facts, arrays: facts["checkpoint"].update({"origin": text})


FAILURES: list[tuple[str, Change, type[BaseException], str]] = [
    ("export_stage", raising(ExportError("the model depends on a concrete shape")), ExportError, "the model depends"),
    ("export_stage", raising(CheckpointError("weights: damaged")), CheckpointError, "weights: damaged"),
    ("export_stage", raising(KeyboardInterrupt()), KeyboardInterrupt, ""),
    (
        "export_stage",
        lambda facts, arrays: facts["checkpoint"].update({"origin": "/data/me"}),
        BundleError,
        ".*not a path",
    ),
    ("reference", raising(ExportError("reference was killed")), ExportError, "reference was killed"),
    ("executed", raising(Moe3dError("ONNX Runtime failed")), Moe3dError, "ONNX Runtime failed"),
    ("executed", raising(KeyboardInterrupt()), KeyboardInterrupt, ""),
    ("executed", off("depth", 1.02), ExportError, "verification failed: ONNX Runtime at B=1 S=1, 1x1 patches: depth"),
    ("executed", off("intrinsics", math.nan), ExportError, "verification failed: ONNX Runtime .*: intrinsics is off"),
    ("rounded", off("depth", 0.98), ExportError, "verification failed: 16-bit PyTorch at B=1 S=1, 1x1 patches: depth"),
    (
        "rounded",
        shares(0.6),
        ExportError,
        "verification failed: tensor 'depth_head.projects.0: convolution' reaches 0.6",
    ),
    ("rounded", shares(math.inf), ExportError, "verification failed: tensor .* reaches inf"),
    (
        "rounded",
        raising(OSError(28, "No space left on device")),
        ExportError,
        "stage round of the export could not write: No space left on device; make room, or choose another -o$",
    ),
]


@pytest.mark.parametrize(("stage", "change", "expected", "message"), FAILURES)
def test_whatever_fails_nothing_is_left(
    stage: str, change: Change, expected: type[BaseException], message: str, stages: Stages, tmp_path: Path
) -> None:
    stages.change[stage] = change
    with pytest.raises(expected, match=f"^{message}"):
        export(tmp_path / "bundle")

    assert list(tmp_path.iterdir()) == []
    assert not any(folder.exists() for folder in stages.folders)


@pytest.mark.parametrize(("stage", "change", "expected", "message"), FAILURES)
def test_whatever_fails_the_bundle_to_be_replaced_stays(
    stage: str, change: Change, expected: type[BaseException], message: str, stages: Stages, tmp_path: Path
) -> None:
    old = export(tmp_path / "bundle").bundle
    stages.change[stage] = change
    with pytest.raises(expected, match=f"^{message}"):
        export(tmp_path / "bundle", overwrite=True)

    assert Bundle.open(tmp_path / "bundle").manifest == old.manifest
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_an_overflow_is_reported_rather_than_the_error_it_causes(stages: Stages, tmp_path: Path) -> None:
    stages.change["rounded"] = shares(math.inf)
    stages.change["executed"] = off("depth", math.inf)
    with pytest.raises(ExportError, match=r"reaches inf of its 16-bit range"):
        export(tmp_path / "bundle")


def test_an_existing_bundle_is_replaced_only_on_request_and_before_any_work(stages: Stages, tmp_path: Path) -> None:
    export(tmp_path / "bundle")
    stages.ran.clear()
    with pytest.raises(InputError, match=r"^bundle .*bundle exists; choose another name or ask for it to be overwritt"):
        export(tmp_path / "bundle")
    assert stages.ran == []

    manifest = export(tmp_path / "bundle", overwrite=True, verify=False).bundle.manifest
    assert Bundle.open(tmp_path / "bundle").manifest == manifest
    assert manifest.verification.status == "skipped"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_bundle_is_never_replaced(overwrite: bool, stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"x")
    with pytest.raises(InputError, match="exists and is not a bundle, so it is never overwritten"):
        export(tmp_path / "photos", overwrite=overwrite)
    assert stages.ran == []
    assert (tmp_path / "photos" / "me.png").exists()


def test_an_empty_folder_takes_the_bundle(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    export(tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle")


def test_a_folder_that_cannot_be_is_refused_before_any_work(stages: Stages, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; create it"):
        export(tmp_path / "nowhere" / "bundle")
    assert stages.ran == []


# ---- packages


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find, version = importlib.util.find_spec, importlib.metadata.version

    def missing(name: str) -> str:
        if name in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))
    monkeypatch.setattr(importlib.metadata, "version", missing)


@pytest.mark.parametrize(("package", "extra"), [("torch", "export"), ("onnxscript", "export"), ("onnxruntime", "cpu")])
def test_a_missing_package_is_named_before_any_work(
    package: str, extra: str, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, package)
    with pytest.raises(
        MissingExtraError, match=rf"^{package} is not installed: pip install 'moe3d-deploy\[{extra}\]'$"
    ):
        export(tmp_path / "bundle")
    assert stages.ran == []
    assert list(tmp_path.iterdir()) == []


def test_an_export_without_verification_needs_no_onnxruntime(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime")
    manifest: Manifest = export(tmp_path / "bundle", verify=False).bundle.manifest
    assert "onnxruntime" not in manifest.created_by
    assert "onnx" in manifest.created_by


def test_onnxruntime_may_be_the_gpu_package(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It brings the same module under another distribution name."""
    version = importlib.metadata.version

    def of_gpu_package(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.31.1" if name == "onnxruntime-gpu" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_gpu_package)
    assert export(tmp_path / "bundle").bundle.manifest.created_by["onnxruntime-gpu"] == "1.31.1"
