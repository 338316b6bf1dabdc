"""The files of a scene, read back with other means than those that wrote them."""

from pathlib import Path

import numpy as np
import pytest
from scenes import EXPERTS, Arrays, read_cameras, read_png, read_points

from moe3d_deploy.errors import InputError
from moe3d_deploy.images import ImageBatch
from moe3d_deploy.runtime.colormaps import palette
from moe3d_deploy.runtime.outputs import OutputOptions, write_scene

pytest_plugins = ["scene_fixtures"]


def test_every_file_of_a_scene_is_written_and_listed(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    written = write_scene(result, batch, out)
    kinds = ("depth", "depth_color", "conf", "experts", "entropy")
    expected = {f"{index:03d}_left_{kind}.png" for index in range(2) for kind in kinds}
    expected |= {"points.glb", "points.ply", "scene.npz", "overview.png", "cameras.json"}
    assert {path.name for path in out.iterdir()} == expected
    assert sorted(written) == sorted(out.iterdir())
    assert written[-1].name == "cameras.json"
    assert read_cameras(out)["views"][1]["files"] == {kind: f"001_left_{kind}.png" for kind in kinds}


@pytest.mark.parametrize("name", ["png", "npz", "ply", "glb"])
def test_only_the_formats_asked_for_are_written(result: Arrays, batch: ImageBatch, tmp_path: Path, name: str) -> None:
    for key in ("expert_weights", "expert_entropy"):
        del result[key]
    written = write_scene(result, batch, tmp_path / "out", formats=[name])
    assert {path.suffix for path in written} == {f".{name}", ".json"}
    assert not any("experts" in path.name or "entropy" in path.name for path in written)


def test_an_unknown_format_is_refused(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="output format 'obj' is unknown; choose from png, npz, ply, glb, colmap, colmap-txt, rrd"
    ):
        write_scene(result, batch, tmp_path / "out", formats=["png", "obj"])
    assert not (tmp_path / "out").exists()


def test_depth_png_times_scale_is_the_depth(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    write_scene(result, batch, tmp_path, formats=["png"])
    scale = read_cameras(tmp_path)["depth_png_scale"]
    masks = [view.valid_mask(42, 56) for view in batch.views]
    largest = 0
    for index, mask in enumerate(masks):
        png = read_png(tmp_path / f"{index:03d}_left_depth.png")
        assert png.dtype == np.uint16
        error = np.abs(png.astype(np.float64) * scale - result["depth"][index])
        assert error[mask].max() <= scale / 2 * (1 + 1e-9)  # rounding to integers; 1e-9 for the float64 product
        assert (png[~mask] == 0).all()
        largest = max(largest, int(png.max()))
    assert not masks[1].all()
    assert largest == 65535


def test_one_far_pixel_does_not_take_the_steps_of_all_others(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    """The top is 1.5 times the 99.9th percentile, which is at most the 4 of all other pixels and about there."""
    result["depth"][0, 3, 5] = 1e6
    write_scene(result, batch, tmp_path, formats=["png"])
    cameras = read_cameras(tmp_path)
    scale = cameras["depth_png_scale"]
    assert 65535 * scale == pytest.approx(1.5 * 4, rel=0.01)
    png = read_png(tmp_path / "000_left_depth.png")
    assert png[3, 5] == 65535
    error = np.abs(png * scale - result["depth"][0])
    error[3, 5] = 0
    assert error.max() <= scale / 2 * (1 + 1e-9)  # rounding to integers; 1e-9 for the float64 product
    assert [view["saturated_fraction"] for view in cameras["views"]] == [1 / (42 * 56), 0]
    assert cameras["views"][0]["depth_far"] == 1e6


def test_a_far_part_of_the_scene_is_no_outlier(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][0, :2] = 1000
    write_scene(result, batch, tmp_path, formats=["png"])
    cameras = read_cameras(tmp_path)
    assert cameras["depth_png_scale"] == 1000 / 65535
    assert [view["saturated_fraction"] for view in cameras["views"]] == [0, 0]


def test_pictures_on_disk_are_rgb_and_black_on_padding(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][1] = 4
    result["depth"][1, 20] = 0.5
    result["expert_weights"][1] = np.eye(EXPERTS)[0][:, None, None]
    write_scene(result, batch, tmp_path, formats=["png"])
    near, far = read_png(tmp_path / "001_left_depth_color.png")[[20, 25], 0].tolist()
    assert near == [122, 4, 3]  # turbo's warm end
    assert far[2] > far[0]
    assert read_png(tmp_path / "001_left_experts.png")[20, 0].tolist() == palette(EXPERTS)[0].tolist()
    padding = ~batch.views[1].valid_mask(42, 56)
    assert padding.any()
    for kind in ("depth_color", "conf", "experts", "entropy"):
        assert not read_png(tmp_path / f"001_left_{kind}.png")[padding].any(), kind


def test_invalid_depth_is_zero_and_black(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][0, 0, :4] = (np.nan, np.inf, 0, -2)
    result["depth"][0, 0, 4] = 1e-9  # far below one step of the PNG, yet valid
    write_scene(result, batch, tmp_path, formats=["png"])
    assert read_png(tmp_path / "000_left_depth.png")[0, :5].tolist() == [0, 0, 0, 0, 1]
    color = read_png(tmp_path / "000_left_depth_color.png")
    assert (color[0, :4] == 0).all()
    assert color[0, 4].any()
    view = read_cameras(tmp_path)["views"][0]
    assert view["valid_fraction"] == pytest.approx(1 - 4 / (42 * 56))
    assert view["depth_near"] == pytest.approx(1e-9)


def test_a_view_without_valid_depth_is_reported(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][1] = np.nan
    write_scene(result, batch, tmp_path)
    first, second = read_cameras(tmp_path)["views"]
    assert (first["valid_fraction"], second["valid_fraction"]) == (1, 0)
    assert second["depth_near"] is second["depth_far"] is None
    assert not read_png(tmp_path / "001_left_depth.png").any()


def test_a_scene_without_valid_depth_has_no_glb(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][:] = 0
    with pytest.raises(InputError, match="leave glb out of the formats"):
        write_scene(result, batch, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    write_scene(result, batch, tmp_path / "out", formats=["png", "npz", "ply"])
    cameras = read_cameras(tmp_path / "out")
    assert cameras["color_ranges"]["inverse_depth"] is None
    assert [view["valid_fraction"] for view in cameras["views"]] == [0, 0]


def test_cameras_json_holds_both_pixel_frames(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    write_scene(result, batch, tmp_path, formats=[])
    cameras = read_cameras(tmp_path)
    assert cameras["depth_unit"] == "up to the scene's scale, not metres"
    first, second = cameras["views"]
    assert (first["name"], second["name"]) == ("left.png", "left.jpg")
    assert first["network_size"] == {"width": 56, "height": 42}
    assert second["original_size"] == {"width": 112, "height": 56}
    assert first["intrinsics"] == [[50, 0, 28], [0, 50, 21], [0, 0, 1]]
    assert first["extrinsics"] == np.eye(4)[:3].tolist()
    # Twice the size: f 100, c_original = (c + 0.5) 2 - 0.5; the second view has 7 rows of padding above.
    assert first["intrinsics_original"] == [[100, 0, 56.5], [0, 100, 42.5], [0, 0, 1]]
    assert second["intrinsics_original"] == [[100, 0, 56.5], [0, 100, 28.5], [0, 0, 1]]
    assert second["mapping"]["offset_y"] == 7
    assert first["depth_far"] == result["depth"][0].max()


def test_numbers_that_are_not_finite_are_null_in_json(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["extrinsics"][1, 0, 3] = np.nan
    result["intrinsics"][0, 0, 0] = np.inf
    write_scene(result, batch, tmp_path, formats=["png"])
    first, second = read_cameras(tmp_path)["views"]
    assert second["extrinsics"][0] == [1, 0, 0, None]
    assert first["intrinsics"][0] == [None, 0, 28]


def test_two_runs_write_the_same_bytes(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    first, second = (write_scene(result, batch, tmp_path / name) for name in ("one", "two"))
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    keys = list(read_cameras(tmp_path / "one"))
    assert keys == sorted(keys)


def test_npz_holds_every_array_unchanged(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    write_scene(result, batch, tmp_path, formats=["npz"])
    with np.load(tmp_path / "scene.npz") as stored:
        assert sorted(stored.files) == sorted(result)
        for name, array in result.items():
            np.testing.assert_array_equal(stored[name], array)


def test_point_files_have_the_pixels_colors_and_drop_what_was_asked(
    result: Arrays, batch: ImageBatch, tmp_path: Path
) -> None:
    """Photograph pixel (60..79, 20..39) is red, so network pixel (35, 15) is; padding never becomes a point."""
    write_scene(result, batch, tmp_path, options=OutputOptions(drop_lowest=0))
    ply, glb = read_points(tmp_path / "points.ply"), read_points(tmp_path / "points.glb")
    assert len(ply.vertices) == 42 * 56 + 28 * 56
    np.testing.assert_array_equal(ply.vertices, glb.vertices)
    np.testing.assert_array_equal(ply.colors, glb.colors)
    assert ply.colors[15 * 56 + 35, :3].tolist() == [255, 0, 0]
    depth = result["depth"][0, 15, 35]
    expected = depth * np.array([(35 - 28) / 50, (15 - 21) / 50, 1])
    np.testing.assert_allclose(ply.vertices[15 * 56 + 35], expected, rtol=1e-6)  # float32 rounding

    write_scene(result, batch, tmp_path)
    assert len(read_points(tmp_path / "points.ply").vertices) == (42 + 28) * 56 * 3 // 4


@pytest.mark.parametrize("name", ["../../x/ü y:z.png", "." * 3, "日" * 200 + ".png", ""])
def test_odd_view_names_stay_in_the_folder(result: Arrays, batch: ImageBatch, tmp_path: Path, name: str) -> None:
    odd = ImageBatch(batch.images, tuple(type(view)(**{**view.to_dict(), "name": name}) for view in batch.views))
    written = write_scene(result, odd, tmp_path / "out", formats=["png"])
    assert len(written) == 12
    assert all(path.parent == tmp_path / "out" and path.is_file() for path in written)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("clip.mp4#000120", "000_clip_000120_depth.png"),
        ("my.clip.mov#7", "000_my.clip_7_depth.png"),
        ("a#b.png", "000_a_b_depth.png"),
    ],
)
def test_a_frame_keeps_its_number_in_file_names(
    result: Arrays, batch: ImageBatch, tmp_path: Path, name: str, start: str
) -> None:
    frames = ImageBatch(batch.images, tuple(type(view)(**{**view.to_dict(), "name": name}) for view in batch.views))
    assert (tmp_path / start) in write_scene(result, frames, tmp_path, formats=["png"])


def test_arrays_that_do_not_fit_the_batch_are_refused(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    wrong = {**result, "expert_weights": result["expert_weights"][:, 0]}
    with pytest.raises(InputError, match=r"expert_weights has shape \(2, 42, 56\), expected \(S, K, H, W\)"):
        write_scene(wrong, batch, tmp_path)
    with pytest.raises(InputError, match="one scene, no batch axis"):
        write_scene({name: array[None] for name, array in result.items()}, batch, tmp_path)
