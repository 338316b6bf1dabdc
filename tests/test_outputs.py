"""The files of a scene, read back with other means than those that wrote them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from moe3d_deploy.errors import InputError
from moe3d_deploy.images import ImageBatch, load_images
from moe3d_deploy.runtime.colormaps import palette
from moe3d_deploy.runtime.outputs import write_scene

EXPERTS = 4
Arrays = dict[str, np.ndarray]


@pytest.fixture
def batch(tmp_path: Path) -> ImageBatch:
    """Two photographs of one stem: 112x84 with a red square, and 112x56, padded with 7 rows above and below.

    Network size 56x42: one network pixel is two pixels of the photographs.
    """
    files = []
    for folder, name, height in (("a", "left.png", 84), ("b", "left.jpg", 56)):
        pixels = np.full((height, 112, 3), (40, 90, 200), np.uint8)
        if folder == "a":
            pixels[20:40, 60:80] = (255, 0, 0)
        files.append(tmp_path / folder / name)
        files[-1].parent.mkdir()
        Image.fromarray(pixels).save(files[-1])
    return load_images(files, size=56)


@pytest.fixture
def result(batch: ImageBatch) -> Arrays:
    views, _, height, width = batch.images.shape
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(EXPERTS, 0.3), (views, height, width)).transpose(0, 3, 1, 2).astype(np.float32)
    return {
        "depth": rng.uniform(0.5, 4, (views, height, width)).astype(np.float32),
        "depth_conf": (1 + rng.gamma(2, 2, (views, height, width))).astype(np.float32),
        "extrinsics": np.tile(np.eye(4, dtype=np.float32)[:3], (views, 1, 1)),
        "intrinsics": np.tile(np.array([[50, 0, 28], [0, 50, 21], [0, 0, 1]], np.float32), (views, 1, 1)),
        "expert_weights": weights,
        "expert_entropy": -(weights * np.log(weights + 1e-12)).sum(axis=1),
        "pose_enc": rng.normal(size=(views, 9)).astype(np.float32),
    }


def read_cameras(folder: Path) -> dict[str, Any]:
    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    return json.loads((folder / "cameras.json").read_text(), parse_constant=refuse)


def read_points(path: Path) -> Any:
    """The one geometry of a PLY or GLB file, before its node's rotation."""
    (points,) = trimesh.load_scene(path).geometry.values()
    return points


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


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
    with pytest.raises(InputError, match="output format 'obj' is unknown; choose from png, npz, ply, glb"):
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


def test_a_second_scene_leaves_nothing_of_the_first(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    write_scene(result, batch, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "009_mine_depth.png").write_text("mine")
    one = ImageBatch(batch.images[:1], (dataclasses.replace(batch.views[0], name="other.png"),))
    arrays = {name: array[:1] for name, array in result.items()}
    written = write_scene(arrays, one, tmp_path / "out", formats=["png", "npz"])
    names = {path.name for path in written}
    assert "000_other_depth.png" in names
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"notes.txt", "009_mine_depth.png"}
    assert read_cameras(tmp_path / "out")["files"] == [path.name for path in written[:-1]]


def test_cameras_of_the_first_scene_never_stand_beside_files_of_the_second(
    result: Arrays, batch: ImageBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = {path.name for path in write_scene(result, batch, out)}

    def fail(*_: object) -> None:
        assert not before & {path.name for path in out.iterdir()}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe3d_deploy.runtime.outputs.atomic_write", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_scene(result, batch, out, formats=["png"])


def test_a_scene_that_is_refused_leaves_the_earlier_one(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_scene(result, batch, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result["depth"][:] = 0
    with pytest.raises(InputError, match="leave glb out of the formats"):
        write_scene(result, batch, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


HOSTILE = [
    {"files": ["../overview.png", "/tmp/overview.png", "sub/000_x_depth.png", "thesis.pdf", "..", "", 7, None, "a\0b"]},
    {"files": "overview.png"},
    {"files": {"overview.png": 1}},
    {},
    ["overview.png"],
    "overview.png",
]


@pytest.mark.parametrize("text", [*map(json.dumps, HOSTILE), "", "{", "[" * 100_000, "\ud800"])
def test_only_a_scenes_own_files_are_removed_whatever_cameras_json_says(
    result: Arrays, batch: ImageBatch, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "out"
    kept = ["../overview.png", "sub/000_x_depth.png", "thesis.pdf", "overview.png"]
    for name in kept:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    (out / "cameras.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    write_scene(result, batch, out, formats=["npz"])
    assert all((out / name).read_text() == "mine" for name in kept)
    assert read_cameras(out)["files"] == ["scene.npz"]


def test_a_pipe_or_link_for_cameras_json_is_replaced_unread(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    (tmp_path / "overview.png").write_text("mine")
    (tmp_path / "elsewhere.json").write_text('{"files": ["overview.png"]}')
    (tmp_path / "cameras.json").symlink_to("elsewhere.json")
    write_scene(result, batch, tmp_path, formats=[])
    assert (tmp_path / "overview.png").exists()
    assert (tmp_path / "elsewhere.json").exists()
    (tmp_path / "cameras.json").unlink()
    os.mkfifo(tmp_path / "cameras.json")
    write_scene(result, batch, tmp_path, formats=[])
    assert read_cameras(tmp_path)["files"] == []


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
    write_scene(result, batch, tmp_path, drop_lowest=0)
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


def test_arrays_that_do_not_fit_the_batch_are_refused(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    wrong = {**result, "expert_weights": result["expert_weights"][:, 0]}
    with pytest.raises(InputError, match=r"expert_weights has shape \(2, 42, 56\), expected \(S, K, H, W\)"):
        write_scene(wrong, batch, tmp_path)
    with pytest.raises(InputError, match="one scene, no batch axis"):
        write_scene({name: array[None] for name, array in result.items()}, batch, tmp_path)


def test_a_folder_that_cannot_be_made_is_named(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out: cannot write the results .* choose another output folder"):
        write_scene(result, batch, tmp_path / "file" / "out")


def test_a_failed_write_names_the_folder_and_leaves_no_part(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    """A folder in the place of a file stands for a disk that refuses: it does so for every user, root too."""
    (tmp_path / "out" / "scene.npz").mkdir(parents=True)
    with pytest.raises(InputError, match="out: cannot write the results"):
        write_scene(result, batch, tmp_path / "out", formats=["npz"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scene.npz"]
