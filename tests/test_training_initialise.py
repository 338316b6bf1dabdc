"""Weights to start from: seeded, complete, and a sane picture before the first step."""

import dataclasses
import math

import pytest
import torch
from models import golden_config, random_images

from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.forward import Outputs, trainable_parameters, training_forward
from moe3d_deploy.training.initialise import initialise, new_model
from moe3d_deploy.training.losses import LossOptions, objective
from moe3d_deploy.training.targets import Targets

CONFIG = dataclasses.replace(golden_config(), moe=MoeConfig(), point_head=True)
IMAGES = random_images(1, 3, 3, 42, 56)


@pytest.fixture(scope="module")
def model() -> MoE3D:
    return new_model(CONFIG, 0)


@pytest.fixture(scope="module")
def outputs(model: MoE3D) -> Outputs:
    with torch.no_grad():
        return training_forward(model, IMAGES)


def same(a: MoE3D, b: MoE3D) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)]


def test_equal_seeds_give_equal_bits_and_others_other_values(model: MoE3D) -> None:
    torch.manual_seed(123)
    assert all(same(new_model(CONFIG, 0), model))
    constant = [p.unique().numel() == 1 or p.shape == (9,) for p in model.state_dict().values()]
    assert same(new_model(CONFIG, 1), model) == constant
    assert constant.count(False) > 100


def test_torchs_own_random_stream_is_neither_read_nor_moved() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    new_model(CONFIG, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_is_overwritten(model: MoE3D) -> None:
    fresh = new_model(CONFIG, 3)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(math.nan)
    initialise(fresh, 0)
    assert all(same(fresh, model))


def test_a_tensor_does_not_depend_on_what_else_the_model_has(model: MoE3D) -> None:
    alone = new_model(dataclasses.replace(CONFIG, moe=None, point_head=False), 0).state_dict()
    whole = model.state_dict()
    shared = [name for name in alone if name in whole]
    assert len(shared) > 100
    assert all(torch.equal(alone[name], whole[name]) for name in shared)


def test_depth_starts_at_one_with_confidence_two(outputs: Outputs) -> None:
    assert outputs.depth.min() > 0.8
    assert outputs.depth.max() < 1.25
    torch.testing.assert_close(outputs.confidence, torch.full_like(outputs.confidence, 2.0), rtol=0, atol=0.2)


def test_gate_starts_uniform_over_experts_that_differ(outputs: Outputs) -> None:
    assert outputs.weights is not None
    assert outputs.candidates is not None
    assert torch.equal(outputs.weights, torch.full_like(outputs.weights, 0.25))
    assert outputs.candidates.std(dim=2).min() > 0


def test_cameras_start_near_the_first_with_a_field_of_view_of_one_radian(outputs: Outputs) -> None:
    identity = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1])
    assert (outputs.pose_iterations[-1] - identity).abs().max() < 0.2


def test_layer_scale_is_that_of_the_config() -> None:
    config = dataclasses.replace(
        CONFIG,
        vit=dataclasses.replace(CONFIG.vit, init_values=0.5),
        aggregator=dataclasses.replace(CONFIG.aggregator, init_values=0.125),
    )
    values = {
        name.split(".blocks")[0].split(".0")[0]: p.unique().tolist()
        for name, p in new_model(config, 0).named_parameters()
        if name.endswith("0.ls2.gamma")
    }
    assert values == {
        "aggregator.patch_embed": [0.5],
        "aggregator.frame_blocks": [0.125],
        "aggregator.global_blocks": [0.125],
        "camera_head.trunk": [pytest.approx(0.01)],
    }


@pytest.mark.parametrize(
    ("name", "std"),
    [
        # Xavier: sqrt(2 / (inputs + outputs)). The golden configuration has 64 channels and an MLP of 256.
        ("aggregator.frame_blocks.0.mlp.fc1.weight", math.sqrt(2 / (64 + 256))),
        ("aggregator.patch_embed.patch_embed.proj.weight", math.sqrt(2 / (64 + 3 * 14 * 14))),
        # Kaiming: sqrt(2 / inputs) before a ReLU, sqrt(1 / inputs) elsewhere.
        ("depth_head.scratch.refinenet1.resConfUnit2.conv1.weight", "relu"),
        ("depth_head.experts.1.0.weight", "relu"),
        ("depth_head.gate.0.weight", "relu"),
        ("point_head.scratch.output_conv2.0.weight", "relu"),
        ("depth_head.scratch.refinenet1.resConfUnit2.conv2.weight", "linear"),
        ("depth_head.projects.0.weight", "linear"),
        ("depth_head.experts.1.2.weight", 0.01),
        ("depth_head.resize_layers.0.weight", "transposed"),
        # A normal distribution cut at two sigma has 0.8796 of its standard deviation.
        ("aggregator.patch_embed.pos_embed", 0.8796 * 0.02),
    ],
)
def test_spread_of_the_weights(model: MoE3D, name: str, std: float | str) -> None:
    tensor = model.get_parameter(name)
    inputs = tensor[0].numel()
    by_kind = {
        "relu": math.sqrt(2 / inputs),
        "linear": math.sqrt(1 / inputs),
        "transposed": math.sqrt(1 / tensor.shape[0]),
    }
    expected = by_kind[std] if isinstance(std, str) else std
    # The standard deviation of n draws is known to 1 / sqrt(2 n); four times that.
    assert tensor.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * tensor.numel()))


def test_training_from_these_weights_lowers_depth_and_camera_loss() -> None:
    """A ramp of depth seen by three equal cameras, learned by heart in 20 steps."""
    model = new_model(dataclasses.replace(CONFIG, point_head=False), 0)
    optimizer = torch.optim.AdamW(trainable_parameters(model, "all").values(), lr=1e-3)
    depth = torch.linspace(0.5, 1.5, 42)[:, None].expand(1, 3, 42, 56)
    cameras = torch.tensor([0.1, 0, 0.2, 0, 0.1, 0, 0.99, 0.9, 1.1]).expand(1, 3, 9)
    targets = Targets(depth, depth > 0, cameras, torch.ones(1))
    history = []
    for _ in range(20):
        loss, parts = objective(training_forward(model, IMAGES), targets, LossOptions(depth="l2"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(parts)
    assert history[-1]["depth"] < history[0]["depth"] / 4
    assert history[-1]["camera"] < 0.75 * history[0]["camera"]


def test_negative_seed_and_merged_experts_are_refused() -> None:
    with pytest.raises(InputError, match="seed -1 is negative"):
        new_model(CONFIG, -1)
    merged = new_model(CONFIG, 0)
    merged.depth_head.merge_experts()
    with pytest.raises(InputError, match="merged for deployment; initialise the plain form"):
        initialise(merged, 0)
