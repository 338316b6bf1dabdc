"""PyTorch model -> ONNX file with views, resolution and batch symbolic. Nothing here checks numbers: see verify.py."""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import sympy  # type: ignore[import-untyped]
import torch
from torch import nn

from moe3d_deploy.errors import ExportError, InputError, first_line
from moe3d_deploy.export import attention, eight_bit
from moe3d_deploy.export.contract import ATTENTION_OPSET, MODEL_FILE, OPSET, output_names
from moe3d_deploy.export.expert_mix import DOMAIN, NAME, SymbolicExpertMix, expert_mix_function
from moe3d_deploy.export.modules import ExportModule, PartModule
from moe3d_deploy.export.parts import model_inputs, model_outputs, parts_of
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.export.weights import turn_weights
from moe3d_deploy.manifest import Tensor
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.moe3d import check_outputs
from moe3d_deploy.model.transformer import fused_attention, set_attention

# The example the tracer sees. An axis of 1, or two equal ones, would be taken for constants.
TRACED_SHAPE_IN_PATCHES = (2, 3, 4, 5)

# Below it the coarsest feature map has a side of 1, which the tracer treats apart, and says so of axes that it is given
# as such (tokens), though not of multiples (images). Verification runs smaller sizes, from one patch on.
FEWEST_PATCHES = 3

# (B, S, rows, columns) at which every assumption of the tracer must hold. Many and few views, sides in every order, at
# least FEWEST_PATCHES each.
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
_FLOAT32 = PrecisionPolicy()


def prepare(
    model: MoE3D, *, merge: bool, outputs: Sequence[str] = (), opset: int = OPSET, input_type: str = "float32"
) -> ExportModule:
    """Turn a loaded model into its deployment form, in place: attention and merged experts as nodes with functions.

    From ATTENTION_OPSET on, attention of encoder and aggregator is ONNX's operator. The camera head's stays a function:
    it is float32, for which no builder has a kernel of the whole.
    """
    check_outputs(model.config, outputs)
    if "expert_depths" in outputs:
        raise InputError("output 'expert_depths' exists in PyTorch only; export expert_weights or depth_variance")
    set_attention(model, attention.operator_attention)
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


def trace(module: nn.Module, patch_size: int, inputs: Sequence[Tensor] | None = None) -> torch.export.ExportedProgram:
    """torch.export with named dimensions: the gate that refuses a model which depends on one concrete shape.

    inputs   what the module takes, every axis free; None: float images

    What it cannot see is a size of 1 treated apart (`if S == 1`): see verify.py.
    """
    inputs = inputs or model_inputs("float32", StaticShape())
    batch, views, rows, columns = TRACED_SHAPE_IN_PATCHES
    sizes = {
        "B": batch,
        "S": views,
        "H": rows * patch_size,
        "W": columns * patch_size,
        "rows": rows,
        "columns": columns,
    }
    dim = torch.export.Dim
    least = {} if any(tensor.name == "images" for tensor in inputs) else {"min": FEWEST_PATCHES}
    dims = {"B": dim("B"), "S": dim("S"), "rows": dim("grid_h", **least), "columns": dim("grid_w", **least)}
    dims |= {"H": patch_size * dims["rows"], "W": patch_size * dims["columns"]}
    example, shapes = [], []
    for tensor in inputs:
        axes = {index: axis for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        example.append(torch.zeros(shape, dtype=getattr(torch, tensor.dtype)))
        shapes.append({index: dims[axis] for index, axis in axes.items()})
    # A part takes its tensors as *tensors.
    dynamic = (tuple(shapes),) if isinstance(module, PartModule) else tuple(shapes)
    try:
        program = torch.export.export(module, tuple(example), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ExportError(
            f"the model depends on a concrete shape, so one file cannot serve all: {first_line(error)}"
        ) from error
    _require_general(program, patch_size, inputs)
    return program


def _require_general(program: torch.export.ExportedProgram, patch_size: int, inputs: Sequence[Tensor]) -> None:
    """Raise ExportError for an assumption that the tracer recorded and that does not hold at every size.

    torch.export refuses `S <= 8` itself. Of a dimension written as 14 * n it drops what it cannot solve for n, such as
    `int(2.5 * H) == 140` or `H <= W`, and keeps the example's number (torch 2.13).
    """
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    given = [nodes[name] for name in program.graph_signature.user_inputs]
    recorded = given[0].fake_mode.shape_env
    sizes = {
        axis: size for tensor, value in zip(inputs, given, strict=True)
        for axis, size in zip(tensor.shape, value.shape, strict=True) if isinstance(axis, str)
    }  # fmt: skip
    axes = ("B", "S", "H" if "H" in sizes else "rows", "W" if "W" in sizes else "columns")
    symbols = [next(iter(sizes[axis].node.expr.free_symbols)) for axis in axes]
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
    policy: PrecisionPolicy = _FLOAT32,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda phase: None,
) -> Path:
    """Write `model.onnx` and `model.onnx.data` into `folder`; returns the path of the first.

    `model` is changed to its deployment form. Weights keep their dtype and are streamed to the file; those that have 8
    bits in `policy`, which the model was loaded with, are rounded on the way. The axes that `static` fixes are traced
    like the others, so that the gate sees the whole, and bound in the file.
    """
    module = prepare(model, merge=merge, outputs=outputs, opset=opset, input_type=input_type)
    static = static or StaticShape()
    inputs, free = model_inputs(input_type, static), model_inputs(input_type, StaticShape())
    path = folder / MODEL_FILE
    written = model_outputs(outputs, model.config, static)
    _export(module, free, inputs, written, path, opset, policy, metadata or {}, progress)
    return path


def export_parts(
    model: MoE3D,
    folder: Path,
    split: str,
    *,
    merge: bool = True,
    outputs: Sequence[str] = (),
    opset: int = OPSET,
    input_type: str = "float32",
    static: StaticShape | None = None,
    policy: PrecisionPolicy = _FLOAT32,
    roles: Collection[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda phase: None,
) -> tuple[Path, ...]:
    """As `export_onnx`, in several files: `split` is one of SPLITS. Returns their paths, in the order they run.

    Each has the weights that it uses itself. `progress` gets the phase and the part's role. With `roles` only those
    parts are written, and the model needs no more than they use.
    """
    prepare(model, merge=merge, outputs=outputs, opset=opset, input_type=input_type)
    config = model.config
    traced = parts_of(split, config, outputs, input_type, StaticShape())
    written = parts_of(split, config, outputs, input_type, static or StaticShape())
    paths = []
    for free, part in zip(traced, written, strict=True):
        if roles is not None and part.role not in roles:
            continue
        path = folder / part.file
        notes = {
            **(metadata or {}),
            "moe3d.part": part.role,
            "moe3d.tensors": meanings((*part.inputs, *part.outputs)),
        }
        _export(
            PartModule(model, free), free.inputs, part.inputs, part.outputs, path, opset, policy, notes,
            lambda phase, role=part.role: progress(f"{phase} {role}"),  # type: ignore[misc]
        )  # fmt: skip
        paths.append(path)
    return tuple(paths)


def meanings(tensors: Sequence[Tensor]) -> str:
    """What the tensors of a file mean, as the JSON text in its metadata."""
    return json.dumps({tensor.name: tensor.meaning for tensor in tensors}, sort_keys=True)


def _export(
    module: ExportModule | PartModule,
    free: Sequence[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    path: Path,
    opset: int,
    policy: PrecisionPolicy,
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """Trace with the `free` inputs, and write the file with the sizes that `inputs` and `outputs` have."""
    progress("trace")
    program = trace(module, module.model.config.patch_size, free)
    progress("translate")
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[tensor.name for tensor in inputs],
            output_names=[tensor.name for tensor in outputs],
            verbose=False,
        )
    if onnx_program is None:
        raise ExportError("torch.onnx.export gave no program")
    graph_model = onnx_program.model
    progress("write")
    used = {node.domain for node in graph_model.graph}
    functions = [attention.attention_function(opset)] if attention.DOMAIN in used else []
    mix = module.model.depth_head.merged
    if isinstance(mix, SymbolicExpertMix) and DOMAIN in used:
        functions.append(expert_mix_function(mix.shape, opset))
    turn_weights(graph_model.graph)
    if eight_bit.quantize_products(graph_model.graph, partial(_is_eight_bit, policy)):
        graph_model.opset_imports.update(eight_bit.IMPORTS)
        functions += eight_bit.functions(opset)
    for function in map(ir.serde.deserialize_function, functions):
        graph_model.functions[function.identifier()] = function
    _clean(graph_model)
    for values, tensors in ((graph_model.graph.inputs, inputs), (graph_model.graph.outputs, outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape(tensor.shape)
    graph_model.metadata_props.update(metadata)
    ir.save(graph_model, path, external_data=f"{path.name}.data")
    progress("check")
    _check(path)


def _is_eight_bit(policy: PrecisionPolicy, bias: str) -> bool:
    """Whether the parameter of this name is the bias of a product that `policy` has in 8 bits."""
    name = bias.removeprefix("model.")
    return name.endswith(".bias") and policy.type_of(f"{name.removesuffix('bias')}weight") == "int8"


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
