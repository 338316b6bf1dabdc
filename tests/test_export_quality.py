"""`--verify-quality`: an exported file on rendered scenes beside PyTorch: what is recorded, what a failure leaves."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import variants
from exports import MOE
from numpy.typing import NDArray

from moe3d_deploy import errors
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import ChildResult
from moe3d_deploy.cli.export import _export
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import ExportError, InputError, Moe3dError
from moe3d_deploy.evaluation import Comparison
from moe3d_deploy.export import pipeline, quality
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.quality import QualityPlan
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.export.verify import open_model

PLAN = QualityPlan(scenes=2, views=2, height=28, width=42)
SEEDED = {"origin": "preset:moe3d-tiny seed 0", "licence": "seeded random weights, no licence"}
TRAINED = {"origin": "my-moe3d", "licence": "CC-BY-4.0"}


def here(stage: str, function: str, request: dict[str, Any], total: int) -> ChildResult:
    """Runs a stage of the check in this process, and sees that it tells its steps."""
    steps: list[int] = []
    found = getattr(quality, function.partition(":")[2])(request, lambda event: steps.append(event["step"]))
    assert steps[0] == 0
    assert max(steps) in (total - 1, total)
    return ChildResult(found, 0.1, 1)


def request_for(folder: Path, model: Path, precision: str, plan: QualityPlan = PLAN, **more: Any) -> dict[str, Any]:
    return {
        "source": asdict(SourceSpec(str(exports.checkpoint()))),
        "policy": asdict(PrecisionPolicy(precision)),
        "merge": True,
        "input": "float32",
        "outputs": ["expert_weights"],
        "folder": str(folder),
        "model": str(model),
        "plan": asdict(plan),
        **more,
    }


def judged(kinds: tuple[str, ...], request: dict[str, Any], plan: QualityPlan = PLAN) -> dict[str, Comparison]:
    return quality.judge_deployed(kinds, plan, request, quality.judge_reference(plan, request, here), here)


# ---- what the stages find


def test_a_file_and_its_rounding_are_within_the_limits_of_fp16(tmp_path: Path) -> None:
    request = request_for(tmp_path, exports.bundle().path / "model.onnx", "fp16")
    found = judged(quality.kinds_of(PrecisionPolicy("fp16")), request)

    assert list(found) == ["executed", "rounded"]
    quality.require_quality(found, "fp16", **SEEDED)
    for kind, comparison in found.items():
        change = comparison.changes["abs_rel"]
        assert comparison.scenes == 2
        assert 0 < change.typical < 1e-3, kind  # its weights are rounded: not the same, nor far off
        assert change.low is not None
        assert change.low <= change.change <= (change.high or math.inf)
    assert found["executed"].experts_agree is None  # the file gives no weights
    assert 0.98 < (found["rounded"].experts_agree or 0) <= 1
    assert found["rounded"].changes["abs_rel"].reference == found["executed"].changes["abs_rel"].reference


def test_the_trained_weights_survive_rounding_to_fp16(tmp_path: Path) -> None:
    """Their AbsRel is small enough to tell a fault; that of seeded weights hardly moves."""
    plan = QualityPlan(scenes=1, views=2, height=84, width=112)
    source = asdict(SourceSpec("moe3d-tiny"))
    found = judged(("rounded",), request_for(tmp_path, tmp_path / "none", "fp16", plan, source=source), plan)
    assert found["rounded"].changes["abs_rel"].reference < 0.3
    quality.require_quality(found, "fp16", **TRAINED)


@pytest.mark.full
def test_every_variant_is_judged(tmp_path: Path) -> None:
    """8-bit pixels in float32; and bf16, 8-bit, with fixed axes, of which the twin and the rounded model are judged."""
    found = judged(("executed",), request_for(tmp_path, variants.pixels().model_path, "fp32", input="uint8"))
    quality.require_quality(found, "fp32", **SEEDED)
    assert found["executed"].experts_agree is not None
    assert found["executed"].experts_agree > 0.999

    request = request_for(tmp_path, variants.brain().model_path, "bf16", input="uint8")
    found = judged(("twin", *quality.kinds_of(PrecisionPolicy("bf16"))), request)
    assert list(found) == ["twin", "rounded"]
    quality.require_quality(found, "bf16", **SEEDED)


@pytest.mark.parametrize(
    ("precision", "kinds"),
    [
        ("fp32", ("executed",)),
        ("fp16", ("executed", "rounded")),
        ("fp16-fp32heads", ("executed", "rounded")),
        ("bf16", ("rounded",)),
        ("bf16-fp16heads", ("rounded",)),
        ("int8", ("executed",)),
    ],
)
def test_what_a_cpu_can_tell_of_a_precision(precision: str, kinds: tuple[str, ...]) -> None:
    assert quality.kinds_of(PrecisionPolicy(precision)) == kinds


@pytest.mark.parametrize(
    ("input_type", "batch", "shape", "dtype"),
    [("float32", 1, (1, 2, 3, 28, 42), np.float32), ("uint8", 3, (3, 2, 28, 42, 3), np.uint8)],
)
def test_a_file_gets_the_pixels_and_the_number_of_scenes_it_wants(
    input_type: str, batch: int, shape: tuple[int, ...], dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[NDArray[Any]] = []

    class File:
        def __init__(self, model: Path) -> None:
            assert model == tmp_path / "model.onnx"

        def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
            seen.append(images)
            return {"depth": np.arange(len(images))}

    monkeypatch.setattr("moe3d_deploy.runtime.onnx_backend.OnnxBackend", File)
    plan = dataclasses.replace(PLAN, batch=batch)
    request = request_for(tmp_path, tmp_path / "model.onnx", "fp32", plan, input=input_type)
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 28, 42))
    images = levels.astype(np.float32) / np.float32(255)

    assert quality._file_predictor(request, open_model(request))(images) == {"depth": 0}

    assert (seen[0].shape, seen[0].dtype) == (shape, dtype)
    expected = np.moveaxis(levels, 1, -1) if input_type == "uint8" else images
    for scene in seen[0]:
        np.testing.assert_array_equal(scene, expected)


@pytest.mark.parametrize(
    ("static", "expected"),
    [
        (StaticShape(), QualityPlan(16, 4, 28, 42)),
        (StaticShape(2, 3, None, None), QualityPlan(16, 3, 28, 42, batch=2)),
        (StaticShape(None, None, 56, 70), QualityPlan(16, 4, 56, 70)),
        (StaticShape(1, 1, 14, None), QualityPlan(16, 1, 14, 42)),
    ],
)
def test_scenes_are_rendered_as_the_file_takes_them(static: StaticShape, expected: QualityPlan) -> None:
    assert QualityPlan.of(MOE, static) == expected


def test_views_that_no_scene_has_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"^--verify-quality cannot render scenes for this file: views .*; leave it out$"
    ):
        QualityPlan.of(MOE, StaticShape(None, 9, None, None))


# ---- the whole export


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export's stages run here, and its first one takes the file of a finished bundle; the rest is real."""
    manifest = exports.bundle().report.bundle.manifest

    def export_stage(request: dict[str, Any], emit: Any) -> dict[str, Any]:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(exports.bundle().path / name, request["folder"])
        checkpoint = asdict(manifest.checkpoint)
        return {"name": "small", "config": manifest.model_config, "checkpoint": checkpoint, "torch": "2"}

    monkeypatch.setattr(pipeline, "export_stage", export_stage)


OPTIONS = ExportOptions(PrecisionPolicy("fp16"), shapes=((1, 2, 2, 3),), quality=1)


def export(path: Path, on_event: Callable[[dict[str, Any]], None] | None = None) -> Bundle:
    with variants.stages_here():
        return export_bundle(SourceSpec(str(exports.checkpoint())), path, OPTIONS, on_event=on_event).bundle


@pytest.mark.usefixtures("finished")
def test_the_manifest_records_all_of_it_and_the_command_says_it_in_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with variants.stages_here():
        source = SourceSpec(str(exports.checkpoint()))
        bundle = _export(source, tmp_path / "bundle", OPTIONS, False, Progress(), {})

    recorded = Bundle.open(tmp_path / "bundle").manifest.verification.quality
    assert recorded == bundle.manifest.verification.quality
    assert {key: recorded[key] for key in ("split", "scenes", "shape", "limits")} == {
        "split": "test-seeds", "scenes": 1, "shape": [4, 28, 42], "limits": {"abs_rel": 1e-3, "boundary_f1": 2e-3},
    }  # fmt: skip
    assert sorted(recorded["runs"]) == ["executed", "rounded"]
    changes = recorded["runs"]["rounded"]["changes"]
    assert {"abs_rel", "delta1", "flying", "rotation_deg", "gate_entropy"} < set(changes)
    assert set(changes["abs_rel"]) == {"reference", "found", "change", "low", "high", "typical"}
    assert changes["abs_rel"]["low"] is None  # of one scene
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == [
        "manifest.json", "model.onnx", "model.onnx.data",
    ]  # fmt: skip

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quality   ")]
    value = changes["abs_rel"]
    assert len(lines) == 2
    assert lines[0].endswith(" (ONNX Runtime, 1 scenes)")
    assert lines[1].startswith(f"quality      AbsRel {value['reference']:.4f} -> {value['found']:.4f} (")
    assert f"experts agree {100 * recorded['runs']['rounded']['experts_agree']:.2f} % (16-bit PyTorch" in lines[1]


@pytest.mark.usefixtures("finished")
def test_a_file_that_sees_otherwise_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that the numeric check does not see, as it comes after it: depth leans to one side."""
    true_predictor = quality._file_predictor

    def leaning(request: dict[str, Any], model: Path) -> Any:
        predict = true_predictor(request, model)

        def run(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
            result = predict(images)
            return {**result, "depth": result["depth"] * np.linspace(1, 1.5, images.shape[-1])}

        return run

    monkeypatch.setattr(quality, "_file_predictor", leaning)
    stages: list[str] = []
    with pytest.raises(ExportError, match=r"^quality check failed: ONNX Runtime changes AbsRel by .* on 1 scenes, "):
        export(tmp_path / "bundle", lambda event: stages.append(event["stage"]))
    assert list(tmp_path.iterdir()) == []
    assert list(dict.fromkeys(stages)) == [
        "export", "reference", "execute", "round", "scenes", "quality ref", "quality file", "quality 16b",
    ]  # fmt: skip


@pytest.mark.usefixtures("finished")
def test_a_prediction_that_cannot_be_judged_ends_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"depth": np.zeros((4, 28, 42)), "extrinsics": np.zeros((4, 3, 4)), "intrinsics": np.ones((4, 3, 3))}
    monkeypatch.setattr(quality, "_file_predictor", lambda request, model: lambda images: broken)
    with pytest.raises(Moe3dError, match="^scene 0: the predicted depth is not finite and above 0 at 4704 of 4704 "):
        export(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quality": 4, "verify": False},
            "a check of quality is a part of the verification: it cannot be had without ",
        ),
        ({"quality": 0}, "quality cannot be checked on 0 scenes; pass 1 or more, such as 16"),
    ],
)
def test_options_that_make_no_check_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        ExportOptions(**options)


def test_scipy_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(errors.MissingExtraError, match=r"scipy is not installed: pip install 'moe3d-deploy\[train\]'"):
        export(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
