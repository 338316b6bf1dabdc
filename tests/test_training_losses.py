"""The losses against hand computations, SciPy and finite differences, and what must not reach them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from moe3d_deploy.errors import InputError
from moe3d_deploy.training.forward import Outputs
from moe3d_deploy.training.losses import (
    DEPTH_LOSSES,
    LossOptions,
    gradient_term,
    objective,
    scene_objectives,
)
from moe3d_deploy.training.targets import Targets

BATCH, VIEWS, EXPERTS, HEIGHT, WIDTH, ITERATIONS = 2, 2, 3, 4, 5, 3
NO_GRADIENT_TERM = {"gradient_weight": 0.0}


def row(*values: float) -> Tensor:
    """A map of one row of one view of one scene."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def outputs_of(depth: Tensor, confidence: Tensor | None = None, log_sigma: Tensor | None = None) -> Outputs:
    """A model without experts and without cameras."""
    confidence = torch.ones_like(depth) if confidence is None else confidence
    log_sigma = torch.zeros_like(depth[:, :, None]) if log_sigma is None else log_sigma
    return Outputs(depth, confidence, None, None, log_sigma, [])


def targets_of(depth: Tensor, valid: Tensor | None = None) -> Targets:
    valid = depth > 0 if valid is None else valid
    return Targets(depth, valid, torch.zeros(*depth.shape[:2], 9, dtype=depth.dtype), torch.ones(len(depth)))


def depth_loss(outputs: Outputs, targets: Targets, **options: Any) -> float:
    return float(objective(outputs, targets, LossOptions(**options))[1]["depth"])


def raw_tensors(seed: int = 0) -> list[Tensor]:
    """Leaves from which `mixture` makes outputs: log depths, c, gate logits, poses of all iterations."""
    generator = torch.Generator().manual_seed(seed)
    maps = (BATCH, VIEWS, EXPERTS, HEIGHT, WIDTH)
    shapes = (maps, maps, maps, (ITERATIONS, BATCH, VIEWS, 9))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[0] *= 0.3
    return [tensor.requires_grad_() for tensor in tensors]


def mixture(log_depth: Tensor, c: Tensor, logits: Tensor, poses: Tensor) -> Outputs:
    weights, candidates = logits.softmax(2), log_depth.exp()
    depth, confidence = (weights * candidates).sum(2), 1 + (weights * c.exp()).sum(2)
    return Outputs(depth, confidence, weights, candidates, -c, list(poses))


def some_targets(seed: int = 1) -> Targets:
    """A third of the pixels has no truth."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, VIEWS, HEIGHT, WIDTH)
    depth = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    valid = torch.rand(shape, generator=generator) > 0.3
    poses = torch.randn((BATCH, VIEWS, 9), generator=generator, dtype=torch.float64)
    return Targets(depth * valid, valid, poses, torch.ones(BATCH, dtype=torch.float64))


# ---- values


def test_l2_is_the_mean_squared_error_of_valid_pixels() -> None:
    """Errors 1 and -3 count, the third pixel does not: (1 + 9) / 2."""
    assert depth_loss(outputs_of(row(2, 1, 50)), targets_of(row(1, 4, 0)), depth="l2") == 5


@pytest.mark.parametrize("floor", [1e-3, 0.5])
def test_nll_equals_scipy_mixture(floor: float) -> None:
    outputs, targets = mixture(*(x.detach() for x in raw_tensors())), some_targets()
    weights, centres, sigma = (
        x.numpy() for x in (outputs.weights, outputs.candidates, floor + outputs.log_sigma.exp())
    )  # type: ignore[union-attr]
    density = (weights * norm.pdf(targets.depth[:, :, None].numpy(), centres, sigma)).sum(2)
    expected = float(-np.log(density)[targets.valid.numpy()].mean())

    actual = depth_loss(outputs, targets, depth="nll", sigma_floor=floor)

    assert actual == pytest.approx(expected, rel=1e-12)


def test_nll_of_a_model_without_experts_is_that_of_one_gaussian() -> None:
    log_sigma = row(-1.0, 0.5)[:, :, None]
    expected = -norm.logpdf([1.0, 4.0], [2.0, 1.0], [1e-3 + math.exp(-1), 1e-3 + math.exp(0.5)]).mean()

    actual = depth_loss(outputs_of(row(2, 1), log_sigma=log_sigma), targets_of(row(1, 4)), depth="nll")

    assert actual == pytest.approx(float(expected), rel=1e-12)


def test_nll_of_exact_hits_is_bounded_by_the_floor_of_sigma() -> None:
    """sigma falls to 0.001 and no further: -log N = log 0.001 + log(2 pi) / 2."""
    sure = outputs_of(row(1, 2), log_sigma=row(-60, -60)[:, :, None])
    expected = math.log(1e-3) + math.log(2 * math.pi) / 2

    assert depth_loss(sure, targets_of(row(1, 2)), depth="nll") == pytest.approx(expected, rel=1e-12)


def test_nll_of_a_gate_that_has_decided_is_finite_and_that_of_the_chosen_expert() -> None:
    """A softmax of float32 gives exact zeros, whose logarithm must harm neither value nor gradient."""
    logits = torch.tensor([[300.0, -300.0]]).reshape(1, 1, 2, 1, 1).requires_grad_()
    candidates = torch.tensor([[1.0, 5.0]]).reshape(1, 1, 2, 1, 1)
    weights = logits.softmax(2)
    outputs = Outputs(
        torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), weights, candidates, torch.zeros(1, 1, 2, 1, 1), []
    )

    loss, _ = objective(outputs, targets_of(torch.ones(1, 1, 1, 1)), LossOptions(depth="nll", entropy_weight=1.0))
    loss.backward()

    sigma = 1 + 1e-3
    assert weights.flatten().tolist() == [1, 0]
    assert loss.item() == pytest.approx(-norm.logpdf(1.0, 1.0, sigma), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_vggt_by_hand() -> None:
    """Residuals 1, -1, 0.5 with confidences 1, 2, 4; alpha 0.2, no second row, one scale.

    error     (1 - 0) + (2 - 0.2 log 2) + (2 - 0.2 log 4), over 3
    gradient  |-2| (1 + 2) / 2 + |1.5| (2 + 4) / 2 = 3 + 4.5, over 3
    """
    outputs = outputs_of(row(2, 1, 1.5), confidence=row(1, 2, 4))
    targets = targets_of(row(1, 2, 1))
    error = (5 - 0.2 * math.log(8)) / 3

    total = depth_loss(outputs, targets, depth="vggt", gradient_scales=1, gradient_weight=0.5)
    plain = depth_loss(outputs, targets, depth="vggt", **NO_GRADIENT_TERM)

    assert plain == pytest.approx(error, rel=1e-12)
    assert total == pytest.approx(error + 0.5 * 7.5 / 3, rel=1e-12)


def test_log_by_hand() -> None:
    """Log residuals log 2, -log 2, 0 with confidences 1, 2, 4; the gradient term (2 + 1) log 2 / 3 has none."""
    outputs = outputs_of(row(2, 1, 1), confidence=row(1, 2, 4))
    targets = targets_of(row(1, 2, 1))
    log2 = math.log(2)
    error = (3 * log2 - 0.2 * 3 * log2) / 3

    total = depth_loss(outputs, targets, depth="log", gradient_scales=1)

    assert total == pytest.approx(error + log2, rel=1e-12)


def test_log_loss_is_lowest_at_the_truth() -> None:
    """Whatever the confidence, and for one pixel as for all."""
    targets = targets_of(some_targets().depth)
    generator = torch.Generator().manual_seed(3)
    confidence = 1 + 5 * torch.rand(targets.depth.shape, generator=generator, dtype=torch.float64)
    truth = torch.where(targets.valid, targets.depth, 1)
    best = depth_loss(outputs_of(truth, confidence), targets, depth="log")

    noise = torch.randn(targets.depth.shape, generator=generator, dtype=torch.float64)
    for change in (1.01, 0.99, torch.exp(1e-3 * noise), torch.exp(noise)):
        assert depth_loss(outputs_of(truth * change, confidence), targets, depth="log") > best


@pytest.mark.parametrize("name", ["vggt", "log"])
def test_best_confidence_is_alpha_over_the_error(name: str) -> None:
    """d/dC (C e - alpha log C) = 0: C = 0.2 / 0.05 = 4 for an error of 0.05."""
    depth = row(1 + 0.05) if name == "vggt" else row(math.exp(0.05))
    confidence = row(4.0).requires_grad_()
    loss, _ = objective(outputs_of(depth, confidence), targets_of(row(1)), LossOptions(depth=name))

    (slope,) = torch.autograd.grad(loss, confidence)

    assert float(slope) == pytest.approx(0, abs=1e-12)


def test_log_loss_does_not_depend_on_the_unit_of_depth() -> None:
    outputs, targets = mixture(*(x.detach() for x in raw_tensors())), some_targets()
    scaled = outputs._replace(depth=9 * outputs.depth)

    assert depth_loss(scaled, targets._replace(depth=9 * targets.depth), depth="log") == pytest.approx(
        depth_loss(outputs, targets, depth="log"), rel=1e-12
    )


# ---- the gradient term


def test_gradient_term_by_hand_at_two_scales() -> None:
    """All pixels are valid; the second scale sees the corners alone, [0 3; 4 4]."""
    residual = torch.tensor([[0.0, 1, 3], [0, 0, 0], [4, 3, 4]], dtype=torch.float64)
    along_rows, along_columns = (1 + 2) + (0 + 0) + (1 + 1), (0 + 4) + (1 + 3) + (3 + 4)
    expected = ((along_rows + along_columns) / 9 + ((3 + 0) + (4 + 1)) / 4) / 2

    assert float(gradient_term(residual[None], torch.ones(1, 3, 3, dtype=torch.bool), None, 2)) == pytest.approx(
        expected
    )


def test_third_scale_of_the_gradient_term_sees_every_fourth_pixel() -> None:
    """0 1 0 1 0 1 0 1 3: steps of 1 (7 + 2 over 9 pixels), of 2 (0 0 0 0 3: 3 over 5), of 4 (0 0 3: 3 over 3)."""
    residual = row(0, 1, 0, 1, 0, 1, 0, 1, 3)
    expected = (9 / 9 + 3 / 5 + 3 / 3) / 3
    assert float(gradient_term(residual, residual >= 0, None, 3)) == pytest.approx(expected)


def test_gradient_term_leaves_out_pairs_with_an_invalid_end() -> None:
    residual, valid = row(0, 5, 1, 2), torch.tensor([[[[True, False, True, True]]]])
    assert float(gradient_term(residual, valid, None, 1)) == pytest.approx(1 / 3)


def test_gradient_term_of_a_constant_error_is_zero_and_a_map_smaller_than_the_scale_adds_nothing() -> None:
    found = gradient_term(torch.full((2, 3, 3), 0.7), torch.ones(2, 3, 3, dtype=torch.bool), None, 4)
    assert found.tolist() == [0, 0]


def test_gradient_term_of_a_scale_without_valid_pixels_is_zero() -> None:
    valid = torch.tensor([[[False, True], [True, True]]])  # the second scale sees the first pixel alone
    residual = torch.tensor([[[0.0, 1.0], [1.0, 3.0]]])
    assert float(gradient_term(residual, valid, None, 2)) == pytest.approx((2 + 2) / 3 / 2)


@pytest.mark.parametrize("name", ["vggt", "log"])
def test_a_blurred_edge_costs_more_than_a_flat_error_of_the_same_size(name: str) -> None:
    """Both predictions are off by the same total; the flat one keeps the edge."""
    true = row(1, 1, 1, 2, 2, 2)
    blurred = row(1, 1, 1.25, 1.75, 2, 2)
    offset = float(depth_loss(outputs_of(blurred), targets_of(true), depth=name, **NO_GRADIENT_TERM))
    flat = true + offset if name == "vggt" else true * math.exp(offset)

    assert depth_loss(outputs_of(flat), targets_of(true), depth=name, **NO_GRADIENT_TERM) == pytest.approx(offset)
    assert depth_loss(outputs_of(flat), targets_of(true), depth=name) == pytest.approx(offset)
    assert depth_loss(outputs_of(blurred), targets_of(true), depth=name) > 1.5 * offset


# ---- the objective


def test_objective_is_the_weighted_sum_of_its_parts() -> None:
    options = LossOptions(depth="log", depth_weight=2, camera_weight=3, entropy_weight=0.5)
    total, parts = objective(mixture(*raw_tensors()), some_targets(), options)

    expected = 2 * parts["depth"] + 3 * parts["camera"] + 0.5 * parts["entropy"]
    assert total.item() == pytest.approx(float(expected), rel=1e-12)
    assert parts["loss"].item() == total.item()
    assert total.requires_grad
    assert not any(part.requires_grad or part.dim() for part in parts.values())
    assert set(parts) == {
        *("loss", "depth", "depth_error", "depth_gradient"),
        *("camera", "camera_translation", "camera_quaternion", "camera_fov", "entropy"),
    }


@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_each_scene_of_a_batch_has_the_loss_and_the_gradient_that_it_has_alone(name: str) -> None:
    """The objective of all views as one scene is that of a batch of one."""
    options = LossOptions(depth=name, camera_weight=2, entropy_weight=0.3, gradient_scales=2)
    tensors, targets = raw_tensors(), some_targets()
    total, parts = scene_objectives(mixture(*tensors), targets, options)
    together = torch.autograd.grad(total.sum(), tensors, allow_unused=True)

    for scene in range(BATCH):
        alone = [t[:, [scene]] if t.dim() == 4 else t[[scene]] for t in (x.detach() for x in tensors)]
        leaves = [t.requires_grad_() for t in alone]
        expected, of_scene = objective(mixture(*leaves), Targets(*(t[[scene]] for t in targets)), options)
        assert total[scene].item() == pytest.approx(expected.item(), rel=1e-12)
        assert {key: part[scene].item() for key, part in parts.items()} == pytest.approx(
            {key: part.item() for key, part in of_scene.items()}, rel=1e-12
        )
        for found, gradient in zip(together, torch.autograd.grad(expected, leaves, allow_unused=True), strict=True):
            assert (found is None) == (gradient is None)
            if found is not None and gradient is not None:
                own = found[:, [scene]] if found.dim() == 4 else found[[scene]]
                torch.testing.assert_close(own, gradient, rtol=1e-12, atol=1e-15)


def test_a_gate_without_entropy_loss_has_no_gradient_of_it() -> None:
    tensors = raw_tensors()
    outputs = mixture(*tensors)
    total, parts = objective(outputs._replace(depth=outputs.depth.detach()), some_targets(), LossOptions())
    assert torch.autograd.grad(total, tensors, allow_unused=True)[2] is None
    assert float(parts["entropy"]) > 0


def test_what_a_model_does_not_have_is_not_in_its_objective() -> None:
    _, parts = objective(outputs_of(row(1, 2)), targets_of(row(1, 1)), LossOptions())
    assert set(parts) == {"loss", "depth"}


@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_gradients_equal_finite_differences(name: str) -> None:
    options = LossOptions(depth=name, entropy_weight=0.3, camera="huber", gradient_scales=2)
    targets = some_targets()

    def total(*tensors: Tensor) -> Tensor:
        return objective(mixture(*tensors), targets, options)[0]

    assert torch.autograd.gradcheck(total, raw_tensors())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_invalid_pixels_reach_neither_loss_nor_gradient(name: str, wrong: float) -> None:
    """Whatever stands there in the truth, and also where the prediction itself is NaN."""
    targets, options = some_targets(), LossOptions(depth=name)
    tensors = raw_tensors()
    expected, _ = objective(mixture(*tensors), targets, options)
    gradients = torch.autograd.grad(expected, tensors, allow_unused=True)
    marked = targets._replace(depth=torch.where(targets.valid, targets.depth, wrong))

    loss, _ = objective(mixture(*tensors), marked, options)

    assert loss.item() == expected.item()
    for actual, clean in zip(torch.autograd.grad(loss, tensors, allow_unused=True), gradients, strict=True):
        assert (actual is None) == (clean is None)
        assert actual is None or torch.equal(actual, clean)
    outputs = mixture(*tensors)
    outputs = outputs._replace(depth=torch.where(targets.valid, outputs.depth, math.nan))
    assert torch.isfinite(objective(outputs, marked, options)[0])


@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_sixteen_bit_outputs_are_taken_in_float32(name: str) -> None:
    """The same as if they had been float32 all along, so nothing is added up in 16 bits."""
    tensors = [x.detach().to(torch.bfloat16) for x in raw_tensors()]
    half, full = mixture(*tensors), mixture(*tensors)
    full = Outputs(*(x.float() if isinstance(x, Tensor) else [y.float() for y in x] for x in full if x is not None))
    targets = Targets(*(x.float() if x.is_floating_point() else x for x in some_targets()))
    options = LossOptions(depth=name, entropy_weight=0.1)

    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = objective(half, targets, options)

    assert loss.dtype == torch.float32
    assert {part.dtype for part in parts.values()} == {torch.float32}
    assert float(loss) == float(objective(full, targets, options)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossOptions(depth="l3"), "depth loss 'l3' is unknown; choose from l2, nll, vggt, log"),
        (lambda: LossOptions(camera="l2"), "camera loss 'l2' is unknown; choose from l1, huber"),
        (lambda: LossOptions(entropy_weight=-1e-4), "loss option entropy_weight must be a number >= 0, got -0.0001"),
        (lambda: LossOptions(alpha=math.nan), "loss option alpha must be a number >= 0, got nan"),
        (lambda: LossOptions(sigma_floor=0), "loss option sigma_floor must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], LossOptions], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
