"""Point clouds from depth and cameras, and the PLY and GLB files, read back by trimesh and byte by byte."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from moe3d_deploy.errors import InputError
from moe3d_deploy.runtime.point_files import write_glb, write_ply
from moe3d_deploy.runtime.pointcloud import PointCloud, point_cloud

VIEWS, HEIGHT, WIDTH = 2, 4, 5
PIXELS = VIEWS * HEIGHT * WIDTH


def make_scene() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Result, images and masks of two views; the second camera is turned by 90 degrees about y and shifted."""
    rng = np.random.default_rng(0)
    turned = np.array([[0, 0, 1, 0.5], [0, 1, 0, -0.25], [-1, 0, 0, 2]])
    result = {
        "depth": rng.uniform(1, 3, (VIEWS, HEIGHT, WIDTH)).astype(np.float32),
        "depth_conf": 1 + rng.permutation(PIXELS).reshape(VIEWS, HEIGHT, WIDTH).astype(np.float32),
        "extrinsics": np.stack([np.eye(4)[:3], turned]).astype(np.float32),
        "intrinsics": np.tile(np.array([[10, 0, 2], [0, 8, 1.5], [0, 0, 1]], np.float32), (VIEWS, 1, 1)),
    }
    images = rng.uniform(0, 1, (VIEWS, 3, HEIGHT, WIDTH)).astype(np.float32)
    return result, images, np.ones((VIEWS, HEIGHT, WIDTH), bool)


def random_cloud(count: int) -> PointCloud:
    rng = np.random.default_rng(count)
    return PointCloud(
        points=rng.normal(size=(count, 3)).astype(np.float32),
        colors=rng.integers(0, 256, (count, 3), dtype=np.uint8),
        confidence=(1 + rng.random(count)).astype(np.float32),
        pixels=np.arange(count),
    )


def read_points(path: Path) -> Any:
    """The one geometry of a PLY or GLB file, before its node's rotation."""
    (points,) = trimesh.load_scene(path).geometry.values()
    return points


def test_points_are_depth_along_the_rays_in_the_world_frame() -> None:
    result, images, masks = make_scene()
    cloud = point_cloud(result, images, masks, drop_lowest=0)
    assert (cloud.points.dtype, cloud.colors.dtype, cloud.confidence.dtype) == (np.float32, np.uint8, np.float32)
    v, u = 3, 4
    for view in range(VIEWS):
        depth = float(result["depth"][view, v, u])
        in_camera = depth * np.array([(u - 2) / 10, (v - 1.5) / 8, 1])
        rotation, shift = result["extrinsics"][view, :, :3], result["extrinsics"][view, :, 3]
        expected = rotation.T.astype(float) @ (in_camera - shift)
        # A handful of float32 operations on numbers below 8: a few units of 2^-21.
        np.testing.assert_allclose(cloud.points[(view * HEIGHT + v) * WIDTH + u], expected, atol=2e-6)


def test_each_point_has_the_color_and_confidence_of_its_pixel() -> None:
    result, images, masks = make_scene()
    images[:] = 0.5
    images[1, :, 2, 3] = (1, 0, 0)
    cloud = point_cloud(result, images, masks, drop_lowest=0)
    red = (HEIGHT + 2) * WIDTH + 3
    assert cloud.colors[red].tolist() == [255, 0, 0]
    assert (np.delete(cloud.colors, red, axis=0) == 128).all()
    np.testing.assert_array_equal(cloud.confidence, result["depth_conf"].ravel())


def test_invalid_depth_padding_and_broken_numbers_are_left_out() -> None:
    result, images, masks = make_scene()
    bad = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4), (1, 1, 1)]
    for pixel, depth in zip(bad[:4], (np.nan, np.inf, 0, -1), strict=True):
        result["depth"][pixel] = depth
    result["depth_conf"][bad[4]] = np.nan
    masks[bad[5]] = False
    cloud = point_cloud(result, images, masks, drop_lowest=0)
    kept = np.ones((VIEWS, HEIGHT, WIDTH), bool)
    kept[tuple(zip(*bad, strict=True))] = False
    np.testing.assert_array_equal(cloud.confidence, result["depth_conf"][kept])


def test_a_camera_that_is_not_finite_loses_its_view_only() -> None:
    result, images, masks = make_scene()
    result["extrinsics"][1, 0, 3] = np.nan
    cloud = point_cloud(result, images, masks, drop_lowest=0)
    np.testing.assert_array_equal(cloud.confidence, result["depth_conf"][0].ravel())


@pytest.mark.parametrize(("fraction", "kept"), [(0, 40), (0.25, 30), (0.26, 30), (0.5, 20), (0.999, 1)])
def test_the_lowest_confidences_of_the_whole_scene_are_dropped(fraction: float, kept: int) -> None:
    """40 pixels of confidence 1..40 in random order: those above floor(40 * fraction) stay, of either view."""
    cloud = point_cloud(*make_scene(), drop_lowest=fraction)
    assert sorted(cloud.confidence.tolist()) == list(range(PIXELS - kept + 1, PIXELS + 1))


def test_the_fraction_counts_valid_pixels_only() -> None:
    result, images, masks = make_scene()
    masks[0] = False
    assert len(point_cloud(result, images, masks, drop_lowest=0.25)) == 15


def test_equal_confidences_stay_together() -> None:
    result, images, masks = make_scene()
    result["depth_conf"][:] = 1
    assert len(point_cloud(result, images, masks, drop_lowest=0.9)) == PIXELS
    result["depth_conf"][0, 0, :4] = 0.5
    assert len(point_cloud(result, images, masks, drop_lowest=0.25)) == PIXELS - 4


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="give a number from 0 to below 1"):
        point_cloud(*make_scene(), drop_lowest=fraction)


def test_arrays_that_do_not_fit_are_refused() -> None:
    result, images, masks = make_scene()
    with pytest.raises(InputError, match=r"depth has shape \(1, 2, 4, 5\), expected \(2, 4, 5\): one scene"):
        point_cloud({**result, "depth": result["depth"][None]}, images, masks)
    with pytest.raises(InputError, match=r"padding masks are bool \(1, 4, 5\), expected bool \(2, 4, 5\)"):
        point_cloud(result, images, masks[:1])
    del result["intrinsics"]
    with pytest.raises(InputError, match="the result has no 'intrinsics'"):
        point_cloud(result, images, masks)


def test_a_cloud_has_equal_lengths_and_finite_points() -> None:
    cloud = random_cloud(3)
    with pytest.raises(InputError, match=r"colors has shape \(2, 3\), expected \(3, 3\)"):
        PointCloud(cloud.points, cloud.colors[:2], cloud.confidence, cloud.pixels)
    with pytest.raises(InputError, match="not finite"):
        PointCloud(cloud.points * np.float32("inf"), cloud.colors, cloud.confidence, cloud.pixels)


def test_trimesh_reads_the_ply_unchanged(tmp_path: Path) -> None:
    cloud, path = random_cloud(101), tmp_path / "points.ply"
    write_ply(cloud, path)
    loaded = read_points(path)
    np.testing.assert_array_equal(loaded.vertices.astype(np.float32), cloud.points)
    np.testing.assert_array_equal(loaded.colors[:, :3], cloud.colors)
    confidence = loaded.metadata["_ply_raw"]["vertex"]["data"]["confidence"]
    np.testing.assert_array_equal(np.ravel(confidence), cloud.confidence)


def test_ply_is_binary_with_nineteen_bytes_a_point(tmp_path: Path) -> None:
    cloud, path = random_cloud(7), tmp_path / "points.ply"
    write_ply(cloud, path)
    header, body = path.read_bytes().split(b"end_header\n", 1)
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\n")
    assert b"element vertex 7\n" in header
    assert struct.unpack("<3f3Bf", body[19:38]) == (*cloud.points[1], *cloud.colors[1], cloud.confidence[1])
    assert len(body) == 7 * 19


def test_an_empty_cloud_is_a_valid_ply(tmp_path: Path) -> None:
    result, images, masks = make_scene()
    result["depth"][:] = 0
    cloud = point_cloud(result, images, masks)
    write_ply(cloud, tmp_path / "points.ply")
    content = (tmp_path / "points.ply").read_bytes()
    assert b"element vertex 0\n" in content
    assert content.endswith(b"end_header\n")


@pytest.mark.parametrize("count", [1, 2, 3, 101])
def test_trimesh_reads_the_glb_unchanged(tmp_path: Path, count: int) -> None:
    cloud, path = random_cloud(count), tmp_path / "points.glb"
    write_glb(cloud, path)
    loaded = read_points(path)
    np.testing.assert_array_equal(loaded.vertices.astype(np.float32), cloud.points)
    np.testing.assert_array_equal(loaded.colors[:, :3], cloud.colors)
    assert (loaded.colors[:, 3] == 255).all()


def test_glb_turns_opencv_axes_into_gltf_axes(tmp_path: Path) -> None:
    """A point right, below and in front of the camera is at +x, -y, -z in glTF (y up, viewer looks along -z)."""
    cloud, path = random_cloud(1), tmp_path / "points.glb"
    cloud.points[0] = (1, 2, 3)
    write_glb(cloud, path)
    placed: Any = trimesh.load_scene(path).to_geometry()
    np.testing.assert_allclose(placed.vertices, [[1, -2, -3]], atol=1e-12)  # a float64 rotation matrix


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_glb_chunks_are_aligned_and_bounds_exact(tmp_path: Path, count: int) -> None:
    cloud, path = random_cloud(count), tmp_path / "points.glb"
    write_glb(cloud, path)
    content = path.read_bytes()
    assert struct.unpack_from("<4sII", content) == (b"glTF", 2, len(content))
    json_length, json_type = struct.unpack_from("<I4s", content, 12)
    bin_length, bin_type = struct.unpack_from("<I4s", content, 20 + json_length)
    assert (json_type, bin_type) == (b"JSON", b"BIN\0")
    assert json_length % 4 == bin_length % 4 == 0
    assert 28 + json_length + bin_length == len(content)
    document = json.loads(content[20 : 20 + json_length])
    assert all(view["byteOffset"] % 4 == 0 for view in document["bufferViews"])
    assert document["buffers"][0]["byteLength"] == bin_length
    position, color = document["accessors"]
    assert np.array_equal(np.float32(position["min"]), cloud.points.min(axis=0))
    assert np.array_equal(np.float32(position["max"]), cloud.points.max(axis=0))
    assert (color["componentType"], color["normalized"], color["type"]) == (5121, True, "VEC4")
    assert document["meshes"][0]["primitives"][0]["mode"] == 0


def test_an_empty_glb_is_refused_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="points.glb: there are no points .* lower drop_lowest"):
        write_glb(random_cloud(0), tmp_path / "points.glb")
    assert list(tmp_path.iterdir()) == []
