"""Exports that several test files look at, each made once per run: tracing the smallest model takes seconds."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.config import AggregatorConfig, CameraHeadConfig, DptHeadConfig, ModelConfig, MoeConfig, VitConfig
from moe3d_deploy.export.graph import export_onnx
from moe3d_deploy.export.pipeline import ExportOptions, ExportReport, export_bundle
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.moe3d import OF_POINT_HEAD
from moe3d_deploy.runtime.onnx_backend import OnnxBackend

# The fewest nodes of every kind of layer. The camera head's attention and MLP have more than 8192 values per weight:
# up to there the exporter folds constants, and may store a weight that two iterations share twice.
MOE = ModelConfig(
    img_size=42,
    vit=VitConfig(embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0, num_register_tokens=2),
    aggregator=AggregatorConfig(embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0, num_register_tokens=2),
    camera_head=CameraHeadConfig(dim_in=64, trunk_depth=1, num_heads=2, num_iterations=2),
    dpt_head=DptHeadConfig(dim_in=64, features=16, out_channels=(8, 8, 8, 8), intermediate_layer_idx=(0, 0, 0, 0)),
    moe=MoeConfig(num_experts=2, hidden_channels=4, gate_hidden_channels=4, temperature=0.5),
    point_head=True,
)

EXPERT_OUTPUTS = ("expert_weights", "expert_entropy", "depth_variance")


@dataclass(frozen=True)
class Exported:
    """A written file and the model it is of, as loaded: float32, plain experts, torch's own attention."""

    path: Path
    model: MoE3D

    @functools.cached_property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.path)

    @functools.cached_property
    def session(self) -> ort.InferenceSession:
        return ort.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def in_the_runtime(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """As a bundle runs it: with ONNX Runtime's own kernel for attention."""
        return OnnxBackend(self.path).run(images)

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """As any runtime may run it: with the functions in the file."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, {"images": images}), strict=True))

    def reference(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        names = [output.name for output in self.proto.graph.output]
        with torch.inference_mode():
            result = self.model(torch.from_numpy(images), outputs=[name for name in names if name != "pose_enc"])
        return {name: result[name].numpy() for name in names}


def new_folder(label: str) -> Path:
    """An empty folder that goes when the test run ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"moe3d-test-{label}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def checkpoint() -> Path:
    """A checkpoint folder called `small`, of MOE."""
    folder = new_folder("checkpoint") / "small"
    save_checkpoint(seeded_source("small", MOE), folder)
    return folder


def load(precision: str = "fp32", outputs: Sequence[str] = ()) -> MoE3D:
    """The checkpoint's model as an export of these outputs loads it: with the point head only if one needs it."""
    return SourceSpec(str(checkpoint())).load(PrecisionPolicy(precision), outputs)


@functools.cache
def merged() -> Exported:
    """float32, merged experts, every output but the point head's."""
    return _export((*EXPERT_OUTPUTS, "world_points", "pose_enc"), merge=True)


@functools.cache
def unmerged() -> Exported:
    """float32, a convolution per expert, with the point head."""
    return _export((*EXPERT_OUTPUTS, *OF_POINT_HEAD), merge=False)


def _export(outputs: tuple[str, ...], *, merge: bool) -> Exported:
    path = export_onnx(load(outputs=outputs), new_folder("file"), merge=merge, outputs=outputs)
    return Exported(path, load(outputs=outputs))


@dataclass(frozen=True)
class ExportedBundle:
    report: ExportReport
    events: list[dict[str, Any]]

    @property
    def path(self) -> Path:
        return self.report.bundle.path

    @functools.cached_property
    def exported(self) -> Exported:
        return Exported(self.path / "model.onnx", load())


@functools.cache
def bundle() -> ExportedBundle:
    """The bundle that the default options make of the checkpoint: fp16, verified, no output beyond the four."""
    events: list[dict[str, Any]] = []
    path = new_folder("bundle") / "small"
    report = export_bundle(SourceSpec(str(checkpoint())), path, ExportOptions(), on_event=events.append)
    return ExportedBundle(report, events)


FILES: dict[str, Callable[[], Exported]] = {
    "fp16 merged": lambda: bundle().exported,
    "fp32 merged": merged,
    "fp32 plain": unmerged,
}
IN_EACH = pytest.mark.parametrize("file", FILES)


def initializers(exported: Exported) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.proto.graph.initializer}
