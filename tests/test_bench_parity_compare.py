"""The figures of a variant beside the reference, on arrays whose differences are known by hand."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.parity_compare import EXPERTS, boundary_scores, difference, strongest

NAMES = ("depth", "extrinsics")
Outputs = dict[str, NDArray[Any]]


def turned(degrees: float) -> NDArray[np.float64]:
    """About the optical axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def outputs(batch: int = 1, views: int = 2) -> Outputs:
    """A near square before a wall in every view; cameras in a row along x, one apart."""
    depth = np.full((batch, views, 8, 8), 4.0)
    depth[..., 2:6, 2:6] = 2.0
    extrinsics = np.tile(np.eye(3, 4), (batch, views, 1, 1))
    extrinsics[..., 0, 3] = -np.arange(views)
    return {"depth": depth, "extrinsics": extrinsics}


def changed(**arrays: NDArray[Any]) -> Outputs:
    return {**outputs(), **arrays}


def test_a_variant_that_is_the_reference_differs_in_nothing() -> None:
    same = {**outputs(2, 3), EXPERTS: np.zeros((2, 3, 8, 8), np.uint8)}
    truth = outputs(2, 3)["depth"]
    found = difference(same, same, NAMES, truth)
    assert {kind for error in found.errors.values() for kind in (error.max, error.mean, error.p99)} == {0.0}
    zeros = (found.abs_rel, found.scale, found.rotation_deg, found.translation_deg, found.translation_share)
    assert zeros == (0, 0, 0, 0, 0)
    assert (found.boundary_f1, found.truth_f1, found.truth_f1_change, found.experts_agree) == (1, 1, 0, 1)


def test_a_scale_is_told_apart_from_what_is_left_after_it() -> None:
    found = difference(changed(depth=1.25 * outputs()["depth"]), outputs(), NAMES, None)
    assert found.errors["depth"].max == pytest.approx(0.25)
    assert found.abs_rel == pytest.approx(0, abs=1e-15)
    assert found.scale == pytest.approx(0.2)  # 1 / 1.25 - 1


def test_abs_rel_is_the_mean_over_scenes_after_a_scale_of_their_own() -> None:
    """16 of 64 pixels of each view are near; in the second scene they are 10 % too far, its median is the wall's."""
    depth = outputs(2)["depth"]
    depth[0] *= 3
    depth[1, :, 2:6, 2:6] *= 1.1
    found = difference({**outputs(2), "depth": depth}, outputs(2), NAMES, None)
    assert found.abs_rel == pytest.approx((0 + 0.1 * 16 / 64) / 2)


def test_the_largest_turn_of_a_camera_counts_also_that_of_a_single_view() -> None:
    extrinsics = outputs()["extrinsics"].copy()
    extrinsics[0, 1, :, :3] = turned(2)
    found = difference(changed(extrinsics=extrinsics), outputs(), NAMES, None)
    assert found.rotation_deg == pytest.approx(2)
    one = outputs(views=1)
    one["extrinsics"][..., 0, 3] = 1e-6  # rounding, as the first camera is the origin
    alone = one["extrinsics"].copy()
    alone[0, 0, :, :3] = turned(3)
    alone[..., 0, 3] = 2e-6
    found = difference({**one, "extrinsics": alone}, one, NAMES, None)
    assert found.rotation_deg == pytest.approx(3)
    assert (found.translation_deg, found.translation_share) == (None, None)


def test_translations_are_compared_in_direction_and_in_distance() -> None:
    """The second camera is moved from (-1, 0, 0) to (-1, 1, 0): 45 degrees, and 1 beside a length of 1."""
    extrinsics = outputs()["extrinsics"].copy()
    extrinsics[0, 1, 1, 3] = 1
    found = difference(changed(extrinsics=extrinsics), outputs(), NAMES, None)
    assert found.translation_deg == pytest.approx(45)
    assert found.translation_share == pytest.approx(1)
    assert found.rotation_deg == 0


def test_a_boundary_that_is_lost_costs_its_view() -> None:
    """One of two views has no edge any more: F1 0 there and 1 in the other."""
    depth = outputs()["depth"].copy()
    depth[0, 1] = 4
    found = difference(changed(depth=depth), outputs(), NAMES, outputs()["depth"])
    assert found.boundary_f1 == pytest.approx(0.5)
    assert found.truth_f1 == pytest.approx(0.5)
    assert found.truth_f1_change == pytest.approx(0.5)


def test_changes_of_boundaries_do_not_cancel() -> None:
    """The reference lacks the edge of the first view and the variant that of the second: the mean F1 is the same."""
    ours, theirs = outputs()["depth"].copy(), outputs()["depth"].copy()
    ours[0, 1] = theirs[0, 0] = 4
    found = difference(changed(depth=ours), changed(depth=theirs), NAMES, outputs()["depth"])
    assert found.truth_f1 == pytest.approx(0.5)
    assert found.truth_f1_change == pytest.approx(1)
    assert found.boundary_f1 == 0  # of the second view: the reference has no edge in the first


def test_without_a_boundary_or_a_truth_there_is_no_score() -> None:
    flat = changed(depth=np.ones((1, 2, 8, 8)))
    found = difference(flat, flat, NAMES, None)
    assert (found.boundary_f1, found.truth_f1, found.truth_f1_change) == (None, None, None)
    unknown = np.zeros((1, 2, 8, 8))
    assert boundary_scores(flat["depth"], unknown) == [None, None]


def test_values_that_are_not_finite_are_no_figures() -> None:
    depth = outputs()["depth"].copy()
    depth[0, 0, 0, 0] = np.inf
    extrinsics = np.full((1, 2, 3, 4), np.nan)
    found = difference(changed(depth=depth, extrinsics=extrinsics), outputs(), NAMES, outputs()["depth"])
    assert (found.errors["depth"].max, found.errors["extrinsics"].max) == (None, None)
    assert (found.abs_rel, found.scale, found.rotation_deg, found.translation_share) == (None, None, None, None)
    assert found.boundary_f1 == 1  # of the view that can be judged


def test_experts_agree_where_the_same_one_is_strongest() -> None:
    weights = np.zeros((1, 1, 3, 2, 2))
    weights[0, 0, 1] = 1
    ours = strongest(weights)
    assert ours.tolist() == [[[[1, 1], [1, 1]]]]
    weights[0, 0, 2, 0, 0] = 2
    theirs = strongest(weights)
    one = outputs(views=1)
    found = difference({**one, EXPERTS: ours}, {**one, EXPERTS: theirs}, NAMES, None)
    assert found.experts_agree == pytest.approx(0.75)
    assert difference(one, {**one, EXPERTS: theirs}, NAMES, None).experts_agree is None
