"""The verification: its shapes, what it makes of wrong files, and three faults that no export may let pass."""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import torch
from exports import MOE
from torch import Tensor

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.child import ChildResult
from moe3d_deploy.errors import ExportError, Moe3dError
from moe3d_deploy.export import graph, pipeline, verify
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.verify import SHAPES_IN_PATCHES, Shape, images_for
from moe3d_deploy.model import MoE3D
from moe3d_deploy.runtime.onnx_operators import DOMAIN

# ---- the shapes


def test_the_shapes_are_those_at_which_a_specialised_graph_shows() -> None:
    """None is the tracer's. One patch, one view, several scenes, odd views, more views than VGGT's chunk of 8, sides
    that differ, and a size that MoE3D was trained at."""
    shapes = SHAPES_IN_PATCHES
    traced_batch, traced_views, *traced_grid = graph.TRACED_SHAPE_IN_PATCHES
    assert all(list(shape[2:]) != traced_grid for shape in shapes)
    assert any(shape[:2] != (traced_batch, traced_views) for shape in shapes)
    assert (1, 1, 1, 1) in shapes
    assert any(views == 1 and height != width for _, views, height, width in shapes)
    assert any(batch == 2 for batch, *_ in shapes)
    assert any(views % 2 and views > 1 for _, views, _, _ in shapes)
    assert any(views > 8 for _, views, _, _ in shapes)
    assert any(height > width for *_, height, width in shapes)
    assert any(height < width for *_, height, width in shapes)
    assert (154, 518) in [(14 * height, 14 * width) for *_, height, width in shapes]


def test_the_images_fill_the_range_and_are_the_same_in_every_process() -> None:
    images = images_for((2, 3, 4, 5), 14)
    assert images.shape == (2, 3, 3, 56, 70)
    assert images.dtype == np.float32
    assert 0 <= images.min() < 0.1
    assert 0.9 < images.max() <= 1
    assert np.array_equal(images, images_for((2, 3, 4, 5), 14))
    flat = images.reshape(-1, images[0, 0].size)
    assert len({row.tobytes() for row in flat}) == 6  # no two views are equal
    assert float(images[0, 0, 0, 0, 0]) == pytest.approx(0.14868769)  # the generator's bits are fixed


# ---- comparing what the stages saved


class Saved:
    """A folder as the stages leave it: depth of one shape, ones, changed as a test likes."""

    SHAPE: Shape = (1, 1, 1, 1)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for kind in ("reference", "executed", "rounded"):
            self.save(kind, np.ones((1, 1, 14, 14), np.float32))

    def save(self, kind: str, depth: Any) -> None:
        verify._save({"folder": str(self.folder)}, kind, 0, {"depth": np.asarray(depth, np.float32)})

    def check(self, precision: str) -> list[dict[str, Any]]:
        kinds = ["executed"] if precision == "fp32" else ["executed", "rounded"]
        return verify.check(self.folder, [self.SHAPE], ["depth"], kinds, precision)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def test_equal_runs_pass_with_a_case_per_shape(saved: Saved) -> None:
    zero = {"depth": {"max": 0.0, "mean": 0.0, "p99": 0.0}}
    assert saved.check("fp32") == [{"shape_in_patches": [1, 1, 1, 1], "errors": {"executed": zero}}]
    assert saved.check("fp16")[0]["errors"] == {"executed": zero, "rounded": zero}


@pytest.mark.parametrize(("kind", "label"), [("executed", "ONNX Runtime"), ("rounded", "16-bit PyTorch")])
@pytest.mark.parametrize(("value", "shown"), [(1.02, "0.02"), (math.inf, "inf"), (math.nan, "inf")])
def test_a_run_that_differs_says_which_and_where(saved: Saved, kind: str, label: str, value: float, shown: str) -> None:
    depth = np.ones((1, 1, 14, 14))
    depth[0, 0, 3, 4] = value
    saved.save(kind, depth)
    with pytest.raises(ExportError) as caught:
        saved.check("fp16")
    assert str(caught.value).startswith(
        f"verification failed: {label} at B=1 S=1, 1x1 patches: depth is off by {shown} (max relative), "
        "the limit is 0.01; nothing was written."
    )


def test_a_run_of_another_shape_fails(saved: Saved) -> None:
    saved.save("executed", np.ones((1, 1, 14, 1)))
    with pytest.raises(ExportError, match="depth is off by inf"):
        saved.check("fp32")


def test_a_precision_without_a_headroom_limit_is_no_half() -> None:
    with pytest.raises(ExportError, match=r"^precision fp32 has no headroom limit; add it to limits\.json$"):
        verify.headroom_report({"a: mm": 0.1}, "fp32")


# ---- a wrong file


def test_a_changed_weight_in_the_file_is_seen(tmp_path: Path) -> None:
    """One value of the first layer by a tenth: what a wrong transposition or a stale file does is far more."""
    proto = onnx.load(exports.merged().path)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("patch_embed.proj.weight"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] *= 1.1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "model.onnx")
    request = request_for(tmp_path, exports.checkpoint(), names=["depth"], shapes=[(1, 2, 2, 3)])

    verify.reference(request, lambda event: None)
    verify.executed(request, lambda event: None)

    with pytest.raises(ExportError, match="ONNX Runtime at B=1 S=2, 2x3 patches: depth is off by"):
        verify.check(tmp_path, [(1, 2, 2, 3)], ["depth"], ["executed"], "fp32")


def request_for(folder: Path, checkpoint: Path, *, names: list[str], shapes: list[Shape]) -> dict[str, Any]:
    return {
        "source": dataclasses.asdict(SourceSpec(str(checkpoint))),
        "policy": dataclasses.asdict(PrecisionPolicy("fp32")),
        "merge": True,
        "input": "float32",
        "outputs": [],
        "names": names,
        "shapes": [list(shape) for shape in shapes],
        "patch_size": 14,
        "folder": str(folder),
        "model": str(folder / "model.onnx"),
    }


def test_each_stage_tells_its_steps(tmp_path: Path) -> None:
    shutil.copy(exports.merged().path, tmp_path)
    shutil.copy(exports.merged().path.with_name("model.onnx.data"), tmp_path)
    request = request_for(tmp_path, exports.checkpoint(), names=["depth"], shapes=[(1, 1, 1, 1), (2, 1, 1, 2)])
    for stage in (verify.reference, verify.rounded, verify.executed):
        events: list[dict[str, Any]] = []
        stage(request, events.append)
        assert events == [{"step": 0}, {"step": 1}]


# ---- three faults in the model itself


def faulty(fault: Callable[[Tensor], Tensor | float]) -> Callable[..., dict[str, Tensor]]:
    """MoE3D.forward with a fault: depth is multiplied by what `fault` makes of the images."""
    true_forward = MoE3D.forward

    def forward(self: MoE3D, images: Tensor, **arguments: Any) -> dict[str, Tensor]:
        result = true_forward(self, images, **arguments)
        return {**result, "depth": result["depth"] * fault(images)}

    return forward


def up_to_eight_views(images: Tensor) -> float:
    return 1.0 if images.shape[1] <= 8 else 1.5


def scaled_height(images: Tensor) -> Tensor:
    return torch.ones(int(2.5 * images.shape[-2])).sum()


def one_view(images: Tensor) -> float:
    return 1.5 if images.shape[1] == 1 else 1.0


@functools.cache
def plain_checkpoint() -> Path:
    """VGGT without experts or point head: the least to trace."""
    folder = exports.new_folder("plain") / "plain"
    save_checkpoint(seeded_source("plain", dataclasses.replace(MOE, moe=None, point_head=False)), folder)
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the stages here, where a fault can be planted, and lists them. A child would load the true model."""
    stages: list[str] = []

    def run_here(
        function: str, request: dict[str, Any], *, title: str, on_event: Any, failure: type[Moe3dError]
    ) -> ChildResult:
        module, _, name = function.partition(":")
        stages.append(name)
        stage = getattr({pipeline.__name__: pipeline, verify.__name__: verify}[module], name)
        return ChildResult(stage(request, on_event), 0.1, 1)

    monkeypatch.setattr(pipeline, "run_in_child", run_here)
    return stages


def export_plain(path: Path, shapes: tuple[Shape, ...] = SHAPES_IN_PATCHES) -> Bundle:
    options = ExportOptions(PrecisionPolicy("fp32"), shapes=shapes)
    return export_bundle(SourceSpec(str(plain_checkpoint())), path / "bundle", options).bundle


@pytest.mark.parametrize("fault", [up_to_eight_views, scaled_height])
def test_the_gate_refuses_a_model_that_depends_on_a_concrete_shape(
    fault: Callable[[Tensor], Any], in_this_process: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MoE3D, "forward", faulty(fault))
    with pytest.raises(ExportError) as caught:
        export_plain(tmp_path)

    assert str(caught.value).startswith("the model depends on a concrete shape, so one file cannot serve all: ")
    assert "\n" not in str(caught.value)
    assert in_this_process == ["export_stage"]
    assert list(tmp_path.iterdir()) == []


def test_verification_refuses_a_model_that_treats_one_view_apart(
    in_this_process: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch's tracer never takes a size for 1, so this branch is gone from the file without an error."""
    monkeypatch.setattr(MoE3D, "forward", faulty(one_view))

    blind = export_plain(tmp_path, shapes=((2, 2, 3, 6), (1, 5, 5, 3)))  # no shape of one view: passes
    file = {entry.name: entry for entry in blind.path.iterdir()}
    assert blind.manifest.verification.status == "passed"
    assert in_this_process == ["export_stage", "reference", "executed"]
    assert {node.domain for node in onnx.load(file["model.onnx"]).graph.node} == {"", DOMAIN}  # and no ExpertMix

    def write_again(request: dict[str, Any], emit: Any) -> dict[str, Any]:
        """The same model gives the same file: spares a second trace."""
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(file[name], request["folder"])
        manifest = blind.manifest
        return {
            "name": manifest.name,
            "config": manifest.model_config,
            "checkpoint": dataclasses.asdict(manifest.checkpoint),
            "torch": torch.__version__,
        }

    monkeypatch.setattr(pipeline, "export_stage", write_again)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ExportError) as caught:
        export_plain(other)

    assert str(caught.value).startswith(
        "verification failed: ONNX Runtime at B=1 S=1, 1x1 patches: depth is off by 0.33 (max relative), the limit is "
        "5e-05; nothing was written."
    )
    assert list(other.iterdir()) == []
