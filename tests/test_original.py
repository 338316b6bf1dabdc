"""Depth in the photograph's resolution: the same surface, seen by the photograph's own camera."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import Arrays, read_cameras, read_png

from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import project, unproject
from moe3d_deploy.images import ImageBatch, ViewMapping, load_images
from moe3d_deploy.runtime.original import EDGE_RATIO, to_original
from moe3d_deploy.runtime.outputs import OutputOptions, write_scene

pytest_plugins = ["scene_fixtures"]

# A camera off the origin that looks along its own z, and a slanted plane n X = d before it, all in world units.
POSE = np.array([[0.8, 0, 0.6, 0.3], [0, 1, 0, -0.2], [-0.6, 0, 0.8, 0.5]])
NORMAL, DISTANCE = np.array([-0.9, 0.3, 1.4]), 4.0

# mode, size, photograph width x height: landscape, portrait cut off at both ends, odd sizes, smaller than the view.
CASES = [
    ("crop", 56, 113, 84),
    ("crop", 56, 61, 151),
    ("crop", 56, 23, 19),
    ("pad", 56, 113, 71),
    ("pad", 56, 67, 150),
    ("pad", 56, 31, 17),
    ("square", 50, 113, 71),
    ("square", 56, 67, 151),
    ("square", 64, 29, 31),
]


def view_of(tmp_path: Path, mode: str, size: int, width: int, height: int) -> tuple[ViewMapping, int, int]:
    """The mapping of a photograph, and height and width of its network input."""
    Image.new("RGB", (width, height)).save(tmp_path / "photo.png")
    batch = load_images([tmp_path / "photo.png"], mode=mode, size=size)  # type: ignore[arg-type]
    return batch.views[0], batch.images.shape[2], batch.images.shape[3]


def plane_depth(intrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """Depth (height, width) of the plane by intersecting rays, in float64: X = C + d R^T K^-1 p, n X = d."""
    rotation, translation = POSE[:, :3], POSE[:, 3]
    center = -rotation.T @ translation
    v, u = np.mgrid[:height, :width].astype(float)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T @ rotation
    depth: np.ndarray = (DISTANCE - NORMAL @ center) / (rays @ NORMAL)
    assert depth.min() > 0
    return depth


def camera(height: int, width: int) -> np.ndarray:
    return np.array([[70.0, 0, width / 2 + 1.3], [0, 74.0, height / 2 - 0.7], [0, 0, 1]])


def covered(view: ViewMapping, height: int, width: int) -> np.ndarray:
    """(h, w) of the photograph: the centre of a pixel lies on the outermost valid centres of the network or inside."""
    mask = view.valid_mask(height, width)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    (u0, v0), (u1, v1) = view.to_original([[columns[0], rows[0]], [columns[-1], rows[-1]]])
    v, u = np.mgrid[: view.original_height, : view.original_width]
    inside: np.ndarray = (u >= u0 - 1e-6) & (u <= u1 + 1e-6) & (v >= v0 - 1e-6) & (v <= v1 + 1e-6)
    return inside


@pytest.mark.parametrize(("mode", "size", "width", "height"), CASES)
def test_a_plane_comes_out_as_the_same_plane(tmp_path: Path, mode: str, size: int, width: int, height: int) -> None:
    """Unprojected with the photograph's intrinsics every pixel lies on the plane."""
    view, h, w = view_of(tmp_path, mode, size, width, height)
    intrinsics = camera(h, w)
    depth, valid = plane_depth(intrinsics, h, w), view.valid_mask(h, w)
    maps = to_original(view, depth, np.full((h, w), 3.0), valid)
    assert maps.depth.shape == (height, width)
    original = view.intrinsics_to_original(intrinsics)
    inside = covered(view, h, w)
    assert inside.mean() > 0.3
    # float32 inverse depths and shares: a few roundings of 2^-24 each
    np.testing.assert_allclose(maps.depth[inside], plane_depth(original, height, width)[inside], rtol=2e-6)
    points = unproject(maps.depth, POSE, original)[inside]
    np.testing.assert_allclose(points @ NORMAL, DISTANCE, rtol=2e-5)
    assert (maps.confidence[inside] == 3).all()


@pytest.mark.parametrize(("mode", "size", "width", "height"), CASES)
def test_network_pixels_and_the_photographs_give_the_same_world_points(
    tmp_path: Path, mode: str, size: int, width: int, height: int
) -> None:
    """A photograph pixel's world point, seen by the network's camera, has the depth of the surface at that place."""
    view, h, w = view_of(tmp_path, mode, size, width, height)
    intrinsics = camera(h, w)
    v, u = np.mgrid[:h, :w]
    depth = 3 + 0.2 * np.sin(u / 9) + 0.1 * np.cos(v / 7)
    maps = to_original(view, depth, depth, view.valid_mask(h, w))
    inside = covered(view, h, w)
    points = unproject(maps.depth, POSE, view.intrinsics_to_original(intrinsics))[inside]
    uv, seen = project(points, POSE, intrinsics)
    # Bilinear on a curvature of at most 0.2 / 81 per pixel^2, an eighth of it per axis: below 6e-4.
    np.testing.assert_allclose(seen, 3 + 0.2 * np.sin(uv[:, 0] / 9) + 0.1 * np.cos(uv[:, 1] / 7), atol=6e-4)


@pytest.mark.parametrize(("mode", "size", "width", "height"), CASES)
def test_what_was_cropped_away_is_invalid_and_all_else_is_not(
    tmp_path: Path, mode: str, size: int, width: int, height: int
) -> None:
    view, h, w = view_of(tmp_path, mode, size, width, height)
    maps = to_original(view, np.ones((h, w)), np.ones((h, w)), view.valid_mask(h, w))
    rows = (np.arange(height) + 0.5) / view.scale_y + view.offset_y  # of the network input, from its upper edge
    seen = np.broadcast_to(((rows >= 0) & (rows <= h))[:, None], (height, width))
    assert np.array_equal(np.isnan(maps.depth), np.isnan(maps.confidence))
    assert not np.isfinite(maps.depth[~seen]).any()
    assert (maps.depth[seen] == 1).mean() > 0.96, "padding meets the photograph within a pixel"
    if (mode, height) == ("crop", 151):
        assert 0.3 < seen.mean() < 0.45, "56 of 140 rows"
    else:
        assert seen.all()


def test_no_depth_arises_between_an_object_and_what_is_behind_it() -> None:
    """A step from 2 to 5 stays one: of five times as many pixels none has another depth, and no side gains any."""
    view = ViewMapping("step.png", 50, 40, 5.0, 5.0, 0.0, 0.0)
    depth = np.full((8, 10), 2.0)
    depth[:, 4:] = 5
    depth[5:] = 5
    maps = to_original(view, depth, np.where(depth == 2, 9.0, 1.5), np.ones((8, 10), bool))
    np.testing.assert_array_equal(maps.depth, np.kron(depth, np.ones((5, 5))))
    np.testing.assert_array_equal(maps.confidence, np.where(maps.depth == 2, 9, 1.5))


def test_neighbours_within_the_edge_ratio_are_averaged_and_others_are_not() -> None:
    view = ViewMapping("two.png", 20, 10, 10.0, 10.0, 0.0, 0.0)
    for ratio, averaged in ((EDGE_RATIO - 0.001, True), (EDGE_RATIO + 0.001, False)):
        maps = to_original(view, np.array([[1.0, ratio]]), np.ones((1, 2)), np.ones((1, 2), bool))
        between = (maps.depth > 1.0001) & (maps.depth < ratio - 0.0001)
        assert between.any() == averaged


def test_an_invalid_pixel_stays_invalid_and_spoils_no_neighbour() -> None:
    view = ViewMapping("hole.png", 15, 15, 3.0, 3.0, 0.0, 0.0)
    depth, valid = np.full((5, 5), 4.0), np.ones((5, 5), bool)
    depth[2, 2], valid[2, 2] = -1, False
    maps = to_original(view, depth, np.full((5, 5), 2.0), valid)
    hole = np.zeros((15, 15), bool)
    hole[6:9, 6:9] = True
    assert np.array_equal(np.isnan(maps.depth), hole)
    assert (maps.depth[~hole] == 4).all()


def test_a_view_of_one_pixel_fills_its_photograph() -> None:
    maps = to_original(
        ViewMapping("a.png", 3, 2, 3.0, 2.0, 0, 0), np.full((1, 1), 7.0), np.ones((1, 1)), np.ones((1, 1), bool)
    )
    np.testing.assert_allclose(maps.depth, 7, rtol=1e-6)


@pytest.mark.parametrize("depth", [1e-45, 1e-39, 1e-30, 1e30, 3.4e38])
def test_depths_at_the_ends_of_float32_come_through(depth: float) -> None:
    view = ViewMapping("a.png", 6, 6, 3.0, 3.0, 0.0, 0.0)
    maps = to_original(view, np.full((2, 2), depth, np.float32), np.ones((2, 2)), np.ones((2, 2), bool))
    np.testing.assert_allclose(maps.depth, np.float32(depth), rtol=1e-6)


def test_a_large_photograph_is_worked_on_in_bands_without_a_seam() -> None:
    """3000 x 2500 is more than one band; the bands must meet."""
    view = ViewMapping("large.png", 3000, 2500, 100.0, 100.0, 0.0, 0.0)
    v, u = np.mgrid[:25, :30]
    maps = to_original(view, 1 / (1 + 0.001 * u + 0.0015 * v), np.ones((25, 30)), np.ones((25, 30), bool))
    rows = 1 / maps.depth[50:-50, 1500]
    np.testing.assert_allclose(np.diff(rows), 0.0015 / 100, atol=3e-7)  # of numbers near 1 in float32


def test_a_photograph_too_large_is_refused() -> None:
    with pytest.raises(
        InputError, match="wide.png is 70000x70000, too large for depth in its own resolution; downscale it"
    ):
        to_original(
            ViewMapping("wide.png", 70000, 70000, 1.0, 1.0, 0, 0),
            np.ones((2, 2)),
            np.ones((2, 2)),
            np.ones((2, 2), bool),
        )


# ---- the files


def test_pngs_and_arrays_have_the_photographs_sizes(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][0, :2, :2] = 0
    write_scene(result, batch, tmp_path / "out", formats=["png", "npz"], options=OutputOptions(original=True))
    cameras = read_cameras(tmp_path / "out")
    arrays = np.load(tmp_path / "out" / "scene_original.npz")
    assert sorted(arrays) == ["depth_000", "depth_001", "depth_conf_000", "depth_conf_001", "extrinsics", "intrinsics"]
    for index, (height, width) in enumerate(((84, 112), (56, 112))):
        files = cameras["views"][index]["files"]
        depth = arrays[f"depth_{index:03d}"]
        assert depth.dtype == np.float32
        assert depth.shape == arrays[f"depth_conf_{index:03d}"].shape == (height, width)
        png = read_png(tmp_path / "out" / files["original_depth"])
        assert (png.shape, png.dtype) == ((height, width), np.uint16)
        assert np.array_equal(png == 0, np.isnan(depth))
        scale = cameras["depth_png_scale"]
        valid = np.isfinite(depth)
        assert np.abs(png[valid] * scale - depth[valid]).max() <= scale / 2 * 1.01  # rounding to integers
        for kind in ("original_depth_color", "original_conf"):
            picture = read_png(tmp_path / "out" / files[kind])
            assert picture.shape == (height, width, 3)
            assert not picture[~valid].any()
        np.testing.assert_allclose(arrays["intrinsics"][index], cameras["views"][index]["intrinsics_original"])
    assert np.isnan(arrays["depth_000"]).sum() == 16, "four network pixels of four"


def test_original_maps_belong_to_the_scene_and_go_with_it(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = write_scene(result, batch, out, formats=["png", "npz"], options=OutputOptions(original=True))
    assert sorted(written) == sorted(out.iterdir())
    assert json.loads((out / "cameras.json").read_text())["files"] == [path.name for path in written[:-1]]
    write_scene(result, batch, out, formats=["npz"])
    assert sorted(path.name for path in out.iterdir()) == ["cameras.json", "scene.npz"]


def test_original_without_a_format_for_it_is_refused(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="written as png and npz; add one of them to the formats"):
        write_scene(result, batch, tmp_path / "out", formats=["ply"], options=OutputOptions(original=True))
    assert not (tmp_path / "out").exists()
