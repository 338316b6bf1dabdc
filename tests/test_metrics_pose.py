"""Camera errors: known rotations, known directions, and the area under their curve."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics import auc, relative_pose_errors

PAIRS = [(0, 1), (0, 2), (1, 2)]


def cameras(*centres: tuple[float, float, float], turned_y_deg: tuple[float, ...] | None = None) -> np.ndarray:
    """Cameras at these centres, turned about their own y axis: [R | -R c]."""
    angles = turned_y_deg or (0.0,) * len(centres)
    rotations = [Rotation.from_euler("y", angle, degrees=True).as_matrix() for angle in angles]
    return np.stack([np.c_[r, -r @ np.array(c)] for r, c in zip(rotations, centres, strict=True)])


def test_one_turned_camera_is_wrong_towards_each_other() -> None:
    """Camera 1 turned in its place by 10 degrees: the pairs with it are 10 degrees off, (0, 2) is right."""
    centres = ((0, 0, 0), (1, 0, 0), (0, 0, 1))
    errors = relative_pose_errors(cameras(*centres, turned_y_deg=(0, 10, 0)), cameras(*centres))
    np.testing.assert_allclose(errors.rotation_deg, [10, 0, 10], atol=1e-9)
    # A baseline is expressed in the first camera of its pair, so only (1, 2) turns with camera 1.
    np.testing.assert_allclose(errors.translation_deg, [0, 0, 10], atol=1e-9)
    rotation, translation = errors
    np.testing.assert_allclose(errors.worst_deg, np.maximum(rotation, translation))


def test_a_camera_that_stands_elsewhere_is_off_by_the_angle_of_the_directions() -> None:
    """The true camera 1 lies to the right, the predicted one 30 degrees off that, at another distance."""
    pred = cameras((0, 0, 0), (5 * math.cos(math.radians(30)), 5 * math.sin(math.radians(30)), 0))
    errors = relative_pose_errors(pred, cameras((0, 0, 0), (1, 0, 0)))
    np.testing.assert_allclose(errors.translation_deg, [30])
    np.testing.assert_allclose(errors.rotation_deg, [0])


def test_opposite_directions_are_one() -> None:
    """135 degrees apart, and 45 from the opposite."""
    pred, true = cameras((0, 0, 0), (-1, 0, 1)), cameras((0, 0, 0), (1, 0, 0))
    np.testing.assert_allclose(relative_pose_errors(pred, true).translation_deg, [45])


def test_small_and_half_turns_keep_their_digits() -> None:
    centres = ((0, 0, 0), (1, 0, 0))
    for angle in (1e-7, 179.9999, 180.0):
        errors = relative_pose_errors(cameras(*centres, turned_y_deg=(0, angle)), cameras(*centres))
        np.testing.assert_allclose(errors.rotation_deg, [angle], rtol=1e-6)


def test_cameras_in_one_place_have_no_direction() -> None:
    true = cameras((0, 0, 0), (0, 0, 0), (1, 0, 0))
    pred = cameras((0, 0, 0), (3, 1, 0), (0, 0, 0), turned_y_deg=(0, 20, 0))
    errors = relative_pose_errors(pred, true)
    assert np.isnan(errors.translation_deg[0]), "nothing is true there"
    np.testing.assert_allclose(errors.translation_deg[1], 90, err_msg="the prediction has none")
    assert errors.worst_deg[0] == pytest.approx(20), "judged by its rotation alone"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_place_far_from_the_origin_is_within_rounding(dtype: type) -> None:
    """Turned in one place at a distance of 1000: the translations [R | -R c] differ by rounding."""
    centre = (1000.0, 200.0, -300.0)
    true = cameras(centre, centre, (1001.0, 200.0, -300.0), turned_y_deg=(0, 33, 50)).astype(dtype)
    errors = relative_pose_errors(true, true)
    np.testing.assert_array_equal(np.isnan(errors.translation_deg), [True, False, False])


def test_one_view_has_no_pair() -> None:
    errors = relative_pose_errors(cameras((0, 0, 0)), cameras((0, 0, 0)))
    assert errors.rotation_deg.shape == errors.translation_deg.shape == (0,)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3))
def test_against_a_reference_by_pairs_in_any_world_and_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    pred, true = (
        np.concatenate([Rotation.random(3, rng).as_matrix(), rng.normal(size=(3, 3, 1))], axis=2) for _ in range(2)
    )
    errors = relative_pose_errors(pred, true)
    full_pred, full_true = (np.concatenate([e, np.tile([[[0, 0, 0, 1]]], (3, 1, 1))], axis=1) for e in (pred, true))
    for n, (i, j) in enumerate(PAIRS):
        a, b = (full[i] @ np.linalg.inv(full[j]) for full in (full_pred, full_true))
        angle = Rotation.from_matrix(a[:3, :3] @ b[:3, :3].T).magnitude()
        assert errors.rotation_deg[n] == pytest.approx(math.degrees(angle))
        cosine = a[:3, 3] @ b[:3, 3] / np.linalg.norm(a[:3, 3]) / np.linalg.norm(b[:3, 3])
        assert errors.translation_deg[n] == pytest.approx(math.degrees(math.acos(min(abs(cosine), 1))), abs=1e-5)
    world = np.vstack([np.c_[Rotation.random(rng=rng).as_matrix(), rng.normal(size=3)], [0, 0, 0, 1]])
    moved = pred @ world
    moved[:, :, 3] *= scale
    again = relative_pose_errors(moved, true)
    np.testing.assert_allclose(again.rotation_deg, errors.rotation_deg, atol=1e-6)
    np.testing.assert_allclose(again.translation_deg, errors.translation_deg, atol=1e-6)


def test_the_area_is_that_of_a_hand_computation() -> None:
    """0.5 is below each of 30 thresholds, 10.5 below 20 of them (11 to 30), 40 below none."""
    assert auc([0.5, 10.5, 40.0]) == pytest.approx((30 + 20) / 3 / 30)
    assert auc([0.5, 10.5, 40.0], threshold=15) == pytest.approx((15 + 5) / 3 / 15)
    assert auc(np.zeros(5)) == 1
    assert auc([0.99]) == 1, "whole degrees, as in the field"
    assert auc([1.0]) == pytest.approx(29 / 30)
    assert auc([30.0]) == pytest.approx(1 / 30), "the last bin holds its upper end"
    assert auc([30.01, 180.0]) == 0


@settings(max_examples=30, deadline=None)
@given(errors=st.lists(st.floats(0, 180), min_size=1, max_size=20), threshold=st.integers(1, 60))
def test_the_area_against_a_count_per_threshold(errors: list[float], threshold: int) -> None:
    shares = [
        sum(error < x or error == x == threshold for error in errors) / len(errors) for x in range(1, threshold + 1)
    ]
    assert auc(errors, threshold) == pytest.approx(sum(shares) / threshold)


@pytest.mark.parametrize("errors", [[], [1.0, np.nan], [-1.0], [[1.0]]])
def test_errors_that_cannot_be_averaged_are_refused(errors: list[float]) -> None:
    with pytest.raises(
        InputError, match=r"pose errors of shape .* cannot be averaged; pass \(N,\) degrees of one pair"
    ):
        auc(errors)


@pytest.mark.parametrize("threshold", [0, -3, 2.5])
def test_a_threshold_that_is_no_number_of_degrees_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=f"the threshold of the AUC is {threshold}; pass whole degrees, 1 or more"):
        auc([1.0], threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (
            cameras((0, 0, 0)),
            "predicted extrinsics (1, 3, 4) and true extrinsics (2, 3, 4) differ; pass the same views",
        ),
        (np.eye(4)[None], "predicted extrinsics have shape (1, 4, 4); pass (S, 3, 4), camera from world"),
        (
            np.full((2, 3, 4), np.nan),
            "predicted extrinsics hold 24 values that are NaN or infinite of 24; pass finite numbers",
        ),
        (
            cameras((0, 0, 0), (1, 0, 0)) * [[[1], [1], [-1]]],
            "predicted extrinsics of view 0 hold no rotation; pass [R | t] with R R^T = 1 and det R = 1",
        ),
        (
            cameras((0, 0, 0), (1, 0, 0)) * [[[1]], [[1.1]]],
            "predicted extrinsics of view 1 hold no rotation; pass [R | t] with R R^T = 1 and det R = 1",
        ),
    ],
)
def test_cameras_that_cannot_be_compared_are_told_in_one_line(pred: np.ndarray, message: str) -> None:
    with pytest.raises(InputError) as error:
        relative_pose_errors(pred, cameras((0, 0, 0), (1, 0, 0)))
    assert str(error.value) == message
