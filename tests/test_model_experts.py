"""The expert head: where it must equal VGGT's, where its two forms must agree, and what its maps mean."""

import copy
import math
from itertools import product

import pytest
import torch
from models import ROUNDING, depth_head, random_images, relative_error, small_model
from torch import Tensor

from moe3d_deploy.config import MoeConfig
from moe3d_deploy.model.dpt import DptHead, Grid, activate_depth
from moe3d_deploy.model.experts import Mixture, expert_mix, gate_entropy, mix, mixture_variance

EPSILON = 2.0**-23  # spacing of float32 above 1

TEMPERATURES = (0.25, 1.0, 3.0)


@pytest.fixture(scope="module")
def vggt_head() -> DptHead:
    return depth_head(None)


@pytest.fixture(scope="module")
def features() -> Tensor:
    """What the last stage reads: (2, 16, 14, 28)."""
    return torch.randn((2, 16, 14, 28), generator=torch.Generator().manual_seed(0))


def with_experts_of(vggt: DptHead, moe: MoeConfig) -> DptHead:
    """A head whose experts are all VGGT's last stage, under a gate of its own."""
    head = depth_head(moe)
    for expert in head.experts:
        expert.load_state_dict(vggt.scratch.output_conv2.state_dict())
    return head


def raw_and_logits(experts: int, *, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Raw outputs (3, K, 2, 8, 9) and gate logits (3, K, 8, 9)."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn((3, experts, 2, 8, 9), generator=generator)
    return raw, spread * torch.randn((3, experts, 8, 9), generator=generator)


# Equal to VGGT's head


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_one_expert_is_vggts_head_to_the_bit(vggt_head: DptHead, features: Tensor, temperature: float) -> None:
    """A softmax over one expert is exactly 1."""
    head = with_experts_of(vggt_head, MoeConfig(num_experts=1, temperature=temperature))

    depth, confidence = activate_depth(vggt_head.raw(features))
    mixture = head.mixture(features)

    assert torch.equal(mixture.depth, depth)
    assert torch.equal(mixture.confidence, confidence)


@pytest.mark.parametrize(("experts", "temperature"), [*product((2, 4, 7), TEMPERATURES)])
def test_equal_experts_are_vggts_head_under_any_gate(
    vggt_head: DptHead, features: Tensor, experts: int, temperature: float
) -> None:
    """K copies of one expert give VGGT's depth, so the mix itself adds nothing but the rounding of a sum of K."""
    head = with_experts_of(vggt_head, MoeConfig(num_experts=experts, temperature=temperature))

    depth, confidence = activate_depth(vggt_head.raw(features))
    mixture = head.mixture(features)

    assert mixture.weights.std() > 0.01  # the gate does choose
    torch.testing.assert_close(mixture.depth, depth, rtol=experts * EPSILON, atol=0)
    torch.testing.assert_close(mixture.confidence, confidence, rtol=experts * EPSILON, atol=0)


def test_the_head_before_its_last_stage_does_not_depend_on_experts(vggt_head: DptHead) -> None:
    levels = [torch.randn((2, 6, 128), generator=torch.Generator().manual_seed(i)) for i in range(4)]

    actual = depth_head(MoeConfig()).features(levels, Grid(2, 3))

    assert torch.equal(actual, vggt_head.features(levels, Grid(2, 3)))


# A mixture


def check_is_a_mixture(mixture: Mixture, experts: int) -> None:
    assert all(bool(part.isfinite().all()) for part in mixture)
    assert bool((mixture.weights >= 0).all())
    # Each of K weights and K sums is rounded once.
    rounding = experts * EPSILON
    torch.testing.assert_close(mixture.weights.sum(1), torch.ones_like(mixture.depth), rtol=rounding, atol=0)
    assert bool((mixture.depth >= mixture.candidates.amin(1) * (1 - rounding)).all())
    assert bool((mixture.depth <= mixture.candidates.amax(1) * (1 + rounding)).all())
    assert bool((mixture.confidence >= 1).all())


@pytest.mark.parametrize(("experts", "temperature"), [*product((1, 2, 4, 9), TEMPERATURES)])
def test_depth_lies_between_the_experts_and_weights_sum_to_one(
    features: Tensor, experts: int, temperature: float
) -> None:
    moe = MoeConfig(num_experts=experts, temperature=temperature)

    check_is_a_mixture(depth_head(moe).mixture(features), experts)


def test_confidence_is_at_least_one_where_every_expert_is_sure_of_nothing() -> None:
    """exp(-30) is lost beside 1, and the weights' sum is often one rounding below 1."""
    raw, logits = raw_and_logits(4)
    raw[:, :, 1] = -30.0

    assert bool((mix(raw, logits, 1.0).confidence == 1).all())


@pytest.mark.parametrize("size", [1e4, 3e38])
@pytest.mark.parametrize("temperature", TEMPERATURES[1:])
def test_extreme_gate_logits_stay_finite(size: float, temperature: float) -> None:
    """The softmax subtracts the largest logit first. 3e38 is near the largest float32, so not to be divided by 0.25."""
    raw, logits = raw_and_logits(4)
    extreme = logits.sign() * size

    mixture = mix(raw, extreme, temperature)

    check_is_a_mixture(mixture, 4)
    assert bool(gate_entropy(mixture.weights).isfinite().all())
    assert bool(mixture_variance(mixture).isfinite().all())


def test_mix_is_of_depths_not_of_their_logarithms() -> None:
    """Depths 1 and 9 half and half are 5, not 3; confidences 1 + 1 and 1 + 3 are 3."""
    raw = torch.tensor([[0.0, 0.0], [math.log(9.0), math.log(3.0)]])[None, :, :, None, None]

    mixture = mix(raw, torch.zeros(1, 2, 1, 1), 1.0)

    assert mixture.depth.item() == pytest.approx(5.0, rel=1e-6)
    assert mixture.confidence.item() == pytest.approx(3.0, rel=1e-6)


def test_temperature_divides_the_logits() -> None:
    raw, logits = raw_and_logits(5, spread=3.0)

    assert torch.equal(mix(raw, logits, 2.0).weights, (logits / 2).softmax(1))


def test_low_temperature_leaves_the_best_expert_and_high_temperature_their_mean() -> None:
    raw, logits = raw_and_logits(5)
    candidates, best = raw[:, :, 0].exp(), logits.argmax(1, keepdim=True)

    cold, hot = mix(raw, logits, 1e-6), mix(raw, logits, 1e6)

    # Two of 216 x 5 normal logits closer than 1e-4 are not expected; e^-100 is nothing beside 1.
    torch.testing.assert_close(cold.depth, candidates.gather(1, best)[:, 0], rtol=EPSILON, atol=0)
    # exp(x) - 1 for |x| < 4e-6 moves a mean of candidates by less than twice that.
    torch.testing.assert_close(hot.depth, candidates.mean(1), rtol=1e-5, atol=0)


# Uncertainty


@pytest.mark.parametrize("experts", [1, 2, 4, 8])
def test_entropy_is_zero_for_one_expert_and_log_k_for_all_alike(experts: int) -> None:
    one_hot = torch.eye(experts).reshape(experts, experts, 1, 1)  # each image chooses another one
    uniform = torch.full((1, experts, 1, 1), 1 / experts)

    assert gate_entropy(one_hot).tolist() == [[[0.0]]] * experts
    assert gate_entropy(uniform).item() == pytest.approx(math.log(experts), rel=experts * EPSILON)


def test_entropy_lies_between_zero_and_log_k() -> None:
    raw, logits = raw_and_logits(6, spread=20.0)

    entropy = gate_entropy(mix(raw, logits, 1.0).weights)

    assert bool((entropy >= 0).all())
    assert bool((entropy <= math.log(6) * (1 + 6 * EPSILON)).all())


def test_variance_by_hand() -> None:
    """Depths 2 and 4 with weights 1/4 and 3/4: the mean is 3.5, the variance 9/16 + 3/16."""
    raw = torch.tensor([[math.log(2.0), 0.0], [math.log(4.0), 0.0]])[None, :, :, None, None]
    logits = torch.tensor([0.0, math.log(3.0)])[None, :, None, None]

    mixture = mix(raw, logits, 1.0)

    assert mixture.depth.item() == pytest.approx(3.5, rel=1e-6)
    assert mixture_variance(mixture).item() == pytest.approx(0.75, rel=1e-6)


def test_variance_is_never_negative_and_zero_for_equal_experts() -> None:
    raw, logits = raw_and_logits(4, spread=20.0)
    equal = raw[:, :1].expand_as(raw)

    assert bool((mixture_variance(mix(raw, logits, 1.0)) >= 0).all())
    mixture = mix(equal, logits, 1.0)
    assert bool((mixture_variance(mixture) <= (4 * EPSILON * mixture.depth) ** 2).all())


# The deployment form

SIZES = [(1, 32, 32), (2, 8, 16), (4, 32, 32), (4, 5, 7), (8, 16, 8)]


@pytest.mark.parametrize(("experts", "hidden", "gate_hidden"), SIZES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_merged_form_equals_the_plain_form(
    features: Tensor, experts: int, hidden: int, gate_hidden: int, temperature: float
) -> None:
    head = depth_head(MoeConfig(experts, hidden, gate_hidden, temperature))
    merged = copy.deepcopy(head)

    merged.merge_experts()

    assert not hasattr(merged, "experts")
    for actual, expected in zip(merged.mixture(features), head.mixture(features), strict=True):
        assert relative_error(actual, expected) < ROUNDING


def test_merged_form_equals_the_plain_form_in_float64_to_its_rounding(features: Tensor) -> None:
    """So what differs in float32 is rounding and no part of the algebra."""
    head = depth_head(MoeConfig(temperature=0.5)).double()
    merged = copy.deepcopy(head)

    merged.merge_experts()

    for actual, expected in zip(merged.mixture(features.double()), head.mixture(features.double()), strict=True):
        assert relative_error(actual, expected) < 1e-14


def test_channels_of_the_merged_convolution_are_the_experts_in_order_and_then_the_gate(features: Tensor) -> None:
    head = depth_head(MoeConfig(num_experts=3, hidden_channels=5, gate_hidden_channels=7))
    expected = torch.cat([branch[0](features).relu() for branch in (*head.experts, head.gate)], dim=1)
    head.merge_experts()
    assert head.merged is not None

    hidden = head.merged.hidden(features)

    assert hidden.shape[1] == 3 * 5 + 7
    assert relative_error(hidden, expected) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tail_of_a_16_bit_hidden_map_is_computed_in_float32(dtype: torch.dtype) -> None:
    """exp(12) = 162,755 is beyond float16, and equals float32's result for the same hidden map."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand((1, 2 * 4 + 3, 5, 6), generator=generator).to(dtype)
    shapes = ((2, 2, 4), (2, 2), (2, 3), (2,))
    expert_weight, expert_bias, gate_weight, gate_bias = (torch.randn(shape, generator=generator) for shape in shapes)
    operands = (expert_weight, expert_bias + 12.0, gate_weight, gate_bias, 1.0)

    mixture, expected = expert_mix(hidden, *operands), expert_mix(hidden.float(), *operands)

    assert {part.dtype for part in mixture} == {torch.float32}
    assert mixture.depth.max() > 65504
    assert all(torch.equal(actual, part) for actual, part in zip(mixture, expected, strict=True))


def test_a_whole_model_gives_the_same_in_the_merged_form() -> None:
    model = small_model(MoeConfig(temperature=0.7), point_head=False)
    merged = copy.deepcopy(model)
    merged.depth_head.merge_experts()
    images = random_images(1, 2, 3, 28, 42)
    outputs = ("expert_weights", "expert_depths", "expert_entropy", "depth_variance")

    with torch.inference_mode():
        expected, actual = model(images, outputs=outputs), merged(images, outputs=outputs)

    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < ROUNDING, errors


def test_merging_keeps_the_number_of_parameters() -> None:
    head = depth_head(MoeConfig(num_experts=4))
    before = sum(tensor.numel() for tensor in head.state_dict().values())

    head.merge_experts()

    assert sum(tensor.numel() for tensor in head.state_dict().values()) == before
