"""Checkpoint to bundle: what the manifest records, what is reported on the way, and what is refused at once."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import platform
import signal
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from exports import MOE

from moe3d_deploy import __version__
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dError
from moe3d_deploy.export import verify
from moe3d_deploy.export.compare import Limits
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.verify import SHAPES_IN_PATCHES
from moe3d_deploy.manifest import Range


def test_the_bundle_opens_and_holds_the_model_alone() -> None:
    path = exports.bundle().path
    assert {entry.name for entry in path.iterdir()} == {"manifest.json", "model.onnx", "model.onnx.data"}
    assert {entry.name for entry in path.parent.iterdir()} == {path.name}
    bundle = Bundle.open(path)
    assert bundle.manifest == exports.bundle().report.bundle.manifest
    assert bundle.manifest.engines == ()


def test_the_manifest_says_what_the_model_is_and_where_it_comes_from() -> None:
    manifest = exports.bundle().report.bundle.manifest
    weights = (exports.checkpoint() / "model.safetensors").read_bytes()

    assert manifest.name == "small"
    assert manifest.checkpoint.origin == "seeded:small seed 0"
    assert manifest.checkpoint.licence == "seeded random weights, no licence"
    assert manifest.checkpoint.sha256 == hashlib.sha256(weights).hexdigest()
    assert manifest.config == dataclasses.replace(MOE, point_head=False)  # the file has none: no output asked for it
    assert manifest.precision == "fp16"
    assert manifest.opset == 20
    assert manifest.merged_experts
    assert str(exports.checkpoint()) not in (exports.bundle().path / "manifest.json").read_text()


def test_the_manifest_says_how_to_feed_the_model_and_what_comes_out() -> None:
    manifest = exports.bundle().report.bundle.manifest

    assert [(t.name, t.dtype, t.shape) for t in manifest.inputs] == [("images", "float32", ("B", "S", 3, "H", "W"))]
    assert [t.name for t in manifest.outputs] == list(DEFAULT_OUTPUTS)
    assert [(o.name, list(o.shape)) for o in manifest.outputs] == [
        (value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in exports.bundle().exported.proto.graph.output
    ]
    ranges = manifest.shape_ranges
    assert (ranges.batch, ranges.views) == (Range(1, None), Range(1, None))
    assert (ranges.height, ranges.width) == (Range(14, None, 14), Range(14, None, 14))
    assert (manifest.preprocessing.size, manifest.preprocessing.patch_size) == (42, 14)


def test_the_manifest_names_the_tools() -> None:
    tools = exports.bundle().report.bundle.manifest.created_by
    packages = ("onnx", "onnxscript", "onnxruntime", "numpy")
    assert tools == {
        "moe3d_deploy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def test_the_manifest_holds_the_errors_of_every_output_at_every_shape() -> None:
    verification = exports.bundle().report.bundle.manifest.verification

    assert verification.status == "passed"
    assert verification.limits == Limits.of("fp16").errors
    assert [case["shape_in_patches"] for case in verification.cases] == [list(shape) for shape in SHAPES_IN_PATCHES]
    for case in verification.cases:
        assert set(case["errors"]) == {"executed", "rounded"}
        for of_kind in case["errors"].values():
            assert set(of_kind) == set(DEFAULT_OUTPUTS)
            for error in of_kind.values():
                assert set(error) == {"max", "mean", "p99"}
                assert all(0 < value < 0.1 for value in error.values())
            assert of_kind["depth"]["max"] < 1e-2
            assert of_kind["depth"]["mean"] < 1e-3


def test_the_manifest_holds_the_headroom_of_the_half_tensors() -> None:
    headroom = exports.bundle().report.bundle.manifest.verification.headroom
    assert headroom["limit"] == 0.5
    assert headroom["tensors"] > 50
    assert len(headroom["largest"]) == headroom["tensors"]
    assert 0 < max(headroom["largest"].values()) < 0.5


def test_the_recorded_errors_are_those_of_the_file_in_the_bundle() -> None:
    """Not of some other file: the figures come out again, to the digits that other thread counts change."""
    case = next(c for c in exports.bundle().report.bundle.manifest.verification.cases if c["shape_in_patches"][1] == 9)
    images = verify.images_for(tuple(case["shape_in_patches"]), 14)
    exported = exports.bundle().exported
    again = verify.errors(exported.in_the_runtime(images), exported.reference(images))
    for name, error in case["errors"]["executed"].items():
        assert again[name]["mean"] == pytest.approx(error["mean"], rel=0.02), name


def test_progress_goes_through_the_stages_in_order() -> None:
    events = exports.bundle().events
    stages = list(dict.fromkeys(event["stage"] for event in events))
    assert stages == ["export", "reference", "execute", "round", "bundle"]
    for stage in stages:
        own = [event for event in events if event["stage"] == stage]
        steps = [event["step"] for event in own]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (0, own[0]["total"])
        assert {event["total"] for event in own} == {steps[-1]}
    phases = [event["detail"] for event in events if event["stage"] == "export" and event["detail"]]
    assert phases == ["load", "trace", "translate", "write", "check"]
    costs = {event["stage"]: event["cost"] for event in events if "cost" in event}
    assert costs == exports.bundle().report.stages


def test_the_report_has_time_and_memory_of_each_stage() -> None:
    stages = exports.bundle().report.stages
    assert list(stages) == ["export", "reference", "execute", "round"]
    for cost in stages.values():
        assert 0 < cost["seconds"] < 300
        assert 50e6 < cost["peak_bytes"] < 2e9


def test_an_interrupt_during_a_real_stage_leaves_nothing(tmp_path: Path) -> None:
    """As Ctrl-C does: the signal arrives while the parent waits for its child."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    phases = []

    def interrupt(event: dict[str, Any]) -> None:
        phases.append(event["detail"])
        if event["detail"] == "load":
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            export_bundle(SourceSpec("moe3d-tiny"), tmp_path / "bundle", ExportOptions(), on_event=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)

    assert phases == ["", "load"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "outputs", "expected", "message"),
    [
        ("no-such-thing", (), CheckpointError, "no-such-thing: no such file or folder, nor a preset"),
        ("vggt-1b", ("expert_weights",), InputError, "output 'expert_weights' needs experts; this model has none"),
        ("moe3d-tiny", ("point_map",), InputError, "output 'point_map' needs the point head; this model has none"),
    ],
)
def test_a_source_or_output_that_does_not_exist_is_refused_before_work_begins(
    source: str, outputs: tuple[str, ...], expected: type[Moe3dError], message: str, tmp_path: Path
) -> None:
    phases: list[str] = []
    with pytest.raises(expected, match=f"^{message}"):
        export_bundle(
            SourceSpec(source),
            tmp_path / "bundle",
            ExportOptions(outputs=outputs),
            on_event=lambda event: phases.append(event["detail"]),
        )
    assert phases == ["", "load"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["expert_depths", "normals", "Depth"])
def test_an_output_that_no_file_has_is_refused_without_a_child(name: str) -> None:
    with pytest.raises(InputError) as caught:
        ExportOptions(outputs=("pose_enc", name))
    assert str(caught.value) == (
        f"output '{name}' cannot be exported; choose from pose_enc, world_points, point_map, point_map_conf, "
        "expert_weights, expert_entropy, depth_variance"
    )
