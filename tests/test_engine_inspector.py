"""What the engine inspector's JSON tells and what it does not; layers of real engines are those TensorRT-RTX lists."""

import json
from typing import Any

import pytest
from engine_models import Build, Write
from inspections import CAMERA, FIRST, SECOND, apart, fused, layer, of_listing, text_of

from moe3d_deploy.engines.inspector import inspected
from moe3d_deploy.trt import Attention

pytest_plugins = ["engine_fixtures"]


def states(*layers: Any, profiles: int = 1, of: tuple[Attention, ...] = (FIRST,)) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = inspected(text_of(*layers), of, profiles=profiles)["attentions"]
    return found


# Attention


def test_fused_and_unfused_attentions_are_counted_by_type() -> None:
    text = text_of(fused(FIRST), *apart(SECOND), *apart(CAMERA, dtype="Float"))
    facts = inspected(text, (FIRST, SECOND, CAMERA))
    assert facts["told"] is True
    assert facts["attentions"] == {"fp16": {"fused": 1, "apart": 1}, "fp32": {"apart": 1}}
    assert facts["fused_layers"] == ["_gemm_mha_v2_myl1_16"]
    assert facts["layers"] == {"kgen": {"fp16": 2, "fp32": 1}, "gemm": {"fp16": 2, "fp32": 2}}


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("_gemm_mha_v2_myl1_16", "fused"),
        ("fmha_v2_flash_attention_fp16_64_64_sm89_kernel", "fused"),
        ("sm90_FlashAttention_fwd", "fused"),
        ("mhalf_gemm", "not told"),  # no attention's name
    ],
)
def test_a_kernel_is_an_attention_by_its_name_where_it_names_the_softmax(name: str, state: str) -> None:
    """The products are named by another layer as well, so the name alone decides."""
    whole = layer(name, "kgen", FIRST.core, *FIRST.products)
    others = [layer(node, "gemm", node) for node in FIRST.products]
    assert states(whole, *others) == {"fp16": {state: 1}}


def test_a_kernel_of_an_attentions_name_that_names_no_node_is_no_proof() -> None:
    assert states(layer("_gemm_mha_v2_myl1_16", "kgen")) == {"fp16": {"not told": 1}}
    assert states(fused(SECOND)) == {"fp16": {"not told": 1}}  # of another attention


def test_a_kernel_of_any_name_is_all_of_an_attention_where_no_other_layer_has_a_product() -> None:
    whole = layer("__myl_FcMaxrSubExpSumDivFc_myl1_3", "kgen", FIRST.products[0], FIRST.core, FIRST.products[1])
    assert states(whole) == {"fp16": {"fused": 1}}
    gemm = layer("node_matmul_3_myl1_4", "gemm", FIRST.products[1])
    assert states(whole, gemm) == {"fp16": {"not told": 1}}


def test_a_softmax_that_names_one_product_is_apart() -> None:
    assert states(*apart(FIRST)) == {"fp16": {"apart": 1}}
    assert states(layer("softmax", "SoftMax", FIRST.core)) == {"fp16": {"apart": 1}}


def test_an_attention_that_no_layer_names_is_not_told() -> None:
    assert states(layer("x", "kgen", "node_add")) == {"fp16": {"not told": 1}}


def test_every_profile_needs_a_kernel_of_its_own() -> None:
    assert states(fused(FIRST, 1), fused(FIRST, 3), profiles=2) == {"fp16": {"fused": 1}}
    assert states(fused(FIRST, 1), *apart(FIRST, 3), profiles=2) == {"fp16": {"apart": 1}}
    assert states(fused(FIRST, 1), profiles=2) == {"fp16": {"not told": 1}}  # one profile's layers alone


@pytest.mark.parametrize(
    ("layers", "state"),
    [
        ([layer("_gemm_mha_v2_myl1_11", "kgen", "attention")], "fused"),
        ([layer("__myl_MoveReshTran_myl1_12", "kgen", "attention")], "not told"),  # before and after every attention
        ([layer("attention_myl1_12", "gemm", "attention")], "apart"),
    ],
)
def test_an_attention_operator_is_fused_by_a_kernel_of_that_name_alone(layers: list[Any], state: str) -> None:
    operator = Attention("attention", (), "fp16")
    around = layer("__myl_AddReshTran_myl1_8", "kgen", "node_linear", "attention")
    assert states(around, *layers, of=(operator,)) == {"fp16": {state: 1}}


# The expert mix


def test_a_plugin_layer_of_the_mix_is_told_from_other_plugins() -> None:
    mix = layer("ExpertMix", "PluginV3", "ExpertMix")
    facts = inspected(text_of(mix, layer("resize", "PluginV2DynamicExt", "resize")), ())
    assert facts["expert_mix"] == {"plugin": 1, "function": 0}
    assert facts["plugins"] == ["ExpertMix", "resize"]


def test_layers_of_the_functions_body_are_counted() -> None:
    body = [layer(f"l{i}", "kgen", f"mix_{i} | ExpertMix (ExpertMix)") for i in range(3)]
    other = layer("x", "kgen", "n | Gelu (Gelu)")
    assert inspected(text_of(*body, other), ())["expert_mix"] == {"plugin": 0, "function": 3}


# Types


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 4 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Row major linear FP32", "fp32"),
        ("N/A due to dynamic shapes", "not told"),
        (7, "not told"),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_types_are_read_in_both_forms(text: Any, dtype: str, old: bool) -> None:
    assert inspected(text_of(layer("x", "gemm", dtype=text, old=old)), ())["layers"] == {"gemm": {dtype: 1}}


@pytest.mark.parametrize("inputs", [[], None, "x", [3], [{}]])
def test_a_layer_without_a_readable_input_has_no_type(inputs: Any) -> None:
    assert inspected(text_of(layer("x", "NoOp", Inputs=inputs)), ())["layers"] == {"NoOp": {"not told": 1}}


# What tells nothing


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "its text is no JSON"),
        ("Layers: ...", "its text is no JSON"),
        ("[]", "it lists no layers"),
        ('{"Layers": []}', "it lists no layers"),
        ('{"Layers": "none"}', "it lists no layers"),
        (text_of("_gemm_mha_v2_myl1_16"), "it has the layers' names alone: the engine was built without detailed"),
        (text_of({"LayerType": "kgen"}), "a layer of it has no name or type"),
        (text_of({"Name": "x", "LayerType": 3}), "a layer of it has no name or type"),
        (text_of(fused(FIRST), 3), "a layer of it has no name or type"),
    ],
)
def test_text_without_details_tells_nothing_and_says_why(text: str, reason: str) -> None:
    facts = inspected(text, (FIRST,))
    assert set(facts) == {"told", "reason"}
    assert facts["told"] is False
    assert facts["reason"].startswith(reason)


def test_a_layer_that_is_a_name_among_layers_with_details_proves_nothing() -> None:
    text = text_of("_gemm_mha_v2_myl1_16", layer("x", "kgen", "node_add"))
    assert inspected(text, (FIRST,))["attentions"] == {"fp16": {"not told": 1}}


def test_facts_are_json() -> None:
    facts = inspected(text_of(fused(FIRST), *apart(SECOND), layer("ExpertMix", "PluginV3")), (FIRST, SECOND))
    assert json.loads(json.dumps(facts)) == facts


# Real engines


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "state"), [("fp16", "fused"), ("fp32", "apart")])
def test_layers_of_a_real_engine_are_held_against_its_network(
    write_model: Write, build_here: Build, dtype: str, state: str
) -> None:
    """TensorRT-RTX has a fused kernel for fp16 and none for fp32; the network has two attentions in a row."""
    engine = build_here(write_model(f"inspected_{dtype}.onnx", dtype, attention=True), compute_capabilities=[(8, 9)])
    first, second = engine.attentions
    assert (first.dtype, second.dtype) == (dtype, dtype)
    # Nodes are numbered in the order they are written, with those before: q, k and v, each reshaped and transposed.
    assert first.core.startswith("Softmax_")
    number = int(first.core.removeprefix("Softmax_"))
    assert first.products == (f"MatMul_{number - 1}", f"MatMul_{number + 1}")
    assert second.core != first.core
    assert inspected(of_listing(engine.listing), engine.attentions)["attentions"] == {dtype: {state: 2}}
