"""What the checks of a runtime share: a bundle to run, and what PyTorch gives for its weights in float32."""

import dataclasses
import importlib.util
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.export.compare import Limits, errors
from moe3d_deploy.export.contract import OPTIONAL_OUTPUTS
from moe3d_deploy.export.verify import Shape, images_for
from moe3d_deploy.manifest import Manifest

if TYPE_CHECKING:
    from moe3d_deploy.model import MoE3D

PRESET = "moe3d-tiny"
TO_EXPORT = ("torch", "onnx", "onnxscript", "onnxruntime")
_OF_PRESET = re.compile(r"preset:(\S+) (?:seed (\d+)|trained weights)")


def find_bundle(run: CheckRun) -> Bundle:
    """The user's bundle, or moe3d-tiny in fp16, exported once for all checks; skips where that cannot be done."""
    if run.bundle:
        bundle = Bundle.open(run.bundle)
        if bundle.manifest.split:
            run.skip("the bundle's model is split over two files, and the check takes one: export without --split")
        return bundle
    path = run.work / "bundle"
    if path.exists():
        return Bundle.open(path)
    if missing := [name for name in TO_EXPORT if importlib.util.find_spec(name) is None]:
        run.skip(f"{missing[0]} is not installed, so nothing can be exported here; give --bundle")
    from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
    from moe3d_deploy.export.source import SourceSpec

    run.step(f"exporting {PRESET} in fp16")
    return export_bundle(SourceSpec(PRESET), path, ExportOptions(verify=False)).bundle


class Reference:
    """The float32 model with the weights of a preset's bundle, in PyTorch: on its GPU, else on the CPU."""

    def __init__(self, run: CheckRun, manifest: Manifest) -> None:
        """Skips the check for weights that neither a seed nor this package gives again."""
        checkpoint = manifest.checkpoint
        match = _OF_PRESET.fullmatch(checkpoint.origin)
        if not match:
            run.skip(f"the bundle's weights are {checkpoint.origin!r}; give a bundle of a preset")
        import torch

        from moe3d_deploy.benchmarks.torch_device import set_exact_float32
        from moe3d_deploy.export.precision import PrecisionPolicy
        from moe3d_deploy.export.source import SourceSpec

        source = SourceSpec(match[1], int(match[2]) if match[2] else None)
        opened = source.open()
        config = dataclasses.replace(opened.config, point_head=manifest.config.point_head)
        if (config, opened.sha256()) != (manifest.config, checkpoint.sha256):
            run.skip(
                f"the bundle's weights are {checkpoint.origin!r} of another version of moe3d-deploy; export it again"
            )
        set_exact_float32()
        self.names = [tensor.name for tensor in manifest.outputs]
        self.precision = manifest.precision
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.patch_size = manifest.config.patch_size
        self._optional = [name for name in self.names if name in OPTIONAL_OUTPUTS]
        run.step(f"loading the PyTorch model on {self.device}")
        self._model: MoE3D = source.load(PrecisionPolicy("fp32"), self._optional).to(self.device)
        run.record(reference={"torch": torch.__version__, "device": self.device, "precision": "fp32", "tf32": False})

    def images(self, shape_in_patches: Shape) -> NDArray[Any]:
        """The input of a shape (B, S, rows, columns), as the export's verification takes it."""
        return images_for(shape_in_patches, self.patch_size)

    def outputs(self, shape_in_patches: Shape) -> dict[str, NDArray[Any]]:
        return self.outputs_of(self.images(shape_in_patches))

    def outputs_of(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """What PyTorch gives for images (B, S, 3, H, W) in [0, 1]."""
        import torch

        with torch.inference_mode():
            found = self._model(torch.from_numpy(images).to(self.device), outputs=self._optional)
        return {name: found[name].cpu().numpy() for name in self.names}


def compare(
    run: CheckRun, label: str, found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], precision: str
) -> dict[str, dict[str, float]]:
    """The errors of every output; fails the check for those outside the export's limits of the bundle's precision."""
    measured = errors(found, expected)
    limits = Limits.of(precision).errors
    for name, error in measured.items():
        for kind, bound in limits.get(name, limits["*"]).items():
            if not error[kind] <= bound:
                run.fail(f"{label}: {name} is off by {error[kind]:.2g} ({kind} relative), limit {bound:g}")
    return measured


def text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
