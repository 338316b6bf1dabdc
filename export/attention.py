"""Attention as one ONNX node with a model-local function as its body.

TensorRT's parser inlines the body, plain operations that it fuses itself. ONNX Runtime has a kernel for the node, under
another name: see `moe3d_deploy.runtime.onnx_operators`. Operands and attributes are that kernel's.
"""

import math
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from moe3d_deploy.runtime.onnx_operators import DOMAIN, NAME

VERSION = 1


def operator_attention(q_BTHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    """Stands in for an attention while a graph is exported: emits the node instead of computing it.

    As in `explicit_attention`, 16-bit q and k are scaled by powers of two, which they hold exactly; the attribute
    `scale`, of the float32 logits, is the rest. In float32 it is all of it.
    """
    batch, length, heads, width = q_BTHd.shape
    scale = -0.5 * math.log2(width)
    if q_BTHd.dtype != torch.float32:
        whole = math.floor(scale)
        q_BTHd, k_BTHd = q_BTHd * 2.0 ** (whole // 2), k_BTHd * 2.0 ** (whole - whole // 2)
        scale -= whole
    result = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}",
        tuple(t.flatten(-2) for t in (q_BTHd, k_BTHd, v_BTHd)),
        {"num_heads": heads, "scale": 2.0**scale},
        dtype=v_BTHd.dtype,
        shape=[batch, length, heads * width],
        version=VERSION,
    )
    return result.unflatten(-1, (heads, width))


def attention_function(opset: int) -> onnx.FunctionProto:
    """The node's body, for any type and width. Every name has a prefix: see `expert_mix_function`."""
    body: list[onnx.NodeProto] = []

    def n(name: str) -> str:
        return f"moe3d_mha_{name}"

    def op(op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        body.append(helper.make_node(op_type, [n(i) for i in inputs], [n(output)], **attributes))

    def constant(name: str, values: Sequence[int]) -> None:
        op("Constant", [], name, value=helper.make_tensor(n(name), TensorProto.INT64, [len(values)], values))

    for name, key, kind in (("num_heads", "value_int", "INT"), ("scale", "value_float", "FLOAT")):
        given = onnx.AttributeProto(name=key, type=onnx.AttributeProto.AttributeType.Value(kind), ref_attr_name=name)
        op("Constant", [], name)
        body[-1].attribute.append(given)

    constant("first_axis", [0])
    constant("whole", [0, 0])  # Reshape keeps these axes
    constant("rest", [-1])
    op("Unsqueeze", ["num_heads", "first_axis"], "heads")
    op("Concat", ["whole", "heads", "rest"], "apart", axis=0)
    op("Concat", ["whole", "rest"], "together", axis=0)
    for name, order in (("query", (0, 2, 1, 3)), ("key", (0, 2, 3, 1)), ("value", (0, 2, 1, 3))):
        op("Reshape", [name, "apart"], f"{name}_apart")
        op("Transpose", [f"{name}_apart"], f"{name}_heads", perm=order)
    op("MatMul", ["query_heads", "key_heads"], "products")
    op("Cast", ["products"], "products32", to=TensorProto.FLOAT)
    op("Mul", ["products32", "scale"], "logits")
    op("Softmax", ["logits"], "weights32", axis=-1)
    op("CastLike", ["weights32", "value"], "weights")
    op("MatMul", ["weights", "value_heads"], "mixed_heads")
    op("Transpose", ["mixed_heads"], "mixed", perm=(0, 2, 1, 3))
    op("Reshape", ["mixed", "together"], "output")
    return helper.make_function(
        DOMAIN,
        NAME,
        [n(i) for i in ("query", "key", "value")],
        [n("output")],
        body,
        [helper.make_opsetid("", opset)],
        attributes=["num_heads", "scale"],
    )
