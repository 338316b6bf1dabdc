"""FLOPs of an ONNX graph at one input shape, counted from its nodes: an independent check of `moe3d_deploy.costs`.

Shapes are computed node by node from the concrete input, as what this exporter writes derives most of them from other
shapes. No weight is read. The convention is that of `costs`: products, convolutions and attention, 2 FLOP each
multiply-add.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from moe3d_deploy.errors import ExportError, InputError
from moe3d_deploy.export.expert_mix import DOMAIN, NAME

Dims = tuple[int, ...]

# Holds products that are not counted here, or a graph of its own: better no figure than a wrong one.
_UNCOUNTED = {
    "ConvInteger", "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "RNN", "Scan",
}  # fmt: skip
_LARGEST_KNOWN = 32  # values; what computes a shape is short, what is longer is data


def graph_flops(path: str | Path, shape: tuple[int, int, int, int]) -> dict[str, int]:
    """FLOPs per operator type of the ONNX file at `path` on (batch, views, height, width); their sum is the total.

    A function of the model counts as what its body does, but for moe3d::ExpertMix: its body multiplies and adds without
    a product operator, so it counts by its definition. Raises InputError for a shape that the file's input cannot take,
    and ExportError for an operator that cannot be counted.
    """
    model = onnx.load(path, load_external_data=False)
    return count_flops(model, image_dims(model, shape))


def image_dims(model: onnx.ModelProto, shape: tuple[int, int, int, int]) -> Dims:
    """The dimensions of the input `images` for (batch, views, height, width); channels are where the file has its 3."""
    batch, views, height, width = shape
    declared = [_dim(d) for d in model.graph.input[0].type.tensor_type.shape.dim]
    last = len(declared) == 5 and declared[4] == 3
    dims = (batch, views, height, width, 3) if last else (batch, views, 3, height, width)
    if len(declared) != 5 or any(isinstance(d, int) and d != size for d, size in zip(declared, dims, strict=True)):
        raise InputError(f"shape {shape} does not fit the graph's input {tuple(declared)}; use a shape that it takes")
    return dims


def count_flops(model: onnx.ModelProto, images: Dims) -> dict[str, int]:
    """FLOPs per operator type with the graph's first input of dimensions `images`; see `graph_flops`."""
    from onnx.inliner import inline_selected_functions

    model = inline_selected_functions(model, [(DOMAIN, NAME)], exclude=True)
    found = _Shapes(model, images)
    totals: dict[str, int] = {}
    for node in model.graph.node:
        found.add(node)
        if node.op_type in _COUNTED:
            inputs = [found.dims(name) for name in node.input if name]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            count = _COUNTED[node.op_type](inputs, found.dims(node.output[0]), attributes)
            totals[node.op_type] = totals.get(node.op_type, 0) + count
    return totals


class _Shapes:
    """Type and shape of every tensor so far, and the values of those that are short enough to be part of a shape."""

    def __init__(self, model: onnx.ModelProto, images: Dims) -> None:
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._ir_version = model.ir_version
        self._imports = list(model.opset_import)
        self._types: dict[str, onnx.TypeProto] = {}
        self._values: dict[str, NDArray[Any]] = {}
        first = model.graph.input[0]
        self._types[first.name] = helper.make_tensor_type_proto(first.type.tensor_type.elem_type, images)
        for tensor in model.graph.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if math.prod(tensor.dims) <= _LARGEST_KNOWN and tensor.data_location != onnx.TensorProto.EXTERNAL:
                self._values[tensor.name] = numpy_helper.to_array(tensor)

    def dims(self, name: str) -> Dims:
        return tuple(d.dim_value for d in self._types[name].tensor_type.shape.dim)

    def add(self, node: onnx.NodeProto) -> None:
        """Find the shapes, and if they are known the values, of what `node` gives."""
        label = f"{node.domain or 'ai.onnx'}::{node.op_type}"
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            self._add_expert_mix(node)
            return
        if node.op_type in _UNCOUNTED or node.domain not in ("", "ai.onnx"):
            raise ExportError(f"node {node.name!r} ({label}) cannot be counted; its FLOPs are not known")
        inputs = [name for name in node.input if name]
        if all(name in self._values for name in inputs):
            known = {name: self._values[name] for name in inputs}
            self._keep(node, list(ReferenceEvaluator(node).run(None, known)))
            return
        if node.op_type == "Shape":
            dims = np.array(self.dims(inputs[0]), np.int64)
            start, end = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
            self._keep(node, [dims[start:end]])
            return
        schema = onnx.defs.get_schema(node.op_type, self._opsets[node.domain], node.domain)
        types = onnx.shape_inference.infer_node_outputs(
            schema,
            node,
            {name: self._types[name] for name in inputs},
            {name: numpy_helper.from_array(self._values[name]) for name in inputs if name in self._values},
            opset_imports=self._imports,
            ir_version=self._ir_version,
        )
        for name in node.output:
            if name and not _is_concrete(types.get(name)):
                raise ExportError(f"node {node.name!r} ({label}) has an output of unknown shape; FLOPs are not known")
        self._types.update(types)

    def _add_expert_mix(self, node: onnx.NodeProto) -> None:
        """depth and confidence (N, H, W), and the gate's weights (N, K, H, W) where they are asked for."""
        count, _, height, width = self.dims(node.input[0])
        experts = self.dims(node.input[1])[0]
        shapes = [(count, height, width), (count, height, width), (count, experts, height, width)]
        for name, dims in zip(node.output, shapes, strict=False):
            self._types[name] = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, dims)

    def _keep(self, node: onnx.NodeProto, values: Sequence[Any]) -> None:
        for name, value in zip(node.output, values, strict=True):
            array = np.asarray(value)
            self._types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            if array.size <= _LARGEST_KNOWN:
                self._values[name] = array


def _is_concrete(found: onnx.TypeProto | None) -> bool:
    tensor = found.tensor_type if found is not None else None
    return tensor is not None and tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)


def _dim(dim: Any) -> int | str:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param


def _matmul(inputs: Sequence[Dims], output: Dims, attributes: dict[str, Any]) -> int:
    return 2 * math.prod(output) * inputs[0][-1]


def _gemm(inputs: Sequence[Dims], output: Dims, attributes: dict[str, Any]) -> int:
    return 2 * math.prod(output) * inputs[0][0 if attributes.get("transA") else 1]


def _conv(inputs: Sequence[Dims], output: Dims, attributes: dict[str, Any]) -> int:
    """The weight's (out, in / groups, ...) is read once for every pixel of the output."""
    return 2 * math.prod(output) * math.prod(inputs[1][1:])


def _conv_transpose(inputs: Sequence[Dims], output: Dims, attributes: dict[str, Any]) -> int:
    """The weight's (in, out / groups, ...) is read once for every pixel of the input."""
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _attention(inputs: Sequence[Dims], output: Dims, attributes: dict[str, Any]) -> int:
    """q k^T and its product with v; (B, heads, T, d), or (B, T, heads d) with the number of heads as an attribute."""
    query, key, value = inputs[:3]
    if len(query) == 4:
        batch, heads, length, dim = query
        value_dim = value[3]
    else:
        batch, length, width = query
        heads = attributes["q_num_heads"]
        dim, value_dim = width // heads, value[2] // attributes["kv_num_heads"]
    return 2 * batch * heads * length * key[-2] * (dim + value_dim)


def _expert_mix(inputs: Sequence[Dims], output: Dims, attributes: dict[str, Any]) -> int:
    """Each pixel: K experts of Ce channels to 2 values, Cg channels to K logits; weights (K, 2, Ce) and (K, Cg)."""
    expert_weight, gate_weight = inputs[1], inputs[3]
    return 2 * math.prod(output) * (math.prod(expert_weight) + math.prod(gate_weight))


_COUNTED: dict[str, Callable[[Sequence[Dims], Dims, dict[str, Any]], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    NAME: _expert_mix,
}
