"""`moe3d::ExpertMix`: the expert head's per-pixel tail as one ONNX node with a model-local function as its body.

A runtime that knows the operator (a TensorRT plugin) replaces the node; every other one inlines the body. Formula
and operand layout: `moe3d_deploy.model.experts.expert_mix`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from moe3d_deploy.model.experts import MergedExperts, Mixture, expert_mix

DOMAIN = "moe3d"
NAME = "ExpertMix"
VERSION = 1

# TensorRT 10.15 and later choose a registered plugin over the function only for a node with these.
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}


@dataclass(frozen=True)
class ExpertMixShape:
    """The static sizes of one model's mix; `with_weights` adds the gate's weights as a third output."""

    num_experts: int
    hidden_channels: int
    gate_hidden_channels: int
    with_weights: bool = False

    @property
    def outputs(self) -> Sequence[str]:
        return ("depth", "confidence", "weights") if self.with_weights else ("depth", "confidence")


class SymbolicExpertMix(nn.Module):
    """Stands in for MergedExperts while a graph is exported: emits the node instead of computing the mix."""

    def __init__(self, merged: MergedExperts, *, with_weights: bool, with_candidates: bool) -> None:
        super().__init__()
        self.merged = merged
        self.with_candidates = with_candidates
        experts, _, width = merged.expert_weight.shape
        self.shape = ExpertMixShape(experts, width, merged.gate_weight.shape[1], with_weights)

    def forward(self, features_NCHW: Tensor) -> Mixture:
        merged = self.merged
        hidden = merged.hidden(features_NCHW)
        count, _, height, width = hidden.shape
        operands = (merged.expert_weight, merged.expert_bias, merged.gate_weight, merged.gate_bias)
        shapes = [[count, height, width]] * 2 + [[count, self.shape.num_experts, height, width]]
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            (hidden, *operands),
            {
                "num_experts": self.shape.num_experts,
                "temperature": merged.temperature,
                "with_weights": int(self.shape.with_weights),  # a plugin is not told how many outputs its node has
                **PLUGIN_ATTRIBUTES,
            },
            dtypes=[torch.float32] * len(self.shape.outputs),
            shapes=shapes[: len(self.shape.outputs)],
            version=VERSION,
        )
        weights = outputs[2] if self.shape.with_weights else torch.empty(0)
        candidates = torch.empty(0)
        if self.with_candidates:  # the node does not hand them out: computed beside it, for those who debug
            candidates = expert_mix(hidden, *operands, merged.temperature).candidates
        return Mixture(outputs[0], outputs[1], weights, candidates)


def expert_mix_function(shape: ExpertMixShape, opset: int) -> onnx.FunctionProto:
    """The node's body. Every name carries a prefix: TensorRT-RTX's parser mixes up names of outer and inner scopes."""
    k, expert_width, gate_width = shape.num_experts, shape.hidden_channels, shape.gate_hidden_channels
    body: list[onnx.NodeProto] = []

    def n(name: str) -> str:
        return f"moe3d_mix_{name}"

    def op(op_type: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> None:
        outputs = [output] if isinstance(output, str) else output
        body.append(helper.make_node(op_type, [n(i) for i in inputs], [n(o) for o in outputs], **attributes))

    def constant(name: str, values: Sequence[int] | Sequence[float], kind: int = TensorProto.INT64) -> None:
        tensor = helper.make_tensor(n(name), kind, [len(values)], values)
        op("Constant", [], name, value=tensor)

    temperature = onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT)
    temperature.ref_attr_name = "temperature"
    op("Constant", [], "temperature")
    body[-1].attribute.append(temperature)

    constant("widths", [k * expert_width, gate_width])
    op("Split", ["hidden", "widths"], ["of_experts", "of_gate"], axis=1)
    constant("last_axis", [-1])
    constant("one", [1.0], TensorProto.FLOAT)

    def dot(values: str, weights: str, result: str) -> None:
        """Sum over axis 2 of values (N, K or 1, width, HW) times weights (K, width): (N, K, HW), in float32.

        Not a MatMul: TensorRT-RTX would write a float32 copy of the hidden map for it, and a second one where shapes
        are dynamic. Products and sums become one kernel that reads the hidden map as it is.
        """
        op("Unsqueeze", [weights, "last_axis"], f"{result}_weights")
        op("Mul", [values, f"{result}_weights"], f"{result}_terms")
        op("ReduceSum", [f"{result}_terms", "width_axis"], result, keepdims=0)

    constant("width_axis", [2])
    constant("output_axis", [1])
    constant("one_each", [1, 1])
    constant("experts_shape", [0, k, expert_width, -1])
    op("Reshape", ["of_experts", "experts_shape"], "experts_flat")
    op("Cast", ["experts_flat"], "experts_flat32", to=TensorProto.FLOAT)
    op("Split", ["expert_weight", "one_each"], ["weight_depths", "weight_confidences"], axis=1)
    op("Split", ["expert_bias", "one_each"], ["bias_depths", "bias_confidences"], axis=1)
    for values in ("depths", "confidences"):
        op("Squeeze", [f"weight_{values}", "output_axis"], f"row_{values}")
        dot("experts_flat32", f"row_{values}", f"products_{values}")
        op("Add", [f"products_{values}", f"bias_{values}"], f"raw_{values}")
        op("Exp", [f"raw_{values}"], values)

    constant("gate_shape", [0, 1, gate_width, -1])
    op("Reshape", ["of_gate", "gate_shape"], "gate_flat")
    op("Cast", ["gate_flat"], "gate_flat32", to=TensorProto.FLOAT)
    dot("gate_flat32", "gate_weight", "gate_products")
    op("Unsqueeze", ["gate_bias", "last_axis"], "gate_bias_column")
    op("Add", ["gate_products", "gate_bias_column"], "logits")
    op("Div", ["logits", "temperature"], "scaled_logits")
    op("Softmax", ["scaled_logits"], "weights_flat", axis=1)

    op("Shape", ["hidden"], "shape")
    constant("pick_map", [0, 2, 3])
    op("Gather", ["shape", "pick_map"], "map_shape")
    constant("expert_axis", [1])
    for values in ("depths", "confidences"):
        op("Mul", ["weights_flat", values], f"weighted_{values}")
        op("ReduceSum", [f"weighted_{values}", "expert_axis"], f"mixed_{values}", keepdims=0)
    op("Add", ["mixed_confidences", "one"], "at_least_one")  # after the sum: the weights add up to 1 but for rounding
    op("Reshape", ["mixed_depths", "map_shape"], "depth")
    op("Reshape", ["at_least_one", "map_shape"], "confidence")
    if shape.with_weights:
        constant("experts_count", [k])
        constant("pick_count", [0])
        constant("pick_size", [2, 3])
        op("Gather", ["shape", "pick_count"], "count")
        op("Gather", ["shape", "pick_size"], "size")
        op("Concat", ["count", "experts_count", "size"], "weights_shape", axis=0)
        op("Reshape", ["weights_flat", "weights_shape"], "weights")

    return helper.make_function(
        DOMAIN,
        NAME,
        [n(i) for i in ("hidden", "expert_weight", "expert_bias", "gate_weight", "gate_bias")],
        [n(o) for o in shape.outputs],
        body,
        [helper.make_opsetid("", opset)],
        attributes=["num_experts", "temperature", "with_weights", *PLUGIN_ATTRIBUTES],
    )
