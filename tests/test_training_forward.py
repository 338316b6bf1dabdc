"""The training forward pass: the model's own numbers, gradients where they belong, and the form on cached features."""

import dataclasses

import pytest
import torch
from models import random_images, small_model
from torch import Tensor

from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.forward import Outputs, frozen_levels, head_forward, trainable_parameters, training_forward
from moe3d_deploy.training.losses import LossOptions, objective
from moe3d_deploy.training.targets import Targets

SHAPE = (2, 2, 3, 28, 42)  # B, S, 3, H, W: every axis above 1 has another length than its neighbours but for B = S
GRID = (2, 3)
EXPERTS = MoeConfig(num_experts=3, temperature=0.7)


def model_of(moe: MoeConfig | None = EXPERTS, *, point_head: bool = False) -> MoE3D:
    """Seeded weights: no gate is uniform and no gradient zero by chance, as they would be before training."""
    return small_model(moe, point_head=point_head)


def some_targets(dtype: torch.dtype = torch.float32) -> Targets:
    depth = 0.5 + random_images(2, 2, 28, 42, seed=1).to(dtype)
    return Targets(depth, depth > 0.7, random_images(2, 2, 9, seed=2).to(dtype), torch.ones(2, dtype=dtype))


def loss_of(outputs: Outputs, depth: str = "nll", dtype: torch.dtype = torch.float32) -> Tensor:
    return objective(outputs, some_targets(dtype), LossOptions(depth=depth, entropy_weight=0.1))[0]


def assert_equal(actual: Outputs, expected: Outputs) -> None:
    for name in ("depth", "confidence", "weights", "candidates", "log_sigma"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0)


def test_forward_gives_the_bits_that_the_model_gives() -> None:
    model, images = model_of(), random_images(*SHAPE)
    with torch.no_grad():
        reference = model(images, outputs=("expert_weights", "expert_depths"))
        poses = model.camera_head(model.features(images)["aggregated"][-1][:, :, 0])
        outputs = training_forward(model, images)

    names = {"depth": "depth", "depth_conf": "confidence", "expert_weights": "weights", "expert_depths": "candidates"}
    for of_model, of_training in names.items():
        assert torch.equal(getattr(outputs, of_training), reference[of_model])
    assert torch.equal(outputs.pose_iterations[-1], reference["pose_enc"])
    assert torch.equal(torch.stack(outputs.pose_iterations), torch.stack(poses))


def test_forward_of_a_model_without_experts_gives_the_bits_that_the_model_gives() -> None:
    model, images = model_of(None), random_images(*SHAPE)
    with torch.no_grad():
        reference, outputs = model(images), training_forward(model, images, temperature=3.0)

    assert torch.equal(outputs.depth, reference["depth"])
    assert torch.equal(outputs.confidence, reference["depth_conf"])
    assert outputs.weights is None
    assert outputs.candidates is None
    torch.testing.assert_close(1 + (-outputs.log_sigma[:, :, 0]).exp(), outputs.confidence)


def test_log_sigma_is_what_the_confidence_is_mixed_from() -> None:
    """sigma_k = exp(-c_k) and C = 1 + sum_k w_k exp(c_k)."""
    outputs = training_forward(model_of(), random_images(*SHAPE))
    assert outputs.weights is not None
    torch.testing.assert_close(1 + (outputs.weights * (-outputs.log_sigma).exp()).sum(2), outputs.confidence)


def test_temperature_replaces_that_of_the_checkpoint() -> None:
    images = random_images(*SHAPE)
    own, asked = model_of(), model_of(dataclasses.replace(EXPERTS, temperature=0.25))
    with torch.no_grad():
        expected = training_forward(asked, images)
        assert_equal(training_forward(own, images, temperature=0.25), expected)
        assert_equal(training_forward(own, images, temperature=0.7), training_forward(own, images))
        assert_equal(head_forward(own, frozen_levels(own, images), GRID, 0.25), expected)


@pytest.mark.parametrize("moe", [EXPERTS, None], ids=["experts", "single head"])
@pytest.mark.parametrize("half_dense", [False, True])
def test_every_parameter_that_is_trained_gets_a_gradient(moe: MoeConfig | None, half_dense: bool) -> None:
    """Under autocast too; the point head and the mask token are the only ones left out."""
    model = model_of(moe, point_head=True)
    trained = trainable_parameters(model, "all")
    with torch.autocast("cpu", torch.bfloat16, enabled=half_dense):
        outputs = training_forward(model, random_images(*SHAPE), half_dense=half_dense)

    loss_of(outputs).backward()

    left_out = {name for name, p in model.named_parameters() if p.grad is None}
    expected = {name for name, _ in model.named_parameters() if name.startswith("point_head.")}
    assert left_out == expected | {"aggregator.patch_embed.mask_token"}
    assert set(trained) == {name for name, _ in model.named_parameters()} - left_out
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())


def test_directional_derivative_of_the_whole_model_equals_finite_differences() -> None:
    """In float64, all parameters at once along their gradient: no operation in place spoils what backward needs."""
    model, images = model_of().double(), random_images(*SHAPE).double()
    trained = list(trainable_parameters(model, "all").values())
    gradients = torch.autograd.grad(loss_of(training_forward(model, images), dtype=torch.float64), trained)
    length = float(sum((g**2).sum() for g in gradients)) ** 0.5

    def along(step: float) -> float:
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.add_(gradient, alpha=step / length)
            value = float(loss_of(training_forward(model, images), dtype=torch.float64))
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.sub_(gradient, alpha=step / length)
        return value

    # Small, so that no ReLU changes its side: then 1e-11 are left, at 1e-5 it is 1e-5.
    assert (along(1e-6) - along(-1e-6)) / 2e-6 == pytest.approx(length, rel=1e-8)


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (EXPERTS, {f"depth_head.{b}.{i}" for b in ("experts.0", "experts.1", "experts.2", "gate") for i in (0, 2)}),
        (None, {"depth_head.scratch.output_conv2.0", "depth_head.scratch.output_conv2.2"}),
    ],
)
def test_only_the_last_stage_is_trained_as_head(moe: MoeConfig | None, expected: set[str]) -> None:
    model = model_of(moe)
    trained = trainable_parameters(model, "head")

    loss_of(training_forward(model, random_images(*SHAPE))).backward()

    assert set(trained) == {f"{name}.{leaf}" for name in expected for leaf in ("weight", "bias")}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)


def test_cached_features_give_the_depth_and_the_gradients_of_the_whole_model() -> None:
    model, images = model_of(), random_images(*SHAPE)
    trained = list(trainable_parameters(model, "head").values())
    whole = training_forward(model, images)
    levels = frozen_levels(model, images)

    cached = head_forward(model, levels, GRID)

    config = model.config
    assert [tuple(level.shape) for level in levels] == [(2, 2, 6, config.token_dim)] * 4
    assert_equal(cached, whole)
    assert cached.pose_iterations == []
    of_whole = torch.autograd.grad(loss_of(whole._replace(pose_iterations=[])), trained)
    of_cached = torch.autograd.grad(loss_of(cached), trained)
    assert all(torch.equal(a, b) for a, b in zip(of_whole, of_cached, strict=True))


def test_cached_features_in_half_precision_change_little() -> None:
    """float16 keeps 11 bits: 5e-4 of a feature, and no more than ten times that of a depth."""
    model, images = model_of(), random_images(*SHAPE)
    with torch.no_grad():
        levels = frozen_levels(model, images)
        exact, half = head_forward(model, levels, GRID), head_forward(model, [x.half() for x in levels], GRID)
    torch.testing.assert_close(half.depth, exact.depth, rtol=5e-3, atol=0)


def test_body_of_the_depth_head_is_trained_where_it_is_asked_for() -> None:
    model = model_of()
    levels = frozen_levels(model, random_images(*SHAPE))
    trainable_parameters(model, "head")

    loss_of(head_forward(model, levels, GRID)).backward()
    assert model.depth_head.norm.weight.grad is None
    model.depth_head.norm.weight.requires_grad_()
    loss_of(head_forward(model, levels, GRID)).backward()
    assert model.depth_head.norm.weight.grad is not None


def test_cached_features_have_no_graph_even_of_a_model_that_is_trained() -> None:
    model = model_of()
    trainable_parameters(model, "all")
    assert not any(level.requires_grad for level in frozen_levels(model, random_images(*SHAPE)))


def test_autocast_leaves_the_heads_in_float32_unless_asked() -> None:
    model, images = model_of(), random_images(*SHAPE)
    with torch.no_grad():
        levels = frozen_levels(model, images)
        exact = head_forward(model, levels, GRID)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(head_forward(model, levels, GRID), exact)
            full, half = training_forward(model, images), training_forward(model, images, half_dense=True)
            levels = frozen_levels(model, images)
        assert_equal(head_forward(model, levels, GRID), full)  # the backbone alone was in bfloat16

    assert not torch.equal(half.depth, full.depth)
    assert {x.dtype for x in (*half[:5], *full[:5], *full.pose_iterations)} == {torch.float32}  # type: ignore[union-attr]


def test_a_model_with_merged_experts_is_refused() -> None:
    model, images = model_of(), random_images(*SHAPE)
    levels = frozen_levels(model, images)
    model.depth_head.merge_experts()
    for call in (
        lambda: training_forward(model, images),
        lambda: head_forward(model, levels, GRID),
        lambda: trainable_parameters(model),
    ):
        with pytest.raises(InputError, match="experts of this model are merged for deployment; train the checkpoint"):
            call()
    with pytest.raises(RuntimeError, match="this head has no separate experts"):
        model.depth_head.branches(torch.zeros(1, 16, 4, 4))


def test_unknown_part_and_images_or_levels_that_do_not_fit_are_refused() -> None:
    model = model_of()
    with pytest.raises(InputError, match="train 'neck' is unknown; choose from head, backbone, all"):
        trainable_parameters(model, "neck")
    with pytest.raises(InputError, match="30x28 is not a multiple of 14"):
        training_forward(model, torch.zeros(1, 1, 3, 28, 30))
    levels = frozen_levels(model, random_images(*SHAPE))
    with pytest.raises(InputError, match=r"levels of shapes \(2, 2, 6, .* do not fit a grid of 3x3 patches"):
        head_forward(model, levels, (3, 3))
