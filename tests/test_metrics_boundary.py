"""Boundary F1 and edge mIoU: steps, shifted steps, blurred steps, and a pixel-by-pixel reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics import boundary_f1, edge_miou
from moe3d_deploy.metrics.boundary import THRESHOLDS, edge_map


def square(near: float = 1.0, far: float = 2.0, left: int = 8) -> np.ndarray:
    """A 10x10 square in front of a wall, in 26x26 pixels: ten edges of each of the four kinds."""
    depth = np.full((26, 26), far)
    depth[8:18, left : left + 10] = near
    return depth


def upright(height: int = 4, width: int = 10) -> np.ndarray:
    """One step along the rows, from 1 to 3: edges of a single kind, one in each row."""
    return np.where(np.arange(width) < width // 2, 1.0, 3.0)[None].repeat(height, axis=0)


def blurred(depth: np.ndarray, times: int) -> np.ndarray:
    """Along rows and columns with (1, 2, 1) / 4, `times` times; the border is repeated."""
    for _ in range(times):
        for axis in (0, 1):
            padded = np.pad(depth, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
            parts = [np.take(padded, range(i, i + depth.shape[axis]), axis) for i in range(3)]
            depth = (parts[0] + 2 * parts[1] + parts[2]) / 4
    return depth


def reference(pred: np.ndarray, true: np.ndarray, valid: np.ndarray) -> tuple[float, float, float]:
    """The definition, pair by pair."""
    height, width = pred.shape
    sums, weights = np.zeros(3), 0.0
    for t in np.linspace(1.05, 1.25, 10):
        counts = []
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            both = ours = theirs = 0
            for y in range(height):
                for x in range(width):
                    if not (0 <= y + dy < height and 0 <= x + dx < width) or not (
                        valid[y, x] and valid[y + dy, x + dx]
                    ):
                        continue
                    a, b = (d[y + dy, x + dx] / d[y, x] > t for d in (pred, true))
                    both, ours, theirs = both + (a and b), ours + a, theirs + b
            counts.append((both, ours, theirs))
        judged = [kind for kind in counts if kind[2]]
        if judged:
            stray = sum(ours for _, ours, theirs in counts if not theirs) / len(judged)
            p = np.mean([both / (ours + stray) if ours + stray else 0.0 for both, ours, _ in judged])
            r = np.mean([both / theirs for both, _, theirs in judged])
            sums += t * np.array([2 * p * r / (p + r) if p + r else 0, p, r])
            weights += t
    return tuple((sums / weights).tolist()) if weights else (np.nan,) * 3


def published(pred: np.ndarray, true: np.ndarray) -> float:
    """Depth Pro's evaluation, for maps that are valid everywhere: inverse depth, an empty kind of edge scores 0."""
    total = 0.0
    for t in THRESHOLDS:
        precision = recall = 0.0
        for flip in (False, True):
            for axis in (0, 1):
                ours, theirs = (np.flip(1 / d, axis) if flip else 1 / d for d in (pred, true))
                ours, theirs = (np.exp(np.diff(np.log(d), axis=axis)) > t for d in (ours, theirs))
                precision += np.sum(ours & theirs) / max(np.sum(ours), 1) / 4
                recall += np.sum(ours & theirs) / max(np.sum(theirs), 1) / 4
        total += t * (2 * precision * recall / (precision + recall) if precision + recall else 0)
    return total / THRESHOLDS.sum()


@pytest.mark.parametrize("seed", range(5))
def test_maps_full_of_edges_score_as_in_the_public_evaluation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = np.exp(rng.normal(0, 0.2, (40, 50)))
    pred = true * np.exp(rng.normal(0, 0.1, true.shape))
    assert 0.3 < boundary_f1(pred, true).f1 < 0.9
    assert boundary_f1(pred, true).f1 == pytest.approx(published(pred, true))


def test_one_kind_of_edge_is_where_the_public_evaluation_differs() -> None:
    assert published(upright(), upright()) == pytest.approx(0.25)


def test_a_perfect_map_scores_one_at_any_scale_even_with_one_kind_of_edge() -> None:
    assert boundary_f1(square() * 7, square()) == pytest.approx((1, 1, 1))
    assert boundary_f1(upright() / 3, upright()) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(("nearer", "counted"), [(1.06, 1), (10.0, 10)])
def test_one_wrong_pixel_costs_what_one_pixel_is_worth(nearer: float, counted: int) -> None:
    """An upright step of 30 rows has 30 edges of one kind; a pixel off the step has a false edge towards each side.

    At the thresholds below `nearer` (the first of 1.05, 1.0722, ..., or all ten) precision is 30 / 34, recall 1 and
    F1 60 / 64; at the others nothing changes. The kinds that the truth lacks count, but bring no score of their own.
    """
    true = upright(30, 40)
    pred = true.copy()
    pred[10, 30] /= nearer
    share = THRESHOLDS[:counted].sum() / THRESHOLDS.sum()
    score = boundary_f1(pred, true)
    assert score.f1 == pytest.approx(1 - share * 4 / 64)
    assert score.precision == pytest.approx(1 - share * 4 / 34)
    assert score.recall == pytest.approx(1)


def test_a_kind_of_edge_is_judged_because_the_truth_has_it() -> None:
    """A box that a flat wall in the prediction hides above: three kinds found, the fourth predicted nowhere."""
    pred = square()
    pred[:8, 8:18] = 1  # the box goes up to the rim of the picture
    # recall: left, right and lower sides; precision of left and right: 10 of 18
    expected = np.array([(1 + 10 / 18 + 10 / 18) / 4, 3 / 4])
    score = boundary_f1(pred, square())
    assert (score.precision, score.recall) == pytest.approx(tuple(expected))


def test_false_edges_of_kinds_that_the_truth_lacks_are_shared_by_those_it_has() -> None:
    """A beam from rim to rim, 5 edges above it and 5 below; the prediction has 3 of each, and 10 at either side."""
    true = np.full((26, 26), 2.0)[:, :5]
    true[8:18] = 1
    pred = true.copy()
    pred[8:18, 0] = pred[8:18, 4] = 2
    # upper and lower: 3 of the true 5, predicted 3 and half of the 20 at the sides
    assert boundary_f1(pred, true)[1:] == pytest.approx((3 / 13, 3 / 5))


def test_a_shifted_edge_is_no_edge_in_its_place() -> None:
    """A step moved by one pixel: no pair of it agrees, there is no tolerance in position."""
    step = upright()
    assert boundary_f1(np.roll(step, 1, axis=1)[:, 1:], step[:, 1:]) == (0, 0, 0)


def test_a_shifted_square_keeps_the_edges_along_the_shift() -> None:
    """By one pixel to the right, of the ten upper (and lower) pairs nine agree, of the left and right ones none."""
    expected = (0.9 + 0.9 + 0 + 0) / 4
    assert boundary_f1(square(left=9), square()) == pytest.approx((expected,) * 3)


def test_a_ratio_counts_at_the_thresholds_below_it() -> None:
    """The truth's ratio 2 is an edge at all ten; the prediction's 1.15 at the first 5 of 1.05, 1.0722, ..., 1.25."""
    found = THRESHOLDS < 1.15
    assert found.sum() == 5
    expected = THRESHOLDS[found].sum() / THRESHOLDS.sum()
    assert boundary_f1(square(far=1.15), square()) == pytest.approx((expected,) * 3)


def test_a_threshold_at_which_the_truth_has_no_edge_does_not_count() -> None:
    assert boundary_f1(square(far=1.15), square(far=1.15)) == pytest.approx((1, 1, 1))
    assert boundary_f1(square(far=3), square(far=1.15)) == pytest.approx((1, 1, 1))
    assert boundary_f1(np.full((26, 26), 2.0), square(far=1.15)) == (0, 0, 0)


def test_inverted_depth_scores_nothing() -> None:
    """The edges lie in the same places, but foreground and background are swapped."""
    assert boundary_f1(1 / square(), square()).f1 == 0


def test_a_truth_without_edges_leaves_nothing_to_judge_whatever_is_predicted() -> None:
    flat = np.full((26, 26), 3.0)
    assert np.isnan(boundary_f1(np.ones((26, 26)), flat)).all()
    assert np.isnan(boundary_f1(square(), flat)).all()
    assert np.isnan(boundary_f1([[2.0]], [[1.0]])).all()


def test_more_blur_scores_less() -> None:
    """A blurred step is several small ones: false edges appear first, then the true one falls below the thresholds."""
    scores = [boundary_f1(blurred(square(), times), square()).f1 for times in (0, 1, 2, 4, 8)]
    assert scores[0] == pytest.approx(1)
    assert all(a > b + 0.01 for a, b in zip(scores, scores[1:], strict=False))


def test_blur_lowers_the_iou_of_the_edges() -> None:
    """Not step by step: a wider blur has fewer false edges again."""
    assert edge_miou(square(), square()) == 1
    assert all(edge_miou(blurred(square(), times), square()) < 0.7 for times in (1, 2, 4, 8))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3), spread=st.sampled_from([0.02, 0.1, 0.5]))
def test_against_a_pair_by_pair_reference_and_at_any_scale(seed: int, scale: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    pred, true = np.exp(rng.normal(0, spread, (2, 5, 6)))
    valid = rng.random((5, 6)) < 0.8
    valid[0, 0] = True
    expected = reference(pred, true, valid)
    assert boundary_f1(pred, true, valid) == pytest.approx(expected, nan_ok=True)
    assert boundary_f1(scale * pred, np.where(valid, true, 0)) == pytest.approx(expected, nan_ok=True)


def test_pairs_with_an_invalid_end_are_left_out_of_both_maps() -> None:
    """A false edge in the prediction that touches only unknown pixels is not judged."""
    true, pred = square(), square()
    true[0, :5] = 0
    pred[0, :4] = 50
    pred[0, 3] = np.nan
    assert boundary_f1(pred, true) == pytest.approx((1, 1, 1))
    assert edge_miou(pred, true) == 1


def test_the_edge_map_is_the_rim_of_what_is_in_front() -> None:
    rim = np.zeros((26, 26), bool)
    rim[8:18, 8:18] = True
    rim[9:17, 9:17] = False
    valid = np.ones((26, 26), bool)
    np.testing.assert_array_equal(edge_map(square(), valid, 1.1), rim)
    assert not edge_map(square(), valid, 2.0).any(), "a ratio of the threshold itself is none"


def test_edge_miou_is_that_of_a_hand_computation() -> None:
    """The rim of 36 pixels, moved by one to the right: 9 + 9 of rows 8 and 17 stay, no column does.

    Edges: 18 in both, 36 + 36 - 18 = 54 in either. Others: 676 - 54 in both, 676 - 18 in either.
    """
    assert edge_miou(square(left=9), square()) == pytest.approx((18 / 54 + 622 / 658) / 2)


def test_edge_miou_counts_valid_pixels_alone() -> None:
    """Without the lower half, rows 13 to 25, the rim is 10 + 4 + 4 of 338; a flat prediction has none of it."""
    valid = np.arange(26)[:, None].repeat(26, axis=1) < 13
    assert edge_miou(np.ones((26, 26)), square(), valid=valid) == pytest.approx((338 - 18) / 338 / 2)


def test_edge_miou_of_a_truth_without_edges_is_that_of_the_other_class() -> None:
    assert edge_miou(np.ones((3, 3)), np.ones((3, 3))) == 1
    assert edge_miou(square(), np.ones((26, 26))) == pytest.approx((676 - 36) / 676)
    assert edge_miou(np.ones((26, 26)), square()) == pytest.approx(((676 - 36) / 676 + 0) / 2)
    assert edge_miou([[1.0, 2.0]], [[1.0, 2.0]], threshold=1.0) == 1


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (
            np.zeros((26, 26)),
            "predicted depth is 0 at the first of 676 unusable pixels .* pass depth along the optical axis",
        ),
        (np.full((26, 26), np.inf), "predicted depth is inf at the first of 676"),
        (
            np.ones((2, 26, 26)),
            r"predicted depth \(2, 26, 26\) and true depth \(26, 26\) do not fit; pass \(H, W\) for both",
        ),
    ],
)
def test_maps_that_cannot_be_judged_are_told_in_one_line(pred: np.ndarray, message: str) -> None:
    for function in (boundary_f1, edge_miou):
        with pytest.raises(InputError, match=message):
            function(pred, square())


def test_scenes_are_judged_view_by_view() -> None:
    with pytest.raises(InputError, match=r"pass \(H, W\) for both"):
        boundary_f1(np.ones((2, 4, 4)), np.ones((2, 4, 4)))


@pytest.mark.parametrize("threshold", [0.9, np.nan, np.inf])
def test_a_threshold_that_is_no_ratio_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="the threshold of edges is .*; pass a ratio of 1 or more, such as 1.1"):
        edge_miou(square(), square(), threshold)
