"""Parameters, bytes of weights and least traffic against the real model's state dict and hand computation."""

import dataclasses

import pytest
import torch
from cost_models import ODD, configs, meta_model
from hypothesis import given, settings

from moe3d_deploy import costs
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.export.precision import PRECISIONS, PrecisionPolicy
from moe3d_deploy.parameter_shapes import parameter_shapes

VGGT = PRESETS["vggt-1b"]
MOE3D = PRESETS["moe3d-1b"]


@pytest.mark.parametrize("config", [*PRESETS.values(), ODD], ids=[*PRESETS, "odd"])
@pytest.mark.parametrize("point_head", [None, True, False])
def test_parameter_names_and_shapes_are_the_models(config: ModelConfig, point_head: bool | None) -> None:
    held = config if point_head is None else dataclasses.replace(config, point_head=point_head)
    expected = {name: tuple(tensor.shape) for name, tensor in meta_model(held).state_dict().items()}
    assert parameter_shapes(config, point_head=point_head) == expected


def of_the_model(config: ModelConfig) -> dict[str, int]:
    """Values in the model's own modules, by component."""
    model = meta_model(config)
    aggregator, depth_head = model.aggregator, model.depth_head
    tokens = aggregator.camera_token.numel() + aggregator.register_token.numel()
    modules = {
        "encoder": aggregator.patch_embed,
        "frame": aggregator.frame_blocks,
        "global": aggregator.global_blocks,
        "camera head": model.camera_head,
        "depth head": depth_head,
    }
    if config.moe:
        modules |= {"experts": depth_head.experts, "gate": depth_head.gate}
    if config.point_head:
        modules["point head"] = model.point_head
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    counts["depth head"] -= counts.get("experts", 0) + counts.get("gate", 0)
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    return counts | {"special tokens": tokens, "total": total}


@settings(max_examples=10, deadline=None)
@given(configs())
def test_parameters_of_any_model_are_the_models(config: ModelConfig) -> None:
    assert costs.parameters(config) == of_the_model(config)


def test_parameters_of_the_odd_model_are_the_models() -> None:
    assert costs.parameters(ODD) == of_the_model(ODD)


# Values in the weights of ODD, by hand: 24 channels, MLPs of 55 and 74, 48 in the camera head and 40 features.
ENCODER_PRODUCTS = 2 * (72 * 24 + 72 + 24 * 24 + 24 + 55 * 24 + 55 + 24 * 55 + 24)  # qkv, proj, fc1, fc2 of 2 blocks
PATCH_CONV = 24 * 3 * 49 + 24
AGGREGATOR_PRODUCTS = 3 * (72 * 24 + 72 + 24 * 24 + 24 + 74 * 24 + 74 + 24 * 74 + 24)  # of 3 frame or 3 global blocks
CAMERA_BLOCK = (144 * 48 + 144) + (48 * 48 + 48) + (192 * 48 + 192) + (48 * 192 + 48) + 6 * 48  # an MLP of 4 x 48
DENSE_CONVOLUTIONS = (
    (64 * 48 + 64)  # projects to 4 + 12 + 20 + 28 channels
    + (16 * 16 + 4 + 4 * 144 + 12 + 9 * 784 + 28)  # resize_layers
    + 9 * 40 * 64  # layer_rn, without a bias
    + 4 * (1600 + 40)  # out_conv of the four refinenets
    + 14 * (9 * 1600 + 40)  # of their seven units
    + (9 * 40 * 20 + 20)  # output_conv1
)
EXPERTS_3X3, EXPERTS_1X1 = 3 * (9 * 20 * 5 + 5), 3 * (5 * 2 + 2)
GATE_3X3, GATE_1X1 = 9 * 20 * 9 + 9, 9 * 3 + 3
PLAIN_3X3 = 9 * 20 * 32 + 32
BY_HAND = {
    # class token, 26 positions, 3 registers, mask token; norm1, norm2, ls1 and ls2 are 6 x 24 in a block; the last norm
    "encoder": (1 + 26 + 3 + 1) * 24 + PATCH_CONV + ENCODER_PRODUCTS + 2 * 6 * 24 + 2 * 24,
    # q_norm and k_norm of 12 channels a head are 48 more
    "frame": AGGREGATOR_PRODUCTS + 3 * (6 * 24 + 4 * 12),
    "global": AGGREGATOR_PRODUCTS + 3 * (6 * 24 + 4 * 12),
    "special tokens": 2 * 24 + 2 * 24,
    # empty pose, 5 blocks, two norms, embed_pose, modulation, pose_branch
    "camera head": 9 + 5 * CAMERA_BLOCK + 4 * 48 + (48 * 9 + 48) + (144 * 48 + 144) + (24 * 48 + 24) + (9 * 24 + 9),
    "depth head": 2 * 48 + DENSE_CONVOLUTIONS,
    "point head": 2 * 48 + DENSE_CONVOLUTIONS + PLAIN_3X3 + 32 * 4 + 4,
    "experts": EXPERTS_3X3 + EXPERTS_1X1,
    "gate": GATE_3X3 + GATE_1X1,
}


def test_parameters_are_those_worked_out_by_hand() -> None:
    assert costs.parameters(ODD) == BY_HAND | {"total": 714_018}
    without = {name: count for name, count in BY_HAND.items() if name != "point head"}
    assert costs.parameters(ODD, point_head=False) == without | {"total": 457_950}
    plain = {name: count for name, count in without.items() if name not in ("experts", "gate")}
    plain["depth head"] += PLAIN_3X3 + 32 * 2 + 2
    found = costs.parameters(dataclasses.replace(ODD, moe=None, point_head=False))
    assert found == plain | {"total": 457_950 - 2751 - 1659 + 5858}


def test_parameters_of_the_presets_are_the_known_counts() -> None:
    assert f"{costs.parameters(VGGT)['total'] / 1e6:,.1f}" == "1,190.6"
    assert costs.parameters(MOE3D)["total"] - costs.parameters(VGGT)["total"] == 147_914
    assert f"{costs.parameters(MOE3D, point_head=False)['total'] / 1e6:,.0f}" == "1,158"
    # 4 experts: 3x3 convolution 128 -> 32 and 1x1 convolution 32 -> 2, both with bias
    assert costs.parameters(MOE3D)["experts"] == 4 * (128 * 9 * 32 + 32 + 32 * 2 + 2)
    assert costs.parameters(MOE3D)["gate"] == 128 * 9 * 32 + 32 + 32 * 4 + 4


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("point_head", [True, False])
def test_weight_bytes_are_those_of_the_model_in_that_precision(precision: str, point_head: bool) -> None:
    type_of = PrecisionPolicy(precision).type_of
    state = meta_model(dataclasses.replace(MOE3D, point_head=point_head)).state_dict()
    expected = sum(tensor.numel() * getattr(torch, type_of(name)).itemsize for name, tensor in state.items())
    assert costs.weight_bytes(MOE3D, type_of, point_head=point_head) == expected


# Of ODD's values, those that a precision has in half; the point head's come on top.
IN_HALF = {"fp32": 0, "fp16-fp32heads": ENCODER_PRODUCTS + PATCH_CONV + 2 * AGGREGATOR_PRODUCTS}
IN_HALF["fp16"] = IN_HALF["fp16-fp32heads"] + DENSE_CONVOLUTIONS + EXPERTS_3X3 + GATE_3X3
POINTS_IN_HALF = {"fp32": 0, "fp16-fp32heads": 0, "fp16": DENSE_CONVOLUTIONS + PLAIN_3X3}


@pytest.mark.parametrize("precision", IN_HALF)
def test_weight_bytes_are_those_worked_out_by_hand(precision: str) -> None:
    rule = PrecisionPolicy(precision).type_of
    assert costs.weight_bytes(ODD, rule, point_head=False) == 4 * 457_950 - 2 * IN_HALF[precision]
    with_points = 4 * 714_018 - 2 * (IN_HALF[precision] + POINTS_IN_HALF[precision])
    assert costs.weight_bytes(ODD, rule) == costs.weight_bytes(ODD, rule, point_head=True) == with_points


def test_parameters_are_counted_by_the_type_they_have() -> None:
    rule = PrecisionPolicy("fp16").type_of
    in_float32 = 457_950 - IN_HALF["fp16"]
    assert costs.parameters_by_type(ODD, rule, point_head=False) == {"float32": in_float32, "float16": IN_HALF["fp16"]}
    assert costs.parameters_by_type(ODD, costs.all_float32) == {"float32": 714_018}


def test_parameters_are_four_bytes_each_unless_told_otherwise() -> None:
    assert costs.weight_bytes(ODD) == 4 * 714_018
    assert costs.weight_bytes(ODD, point_head=False) == 4 * 457_950


def test_traffic_is_weights_and_what_passes_between_blocks() -> None:
    """By hand for ODD at 1x2 views of 3x4 patches of 7: Q = 2 x 2."""
    views, patches, coarse, pixels = 2, 12, 4, 12 * 49
    encoder_tokens, tokens, dim = 1 + 3 + patches, 1 + 1 + patches, 24
    blocks = 2 * 2 * encoder_tokens * dim + 2 * (3 + 3) * tokens * dim  # 2 in the encoder, 3 + 3 in the aggregator
    levels = 3 * patches * 48  # the aggregator outputs 0, 1 and 2 are read, one of them twice
    projected = patches * (4 + 12 + 20 + 28)
    resized = 16 * patches * 4 + 4 * patches * 12 + coarse * 28  # the third level is not resized
    to_features = (16 * patches + 4 * patches + patches + coarse) * 40
    fused = (1 + 4 + 16 + 64) * patches * 40
    out = 64 * patches * 20
    dense = levels + 2 * (projected + resized + to_features + fused + out)
    values = views * (blocks + 3 * pixels + dense + 2 * pixels)
    shape = (1, 2, 21, 28)
    weights = costs.weight_bytes(ODD, point_head=False)
    assert costs.traffic_bytes(ODD, shape, point_head=False) == weights + 4 * values
    with_points = costs.weight_bytes(ODD) + 4 * (values + views * (dense + 4 * pixels))
    assert costs.traffic_bytes(ODD, shape) == with_points


def test_traffic_is_in_the_type_of_each_layer() -> None:
    """fp16 halves what its convolutions write; the residual stream and the images stay float32."""
    policy = PrecisionPolicy("fp16")
    shape = (1, 1, 21, 28)
    full, half = (
        costs.traffic_bytes(ODD, shape, rule, point_head=False) - costs.weight_bytes(ODD, rule, point_head=False)
        for rule in (costs.all_float32, policy.type_of)
    )
    written = 12 * 64 + (16 * 12 * 4 + 4 * 12 * 12 + 4 * 28) + (21 * 12 + 4) * 40 + 85 * 12 * 40 + 64 * 12 * 20
    assert full - half == 2 * 2 * written


# Values of a view of 5x4 patches (980 pixels) that ODD writes and reads again between the stages of a dense head:
# projects, resize_layers, layer_rn, the four refinenets, output_conv1.
BETWEEN = 2 * (20 * 64 + (320 * 4 + 80 * 12 + 6 * 28) + 426 * 40 + 1700 * 40 + 1280 * 20)
LEVELS = 3 * 20 * 48  # three outputs of the aggregator, read once by each head
BLOCKS = 2 * 2 * 24 * 24 + 2 * (3 + 3) * 22 * 24  # 24 tokens in the encoder, 22 in the aggregator


@pytest.mark.parametrize("precision", ["fp32", "fp16-fp32heads", "fp16"])
def test_traffic_is_the_one_worked_out_by_hand(precision: str) -> None:
    """2 scenes of 3 views. fp16 halves what the dense heads' convolutions write, and the weights as above."""
    rule, stage = PrecisionPolicy(precision).type_of, 2 if precision == "fp16" else 4
    weights = 4 * 457_950 - 2 * IN_HALF[precision]
    images_and_depth = 980 * (3 + 2)
    total = weights + 6 * (4 * (images_and_depth + BLOCKS + LEVELS) + stage * BETWEEN)
    assert costs.traffic_bytes(ODD, (2, 3, 35, 28), rule, point_head=False) == total
    total += 4 * 256_068 - 2 * POINTS_IN_HALF[precision] + 6 * (4 * (LEVELS + 980 * 4) + stage * BETWEEN)
    found = costs.traffic_bytes(ODD, (2, 3, 35, 28), rule)
    assert found == total
    assert isinstance(found, int)


@pytest.mark.parametrize(
    ("name", "weights", "values"),
    [
        ("aggregator.patch_embed.blocks.0.ls1.gamma", 24, 2 * 2 * 24 * 24),
        ("aggregator.frame_blocks.0.ls1.gamma", 24, 2 * 3 * 22 * 24),
        ("aggregator.global_blocks.0.ls1.gamma", 24, 2 * 3 * 22 * 24),
        *(
            (f"{head}.{name}.weight", weights, values)
            for head in ("depth_head", "point_head")
            for name, weights, values in (
                ("norm", 48, LEVELS),
                ("projects.0", 4 * 48, 2 * 20 * 64),
                ("resize_layers.0", 16 * 16, 2 * 2408),
                ("scratch.layer1_rn", 9 * 40 * 4, 2 * 426 * 40),
                ("scratch.refinenet1.out_conv", 1600, 2 * 1700 * 40),
                ("scratch.output_conv1", 9 * 40 * 20, 2 * 1280 * 20),
            )
        ),
    ],
)
def test_each_stage_is_counted_in_the_type_of_its_own_parameter(name: str, weights: int, values: int) -> None:
    """One parameter alone in half saves 2 bytes of each of its values, and of each value that its stage writes."""
    shape = (2, 3, 35, 28)

    def rule(asked: str) -> str:
        return "float16" if asked == name else "float32"

    assert costs.weight_bytes(ODD) - costs.weight_bytes(ODD, rule) == 2 * weights
    assert costs.traffic_bytes(ODD, shape) - costs.traffic_bytes(ODD, shape, rule) == 2 * (weights + 6 * values)
