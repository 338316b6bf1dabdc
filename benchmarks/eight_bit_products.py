"""Matrix products with constant weights in 8 bits, in forms that ONNX Runtime has kernels for on a CPU.

    per tensor     DynamicQuantizeMatMul: the activations share one scale, which is measured in every run, and so does
                   each column of the weights
    per token      what `--precision int8` exports: a scale for every token and one for every column
    blocks of n    MatMulNBits at accuracy level 4: every n values of a token, or of a column of weights, share a scale

Weights are rounded to -127..127 with the largest value at the end of that range, and so are the activations of a token.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from moe3d_deploy.errors import InputError
from moe3d_deploy.export import eight_bit
from moe3d_deploy.export.eight_bit import Columns

Array = NDArray[np.float32]
DOMAIN = "com.microsoft"
FLOAT32, PER_TENSOR, PER_TOKEN = "float32", "per tensor", "per token"
BLOCKS = {f"blocks of {size}": size for size in (32, 128)}
FORMS = (PER_TENSOR, PER_TOKEN, *BLOCKS)
_ZERO = 128  # of what is stored without sign


class Product(NamedTuple):
    """The nodes of y = x @ weight, and their initialisers; every name but x begins with y."""

    nodes: list[onnx.NodeProto]
    tensors: list[onnx.TensorProto]


def product(form: str, x: str, weight: Array, y: str) -> Product:
    """y = x @ weight, for a weight (K, N) and any x (..., K). Raises InputError for one that blocks do not divide."""
    if form == PER_TENSOR:
        return _per_tensor(x, weight, y)
    if form == PER_TOKEN:
        return _per_token(x, weight, y)
    if form in BLOCKS:
        return _in_blocks(x, weight, y, BLOCKS[form])
    return Product([helper.make_node("MatMul", [x, f"{y}.weight"], [y])], [_tensor(f"{y}.weight", weight)])


def _per_tensor(x: str, weight: Array, y: str) -> Product:
    values, scale = Columns.of(weight)
    tensors = [
        _tensor(f"{y}.weight", values),
        _tensor(f"{y}.scale", scale),
        _tensor(f"{y}.zero", np.zeros(weight.shape[1], np.int8)),
    ]
    inputs = [x, *(tensor.name for tensor in tensors)]
    return Product([helper.make_node("DynamicQuantizeMatMul", inputs, [y], domain=DOMAIN)], tensors)


def _per_token(x: str, weight: Array, y: str) -> Product:
    tensors = [_tensor(f"{y}.{what}", values) for what, values in Columns.of(weight)._asdict().items()]
    inputs = [x, *(tensor.name for tensor in tensors)]
    return Product([helper.make_node(eight_bit.NAME, inputs, [y], domain=eight_bit.DOMAIN)], tensors)


def _in_blocks(x: str, weight: Array, y: str, size: int) -> Product:
    rows, columns = weight.shape
    if rows % size:
        raise InputError(
            f"a weight of {rows} rows cannot be cut into blocks of {size}; choose a model with wider blocks"
        )
    shape = columns, rows // size
    blocks = Columns.of(weight.T.reshape(-1, size).T)
    values = (blocks.values.T + np.int16(_ZERO)).astype(np.uint8).reshape(*shape, size)
    tensors = [_tensor(f"{y}.weight", values), _tensor(f"{y}.scale", blocks.scale.reshape(shape))]
    options = {"K": rows, "N": columns, "bits": 8, "block_size": size, "accuracy_level": 4}
    inputs = [x, *(tensor.name for tensor in tensors)]
    return Product([helper.make_node("MatMulNBits", inputs, [y], domain=DOMAIN, **options)], tensors)


def in_eight_bits(model: onnx.ModelProto, form: str, chosen: Callable[[str], bool]) -> int:
    """Rewrite the products with constant weights whose bias has a chosen name, in place; returns how many there were.

    The model has its weights with it. What no node reads any longer is left out.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    biases = {
        name: other
        for node in graph.node if node.op_type == "Add"
        for name, other in (tuple(node.input), tuple(reversed(node.input))) if other in weights
    }  # fmt: skip
    nodes, count = [], 0
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights or not chosen(biases.get(node.output[0], "")):
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        replacement = product(form, node.input[0], weight, node.output[0])
        nodes += replacement.nodes
        graph.initializer.extend(replacement.tensors)
        count += 1
    nodes = [copy.deepcopy(node) for node in nodes]  # those of the graph go with it
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    _import(model)
    return count


def chain(form: str, weights: Iterable[tuple[str, str, Array]], inputs: dict[str, int]) -> onnx.ModelProto:
    """A model of products alone: of every (x, y, weight) the product y = x @ weight.

    inputs   by name how many values a token has; they are (tokens, values), and all that no product reads is an output
    """
    nodes, tensors, read, widths = [], [], set(), {}
    for x, y, weight in weights:
        added = product(form, x, weight, y)
        nodes += added.nodes
        tensors += added.tensors
        read.add(x)
        widths[y] = weight.shape[1]
    graph = helper.make_graph(
        nodes, "products", _values(inputs, inputs), _values(widths, widths.keys() - read), tensors
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    _import(model)
    return model


def _tensor(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


def _values(widths: dict[str, int], names: Collection[str]) -> list[onnx.ValueInfoProto]:
    kind = onnx.TensorProto.FLOAT
    return [helper.make_tensor_value_info(n, kind, ["tokens", width]) for n, width in widths.items() if n in names]


def _drop_unused(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _import(model: onnx.ModelProto) -> None:
    """Make the operators of all forms known."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    for domain, version in {DOMAIN: 1, **eight_bit.IMPORTS}.items():
        if domain not in versions:
            model.opset_import.append(helper.make_opsetid(domain, version))
    model.functions.extend(eight_bit.functions(versions[""]))
