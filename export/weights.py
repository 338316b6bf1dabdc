"""Weights as a file stores them."""

import numpy as np
import onnx_ir as ir


def turn_weights(graph: ir.Graph) -> None:
    """Store the weights that every run would transpose as they are used, in place.

    The exporter does so itself, except for what several nodes read: the camera head's, one set for all its iterations.
    A runtime would hold a second copy of each, 0.9 GB for moe3d-1b in float32, and make it whenever it loads the file.
    A weight is copied when it is written, one at a time.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name is None or weight.const_value is None or not weight.is_initializer():
            continue
        turned = _turned(weight.const_value, node.attributes["perm"].as_ints())
        value = ir.Value(name=f"{weight.name}.transposed", const_value=turned, type=weight.type, shape=turned.shape)
        graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


def _turned(stored: ir.TensorProtocol, order: tuple[int, ...]) -> ir.LazyTensor:
    def values() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(stored.numpy().transpose(order)))

    sizes = stored.shape.numpy()
    return ir.LazyTensor(values, dtype=stored.dtype, shape=ir.Shape([sizes[axis] for axis in order]))
