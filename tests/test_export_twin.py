"""The float32 twin of a 16-bit file: every type, nothing else; and what it shows that the file itself would hide."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from moe3d_deploy.export.twin import float32_twin

KINDS = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
WEIGHT = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


def write(folder: Path, kind: int) -> Path:
    """images -> 16 bits -> MatMul, a constant in a node, a function -> float32; the weight beside the file."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = numpy_helper.from_array(WEIGHT.astype(dtype), "weight")
    half = numpy_helper.from_array(np.array([0.5], dtype), "")
    body = [
        helper.make_node("Constant", [], ["f_two"], value=numpy_helper.from_array(np.array([2.0], dtype), "")),
        helper.make_node("Mul", ["f_x", "f_two"], ["f_y"]),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=kind),
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Constant", [], ["half"], value=half),
        helper.make_node("Mul", ["product", "half"], ["halved"]),
        helper.make_node("Double", ["halved"], ["doubled"], domain="moe3d"),
        helper.make_node("Cast", ["doubled"], ["depth"], to=TensorProto.FLOAT),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64]) for name in ("images", "depth")]
    middle = [helper.make_tensor_value_info("product", kind, ["N", 64])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("moe3d", 1)]
    function = helper.make_function("moe3d", "Double", ["f_x"], ["f_y"], body, opsets[:1])
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight], value_info=middle)
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return folder / "model.onnx"


def kinds_in(model: onnx.ModelProto) -> set[int]:
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    attributes: list[Any] = [attribute for node in nodes for attribute in node.attribute]
    return {
        *(tensor.data_type for tensor in model.graph.initializer),
        *(value.type.tensor_type.elem_type for value in model.graph.value_info),
        *(attribute.i for attribute in attributes if attribute.name == "to"),
        *(attribute.t.data_type for attribute in attributes if attribute.type == onnx.AttributeProto.TENSOR),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_16_bit_type_becomes_float32_and_nothing_else_changes(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path, KINDS[kind])
    assert kinds_in(onnx.load(source)) == {KINDS[kind], TensorProto.FLOAT}

    twin = onnx.load(float32_twin(source, tmp_path))

    assert kinds_in(twin) == {TensorProto.FLOAT}
    assert [node.op_type for node in twin.graph.node] == [node.op_type for node in onnx.load(source).graph.node]
    onnx.checker.check_model(tmp_path / "twin.model.onnx", full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_runs_and_computes_with_the_rounded_weights_in_float32(kind: str, tmp_path: Path) -> None:
    path = float32_twin(write(tmp_path, KINDS[kind]), tmp_path)
    images = np.random.default_rng(1).random((3, 64), np.float32)

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (depth,) = session.run(None, {"images": images})

    rounded = WEIGHT.astype(helper.tensor_dtype_to_np_dtype(KINDS[kind])).astype(np.float64)
    np.testing.assert_allclose(depth, images @ rounded, rtol=1e-5, atol=1e-5)  # 0.5 times 2
    assert np.abs(depth - images @ WEIGHT.astype(np.float64)).max() > 1e-4


def test_onnxruntime_cannot_run_the_bf16_file_itself(tmp_path: Path) -> None:
    """The day that it can, the twin may go."""
    with pytest.raises(Exception, match="NOT_IMPLEMENTED|bfloat16|Could not find an implementation"):
        ort.InferenceSession(write(tmp_path, TensorProto.BFLOAT16), providers=["CPUExecutionProvider"])
