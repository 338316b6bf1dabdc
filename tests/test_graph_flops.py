"""The count over exported graphs equals the cost model, and that over small graphs what a hand computation gives."""

from collections.abc import Sequence
from pathlib import Path

import exports
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moe3d_deploy import costs
from moe3d_deploy.errors import ExportError, InputError
from moe3d_deploy.export.graph_flops import count_flops, graph_flops, image_dims

SHAPES = ((2, 3, 56, 70), (1, 1, 14, 28))
OPSET = 23


def graph(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, tuple[int, ...]],
    opset: int = OPSET,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A graph from `x` of unknown shape to `y`, with weights of zeros."""
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    body = helper.make_graph(list(nodes), "g", inputs, outputs, tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@exports.IN_EACH
def test_an_exported_graph_does_the_work_that_the_cost_model_says(file: str, shape: costs.Shape4) -> None:
    """And no more than the position embedding's resampling and what optional outputs add, counted here by hand."""
    exported = exports.FILES[file]()
    batch, views, height, width = shape
    names = {output.name for output in exported.proto.graph.output}
    expected = costs.total_flops(exports.MOE, views, height, width, batch=batch, point_head="point_map" in names)
    expected += costs.position_embedding_flops(exports.MOE, height, width)
    pixels = batch * views * height * width
    if "world_points" in names:
        expected += 2 * pixels * 3 * 3  # a rotation
    if "depth_variance" in names and any(node.op_type == "ExpertMix" for node in exported.proto.graph.node):
        expected += 2 * pixels * 2 * 4 * 2  # the candidates once more, beside the node: 2 experts of 4 channels to 2
    assert sum(graph_flops(exported.path, shape).values()) == expected


def test_a_graph_without_its_weights_is_counted_too(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(exports.merged().path.read_bytes())
    assert graph_flops(path, SHAPES[0]) == graph_flops(exports.merged().path, SHAPES[0])


def test_the_expert_mix_counts_by_its_definition() -> None:
    """Each pixel: 2 experts of 4 channels to 2 values each, and 4 channels of the gate to 2 logits."""
    batch, views, height, width = SHAPES[0]
    found = graph_flops(exports.merged().path, SHAPES[0])
    assert found["ExpertMix"] == 2 * batch * views * height * width * (2 * 4 * 2 + 4 * 2)


def test_any_other_function_counts_as_its_body() -> None:
    opset = helper.make_opsetid("", OPSET)
    product = helper.make_node("MatMul", ["a", "b"], ["c"])
    negative = helper.make_node("Neg", ["c"], ["d"])
    function = helper.make_function("local", "Product", ["a", "b"], ["d"], [product, negative], [opset])
    model = graph([helper.make_node("Product", ["x", "w"], ["y"], domain="local")], {"w": (5, 7)})
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert count_flops(model, (3, 5)) == {"MatMul": 2 * 3 * 5 * 7}


@pytest.mark.parametrize(
    ("op", "weights", "attributes", "images", "expected"),
    [
        ("MatMul", {"w": (5, 7)}, {}, (2, 3, 5), 2 * 2 * 3 * 5 * 7),
        ("MatMul", {"w": (5,)}, {}, (2, 3, 5), 2 * 2 * 3 * 5),
        ("Gemm", {"w": (5, 7)}, {}, (3, 5), 2 * 3 * 5 * 7),
        ("Gemm", {"w": (5, 7)}, {"transA": 1}, (5, 3), 2 * 3 * 5 * 7),
        # 4 of 8 input channels for each of 6 output channels, 9 taps, 10 x 11 pixels
        ("Conv", {"w": (6, 4, 3, 3)}, {"group": 2, "pads": [1] * 4}, (2, 8, 10, 11), 2 * 2 * 6 * 4 * 9 * 110),
        ("Conv", {"w": (6, 8, 3, 3)}, {"strides": [2, 2], "pads": [1] * 4}, (1, 8, 5, 7), 2 * 6 * 8 * 9 * 3 * 4),
        ("ConvTranspose", {"w": (8, 6, 4, 4)}, {"strides": [4, 4]}, (2, 8, 3, 5), 2 * 2 * 8 * 6 * 16 * 15),
    ],
)
def test_an_operator_counts_as_by_hand(
    op: str, weights: dict[str, tuple[int, ...]], attributes: dict[str, object], images: tuple[int, ...], expected: int
) -> None:
    model = graph([helper.make_node(op, ["x", "w"], ["y"], **attributes)], weights)
    assert count_flops(model, images) == {op: expected}


def test_attention_counts_both_products_with_heads_apart_or_in_the_channels() -> None:
    """2 scenes, 3 heads, 5 queries, 7 keys of 4 channels, values of 6: 2 x 2 x 3 x 5 x 7 x (4 + 6)."""
    apart = graph([helper.make_node("Attention", ["x", "k", "v"], ["y"])], {"k": (2, 3, 7, 4), "v": (2, 3, 7, 6)})
    heads = {"q_num_heads": 3, "kv_num_heads": 3}
    node = helper.make_node("Attention", ["x", "k", "v"], ["y"], **heads)
    together = graph([node], {"k": (2, 7, 12), "v": (2, 7, 18)})
    assert count_flops(apart, (2, 3, 5, 4)) == {"Attention": 2 * 2 * 3 * 5 * 7 * (4 + 6)}
    assert count_flops(together, (2, 5, 12)) == {"Attention": 2 * 2 * 3 * 5 * 7 * (4 + 6)}


def test_a_shape_computed_from_the_input_is_followed_through_casts() -> None:
    """(B, 2 T) reshaped to (2 B, T) by its own shape, in half, times (T, 3)."""
    model = graph(
        [
            helper.make_node("Shape", ["x"], ["whole"]),
            helper.make_node("Constant", [], ["factors"], value_ints=[2, 1]),
            helper.make_node("Mul", ["whole", "factors"], ["product"]),
            helper.make_node("Constant", [], ["divisors"], value_ints=[1, 2]),
            helper.make_node("Div", ["product", "divisors"], ["target"]),
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Reshape", ["half", "target"], ["tall"]),
            helper.make_node("Cast", ["w"], ["half_w"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["tall", "half_w"], ["y"]),
        ],
        {"w": (5, 3)},
    )
    assert count_flops(model, (4, 10)) == {"MatMul": 2 * 8 * 5 * 3}


@pytest.mark.parametrize("op", ["Einsum", "ConvInteger", "LSTM"])
def test_an_operator_that_hides_products_is_refused(op: str) -> None:
    model = graph([helper.make_node(op, ["x", "w"], ["y"], name="hidden")], {"w": (5, 7)})
    with pytest.raises(ExportError, match=rf"node 'hidden' \(ai.onnx::{op}\) cannot be counted"):
        count_flops(model, (3, 5))


def test_an_operator_of_another_domain_without_a_body_is_refused() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="foreign", domain="com.vendor")
    model = graph([node], {"w": (5, 7)})
    model.opset_import.append(helper.make_opsetid("com.vendor", 1))
    with pytest.raises(ExportError, match="com.vendor::MatMul"):
        count_flops(model, (3, 5))


def test_a_shape_that_depends_on_values_is_refused() -> None:
    model = graph([helper.make_node("NonZero", ["x"], ["y"], name="where")], {})
    with pytest.raises(ExportError, match=r"node 'where' \(ai.onnx::NonZero\) has an output of unknown shape"):
        count_flops(model, (3, 5))


@pytest.mark.parametrize(
    ("declared", "kind", "expected"),
    [
        (("B", "S", 3, "H", "W"), TensorProto.FLOAT, (2, 4, 3, 28, 42)),
        (("B", "S", "H", "W", 3), TensorProto.UINT8, (2, 4, 28, 42, 3)),
        ((2, 4, 3, 28, 42), TensorProto.FLOAT, (2, 4, 3, 28, 42)),
    ],
)
def test_the_images_take_the_shape_in_the_files_own_layout(
    declared: tuple[object, ...], kind: int, expected: tuple[int, ...]
) -> None:
    model = graph([], {})
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", kind, declared))
    assert image_dims(model, (2, 4, 28, 42)) == expected


def test_a_shape_that_a_fixed_input_does_not_take_is_refused() -> None:
    model = graph([], {})
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 2, 3, 28, "W")))
    with pytest.raises(InputError, match="does not fit the graph's input"):
        image_dims(model, (1, 3, 28, 42))
