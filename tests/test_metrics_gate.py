"""The gate's statistics: uniform, one-hot and in between."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics import gate_statistics


def test_a_uniform_gate_has_the_entropy_of_all_experts() -> None:
    """All four are equally large, so they share each pixel."""
    gate = gate_statistics(np.full((2, 4, 3, 5), 0.25, np.float32))
    assert gate.entropy == pytest.approx(math.log(4))
    assert gate.argmax_share == pytest.approx((0.25,) * 4)
    assert gate.effective_experts == pytest.approx(4)


def test_a_collapsed_gate_uses_one_expert() -> None:
    weights = np.zeros((3, 4, 4))
    weights[1] = 1
    gate = gate_statistics(weights)
    assert gate == (0, (0, 1, 0), 1)


def test_a_gate_of_decided_pixels_can_use_every_expert() -> None:
    """Three quarters of the pixels to the first, one to the second: exp(-(3/4 log 3/4 + 1/4 log 1/4)) = 4 / 3^(3/4)."""
    weights = np.zeros((2, 2, 2))
    weights[0] = [[1, 1], [1, 0]]
    weights[1] = 1 - weights[0]
    gate = gate_statistics(weights)
    assert gate.entropy == 0
    assert gate.argmax_share == (0.75, 0.25)
    assert gate.effective_experts == pytest.approx(4 / 3**0.75)


def test_the_largest_weight_wins_the_pixel_whatever_its_size() -> None:
    """Mean weights 0.7 and 0.3, yet the second wins half of the pixels; entropy by hand."""
    weights = np.array([[[1.0, 0.4]], [[0.0, 0.6]]])
    gate = gate_statistics(weights)
    assert gate.argmax_share == (0.5, 0.5)
    assert gate.effective_experts == pytest.approx(0.7**-0.7 * 0.3**-0.3)
    assert gate.entropy == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / 2)


def test_one_expert_has_no_entropy() -> None:
    assert gate_statistics(np.ones((1, 2, 2))) == (0, (1,), 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), experts=st.integers(1, 5))
def test_against_a_pixel_by_pixel_reference(seed: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.exp(3 * rng.normal(size=(2, experts, 3, 4)))
    weights /= weights.sum(axis=1, keepdims=True)
    gate = gate_statistics(weights)
    pixels = [weights[s, :, y, x].tolist() for s in range(2) for y in range(3) for x in range(4)]
    assert gate.entropy == pytest.approx(sum(-sum(w * math.log(w) for w in p) for p in pixels) / 24)
    wins = [p.index(max(p)) for p in pixels]
    assert gate.argmax_share == pytest.approx([wins.count(k) / 24 for k in range(experts)])
    mean = [sum(p[k] for p in pixels) / 24 for k in range(experts)]
    assert gate.effective_experts == pytest.approx(math.exp(-sum(m * math.log(m) for m in mean)))
    assert 1 - 1e-12 <= gate.effective_experts <= experts + 1e-12


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones((4, 4)), "expert weights have shape (4, 4); pass (..., K, H, W) with one pixel or more"),
        (np.ones((2, 0, 4)), "expert weights have shape (2, 0, 4); pass (..., K, H, W) with one pixel or more"),
        (
            np.array([[[0.5, 1.5, np.nan]], [[0.5, -0.5, 1.0]]]),
            "expert weights are negative, NaN or not of sum 1 at 2 of 3 pixels; "
            "pass the gate's softmax, K on the third axis from the end",
        ),
    ],
)
def test_what_is_no_softmax_is_told_in_one_line(weights: np.ndarray, message: str) -> None:
    with pytest.raises(InputError) as error:
        gate_statistics(weights)
    assert str(error.value) == message
