"""PyTorch model -> ONNX file with views, resolution and batch symbolic. Nothing here checks numbers: see verify.py."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from moe3d_deploy.errors import ExportError, InputError, first_line
from moe3d_deploy.export.contract import ATTENTION_OPSET, INPUTS, MODEL_FILE, OPSET, output_names, output_shapes
from moe3d_deploy.export.expert_mix import NAME, SymbolicExpertMix, expert_mix_function
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.moe3d import check_outputs
from moe3d_deploy.model.transformer import explicit_attention, fused_attention, set_attention

# The example the tracer sees. An axis of 1, or two equal ones, would be taken for constants.
TRACED_SHAPE_IN_PATCHES = (2, 3, 4, 5)

# (B, S, rows, columns) at which every assumption of the tracer must hold. Many and few views, sides in every order, at
# least 3 patches each: below them the coarsest feature map has a side of 1, which the tracer treats apart.
PROBED_SHAPES_IN_PATCHES = (
    (2, 2, 3, 3),
    (3, 5, 5, 4),
    (2, 9, 4, 11),
    (7, 4, 37, 27),
    (2, 50, 11, 37),
    (4, 12, 28, 28),
    (5, 3, 64, 10),
    (16, 2, 3, 74),
    (9, 200, 150, 99),
)

Progress = Callable[[str], None]


class ExportModule(nn.Module):
    """The model with the ONNX contract's signature: images in, a tuple of the named outputs out."""

    def __init__(self, model: MoE3D, names: Sequence[str], input_type: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.input_type = input_type

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.input_type == "uint8":
            images = images.to(torch.float32).permute(0, 1, 4, 2, 3) / 255  # TensorRT does nothing to uint8 but cast it
        result = self.model(images, outputs=[name for name in self.names if name != "pose_enc"])
        return tuple(result[name] for name in self.names)


def prepare(
    model: MoE3D, *, merge: bool, outputs: Sequence[str] = (), opset: int = OPSET, input_type: str = "float32"
) -> ExportModule:
    """Turn a loaded model into its deployment form, in place: explicit attention, merged experts as one node.

    From ATTENTION_OPSET on, attention of encoder and aggregator is one operator. The camera head's stays explicit: it
    is float32, for which no builder has a kernel of the whole.
    """
    check_outputs(model.config, outputs)
    if "expert_depths" in outputs:
        raise InputError("output 'expert_depths' exists in PyTorch only; export expert_weights or depth_variance")
    set_attention(model, explicit_attention)
    if opset >= ATTENTION_OPSET:
        set_attention(model.aggregator, fused_attention)
    if model.config.moe is not None and merge:
        model.depth_head.merge_experts()
        variance = "depth_variance" in outputs
        model.depth_head.merged = SymbolicExpertMix(  # type: ignore[assignment]
            model.depth_head.merged,  # type: ignore[arg-type]
            with_weights=variance or bool({"expert_weights", "expert_entropy"} & set(outputs)),
            with_candidates=variance,
        )
    return ExportModule(model, output_names(outputs), input_type)


def trace(module: nn.Module, patch_size: int, input_type: str = "float32") -> torch.export.ExportedProgram:
    """torch.export with named dimensions: the gate that refuses a model which depends on one concrete shape.

    What it cannot see is a size of 1 treated apart (`if S == 1`): see verify.py.
    """
    batch, views, rows, columns = TRACED_SHAPE_IN_PATCHES
    sizes = {"B": batch, "S": views, "H": rows * patch_size, "W": columns * patch_size}
    axes = INPUTS[input_type][0]
    example = torch.zeros([sizes.get(axis, axis) for axis in axes], dtype=getattr(torch, input_type))  # type: ignore
    dim = torch.export.Dim
    dims = {"B": dim("B"), "S": dim("S"), "H": patch_size * dim("grid_h"), "W": patch_size * dim("grid_w")}
    shapes = {index: dims[axis] for index, axis in enumerate(axes) if isinstance(axis, str)}
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise ExportError(
            f"the model depends on a concrete shape, so one file cannot serve all: {first_line(error)}"
        ) from error
    _require_general(program, patch_size, axes)
    return program


def _require_general(program: torch.export.ExportedProgram, patch_size: int, axes: Sequence[str | int]) -> None:
    """Raise ExportError for an assumption that the tracer recorded and that does not hold at every size.

    torch.export refuses `S <= 8` itself. Of a dimension written as 14 * n it drops what it cannot solve for n, such as
    `int(2.5 * H) == 140` or `H <= W`, and keeps the example's number (torch 2.13).
    """
    name = program.graph_signature.user_inputs[0]
    images = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    recorded = images.fake_mode.shape_env
    sizes = dict(zip(axes, images.shape, strict=True))
    symbols = [next(iter(sizes[axis].node.expr.free_symbols)) for axis in ("B", "S", "H", "W")]
    names = dict(zip(symbols, (*sympy.symbols("B S"), *(s / patch_size for s in sympy.symbols("H W"))), strict=True))
    for guard in recorded.guards:
        assumed = guard.expr.xreplace(recorded.replacements)
        for shape in PROBED_SHAPES_IN_PATCHES:
            if assumed.xreplace(dict(zip(symbols, map(sympy.Integer, shape), strict=True))) != sympy.true:
                b, s, h, w = shape
                raise ExportError(
                    "the model depends on a concrete shape, so one file cannot serve all: it takes for granted that "
                    f"{assumed.xreplace(names)}, which fails at B={b} S={s} H={h * patch_size} W={w * patch_size}"
                )


def export_onnx(
    model: MoE3D,
    folder: Path,
    *,
    merge: bool = True,
    outputs: Sequence[str] = (),
    opset: int = OPSET,
    input_type: str = "float32",
    static: StaticShape | None = None,
    metadata: dict[str, str] | None = None,
    progress: Progress = lambda phase: None,
) -> Path:
    """Write `model.onnx` and `model.onnx.data` into `folder`; returns the path of the first.

    `model` is changed to its deployment form. Weights keep their dtype and are streamed to the file. The axes that
    `static` fixes are traced like the others, so that the gate sees the whole, and bound in the file.
    """
    module = prepare(model, merge=merge, outputs=outputs, opset=opset, input_type=input_type)
    progress("trace")
    program = trace(module, model.config.patch_size, input_type)
    progress("translate")
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(module.names),
            verbose=False,
        )
    if onnx_program is None:
        raise ExportError("torch.onnx.export gave no program")
    graph_model = onnx_program.model
    progress("write")
    mix = model.depth_head.merged
    if isinstance(mix, SymbolicExpertMix):
        function = ir.serde.deserialize_function(expert_mix_function(mix.shape, opset))
        graph_model.functions[function.identifier()] = function
    _clean(graph_model)
    static = static or StaticShape()
    (images,) = graph_model.graph.inputs
    images.shape = ir.Shape(static.bind(INPUTS[input_type][0]))
    for value, shape in zip(graph_model.graph.outputs, output_shapes(module.names, model.config), strict=True):
        value.shape = ir.Shape(static.bind(shape))
    graph_model.metadata_props.update(metadata or {})
    path = folder / MODEL_FILE
    ir.save(graph_model, path, external_data=f"{MODEL_FILE}.data")
    progress("check")
    _check(path)
    return path


def _clean(graph_model: ir.Model) -> None:
    """Leave nothing of the exporting machine (paths in node metadata, symbol names) in the file."""
    graph_model.producer_name, graph_model.producer_version = "moe3d-deploy", None
    graph = graph_model.graph
    graph.name = "moe3d"
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        if node.op_type == NAME:
            node.name = NAME  # an engine's layers carry it: that is how its audit knows a plugin
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = None  # inferred anew by every reader, and named after the tracer's symbols
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the written {path.name} is not valid ONNX: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs a warning for each torchvision operator when torchvision is not installed."""
    logger: Any = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
