"""The attentions of a parsed network, by the names of their ONNX nodes, to be found again in what is compiled."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from moe3d_deploy.trt.onnx_names import onnx_nodes

_BETWEEN = (
    "CAST",
    "IDENTITY",
    "SHUFFLE",
    "ELEMENTWISE",
    "SELECT",
    "UNARY",
)  # of a product and its softmax: scale, mask
_MOST_BETWEEN = 6
_DTYPES = {"float": "fp32", "half": "fp16"}


class Attention(NamedTuple):
    """One attention, as the graph has it.

    core      node of its softmax, or of the operator that is all of it
    products  nodes of the matrix products before and after the softmax; none of an operator
    dtype     type of its products, or of the operator: fp32, fp16, bf16
    """

    core: str
    products: tuple[str, ...]
    dtype: str


def attentions_of(network: Any) -> tuple[Attention, ...]:
    """Every attention operator, and every softmax between two matrix products: the camera head's as well.

    The softmax of an expert mix mixes no values with a product, so it is none.
    """
    layers = [network[index] for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    readers: dict[str, list[Any]] = {}
    for layer in layers:
        for tensor in _inputs(layer):
            readers.setdefault(tensor.name, []).append(layer)

    def before(layer: Any) -> Iterable[Any]:
        return (makers[tensor.name] for tensor in _inputs(layer) if tensor.name in makers)

    def after(layer: Any) -> Iterable[Any]:
        return (reader for i in range(layer.num_outputs) for reader in readers.get(layer.get_output(i).name, ()))

    found = []
    for layer in layers:
        kind = layer.type.name
        nodes = onnx_nodes(layer.metadata)
        if not nodes:
            continue
        if kind == "ATTENTION_OUTPUT":
            found.append(Attention(nodes[0], (), _dtype(layer)))
        elif kind == "SOFTMAX":
            products = [product for step in (before, after) if (product := _nearest_product(layer, step)) is not None]
            if len(products) == 2:
                names = tuple(onnx_nodes(product.metadata)[0] for product in products)
                found.append(Attention(nodes[0], names, _dtype(products[0])))
    return tuple(found)


def _nearest_product(layer: Any, step: Callable[[Any], Iterable[Any]]) -> Any | None:
    """The matrix product that is the fewest steps away, through what only scales, masks, casts or reshapes."""
    here = [layer]
    for _ in range(_MOST_BETWEEN):
        here = [other for one in here for other in step(one)]
        for other in here:
            if other.type.name == "MATRIX_MULTIPLY" and onnx_nodes(other.metadata):
                return other
        here = [other for other in here if other.type.name in _BETWEEN]
    return None


def _inputs(layer: Any) -> list[Any]:
    tensors = (layer.get_input(i) for i in range(layer.num_inputs))
    return [tensor for tensor in tensors if tensor is not None]  # an optional one that is left out


def _dtype(layer: Any) -> str:
    name = layer.get_output(0).dtype.name.lower()
    return _DTYPES.get(name, name)
