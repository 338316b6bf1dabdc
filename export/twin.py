"""The float32 twin of a file: the same graph and the same weights, computed in float32 alone.

Of a bf16 file every 16-bit type is replaced by float32. Of products in 8 bits the weights stay, and what they are
multiplied with is not rounded.

ONNX Runtime has no bfloat16 kernels on a CPU, so a bf16 file cannot be run there; its twin can. Float32 noise apart, it
computes what PyTorch gives in float32 with the weights rounded to those of the file. That shows a wrong graph better
than the file itself could, whose own rounding would hide it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from moe3d_deploy.export import eight_bit

_SIXTEEN_BIT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


def float32_twin(model: Path, folder: Path) -> Path:
    """Write the twin of the ONNX file `model` and its weights into `folder`, tensor by tensor; returns its path."""
    twin = ir.load(model)
    in_8_bits = (eight_bit.DOMAIN, eight_bit.NAME, "")
    if in_8_bits in twin.functions:
        opset = twin.opset_imports[""]
        twin.functions[in_8_bits] = ir.serde.deserialize_function(eight_bit.float_function(opset))
    graphs: list[ir.Graph | ir.Function] = [twin.graph, *twin.functions.values()]
    for graph in graphs:
        for value in _values(graph):
            if value.dtype in _SIXTEEN_BIT:
                value.type = _FLOAT
        for node in graph.all_nodes():
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if name == "to" and attribute.value in _SIXTEEN_BIT:
                    node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
                elif attribute.type is ir.AttributeType.TENSOR and attribute.value.dtype in _SIXTEEN_BIT:
                    node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))
    for value in twin.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in _SIXTEEN_BIT:
            value.const_value = _widened(value.const_value)
            value.type = _FLOAT
    path = folder / f"twin.{model.name}"
    ir.save(twin, path, external_data=f"{path.name}.data")
    return path


def _values(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same values in float32, computed when they are written: the weights are never in memory together."""
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=ir.DataType.FLOAT,
        shape=tensor.shape,  # type: ignore[arg-type]
        name=tensor.name,
    )
