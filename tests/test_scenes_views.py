"""What the views of a scene have to do with each other, with their cameras, and with the truth beside the pictures."""

import functools

import numpy as np
import pytest
import torch

from moe3d_deploy.geometry import invert_extrinsics, project, unproject
from moe3d_deploy.training.scenes import SPLITS, Scene, SceneOptions, render_scene, viewpoints
from moe3d_deploy.training.scenes.paths import Cameras
from moe3d_deploy.training.scenes.render import occlusion_edges
from moe3d_deploy.training.scenes.solids import rotation
from moe3d_deploy.training.scenes.viewpoints import BASELINE, CLEARANCE, MOST_TURN_DEGREES, NEAR, sees_enough
from moe3d_deploy.training.scenes.world import describe

SEEDS = range(100)  # of small scenes, rendered once for all tests


@functools.cache
def small(seed: int, split: str = "train") -> Scene:
    return render_scene(seed, SceneOptions(42, 56, views=3, split=split))


@functools.cache
def large(seed: int, split: str = "train") -> Scene:
    return render_scene(seed, SceneOptions(84, 112, views=2, split=split))


def cameras(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    return scene.extrinsics.numpy(), scene.intrinsics.numpy()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", range(3))
def test_points_of_one_view_lie_where_the_other_view_sees_them(seed: int, split: str) -> None:
    """Of a plane the inverse depth is linear in pixels, so interpolating it between four is exact.

    A principal point that is off by half a pixel, or a transposed rotation, is seen here.
    """
    scene = large(seed, split)
    extrinsics, intrinsics = cameras(scene)
    depth, surfaces, normals = scene.depth.numpy(), scene.surfaces.numpy(), scene.normals.numpy()
    points = unproject(depth, extrinsics, intrinsics)
    uv, z = project(points[0], extrinsics[1], intrinsics[1])
    u, v = np.floor(uv[..., 0]).astype(int), np.floor(uv[..., 1]).astype(int)
    height, width = depth.shape[1:]
    there = (depth[0] > 0) & (z > 0) & (u >= 0) & (v >= 0) & (u < width - 1) & (v < height - 1)
    u, v, uv, z = u[there], v[there], uv[there], z[there]
    inverse = np.zeros(len(u))
    flat = np.ones(len(u), bool)
    du, dv = uv[:, 0] - u, uv[:, 1] - v
    for y, x, weight in ((0, 0, (1 - dv) * (1 - du)), (0, 1, (1 - dv) * du), (1, 0, dv * (1 - du)), (1, 1, dv * du)):
        flat &= surfaces[1, v + y, x + u] == surfaces[0][there]
        flat &= np.abs(normals[1, v + y, x + u] - normals[0][there]).max(axis=1) < 1e-3
        with np.errstate(divide="ignore"):
            inverse += weight / depth[1, v + y, x + u]
    assert flat.sum() > 1000
    error = np.abs(inverse[flat] * z[flat] - 1)
    assert np.quantile(error, 0.99) < 1e-4
    assert error.max() < 1e-2  # two leaves in one plane, or a gap narrower than a pixel


def test_normals_are_those_of_neighbouring_points() -> None:
    for seed in range(4):
        scene = large(seed)
        points = unproject(scene.depth.numpy(), *cameras(scene)).astype(np.float64)
        across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
        down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
        expected = np.cross(down, across)
        expected /= np.maximum(np.linalg.norm(expected, axis=-1, keepdims=True), 1e-12)
        surfaces, normals = scene.surfaces.numpy(), scene.normals.numpy()
        inner = normals[:, 1:-1, 1:-1]
        flat = scene.depth.numpy()[:, 1:-1, 1:-1] > 0
        for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
            part = np.s_[:, y : y + flat.shape[1], x : x + flat.shape[2]]
            flat &= (surfaces[part] == surfaces[:, 1:-1, 1:-1]) & (np.abs(normals[part] - inner).max(axis=-1) < 1e-3)
        cosine = (expected * inner).sum(axis=-1)[flat]
        assert flat.sum() > 3000
        assert np.quantile(cosine, 0.01) > np.cos(np.deg2rad(1))  # float32 depth, differences of two pixels


def test_normals_have_unit_length_and_face_the_camera() -> None:
    for seed in range(10):
        scene = small(seed)
        extrinsics, intrinsics = cameras(scene)
        centres = invert_extrinsics(extrinsics)[:, :, 3]
        valid, normals = scene.depth.numpy() > 0, scene.normals.numpy()
        towards = centres[:, None, None] - unproject(scene.depth.numpy(), extrinsics, intrinsics)
        assert ((normals * towards).sum(axis=-1)[valid] > -1e-4).all()
        np.testing.assert_allclose(np.linalg.norm(normals[valid], axis=-1), 1, atol=1e-4)
        assert (normals[~valid] == 0).all()


def test_edges_are_the_near_sides_of_jumps_between_surfaces() -> None:
    """Pixel by pixel, from the contract; sky is farther than everything."""
    seen = 0
    for seed in range(6):
        scene = small(seed)
        views, height, width = scene.depth.shape
        depth = torch.where(scene.depth > 0, scene.depth, torch.inf).tolist()
        surfaces, edges = scene.surfaces.tolist(), scene.edges.tolist()
        for s in range(views):
            for y in range(height):
                for x in range(width):
                    expected = any(
                        depth[s][b][a] > 1.05 * depth[s][y][x] and surfaces[s][b][a] != surfaces[s][y][x]
                        for b, a in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                        if 0 <= b < height and 0 <= a < width
                    )
                    if expected != edges[s][y][x]:  # only where the ratio is 1.05 to the last digit
                        raise AssertionError((seed, s, y, x))
                    seen += expected
    assert seen > 1000


def test_a_step_of_one_surface_or_below_the_ratio_is_no_edge() -> None:
    inverse = torch.tensor([[[1.0, 1.0, 0.96, 0.5, 0.5]]])
    surfaces = torch.tensor([[[1, 1, 2, 2, 3]]], dtype=torch.int32)
    assert not occlusion_edges(inverse, surfaces).any()
    assert occlusion_edges(inverse, torch.tensor([[[1, 1, 1, 2, 2]]])).tolist() == [
        [[False, False, True, False, False]]
    ]


def test_sky_has_no_depth_no_normal_and_no_surface() -> None:
    skies = [scene for scene in map(small, range(40)) if (scene.depth == 0).any()]
    assert len(skies) >= 5
    for scene in skies:
        np.testing.assert_array_equal(scene.depth == 0, scene.surfaces == -1)


@pytest.mark.parametrize("split", SPLITS)
def test_cameras_keep_to_their_limits(split: str) -> None:
    for seed in range(40 if split == "train" else 15):
        scene = small(seed, split)
        extrinsics, intrinsics = cameras(scene)
        rotation = extrinsics[:, :, :3].astype(np.float64)
        np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (3, 1, 1)), atol=1e-6)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)
        assert (intrinsics == intrinsics[0]).all()
        (fx, _, cx), (_, fy, cy), _ = intrinsics[0]
        assert (fx, cx, cy) == (fy, 28, 21)
        assert 45 <= np.rad2deg(2 * np.arctan(28 / fx)) <= 85
        depth = scene.depth.numpy()
        assert depth[depth > 0].min() > NEAR
        assert ((depth > 0).mean(axis=(1, 2)) > 0.6).all()
        turn = np.arccos(np.clip((np.einsum("sij,sij->s", rotation[1:], rotation[:-1]) - 1) / 2, -1, 1))
        assert (np.rad2deg(turn) < MOST_TURN_DEGREES + 0.01).all()
        medians = np.array([np.median(view[view > 0]) for view in depth])
        centres = invert_extrinsics(extrinsics)[:, :, 3]
        step = np.linalg.norm(np.diff(centres, axis=0), axis=1) / ((medians[1:] + medians[:-1]) / 2)
        # The path was chosen by fewer rays, so that the medians differ a little.
        assert ((step > 0.8 * BASELINE[0]) & (step < 1.25 * BASELINE[1])).all()


def test_consecutive_views_overlap() -> None:
    for seed in range(30):
        scene = small(seed)
        extrinsics, intrinsics = cameras(scene)
        depth = scene.depth.numpy()
        points = unproject(depth, extrinsics, intrinsics)
        for a, b in ((0, 1), (1, 2), (2, 1), (1, 0)):
            uv, z = project(points[a], extrinsics[b], intrinsics[b])
            inside = ((uv > -0.5) & (uv < [55.5, 41.5])).all(axis=-1) & (z > 0) & (depth[a] > 0)
            assert inside.sum() > 0.35 * (depth[a] > 0).sum()


def test_cameras_keep_clear_of_every_object() -> None:
    for seed in range(8):
        world = describe(seed, SceneOptions(42, 56, views=8))
        assert world.solids.clearance(world.cameras.position).min() > CLEARANCE


def test_paths_that_stand_still_leap_or_turn_too_far_are_refused() -> None:
    for seed in range(5):
        world = describe(seed, SceneOptions(42, 56, views=2))
        position, axes, tangent = world.cameras.position, world.cameras.axes, world.cameras.tangent
        assert sees_enough(world.solids, world.cameras, 0.75)

        def with_second(place: np.ndarray, turn: np.ndarray) -> bool:
            cameras = Cameras(np.stack([position[0], place]), np.stack([axes[0], turn]), tangent)  # noqa: B023
            return sees_enough(world.solids, cameras, 0.75)  # noqa: B023

        assert not with_second(position[0], axes[0])
        assert not with_second(position[0] + 0.01 * axes[0][0], axes[0])
        assert not with_second(position[0] + 12 * (position[1] - position[0]), axes[0])
        assert not with_second(position[1], rotation(1, np.deg2rad(41)) @ axes[0])


def test_a_path_is_refused_for_its_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    world = describe(0, SceneOptions(42, 56, views=3))
    assert sees_enough(world.solids, world.cameras, 0.75)
    for limits in ((0.0, BASELINE[0]), (BASELINE[1], 9.0)):
        monkeypatch.setattr(viewpoints, "BASELINE", limits)
        assert not sees_enough(world.solids, world.cameras, 0.75)


def test_pictures_are_neither_dark_nor_washed_out() -> None:
    for split, seeds in (("train", SEEDS), ("test-kinds", range(30))):
        images = np.stack([small(seed, split).images.numpy() for seed in seeds]).astype(np.float64)  # (N, S, 3, H, W)
        mean = images.mean(axis=(2, 3, 4)) / 255
        assert mean.min() > 0.22
        assert mean.max() < 0.72
        assert 0.38 < mean.mean() < 0.55
        assert mean.std() > 0.04  # exposures differ
        saturated = (images.min(axis=2) >= 254).mean(axis=(2, 3))
        assert saturated.max() < 0.05
        assert (images.max(axis=2) < 8).mean(axis=(2, 3)).max() < 0.1
        contrast = images.mean(axis=2).std(axis=(2, 3)) / 255
        assert np.quantile(contrast, 0.05) > 0.06


def test_scenes_show_objects_at_many_distances() -> None:
    """No view is one plain surface: several solids, and a spread of depth."""
    for seed in SEEDS:
        scene = small(seed)
        for surfaces, depth in zip(scene.surfaces, scene.depth, strict=True):
            counts = torch.bincount(surfaces[surfaces >= 0].flatten())
            assert (counts > 0).sum() >= 3
            assert counts[1:].sum() > 0.08 * surfaces.numel()
            near, far = torch.quantile(depth[depth > 0], torch.tensor([0.05, 0.95]))
            assert far > 1.25 * near
