"""Ground truth in the model's terms: the scale and the encoding by hand, and what they must not depend on."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import cameras_to_pose_encoding
from moe3d_deploy.training.targets import Targets, normalised_targets, pose_encoding

HEIGHT, WIDTH = 4, 6


def scenes(batch: int = 2, views: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Depths, extrinsics and intrinsics in float64, all views of a scene turned and moved at random."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(1, 5, (batch, views, HEIGHT, WIDTH))
    turned = Rotation.random(batch * views, random_state=seed).as_matrix().reshape(batch, views, 3, 3)
    extrinsics = np.concatenate([turned, rng.normal(size=(batch, views, 3, 1))], axis=-1)
    focal = rng.uniform(3, 9, (batch, views))
    intrinsics = np.zeros((batch, views, 3, 3))
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = WIDTH / 2, HEIGHT / 2, 1
    return torch.from_numpy(depth), torch.from_numpy(extrinsics), torch.from_numpy(intrinsics)


def assert_same(actual: Targets, expected: Targets, tolerance: float) -> None:
    for name in ("depth", "valid", "pose_enc", "scale"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


def test_scale_is_the_mean_distance_of_the_points_to_the_first_camera() -> None:
    """Two views of 1x2 pixels, focal length 2, principal point (1, 0.5); the second camera stands at (3, 0, 0).

    First view: pixel 0 at depth 2 is (-1, -0.5, 2), pixel 1 at depth 4 is (0, -1, 4).
    Second view, depth 2 at both: (-1, -0.5, 2) and (0, -0.5, 2), moved by 3: (2, -0.5, 2), (3, -0.5, 2).
    """
    depth = torch.tensor([[[[2.0, 4.0]], [[2.0, 2.0]]]], dtype=torch.float64)
    extrinsics = torch.eye(3, 4, dtype=torch.float64).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = -3
    intrinsics = torch.tensor([[2.0, 0, 1], [0, 2, 0.5], [0, 0, 1]], dtype=torch.float64).repeat(1, 2, 1, 1)
    scale = (math.sqrt(5.25) + math.sqrt(17) + math.sqrt(8.25) + math.sqrt(13.25)) / 4

    targets = normalised_targets(depth, extrinsics, intrinsics)

    fov_h, fov_w = 2 * math.atan(0.5 / 2), 2 * math.atan(1 / 2)
    assert targets.scale.item() == pytest.approx(scale, rel=1e-14)
    torch.testing.assert_close(targets.depth, depth / scale)
    expected = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, fov_h, fov_w], [-3 / scale, 0, 0, 0, 0, 0, 1, fov_h, fov_w]]])
    torch.testing.assert_close(targets.pose_enc, expected.double(), rtol=0, atol=1e-7)


def test_pose_encoding_equals_that_of_the_geometry_module() -> None:
    """Every one of the four ways to a quaternion, half turns included, where its scalar part is 0."""
    rotations = [Rotation.random(200, random_state=0).as_matrix()]
    rotations.append(np.stack([np.diag(d) for d in ([1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1])]))
    rotation = np.concatenate(rotations)
    rng = np.random.default_rng(1)
    extrinsics = np.concatenate([rotation, rng.normal(size=(len(rotation), 3, 1))], axis=-1)
    intrinsics = np.tile(np.diag([120.0, 90.0, 1.0]), (len(rotation), 1, 1))

    actual = pose_encoding(torch.from_numpy(extrinsics), torch.from_numpy(intrinsics), 70, 98)

    expected = cameras_to_pose_encoding(extrinsics, intrinsics, 70, 98)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)
    assert (actual[:, 6] >= 0).all()


def test_poses_are_those_relative_to_the_first_camera() -> None:
    depth, extrinsics, intrinsics = scenes()
    whole = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1, 1)
    whole[..., :3, :] = extrinsics
    relative = whole @ whole[:, :1].inverse()

    targets = normalised_targets(depth, extrinsics, intrinsics)

    expected = relative[..., :3, :].clone()
    expected[..., 3] /= targets.scale[:, None, None]
    reference = cameras_to_pose_encoding(expected.numpy(), intrinsics.numpy(), HEIGHT, WIDTH)
    np.testing.assert_allclose(targets.pose_enc, reference, rtol=0, atol=1e-12)


def test_targets_do_not_depend_on_the_unit_of_length() -> None:
    depth, extrinsics, intrinsics = scenes()
    larger = extrinsics.clone()
    larger[..., 3] *= 7.5

    targets = normalised_targets(depth, extrinsics, intrinsics)
    scaled = normalised_targets(7.5 * depth, larger, intrinsics)

    assert_same(scaled._replace(scale=scaled.scale / 7.5), targets, 1e-12)


def test_targets_do_not_depend_on_the_world_frame() -> None:
    """Even with a float32 depth and a world origin a million units away."""
    depth, extrinsics, intrinsics = scenes()
    world = torch.eye(4, dtype=torch.float64)
    world[:3, :3] = torch.from_numpy(Rotation.random(random_state=5).as_matrix())
    world[:3, 3] = torch.tensor([1e6, -2e6, 3e6])
    moved = extrinsics @ world

    targets = normalised_targets(depth.float(), extrinsics, intrinsics.float())
    elsewhere = normalised_targets(depth.float(), moved, intrinsics.float())

    assert targets.depth.dtype == targets.pose_enc.dtype == targets.scale.dtype == torch.float32
    assert_same(elsewhere, targets, 1e-6)


def test_scenes_of_a_batch_do_not_influence_each_other() -> None:
    depth, extrinsics, intrinsics = scenes()

    targets = normalised_targets(depth, extrinsics, intrinsics)

    alone = normalised_targets(depth[1:], extrinsics[1:], intrinsics[1:])
    assert_same(Targets(*(x[1:] for x in targets)), alone, 1e-14)


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf, -math.inf])
def test_unknown_depth_is_invalid_and_counts_for_nothing(value: float) -> None:
    """A pixel without truth next to one at depth 3 on the axis: the scale is 3."""
    depth = torch.tensor([[[[value, 3.0]]]])
    intrinsics = torch.tensor([[2.0, 0, 1], [0, 2, 0], [0, 0, 1]]).repeat(1, 1, 1, 1)

    targets = normalised_targets(depth, torch.eye(3, 4).repeat(1, 1, 1, 1), intrinsics)

    assert targets.valid.tolist() == [[[[False, True]]]]
    assert targets.depth.tolist() == [[[[0.0, 1.0]]]]
    assert targets.scale.tolist() == [3.0]


def test_the_place_of_a_camera_does_not_stand_in_for_its_unknown_depth() -> None:
    """The second camera, at (5, 0, 0), sees one pixel of two, at depth 12 on its axis: a distance of 13, not of 5."""
    depth = torch.tensor([[[[0.0, 0.0]], [[0.0, 12.0]]]])
    extrinsics = torch.eye(3, 4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = -5
    intrinsics = torch.tensor([[2.0, 0, 1], [0, 2, 0], [0, 0, 1]]).repeat(1, 2, 1, 1)

    assert normalised_targets(depth, extrinsics, intrinsics).scale.item() == pytest.approx(13, rel=1e-6)


def test_a_scene_without_truth_is_refused_by_its_index() -> None:
    depth, extrinsics, intrinsics = scenes()
    depth[1] = math.nan
    message = r"scene 1 of the batch has no pixel with a valid depth \(finite and positive\); leave this scene out$"
    with pytest.raises(InputError, match=message):
        normalised_targets(depth, extrinsics, intrinsics)


def test_a_camera_that_is_not_finite_is_refused_by_its_scene() -> None:
    depth, extrinsics, intrinsics = scenes()
    extrinsics[1, 2, 0, 3] = math.inf
    with pytest.raises(InputError, match="scene 1 of the batch has a scale of .*not finite; leave this scene out$"):
        normalised_targets(depth, extrinsics, intrinsics)


def test_the_ground_truth_that_came_in_is_left_as_it_was() -> None:
    depth, extrinsics, intrinsics = scenes()
    depth[0, 0, 0, 0] = math.nan
    before = [x.clone() for x in (depth, extrinsics, intrinsics)]

    normalised_targets(depth, extrinsics, intrinsics)

    for now, then in zip((depth, extrinsics, intrinsics), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
