"""Parameters, bytes of weights and least traffic against the real model's state dict and hand computation."""

import dataclasses

import pytest
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


@settings(max_examples=10, deadline=None)
@given(configs())
def test_parameters_of_any_model_are_the_models(config: ModelConfig) -> None:
    model = meta_model(config)
    found = costs.parameters(config)
    assert found["total"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert found["camera head"] == sum(tensor.numel() for tensor in model.camera_head.parameters())
    assert found["encoder"] == sum(tensor.numel() for tensor in model.aggregator.patch_embed.parameters())
    assert found.pop("total") == sum(found.values())


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
    policy = PrecisionPolicy(precision)
    dtype_of = policy.dtype_of()
    state = meta_model(dataclasses.replace(MOE3D, point_head=point_head)).state_dict()
    expected = sum(tensor.numel() * dtype_of(name).itemsize for name, tensor in state.items())
    assert costs.weight_bytes(MOE3D, policy.type_of, point_head=point_head) == expected


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
