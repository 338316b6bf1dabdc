"""The losses of cameras and of the gate's entropy, against hand computations."""

import math

import pytest
import torch
from torch import Tensor

from moe3d_deploy.training.losses import LossOptions, camera_loss, entropy_loss


def poses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 9)


def test_camera_loss_by_hand() -> None:
    """Two iterations, gamma 0.5: the first counts half; both are divided by 2.

    First: translation off by 3 in one of three, quaternion by 0.4 in one of four, fields of view by 1 in both.
    Second: translation off by 0.6 in one.
    """
    true = poses(0, 0, 0, 0, 0, 0, 1, 1, 1)
    first = poses(3, 0, 0, 0, 0, -0.4, 1, 2, 0)
    second = poses(0, 0.6, 0, 0, 0, 0, 1, 1, 1)
    options = LossOptions(gamma=0.5, translation_weight=1, quaternion_weight=2, fov_weight=0.5)

    loss, parts = camera_loss([first, second], true, options)

    translation, quaternion, fov = (0.5 * 1 + 0.2) / 2, 0.5 * 0.1 / 2, 0.5 * 1 / 2
    assert {k: float(v) for k, v in parts.items()} == pytest.approx(
        {"camera_translation": translation, "camera_quaternion": quaternion, "camera_fov": fov}
    )
    assert float(loss) == pytest.approx(translation + 2 * quaternion + 0.5 * fov)


def test_huber_is_quadratic_below_delta_and_linear_above() -> None:
    """delta 0.1: |0.06| gives 0.06^2 / 0.2 = 0.018, |1| gives 1 - 0.05; over three components."""
    true, off = poses(*[0.0] * 9), poses(0.06, -1, 0, *[0.0] * 6)
    loss, _ = camera_loss([off], true, LossOptions(camera="huber", huber_delta=0.1))
    assert float(loss) == pytest.approx((0.018 + 0.95) / 3)


def test_later_camera_iterations_count_more_by_gamma() -> None:
    true = poses(*[0.0] * 9)
    alone = [float(camera_loss([true] * i + [true + 1] + [true] * (3 - i), true, LossOptions())[0]) for i in range(4)]
    assert [a / b for a, b in zip(alone, alone[1:], strict=False)] == pytest.approx([0.6] * 3)


def test_entropy_is_log_k_for_an_undecided_gate_and_zero_for_a_decided_one() -> None:
    shape = (2, 1, 4, 3, 3)
    assert entropy_loss(torch.full(shape, 0.25)).tolist() == pytest.approx([math.log(4)] * 2)
    one_hot = torch.zeros(shape)
    one_hot[:, :, 2] = 1
    assert entropy_loss(one_hot).tolist() == [0, 0]


def test_entropy_of_two_experts_by_hand() -> None:
    weights = torch.tensor([[0.25, 1.0], [0.75, 0.0]]).reshape(1, 1, 2, 1, 2)
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2
    assert float(entropy_loss(weights)) == pytest.approx(expected)
