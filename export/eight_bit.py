"""Matrix products in 8 bits, for ONNX Runtime on a CPU: a scale for every token, one for every column of weights.

A product is one node `moe3d::MatMulInt8` with a model-local function as its body, so that the file says what it
computes in ONNX's own operations. One node of the body has a kernel in ONNX Runtime: see `runtime.onnx_operators`.

Weights are rounded to -127..127 when the file is written, the largest value of a column at the end of that range;
activations in every run, the largest value of a token at its end. One scale for all tokens would be lost with the first
token that has a value far from the others (`moe3d_deploy.benchmarks.eight_bit` measures both).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper

from moe3d_deploy.errors import ExportError
from moe3d_deploy.runtime.onnx_operators import DOMAIN as KERNELS
from moe3d_deploy.runtime.onnx_operators import MATMUL_NAME

DOMAIN, NAME, VERSION = "moe3d", "MatMulInt8", 1
IMPORTS = {DOMAIN: VERSION, KERNELS: VERSION}  # of a file with such products
_INPUTS, _OUTPUT = ("x", "weight", "scale"), "y"
_LARGEST = 127
_ZERO = 128  # activations are stored without sign, around this: for signed ones there is no fast kernel


class Columns(NamedTuple):
    """A weight in 8 bits: values (K, N) int8 and the scale (N,) float32 of every column."""

    values: NDArray[np.int8]
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, weight: NDArray[np.float32]) -> "Columns":
        scale = _scale(weight)
        return cls(np.rint(weight / scale).astype(np.int8), scale)

    def rounded(self) -> NDArray[np.float32]:
        """The weight that these columns stand for."""
        return self.values * self.scale


def _scale(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of every column of a weight (K, N); 1 for one of zeros."""
    largest = np.maximum(weight.max(axis=0), -weight.min(axis=0))
    return np.where(largest > 0, largest / np.float32(_LARGEST), np.float32(1)).astype(np.float32)


def quantize_products(graph: ir.Graph, is_chosen: Callable[[str], bool]) -> int:
    """Put the products whose bias has a chosen name into 8 bits, in place; returns how many there were.

    Weights are rounded when they are written, one at a time. Raises ExportError where a chosen bias belongs to none.
    """
    biases = {name for name in graph.initializers if is_chosen(name)}
    count = 0
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or not (found := biases & _added(node.outputs[0])):
            continue
        biases -= found
        columns = _columns(graph, weight, f"{min(found).removesuffix('bias')}weight")
        product = ir.Node(DOMAIN, NAME, [node.inputs[0], *columns], num_outputs=1, name=node.name)
        graph.insert_before(node, product)
        product.outputs[0].type = node.outputs[0].type
        product.outputs[0].name = node.outputs[0].name
        node.outputs[0].replace_all_uses_with(product.outputs[0])
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[str(weight.name)]
        count += 1
    if biases:
        raise ExportError(f"no matrix product with constant weights has the bias {min(biases)}: it cannot be in 8 bits")
    return count


def functions(opset: int) -> tuple[onnx.FunctionProto, onnx.FunctionProto]:
    """The body of `moe3d::MatMulInt8`, y = x @ (weight * scale), and of the node in it that is a kernel's.

    x (..., K) float32, weight (K, N) int8, scale (N,) float32 -> y (..., N) float32
    """
    body = _Body()
    body.constant("last_axis", np.array([-1], np.int64))
    body.constant("step", np.float32(1 / _LARGEST))
    body.constant("least", np.finfo(np.float32).tiny)  # for a token of zeros
    body.constant("middle", np.float32(_ZERO + 0.5))  # a cast cuts off: with the half it rounds
    body.constant("zero", np.uint8(_ZERO))
    body.constant("one", np.float32(1))
    body.op("ReduceMax", ["x", "last_axis"], "highest", keepdims=1)
    body.op("ReduceMin", ["x", "last_axis"], "lowest", keepdims=1)
    body.op("Neg", ["lowest"], "below")
    body.op("Max", ["highest", "below"], "largest")
    body.op("Mul", ["largest", "step"], "exact_scale")
    body.op("Max", ["exact_scale", "least"], "token_scale")
    body.op("Div", ["x", "token_scale"], "steps")
    body.op("Add", ["steps", "middle"], "moved")
    body.op("Cast", ["moved"], "tokens", to=TensorProto.UINT8)
    body.op(MATMUL_NAME, ["tokens", "weight", "one", "scale", "zero"], "of_columns", domain=KERNELS)
    body.op("Mul", ["of_columns", "token_scale"], _OUTPUT)

    kernel = _Body()
    kernel.op("MatMulInteger", ["a", "b", "a_zero"], "sums")
    kernel.op("Cast", ["sums"], "floats", to=TensorProto.FLOAT)
    kernel.op("Mul", ["floats", "a_scale"], "scaled")
    kernel.op("Mul", ["scaled", "b_scale"], _OUTPUT)
    return (
        body.function(DOMAIN, NAME, _INPUTS, opset, also=KERNELS),
        kernel.function(KERNELS, MATMUL_NAME, ("a", "b", "a_scale", "b_scale", "a_zero"), opset),
    )


def float_function(opset: int) -> onnx.FunctionProto:
    """The body of `moe3d::MatMulInt8` without the rounding of x: what the stored weights stand for, in float32."""
    body = _Body()
    body.op("Cast", ["weight"], "floats", to=TensorProto.FLOAT)
    body.op("Mul", ["floats", "scale"], "columns")
    body.op("MatMul", ["x", "columns"], _OUTPUT)
    return body.function(DOMAIN, NAME, _INPUTS, opset)


class _Body:
    """Nodes of a function; every name has a prefix, as in `expert_mix_function`."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self._nodes.append(helper.make_node(op_type, [*map(_n, inputs)], [_n(output)], **attributes))

    def constant(self, name: str, value: Any) -> None:
        self.op("Constant", [], name, value=onnx.numpy_helper.from_array(np.asarray(value), _n(name)))

    def function(
        self, domain: str, name: str, inputs: Sequence[str], opset: int, also: str | None = None
    ) -> onnx.FunctionProto:
        versions = {"": opset, **({also: VERSION} if also else {})}
        imports = [helper.make_opsetid(*item) for item in versions.items()]
        return helper.make_function(domain, name, [*map(_n, inputs)], [_n(_OUTPUT)], self._nodes, imports)


def _n(name: str) -> str:
    return f"moe3d_int8_{name}"


def _added(value: ir.Value) -> set[str]:
    """Names of the constants that are added to a value."""
    sums = [use.node for use in value.uses() if use.node.op_type == "Add"]
    others = [other for node in sums for other in node.inputs if other is not None]
    return {str(other.name) for other in others if other.const_value is not None}


def _columns(graph: ir.Graph, weight: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Initialisers for the values and the scales of a weight, computed when they are written, under `name`."""
    stored = weight.const_value
    rows, columns = stored.shape.numpy()  # type: ignore[union-attr]

    def values() -> ir.TensorProtocol:
        return ir.tensor(Columns.of(stored.numpy()).values)  # type: ignore[union-attr]

    def scale() -> ir.TensorProtocol:
        return ir.tensor(_scale(stored.numpy()))  # type: ignore[union-attr]

    def add(suffix: str, dtype: ir.DataType, shape: ir.Shape, compute: Callable[[], ir.TensorProtocol]) -> ir.Value:
        tensor = ir.LazyTensor(compute, dtype=dtype, shape=shape)
        value = ir.Value(name=f"{name}.{suffix}", const_value=tensor, type=ir.TensorType(dtype), shape=shape)
        graph.register_initializer(value)
        return value

    return (
        add("int8", ir.DataType.INT8, ir.Shape([rows, columns]), values),
        add("scale", ir.DataType.FLOAT, ir.Shape([columns]), scale),
    )
