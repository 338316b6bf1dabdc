"""Point clouds: known motions are recovered, known distances reported."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics import Similarity, cloud_errors, icp, normals_from_points, umeyama

MOTION = Similarity(
    2.5, Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix(), np.array([1.0, -2.0, 30.0])
)


def corner(count: int = 400, seed: int = 0) -> np.ndarray:
    """Points on three walls that meet: their motion can be found without pairs."""
    rng = np.random.default_rng(seed)
    points = rng.random((count, 3))
    points[np.arange(count), np.arange(count) % 3] = 0
    return points


def small(angle_deg: float = 3.0, shift: float = 0.02) -> Similarity:
    rotation = Rotation.from_rotvec(np.radians(angle_deg) * np.array([0.6, 0.0, 0.8])).as_matrix()
    return Similarity(1.0, rotation, np.array([shift, -shift, shift / 2]))


# ---- Umeyama


def test_a_turned_and_scaled_cloud_is_brought_back() -> None:
    points = corner()
    found = umeyama(points, MOTION.apply(points))
    assert found.scale == pytest.approx(2.5)
    np.testing.assert_allclose(found.rotation, MOTION.rotation, atol=1e-12)
    np.testing.assert_allclose(found.translation, MOTION.translation, atol=1e-12)
    np.testing.assert_allclose(found.apply(points), MOTION.apply(points), atol=1e-12)


def test_points_of_one_plane_are_enough() -> None:
    points = corner() * [1, 1, 0]
    np.testing.assert_allclose(umeyama(points, MOTION.apply(points)).rotation, MOTION.rotation, atol=1e-12)
    np.testing.assert_allclose(umeyama(points[[0, 1, 2]], points[[0, 1, 2]]).rotation, np.eye(3), atol=1e-12)


def test_a_mirrored_cloud_is_met_by_a_rotation() -> None:
    """Its spread is least along x, so mirroring x is best met by leaving it wrong: with the identity."""
    points = np.random.default_rng(1).normal(size=(500, 3)) * [0.1, 1, 2]
    found = umeyama(points, points * [-1, 1, 1])
    assert np.linalg.det(found.rotation) == pytest.approx(1)
    np.testing.assert_allclose(found.rotation, np.eye(3), atol=0.02)
    assert found.scale < 1


def test_without_scale_the_motion_is_rigid() -> None:
    points = corner()
    found = umeyama(points, MOTION.apply(points), with_scale=False)
    assert found.scale == 1
    np.testing.assert_allclose(found.rotation, MOTION.rotation, atol=1e-12)
    np.testing.assert_allclose(found.apply(points).mean(axis=0), MOTION.apply(points).mean(axis=0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), with_scale=st.booleans())
def test_against_scipys_rotation_and_a_line_search_of_the_scale(seed: int, with_scale: bool) -> None:
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(2, 8, 3))
    found = umeyama(source, target, with_scale=with_scale)
    x, y = source - source.mean(axis=0), target - target.mean(axis=0)
    rotation, _ = Rotation.align_vectors(y, x)
    np.testing.assert_allclose(found.rotation, rotation.as_matrix(), atol=1e-7)
    turned = rotation.apply(x)
    scale = np.linalg.lstsq(turned.reshape(-1, 1), y.ravel(), rcond=None)[0][0] if with_scale else 1
    assert found.scale == pytest.approx(scale)
    np.testing.assert_allclose(found.apply(source).mean(axis=0), target.mean(axis=0), atol=1e-9)


def test_one_motion_after_another_is_their_chain() -> None:
    points = corner()
    np.testing.assert_allclose(small().then(MOTION).apply(points), MOTION.apply(small().apply(points)))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.ones((3, 2)), np.ones((3, 3)), "source points have shape (3, 2); pass (N, 3) with one point or more"),
        (np.ones((0, 3)), np.ones((0, 3)), "source points have shape (0, 3); pass (N, 3) with one point or more"),
        (
            np.ones((3, 3)),
            np.full((3, 3), np.inf),
            "target points hold 9 values that are NaN or infinite of 9; pass finite numbers",
        ),
        (
            np.ones((4, 3)),
            np.ones((5, 3)),
            "source points (4, 3) and target points (5, 3) differ; pass pairs, (N, 3) each",
        ),
        (
            np.outer(np.arange(5.0), [1, 2, 3]),
            corner(5),
            "5 pairs of points lie on a line or in one place, or do not vary together; pass points of a surface",
        ),
        (
            corner(6),
            np.ones((6, 3)),
            "6 pairs of points lie on a line or in one place, or do not vary together; pass points of a surface",
        ),
    ],
)
def test_clouds_without_a_motion_are_told_in_one_line(source: np.ndarray, target: np.ndarray, message: str) -> None:
    with pytest.raises(InputError) as error:
        umeyama(source, target)
    assert str(error.value) == message


# ---- ICP


def test_icp_recovers_a_small_motion_without_pairs() -> None:
    points = corner()
    shuffled = np.random.default_rng(2).permutation(small().apply(points))
    result = icp(points, shuffled, tolerance=1e-6)
    assert result.converged
    assert result.error < 1e-9
    np.testing.assert_allclose(result.alignment.apply(points), small().apply(points), atol=1e-9)


def test_icp_starts_from_what_is_known() -> None:
    points = corner()
    target = small().then(MOTION).apply(points)
    result = icp(points, target, initial=MOTION)
    np.testing.assert_allclose(result.alignment.apply(points), target, atol=1e-9)
    assert result.alignment.scale == pytest.approx(2.5), "a rigid motion after the initial similarity"


def test_icp_finds_a_scale_only_when_asked() -> None:
    points = corner()
    target = 1.03 * points
    assert icp(points, target).alignment.scale == 1
    result = icp(points, target, with_scale=True, tolerance=1e-6, max_iterations=100)
    assert result.alignment.scale == pytest.approx(1.03)


def test_points_that_the_target_lacks_do_not_pull() -> None:
    points = corner()
    ghosts = np.random.default_rng(4).random((40, 3)) + [2, 2, 2]
    source = np.concatenate([points, ghosts])
    trimmed = icp(source, small().apply(points), trim=0.9, tolerance=1e-6)
    np.testing.assert_allclose(trimmed.alignment.apply(points), small().apply(points), atol=1e-9)
    pulled = icp(source, small().apply(points), trim=1.0, tolerance=1e-6)
    assert np.abs(pulled.alignment.apply(points) - small().apply(points)).max() > 0.05


def test_an_aligned_cloud_stays() -> None:
    result = icp(corner(), corner())
    assert result[1:] == (0, 0, True)
    np.testing.assert_array_equal(result.alignment.rotation, np.eye(3))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), trim=st.floats(0.2, 1))
def test_icp_never_ends_worse_than_it_began(seed: int, trim: float) -> None:
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(60, 3)), rng.normal(size=(50, 3))

    def error(moved: np.ndarray) -> float:
        distance = np.sort(np.linalg.norm(moved[:, None] - target, axis=2).min(axis=1))
        return float(np.sqrt(np.mean(distance[: max(int(np.ceil(trim * 60)), 1)] ** 2)))

    result = icp(source, target, trim=trim)
    assert result.error == pytest.approx(error(result.alignment.apply(source)))
    assert result.error <= error(source) + 1e-12


def test_icp_that_runs_out_of_iterations_says_so() -> None:
    points = corner()
    result = icp(points, small(8, 0.1).apply(points), max_iterations=1)
    assert (result.iterations, result.converged) == (1, False)


def test_a_cloud_whose_pairs_determine_no_rotation_is_returned_unconverged() -> None:
    """Far off to one side, the nearest point is the same for all."""
    target = corner(seed=5)
    target[0] = [50, 50, 50]
    result = icp(corner() + 100, target)
    assert not result.converged
    np.testing.assert_array_equal(result.alignment.translation, [0, 0, 0])


def test_a_part_of_the_source_finds_the_same_motion() -> None:
    """Some tenth of the source, spread over all three walls, still finds its places in the whole target."""
    points = corner(3000)
    result = icp(points, small(1, 0.005).apply(points), max_points=300)
    assert result.error < 1e-9
    np.testing.assert_allclose(result.alignment.apply(points), small(1, 0.005).apply(points), atol=1e-9)
    other = corner(200, seed=7)
    assert icp(points, other, max_points=300).error != icp(points, other).error
    assert icp(points, other, max_points=3000).error == icp(points, other).error


@pytest.mark.parametrize("parameters", [{"trim": 0.0}, {"trim": 1.1}, {"max_iterations": 0}, {"tolerance": -1.0}])
def test_icp_refuses_parameters_out_of_range(parameters: dict[str, float]) -> None:
    with pytest.raises(
        InputError, match=r"^ICP with trim .*; pass a share in \(0, 1\], 1 or more, 0 or more, 3 or more$"
    ):
        icp(corner(), corner(), **parameters)  # type: ignore[arg-type]


# ---- accuracy, completeness, normal consistency


def plane(height: float, columns: int = 5, normal: tuple[float, ...] = (0, 0, 1)) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.meshgrid(np.arange(columns), np.arange(5), indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), np.full(x.size, height)], axis=1).astype(float)
    return points, np.tile(np.array(normal, float), (len(points), 1))


def test_a_plane_above_a_plane_is_as_far_as_it_lies_above() -> None:
    errors = cloud_errors(plane(0.2)[0], plane(0.0)[0], plane(0.2)[1], -plane(0.0)[1])
    assert errors == pytest.approx((0.2, 0.2, 0.2, 0.2, 1, 1))


def test_a_missing_part_is_incomplete_but_accurate() -> None:
    """Columns 0 to 2 of five: the others lie 1 and 2 away from it; a mean of 3 / 5, a median of 0."""
    errors = cloud_errors(plane(0.0, columns=3)[0], plane(0.0)[0])
    assert errors[:4] == pytest.approx((0, 0, 0.6, 0))
    errors = cloud_errors(plane(0.0)[0], plane(0.0, columns=3)[0])
    assert errors[:4] == pytest.approx((0.6, 0, 0, 0)), "and what is too much is inaccurate but complete"
    assert np.isnan(errors.normal_consistency_mean)


def test_normals_at_sixty_degrees_agree_by_half() -> None:
    tilted = plane(0.0, normal=(np.sin(np.pi / 3), 0, np.cos(np.pi / 3)))
    errors = cloud_errors(plane(0.0)[0], tilted[0], plane(0.0)[1], tilted[1])
    assert errors[4:] == pytest.approx((0.5, 0.5))


def test_unknown_normals_are_left_out() -> None:
    points, normals = plane(0.0)
    some = normals.copy()
    some[::2] = 0
    wrong = normals.copy()
    wrong[::2] = [1, 0, 0]
    assert cloud_errors(points, points, wrong, some)[4:] == pytest.approx((1, 1)), "the wrong ones meet unknown ones"
    assert np.isnan(cloud_errors(points, points, normals, 0 * normals)[4:]).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_against_all_distances(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pred, true = rng.normal(size=(rng.integers(1, 30), 3)), rng.normal(size=(rng.integers(1, 30), 3))
    a, b = (n / np.linalg.norm(n, axis=1, keepdims=True) for n in (rng.normal(size=p.shape) for p in (pred, true)))
    distance = np.linalg.norm(pred[:, None] - true, axis=2)
    cosine = np.abs(a @ b.T)
    rows, columns = distance.argmin(axis=1), distance.argmin(axis=0)
    to_true, to_pred = cosine[np.arange(len(pred)), rows], cosine[columns, np.arange(len(true))]
    expected = (
        distance.min(axis=1).mean(),
        np.median(distance.min(axis=1)),
        distance.min(axis=0).mean(),
        np.median(distance.min(axis=0)),
        (to_true.mean() + to_pred.mean()) / 2,
        (np.median(to_true) + np.median(to_pred)) / 2,
    )
    assert cloud_errors(pred, true, a, b) == pytest.approx(expected)


def test_bad_normals_are_told_in_one_line() -> None:
    points, normals = plane(0.0)
    with pytest.raises(InputError) as error:
        cloud_errors(points, points, normals)
    assert str(error.value) == "normals of one cloud only; pass those of the prediction and of the truth, or none"
    for bad in (2 * normals, normals[:3], normals * np.nan):
        with pytest.raises(
            InputError, match=r"true normals have shape .* lengths other than 1 and 0; pass \(25, 3\) unit"
        ):
            cloud_errors(points, points, normals, bad)


# ---- normals


def grid(depth: np.ndarray) -> np.ndarray:
    """Points of a depth map under f = 20, principal point in the middle."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width]
    return np.stack([(u - width / 2) / 20 * depth, (v - height / 2) / 20 * depth, depth], axis=-1)


def test_a_tilted_plane_has_one_normal_towards_the_camera() -> None:
    """n . X = -3 with n = (0.6, 0, -0.8): depth = -3 / (n . ray)."""
    normal = np.array([0.6, 0.0, -0.8])
    rays = grid(np.ones((6, 8)))
    normals = normals_from_points(grid(-3 / (rays @ normal)))
    np.testing.assert_allclose(normals, np.broadcast_to(normal, (6, 8, 3)), atol=1e-9)


def test_normals_beside_a_step_are_those_of_their_own_surface() -> None:
    depth = np.full((6, 8), 4.0)
    depth[2:, 3:6] = 2
    np.testing.assert_allclose(normals_from_points(grid(depth)), np.broadcast_to([0, 0, -1], (6, 8, 3)), atol=1e-9)


def test_pixels_without_neighbours_have_no_normal() -> None:
    valid = np.zeros((5, 5), bool)
    valid[0, :3] = True  # a row alone
    valid[3:, 3:] = True  # two by two
    points = grid(np.ones((5, 5)))
    points[~valid] = np.nan
    normals = normals_from_points(points, valid)
    np.testing.assert_allclose(normals[3:, 3:], np.broadcast_to([0, 0, -1], (2, 2, 3)), atol=1e-9)
    normals[3:, 3:] = 0
    assert not normals.any()
    assert not normals_from_points(grid(np.zeros((3, 3)))).any(), "all points in one place"


def test_normals_of_bad_points_are_refused() -> None:
    for points, valid, message in (
        (np.ones((4, 3)), None, r"points have shape \(4, 3\); pass \(..., H, W, 3\), the points of a depth map"),
        (np.full((2, 2, 3), np.nan), None, "points are NaN or infinite at valid pixels; .*"),
        (np.ones((2, 2, 3)), np.ones((2, 3), bool), r"valid is bool \(2, 3\); pass bool \(2, 2\)"),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            normals_from_points(points, valid)
