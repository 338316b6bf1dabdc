"""NumPy geometry against the golden cameras and points, hand-computed examples and its own inverses."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import (
    cameras_to_pose_encoding,
    invert_extrinsics,
    pose_encoding_to_cameras,
    project,
    unproject,
)

GOLDEN_FILES = sorted((Path(__file__).parent / "data").glob("golden_tiny_*.npz"))
PARITY_LIMIT = 2e-5  # the project's float32 limit; the reference's own noise is 0.5e-6 .. 2.5e-6


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


def quarter_turn_camera():
    """Camera at world (1, 2, 3), turned by 90 degrees about its optical axis: x_cam = Y, y_cam = -X."""
    rotation = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    extrinsics = np.concatenate([rotation, -rotation @ [[1.0], [2.0], [3.0]]], axis=1)
    intrinsics = np.array([[10.0, 0.0, 2.0], [0.0, 20.0, 1.0], [0.0, 0.0, 1.0]])
    return extrinsics, intrinsics


finite = st.floats(-10, 10, allow_subnormal=False)


@st.composite
def pose_encodings(draw):
    """(N, 9) float64 with unit quaternions of non-negative scalar part and fields of view of 6 to 160 degrees."""
    n = draw(st.integers(1, 3))
    translation = draw(arrays(np.float64, (n, 3), elements=finite))
    quaternion = draw(
        arrays(np.float64, (n, 4), elements=st.floats(-1, 1)).filter(
            lambda q: bool((np.linalg.norm(q, axis=-1) > 0.1).all())
        )
    )
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    quaternion = np.where(quaternion[:, 3:] < 0, -quaternion, quaternion)
    fov = draw(arrays(np.float64, (n, 2), elements=st.floats(0.1, 2.8)))
    return np.concatenate([translation, quaternion, fov], axis=-1)


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_unprojection_equals_the_reference(path):
    golden = np.load(path)
    points = unproject(golden["depth"][..., 0], golden["extrinsic"], golden["intrinsic"])
    assert points.dtype == np.float32
    assert points.shape == golden["unprojected_points"].shape
    assert relative_error(points, golden["unprojected_points"]) < PARITY_LIMIT


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_decoded_cameras_equal_the_reference(path):
    golden = np.load(path)
    height, width = golden["images"].shape[-2:]
    extrinsics, intrinsics = pose_encoding_to_cameras(golden["pose_enc_iters"][-1], height, width)
    assert extrinsics.dtype == intrinsics.dtype == np.float32
    assert relative_error(extrinsics, golden["extrinsic"]) < PARITY_LIMIT
    finite = np.isfinite(golden["intrinsic"])
    np.testing.assert_array_equal(np.isfinite(intrinsics), finite)
    assert relative_error(intrinsics[finite], golden["intrinsic"][finite]) < PARITY_LIMIT


def test_all_golden_files_are_here():
    assert len(GOLDEN_FILES) == 3


def test_unprojection_of_a_hand_computed_pixel():
    """Pixel (u, v) = (4, 2) at depth 5: X_cam = ((4-2)/10*5, (2-1)/20*5, 5) = (1, 0.25, 5); the camera axes
    are x_cam = Y, y_cam = -X, so X_world = (-0.25, 1, 5) + (1, 2, 3)."""
    extrinsics, intrinsics = quarter_turn_camera()
    depth = np.zeros((3, 6), np.float32)
    depth[2, 4] = 5
    points = unproject(depth, extrinsics, intrinsics)
    np.testing.assert_allclose(points[2, 4], [0.75, 3, 8], rtol=1e-6)
    np.testing.assert_allclose(points[0, 0], [1, 2, 3], rtol=1e-6)  # depth 0 is the camera's centre


def test_projection_of_a_hand_computed_point():
    extrinsics, intrinsics = quarter_turn_camera()
    uv, depth = project(np.array([0.75, 3.0, 8.0]), extrinsics, intrinsics)
    np.testing.assert_allclose(uv, [4, 2], atol=1e-12)
    assert depth == pytest.approx(5)


def test_skew_moves_u_with_v():
    """K [0.1, 0.2, 1] with f = 10, skew 5 and c = 0 is u = 10*0.1 + 5*0.2 = 2, v = 2."""
    extrinsics = np.eye(3, 4)
    intrinsics = np.array([[10.0, 5.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 1.0]])
    uv, _ = project(np.array([0.1, 0.2, 1.0]), extrinsics, intrinsics)
    np.testing.assert_allclose(uv, [2, 2])
    np.testing.assert_allclose(unproject(np.ones((3, 3)), extrinsics, intrinsics)[2, 2], [0.1, 0.2, 1], rtol=1e-6)


def test_inverse_extrinsics_hold_the_camera_centre():
    inverse = invert_extrinsics(quarter_turn_camera()[0])
    np.testing.assert_allclose(inverse[:, 3], [1, 2, 3])
    np.testing.assert_allclose(inverse[:, :3], [[0, -1, 0], [1, 0, 0], [0, 0, 1]])


def test_decoding_a_hand_computed_pose():
    """A half turn about y, written with length 2, and fields of view of 90 and 2 atan(0.5) degrees."""
    encoding = [1, 2, 3, 0, 2, 0, 0, np.pi / 2, 2 * np.arctan(0.5)]
    extrinsics, intrinsics = pose_encoding_to_cameras(encoding, 20, 40)
    np.testing.assert_allclose(extrinsics, [[-1, 0, 0, 1], [0, 1, 0, 2], [0, 0, -1, 3]], atol=1e-15)
    np.testing.assert_allclose(intrinsics, [[40, 0, 20], [0, 10, 10], [0, 0, 1]])


def test_a_field_of_view_of_zero_is_an_infinite_focal_length_with_parallel_rays():
    encoding = np.array([0, 0, 0, 0, 0, 0, 1, 0, 0], np.float32)
    extrinsics, intrinsics = pose_encoding_to_cameras(encoding, 4, 4)
    assert np.isposinf(intrinsics[[0, 1], [0, 1]]).all()
    points = unproject(np.full((4, 4), 3.0), extrinsics, intrinsics)
    np.testing.assert_array_equal(points, np.broadcast_to(np.float32([0, 0, 3]), (4, 4, 3)))
    np.testing.assert_array_equal(cameras_to_pose_encoding(extrinsics, intrinsics, 4, 4), encoding)


@settings(max_examples=100, deadline=None)
@given(pose_encodings(), st.integers(1, 2000), st.integers(1, 2000))
def test_pose_encoding_survives_the_round_trip(encoding, height, width):
    """In float64. Where the scalar part is next to 0 rounding decides its sign, and so the quaternion's."""
    back = cameras_to_pose_encoding(*pose_encoding_to_cameras(encoding, height, width), height, width)
    assert back.dtype == np.float64
    assert (back[:, 6] >= 0).all()
    flips = np.where((back[:, 3:7] * encoding[:, 3:7]).sum(-1, keepdims=True) < 0, -1, 1)
    assert (np.abs(encoding[flips[:, 0] < 0, 6]) < 1e-6).all()
    back[:, 3:7] *= flips
    np.testing.assert_allclose(back, encoding, atol=1e-12)


@pytest.mark.parametrize("axis", range(3))
def test_half_turns_have_well_conditioned_quaternions(axis):
    """A rotation by pi - 1e-7 about an axis: the scalar part is sin(0.5e-7), the trace formula would lose it."""
    expected = np.zeros(4)
    expected[axis], expected[3] = np.cos(0.5e-7), np.sin(0.5e-7)
    encoding = np.concatenate([np.zeros(3), expected, [1, 1]])
    back = cameras_to_pose_encoding(*pose_encoding_to_cameras(encoding, 9, 9), 9, 9)
    np.testing.assert_allclose(back[3:7], expected, atol=1e-15)


@settings(max_examples=50, deadline=None)
@given(pose_encodings())
def test_inverting_extrinsics_twice_changes_nothing(encoding):
    extrinsics, _ = pose_encoding_to_cameras(encoding, 10, 10)
    np.testing.assert_allclose(invert_extrinsics(invert_extrinsics(extrinsics)), extrinsics, atol=1e-13)


@settings(max_examples=50, deadline=None)
@given(pose_encodings(), st.integers(1, 6), st.integers(1, 6), st.floats(0.5, 100))
def test_projection_undoes_unprojection(encoding, height, width, scale):
    """float32 points of magnitude m err by 6e-8 m; seen at depth d with focal length f that is 6e-8 m f / d pixels."""
    extrinsics, intrinsics = pose_encoding_to_cameras(encoding, height, width)
    shape = (len(encoding), height, width)
    depth = scale * (1 + np.arange(np.prod(shape)).reshape(shape) / np.prod(shape))
    points = unproject(depth, extrinsics, intrinsics)
    uv, seen = project(points, extrinsics, intrinsics)
    v, u = np.mgrid[:height, :width]
    magnitude = np.abs(points).max() + np.abs(encoding[:, :3]).max()
    limit = 1e-6 * magnitude * (1 + np.abs(intrinsics).max() / scale)
    np.testing.assert_allclose(seen, depth, atol=1e-6 * magnitude)
    np.testing.assert_allclose(uv, np.broadcast_to(np.stack([u, v], -1), uv.shape), atol=limit)


def test_one_camera_serves_points_of_any_shape():
    extrinsics, intrinsics = quarter_turn_camera()
    points = np.random.default_rng(0).uniform(1, 5, (2, 3, 4, 3)).astype(np.float32)
    uv, depth = project(points, np.float32(extrinsics), np.float32(intrinsics))
    assert uv.shape == (2, 3, 4, 2)
    assert depth.shape == (2, 3, 4)
    assert uv.dtype == depth.dtype == np.float32
    one, _ = project(points[1, 2, 3], np.float32(extrinsics), np.float32(intrinsics))
    np.testing.assert_allclose(uv[1, 2, 3], one)


def test_points_without_entries_stay_empty():
    uv, depth = project(np.empty((0, 5, 3)), np.empty((0, 3, 4)), np.empty((0, 3, 3)))
    assert uv.shape == (0, 5, 2)
    assert depth.shape == (0, 5)


def test_points_behind_the_camera_have_negative_depth():
    _, depth = project(np.array([1.0, 2.0, 0.0]), *quarter_turn_camera())
    assert depth == pytest.approx(-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, k: unproject(np.ones(4), e, k), r"depth has shape \(4,\); pass \(\.\.\., H, W\)"),
        (lambda e, k: unproject(np.ones((2, 4, 4, 1)), e[None], k[None]), "depth .* do not match"),
        (lambda e, k: unproject(np.ones((4, 4)), e[None], k), "do not fit extrinsics"),
        (lambda e, k: unproject(np.ones((4, 4)), np.eye(4), k), "extrinsics have shape .* camera from world"),
        (lambda e, k: unproject(np.ones((4, 4)), e, k * 0), "focal length of 0"),
        (lambda e, k: project(np.ones((4, 2)), e, k), r"points \(4, 2\)"),
        (lambda e, k: project(np.ones((5, 3)), np.stack([e] * 2), np.stack([k] * 2)), "points .* do not match"),
        (lambda e, k: pose_encoding_to_cameras(np.ones(7), 4, 4), r"pose encoding has shape \(7,\)"),
        (lambda e, k: cameras_to_pose_encoding(e, np.eye(2), 4, 4), "intrinsics .* do not fit"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(*quarter_turn_camera())


def test_one_point_per_camera_has_no_axis_of_its_own():
    """Two scenes of three cameras, each at the origin with focal length f: (1, 0, 1) is seen f to the right."""
    extrinsics = np.broadcast_to(np.eye(3, 4), (2, 3, 3, 4))
    focal = np.arange(10.0, 16.0).reshape(2, 3)
    intrinsics = np.zeros((2, 3, 3, 3))
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
    intrinsics[..., 2, 2] = 1
    uv, depth = project(np.broadcast_to([1.0, 0.0, 1.0], (2, 3, 3)), extrinsics, intrinsics)
    np.testing.assert_array_equal(uv, np.stack([focal, np.zeros((2, 3))], axis=-1))
    np.testing.assert_array_equal(depth, np.ones((2, 3)))


@pytest.mark.parametrize("wide", range(3))
def test_one_float64_input_makes_the_results_float64(wide):
    arrays = [np.ones((5, 3), np.float32), *(array.astype(np.float32) for array in quarter_turn_camera())]
    assert {result.dtype for result in project(*arrays)} == {np.dtype(np.float32)}
    assert cameras_to_pose_encoding(*arrays[1:], 4, 4).dtype == np.float32
    assert invert_extrinsics(arrays[1]).dtype == np.float32
    arrays[wide] = arrays[wide].astype(np.float64)
    assert {result.dtype for result in project(*arrays)} == {np.dtype(np.float64)}
    assert cameras_to_pose_encoding(*arrays[1:], 4, 4).dtype == (np.float64 if wide else np.float32)


def test_half_precision_input_gives_float32_results():
    encoding = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1], np.float16)
    extrinsics, intrinsics = pose_encoding_to_cameras(encoding, 4, 4)
    assert extrinsics.dtype == intrinsics.dtype == np.float32
    assert invert_extrinsics(extrinsics.astype(np.float16)).dtype == np.float32


def test_float32_input_is_computed_in_float64_and_rounded_once():
    """So equal to the float64 result of the same values, rounded: to the last bit."""
    rng = np.random.default_rng(0)
    encoding = rng.uniform(0.3, 1.5, (50, 9)).astype(np.float32)
    wide = encoding.astype(np.float64)
    cameras, exact = pose_encoding_to_cameras(encoding, 9, 7), pose_encoding_to_cameras(wide, 9, 7)
    _assert_rounded_once(cameras, exact)
    exact = [camera.astype(np.float64) for camera in cameras]
    points = rng.uniform(2, 9, (50, 4, 3)).astype(np.float32)
    _assert_rounded_once(project(points, *cameras), project(points.astype(np.float64), *exact))
    _assert_rounded_once([cameras_to_pose_encoding(*cameras, 9, 7)], [cameras_to_pose_encoding(*exact, 9, 7)])
    _assert_rounded_once([invert_extrinsics(cameras[0])], [invert_extrinsics(exact[0])])
    depth = rng.uniform(1, 9, (50, 3, 4))
    np.testing.assert_array_equal(unproject(depth, *cameras), unproject(depth, *exact))


def _assert_rounded_once(narrow, exact):
    for result, expected in zip(narrow, exact, strict=True):
        np.testing.assert_array_equal(result, expected.astype(np.float32))


def test_whole_numbers_are_as_good_as_floats():
    """1 / 10 of the focal length would be 0 in whole numbers."""
    extrinsics, intrinsics = quarter_turn_camera()
    points = unproject(np.ones((3, 6), int), extrinsics.astype(int), intrinsics.astype(int))
    np.testing.assert_array_equal(points, unproject(np.ones((3, 6)), extrinsics, intrinsics))


@pytest.mark.filterwarnings("error")
def test_degenerate_cameras_and_points_are_no_numpy_warnings():
    """A point in the camera's plane (x / 0) and in its centre (0 / 0), a view of angle 0, a quaternion of length 0."""
    uv, depth = project(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), np.eye(3, 4), np.eye(3))
    np.testing.assert_array_equal(depth, [0, 0])
    assert not np.isfinite(uv).any()
    extrinsics, intrinsics = pose_encoding_to_cameras(np.zeros(9), 4, 4)
    assert np.isnan(extrinsics[:, :3]).all()
    assert np.isposinf(intrinsics[[0, 1], [0, 1]]).all()


@pytest.mark.parametrize("axis", range(3))
def test_an_exact_half_turn_has_the_positive_axis(axis):
    """The scalar part is 0, so both signs are unit quaternions of it; VGGT turns only a negative scalar part round."""
    rotation = -np.eye(3)
    rotation[axis, axis] = 1
    encoding = cameras_to_pose_encoding(np.concatenate([rotation, np.zeros((3, 1))], axis=1), np.eye(3), 4, 4)
    np.testing.assert_array_equal(encoding[3:7], np.eye(4)[axis])


@pytest.mark.parametrize("entry", [(0, 0), (1, 1)])
def test_one_focal_length_of_zero_is_refused_and_of_one_is_not(entry):
    extrinsics, intrinsics = quarter_turn_camera()
    intrinsics[entry] = 1
    assert np.isfinite(unproject(np.ones((2, 2)), extrinsics, intrinsics)).all()
    intrinsics[entry] = 0
    with pytest.raises(InputError) as error:
        unproject(np.ones((2, 2)), extrinsics, intrinsics)
    assert str(error.value) == "intrinsics have a focal length of 0; pass focal lengths in pixels"


def test_cameras_that_do_not_fit_are_told_with_both_shapes():
    extrinsics, intrinsics = quarter_turn_camera()
    with pytest.raises(InputError) as error:
        unproject(np.ones((4, 4)), np.stack([extrinsics] * 2), intrinsics)
    assert str(error.value) == (
        "intrinsics (3, 3) do not fit extrinsics (2, 3, 4); pass (..., 3, 3) and (..., 3, 4) with the same leading axes"
    )
