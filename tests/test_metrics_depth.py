"""Errors and alignments of depth maps, on numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics import align_median, depth_errors

TRUE = np.array([[1.0, 2.0], [4.0, 0.0]])


def test_errors_are_those_of_a_hand_computation() -> None:
    """|1.2 - 1| / 1 = 0.2, |3 - 2| / 2 = |2 - 4| / 4 = 0.5; ratios 1.2, 1.5, 2."""
    errors = depth_errors([[1.2, 3.0], [2.0, 77.0]], TRUE)
    assert errors.abs_rel == pytest.approx(1.2 / 3)
    assert errors.rmse == pytest.approx(math.sqrt((0.04 + 1 + 4) / 3))
    assert errors.delta1 == pytest.approx(1 / 3)


def test_a_ratio_of_exactly_one_and_a_quarter_is_a_miss() -> None:
    assert depth_errors([[5.0]], [[4.0]]).delta1 == 0
    assert depth_errors([[4.0]], [[5.0]]).delta1 == 0
    assert depth_errors([[4.99]], [[4.0]]).delta1 == 1


def test_predictions_of_zero_and_below_miss_delta_and_count_by_their_distance() -> None:
    errors = depth_errors([[0.0, -2.0]], [[1.0, 2.0]])
    assert errors == pytest.approx((1.5, math.sqrt((1 + 16) / 2), 0))


def test_the_median_scale_is_the_ratio_of_the_medians() -> None:
    """Medians 2 and 30; the median of the ratios would be 5 / 2."""
    assert align_median([[30.0, 10.0, 90.0]], [[2.0, 4.0, 1.0]]) == pytest.approx(2 / 30)


def test_one_scale_serves_all_views_of_a_call() -> None:
    true = np.array([np.full((2, 2), 1.0), np.full((2, 2), 2.0)])
    assert align_median(3 * true, true) == pytest.approx(1 / 3)
    assert depth_errors(3 * true * align_median(3 * true, true), true).abs_rel == pytest.approx(0)


def test_the_median_withstands_outliers() -> None:
    true = np.linspace(1, 2, 101)[None]
    pred = true / 2
    pred[0, -1] = 1e6
    assert align_median(pred, true) == pytest.approx(2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3))
def test_against_a_pixel_by_pixel_reference_and_at_any_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.5, 5, (2, 3, 4)) * (rng.random((2, 3, 4)) < 0.8)
    true[0, 0, 0] = 1
    pred = rng.uniform(0.5, 5, true.shape)
    pairs = [(p, t) for p, t in zip(pred.ravel().tolist(), true.ravel().tolist(), strict=True) if t]
    errors = depth_errors(pred, true)
    assert errors.abs_rel == pytest.approx(sum(abs(p - t) / t for p, t in pairs) / len(pairs))
    assert errors.rmse == pytest.approx(math.sqrt(sum((p - t) ** 2 for p, t in pairs) / len(pairs)))
    assert errors.delta1 == pytest.approx(sum(p < 1.25 * t and t < 1.25 * p for p, t in pairs) / len(pairs))
    assert align_median(scale * pred, true) == pytest.approx(align_median(pred, true) / scale)
    aligned = depth_errors(align_median(scale * pred, true) * scale * pred, true)
    assert aligned == pytest.approx(depth_errors(align_median(pred, true) * pred, true))


def test_pixels_without_truth_are_never_looked_at() -> None:
    pred = np.array([[np.nan, 2.0], [np.inf, -1.0]])
    assert depth_errors(pred, [[0.0, 2.0], [0.0, 0.0]]).abs_rel == 0
    valid = np.array([[False, True], [False, False]])
    assert depth_errors(pred, [[np.nan, 2.0], [-3.0, 7.0]], valid).abs_rel == 0


@pytest.mark.parametrize(
    ("pred", "true", "valid", "message"),
    [
        (
            np.ones((2, 3)),
            np.ones((3, 2)),
            None,
            "predicted depth (2, 3) and true depth (3, 2) do not fit; pass (..., H, W) for both",
        ),
        (
            np.ones(3),
            np.ones(3),
            None,
            "predicted depth (3,) and true depth (3,) do not fit; pass (..., H, W) for both",
        ),
        (
            np.ones((2, 2)),
            np.zeros((2, 2)),
            None,
            "none of 4 pixels is valid; pass a map with true depth at one pixel or more",
        ),
        (
            [[1.0, np.nan, np.inf]],
            [[1.0, 1.0, 1.0]],
            None,
            "predicted depth is nan at the first of 2 unusable pixels (3 are valid); "
            "check the prediction, or leave these pixels out of `valid`",
        ),
        (
            [[1.0, 1.0]],
            [[1.0, np.nan]],
            None,
            "true depth is nan at the first of 1 unusable pixels (2 are valid); mark pixels without truth by 0",
        ),
        (
            [[1.0, 1.0]],
            [[1.0, -2.0]],
            None,
            "true depth is -2 at the first of 1 unusable pixels (2 are valid); mark pixels without truth by 0",
        ),
        ([[1.0]], [[1.0]], [[1]], "valid is int64 (1, 1); pass bool (1, 1), the shape of the depth"),
        ([[1.0], [1.0, 2.0]], [[1.0]], None, "predicted depth is no array of real numbers; pass numbers of one shape"),
        ([["far"]], [[1.0]], None, "predicted depth is no array of real numbers; pass numbers of one shape"),
        ([[1j]], [[1.0]], None, "predicted depth is no array of real numbers; pass numbers of one shape"),
    ],
)
def test_maps_that_cannot_be_judged_are_told_in_one_line(pred, true, valid, message) -> None:  # type: ignore[no-untyped-def]
    for function in (depth_errors, align_median):
        with pytest.raises(InputError) as error:
            function(pred, true, valid)
        assert str(error.value) == message


def test_predictions_without_a_scale_are_refused() -> None:
    with pytest.raises(InputError) as error:
        align_median([[-1.0, -2.0, 3.0]], [[1.0, 1.0, 1.0]])
    assert str(error.value) == "the median of the predicted depth is -1; a scale needs one above 0"


def test_lower_precision_is_judged_in_float64() -> None:
    """In float16 the squares of 300 would overflow and the mean of many would be coarse."""
    errors = depth_errors(np.full((64, 64), 600, np.float16), np.full((64, 64), 300, np.int32))
    assert errors == pytest.approx((1, 300, 0))
