"""Which softmax of a parsed network is an attention's, on stand-ins. A real network: test_engine_inspector.py."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from moe3d_deploy.trt import Attention
from moe3d_deploy.trt.attentions import attentions_of


def layer(kind: str, inputs: Sequence[str], output: str, node: str = "", dtype: str = "HALF") -> Any:
    """One of a network; `node` is the ONNX node that it names."""
    tensors = [SimpleNamespace(name=name) if name else None for name in inputs]
    result = SimpleNamespace(name=output, dtype=SimpleNamespace(name=dtype))
    return SimpleNamespace(
        type=SimpleNamespace(name=kind),
        metadata=f"[ONNX Layer: {node}]" if node else "",
        num_inputs=len(tensors),
        num_outputs=1,
        get_input=lambda i: tensors[i],
        get_output=lambda i: result,
    )


class Network(list[Any]):
    @property
    def num_layers(self) -> int:
        return len(self)


def attention(middle: Sequence[Any] = (), softmax_of: str = "logits") -> Network:
    """images -> product -> ... -> softmax in float32 -> product."""
    return Network(
        [
            layer("MATRIX_MULTIPLY", ["q", "k"], "logits", "mm_1"),
            *middle,
            layer("SOFTMAX", [softmax_of], "weights", "softmax", "FLOAT"),
            layer("CAST", ["weights"], "half", "cast"),
            layer("MATRIX_MULTIPLY", ["half", "v"], "mixed", "mm_2"),
        ]
    )


def test_a_softmax_between_two_products_is_an_attention_of_their_type() -> None:
    assert attentions_of(attention()) == (Attention("softmax", ("mm_1", "mm_2"), "fp16"),)


@pytest.mark.parametrize("kind", ["CAST", "ELEMENTWISE", "SHUFFLE", "SELECT"])
def test_what_scales_masks_and_reshapes_may_lie_between(kind: str) -> None:
    between = [layer(kind, ["logits", "", "scale"], "scaled", "mul"), layer("CONSTANT", [], "scale")]
    assert len(attentions_of(attention(between, "scaled"))) == 1


@pytest.mark.parametrize("kind", ["REDUCE", "CONVOLUTION"])
def test_what_computes_something_else_may_not(kind: str) -> None:
    assert attentions_of(attention([layer(kind, ["logits"], "other", "x")], "other")) == ()


def test_a_mix_of_experts_is_no_attention() -> None:
    """Its gate's weights go into sums, not into a product; and those of a first softmax come from no product."""
    gate = layer("MATRIX_MULTIPLY", ["features", "gate"], "logits", "gate_products")
    softmax = layer("SOFTMAX", ["logits"], "weights", "weights_flat | ExpertMix (ExpertMix)")
    mixed = [layer("ELEMENTWISE", ["weights", "depths"], "terms", "terms"), layer("REDUCE", ["terms"], "depth", "sum")]
    assert attentions_of(Network([gate, softmax, *mixed])) == ()
    assert attentions_of(Network(attention()[1:])) == ()


def test_an_operator_is_an_attention_by_itself() -> None:
    network = Network(
        [
            layer("ATTENTION_INPUT", ["q", "k", "v"], "inside"),
            layer("ATTENTION_OUTPUT", ["inside"], "mixed", "attention", "BF16"),
        ]
    )
    assert attentions_of(network) == (Attention("attention", (), "bf16"),)
