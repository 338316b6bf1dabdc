"""The widespread form of export, rebuilt, as a peer: one file for one size of image, with only the view count free.

People who put such a model into ONNX mostly trace it with the exporter's older path at a fixed height and width, with
every operator decomposed and the weights in float32. This writes such a file of our weights, so that it can be measured
beside ours in one run. It is no format of this project.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from moe3d_deploy.benchmarks.bench.widespread_form import WidespreadForm
from moe3d_deploy.child import Emit
from moe3d_deploy.costs import check_shape
from moe3d_deploy.errors import ExportError, first_line
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS, MODEL_FILE
from moe3d_deploy.model import MoE3D

OPSET = 18
TRACED_VIEWS = 2  # one would be taken for a constant


def export_widespread(model: MoE3D, folder: Path, height: int, width: int) -> Path:
    """Write `model.onnx` and `model.onnx.data` into an existing `folder`; returns the path of the first.

    model           float32, on the CPU, as loaded: experts unmerged; it is not changed
    height, width   pixels, multiples of the patch size

    The file takes `images` (1, S, 3, height, width) for any number of views S and gives DEFAULT_OUTPUTS. Opset 18;
    attention as the exporter decomposes scaled_dot_product_attention; the single head or the experts as plain branches.
    Raises InputError for a size that does not fit, ExportError where the exporter fails.
    """
    check_shape(model.config, (1, TRACED_VIEWS, height, width))
    form = WidespreadForm(model, height, width).eval().requires_grad_(False)
    images = torch.rand(1, TRACED_VIEWS, 3, height, width, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="traced-", dir=folder) as scratch:
        traced = Path(scratch) / MODEL_FILE
        try:
            with warnings.catch_warnings():  # the older path warns of its age, and of every size that it fixes
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    form,
                    (images,),
                    str(traced),
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=["images"],
                    output_names=list(DEFAULT_OUTPUTS),
                    dynamic_axes={name: {1: "S"} for name in ("images", *DEFAULT_OUTPUTS)},
                )
        except Exception as error:
            raise ExportError(
                f"torch {torch.__version__} does not export the widespread form: {first_line(error)}"
            ) from error
        path = folder / MODEL_FILE
        # Beyond 2 GB the exporter writes a file for every weight, and for constants of nodes; the weights become one.
        loaded = ir.load(traced)
        _bring_in_constants(loaded)
        ir.save(loaded, path, external_data=f"{path.name}.data")
    return path


def _bring_in_constants(model: ir.Model) -> None:
    """Into the file, where they are otherwise: `ir.save` writes weights anew, and leaves what nodes hold as it is."""
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().copy()))


def export_in_child(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: `export_widespread` of the source into request["folder"], which has the file only when it is whole.

    source, seed, allow_pickle   of `open_checkpoint`
    height, width                pixels
    """
    from moe3d_deploy.export.precision import PrecisionPolicy
    from moe3d_deploy.export.source import SourceSpec

    spec = SourceSpec(request["source"], request["seed"], request["allow_pickle"])
    export_widespread(
        spec.load(PrecisionPolicy("fp32"), ()), Path(request["folder"]), request["height"], request["width"]
    )
    return {}
