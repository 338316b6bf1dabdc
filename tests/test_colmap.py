"""COLMAP models, read back by a reader written from the format's documentation alone."""

import dataclasses
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes import Arrays, random_result, turned_second_camera, two_photographs

from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import project
from moe3d_deploy.images import ImageBatch
from moe3d_deploy.runtime.outputs import OutputOptions, write_scene
from moe3d_deploy.runtime.thinning import VoxelSize

pytest_plugins = ["scene_fixtures"]

MODEL = Path("sparse") / "0"


@dataclass
class Model:
    """cameras: id -> (model, width, height, params); images: id -> (quaternion, translation, camera, name, points2D);
    points: id -> (xyz, rgb, error, track). points2D are (x, y, point id), a track is of (image id, place)."""

    cameras: dict[int, Any] = field(default_factory=dict)
    images: dict[int, Any] = field(default_factory=dict)
    points: dict[int, Any] = field(default_factory=dict)


class Bytes:
    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0

    def take(self, layout: str) -> Any:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values if len(values) > 1 else values[0]

    def text(self) -> str:
        end = self.data.index(b"\0", self.at)
        text, self.at = self.data[self.at : end].decode(), end + 1
        return text


def read_binary(folder: Path) -> Model:
    model = Model()
    file = Bytes(folder / "cameras.bin")
    for _ in range(file.take("Q")):
        number, kind, width, height = file.take("IiQQ")
        assert kind == 1, "PINHOLE"
        model.cameras[number] = ("PINHOLE", width, height, file.take("4d"))
    assert file.at == len(file.data)
    file = Bytes(folder / "images.bin")
    for _ in range(file.take("Q")):
        number, *pose = file.take("I7d")
        camera, name = file.take("I"), file.text()
        points = [file.take("ddQ") for _ in range(file.take("Q"))]
        model.images[number] = (tuple(pose[:4]), tuple(pose[4:]), camera, name, points)
    assert file.at == len(file.data)
    file = Bytes(folder / "points3D.bin")
    for _ in range(file.take("Q")):
        number, xyz, rgb, error = file.take("Q"), file.take("3d"), file.take("3B"), file.take("d")
        model.points[number] = (xyz, rgb, error, [file.take("II") for _ in range(file.take("Q"))])
    assert file.at == len(file.data)
    return model


def read_text(folder: Path) -> Model:
    def lines(name: str) -> list[str]:
        return [line for line in (folder / name).read_text().split("\n")[:-1] if not line.startswith("#")]

    model = Model()
    for line in lines("cameras.txt"):
        number, kind, width, height, *parameters = line.split(" ")
        model.cameras[int(number)] = (kind, int(width), int(height), tuple(map(float, parameters)))
    of_images = lines("images.txt")
    for head, tail in zip(of_images[::2], of_images[1::2], strict=True):
        number, *pose, camera, name = head.split(" ")
        values = tail.split()
        points = [(float(x), float(y), int(p)) for x, y, p in zip(values[::3], values[1::3], values[2::3], strict=True)]
        numbers = tuple(map(float, pose))
        model.images[int(number)] = (numbers[:4], numbers[4:], int(camera), name, points)
    for line in lines("points3D.txt"):
        number, x, y, z, r, g, b, error, *track = line.split(" ")
        pairs = list(zip(map(int, track[::2]), map(int, track[1::2]), strict=True))
        model.points[int(number)] = ((float(x), float(y), float(z)), (int(r), int(g), int(b)), float(error), pairs)
    return model


@pytest.fixture
def result(batch: ImageBatch) -> Arrays:
    """Two cameras; the second is turned by 90 degrees about y and shifted."""
    return turned_second_camera(batch)


@pytest.fixture
def model(result: Arrays, batch: ImageBatch, tmp_path: Path) -> Model:
    write_scene(result, batch, tmp_path / "out", formats=["colmap"])
    return read_binary(tmp_path / "out" / MODEL)


def test_cameras_are_those_of_the_photographs_in_colmaps_pixels(model: Model) -> None:
    """Network f 50, c (28, 21) at half the size: f 100, c_original = (c - offset + 0.5) 2 - 0.5, and 0.5 more here,
    where the corner of the first pixel is (0, 0). The second photograph has 7 rows of padding above it."""
    assert model.cameras == {
        1: ("PINHOLE", 112, 84, (100, 100, 57, 43)),
        2: ("PINHOLE", 112, 56, (100, 100, 57, 29)),
    }


def test_images_have_the_photographs_names_and_poses_from_world_to_camera(model: Model) -> None:
    assert {number: image[3] for number, image in model.images.items()} == {1: "left.png", 2: "left.jpg"}
    assert [image[2] for image in model.images.values()] == [1, 2]
    (first, first_shift), (second, second_shift) = (image[:2] for image in model.images.values())
    assert (first, first_shift) == ((1, 0, 0, 0), (0, 0, 0))
    half = 0.5**0.5  # a quarter turn about y maps z to x: w = cos 45, y = sin 45
    np.testing.assert_allclose(second, (half, 0, half, 0), atol=1e-7)  # the extrinsics are float32
    assert second_shift == (0.5, -0.25, 2)


def test_every_point_projects_to_the_pixel_it_is_listed_at(model: Model) -> None:
    """By the formula of the format's documentation: camera from world, then f X / Z + c, all from the files."""
    seen = 0
    for image_number, (quaternion, translation, camera, _, points) in model.images.items():
        fx, fy, cx, cy = model.cameras[camera][3]
        w, x, y, z = quaternion
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )
        for place, (u, v, number) in enumerate(points):
            xyz, _, error, track = model.points[number]
            assert track == [(image_number, place)]
            assert error == -1
            right, down, forward = rotation @ xyz + translation
            # float32 points a few units away, times f / Z of 200: 200 * 2^-22
            np.testing.assert_allclose((fx * right / forward + cx, fy * down / forward + cy), (u, v), atol=1e-4)
            seen += 1
    assert seen == len(model.points) == (42 + 28) * 56 * 3 // 4


def test_the_first_pixel_of_a_photograph_has_its_centre_at_one_half(
    result: Arrays, batch: ImageBatch, tmp_path: Path
) -> None:
    """Network pixel (0, 0) covers photograph pixels 0 and 1: its centre is their common corner, (1, 1) in COLMAP."""
    write_scene(result, batch, tmp_path / "out", formats=["colmap"], options=OutputOptions(drop_lowest=0))
    model = read_binary(tmp_path / "out" / MODEL)
    assert model.images[1][4][0] == (1, 1, 1)
    assert model.images[1][4][1] == (3, 1, 2)
    assert model.images[2][4][0][:2] == (1, 1), "row 7, the first that is no padding"


def test_points_have_the_colours_of_their_pixels(model: Model) -> None:
    """Photograph pixels (60..79, 20..39) of the first view are red, all others (40, 90, 200)."""
    *_, points = model.images[1]
    red = {number for x, y, number in points if 64 < x < 76 and 24 < y < 36}
    assert red
    assert {model.points[number][1] for number in red} == {(255, 0, 0)}
    assert (255, 0, 0) not in {
        point[1] for number, point in model.points.items() if number not in red | borders(points)
    }


def borders(points: list[tuple[float, float, int]]) -> set[int]:
    """Points in the red square or at its border."""
    return {number for x, y, number in points if 56 < x < 84 and 16 < y < 44}


def test_text_and_binary_hold_the_same_model(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    written = write_scene(result, batch, tmp_path / "out", formats=["colmap", "colmap-txt"])
    folder = tmp_path / "out" / MODEL
    names = {f"{part}.{suffix}" for part in ("cameras", "images", "points3D") for suffix in ("bin", "txt")}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in written} == names | {"cameras.json"}
    assert read_text(folder) == read_binary(folder)


def test_a_model_is_thinned_to_the_limit(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    options = OutputOptions(max_points=50)
    write_scene(result, batch, tmp_path / "out", formats=["colmap", "colmap-txt"], options=options)
    model = read_binary(tmp_path / "out" / MODEL)
    assert sorted(model.points) == list(range(1, 51))
    listed = [point[2] for image in model.images.values() for point in image[4]]
    assert sorted(listed) == list(range(1, 51))
    assert all(len(image[4]) > 0 for image in model.images.values()), "every view keeps some of 50"
    assert read_text(tmp_path / "out" / MODEL) == model


def test_without_a_limit_a_model_has_100_000_points(tmp_path: Path) -> None:
    batch = two_photographs(tmp_path)
    large = ImageBatch(np.tile(batch.images, (1, 1, 10, 10)), batch.views)
    views = tuple(dataclasses.replace(view, scale_x=0.2, scale_y=0.2, offset_y=0) for view in batch.views)
    large = dataclasses.replace(large, views=views)
    result = random_result(large)
    write_scene(result, large, tmp_path / "out", formats=["colmap", "ply"])
    count = struct.unpack("<Q", (tmp_path / "out" / MODEL / "points3D.bin").read_bytes()[:8])[0]
    assert count == 100_000
    header = (tmp_path / "out" / "points.ply").read_bytes()[:200]
    assert f"element vertex {round((420 + 280) * 560 * 0.75)}\n".encode() in header


def test_a_scene_without_points_has_a_model_of_its_cameras(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][:] = np.nan
    write_scene(result, batch, tmp_path / "out", formats=["colmap", "colmap-txt"])
    for model in (read_binary(tmp_path / "out" / MODEL), read_text(tmp_path / "out" / MODEL)):
        assert len(model.cameras) == 2
        assert model.points == {}
        assert [image[4] for image in model.images.values()] == [[], []]


def test_a_view_without_points_stays_in_the_model(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][0] = 0
    write_scene(result, batch, tmp_path / "out", formats=["colmap", "colmap-txt"])
    model = read_binary(tmp_path / "out" / MODEL)
    assert model.images[1][4] == []
    assert {track for point in model.points.values() for track, _ in point[3]} == {2}
    assert read_text(tmp_path / "out" / MODEL) == model


def test_voxels_thin_the_model_too(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    write_scene(result, batch, tmp_path / "out", formats=["colmap"], options=OutputOptions(voxel=VoxelSize(1000.0)))
    assert 1 <= len(read_binary(tmp_path / "out" / MODEL).points) <= 8, "the eight voxels around the origin"


def renamed(batch: ImageBatch, *names: str) -> ImageBatch:
    views = (dataclasses.replace(view, name=name) for view, name in zip(batch.views, names, strict=True))
    return dataclasses.replace(batch, views=tuple(views))


def test_photographs_of_one_name_are_refused(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="two views are named 'a.png', and a COLMAP model needs different names; rename"
    ):
        write_scene(result, renamed(batch, "a.png", "a.png"), tmp_path / "out", formats=["colmap"])
    assert not (tmp_path / "out").exists()


def test_a_name_with_a_blank_goes_into_the_binary_form_only(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    blank = renamed(batch, "my view.png", "日本.png")
    write_scene(result, blank, tmp_path / "out", formats=["colmap"])
    assert read_binary(tmp_path / "out" / MODEL).images[1][3] == "my view.png"
    assert read_binary(tmp_path / "out" / MODEL).images[2][3] == "日本.png"
    with pytest.raises(
        InputError, match="'my view.png' does not fit COLMAP's text form, .* choose colmap, the binary form"
    ):
        write_scene(result, blank, tmp_path / "text", formats=["colmap-txt"])


@pytest.mark.parametrize("broken", ["extrinsics", "intrinsics", "focal"])
def test_a_broken_camera_is_named_and_no_model_is_written(
    result: Arrays, batch: ImageBatch, tmp_path: Path, broken: str
) -> None:
    if broken == "focal":
        result["intrinsics"][1, 0, 0] = -50
    else:
        result[broken][1, 0, 2] = np.nan
    with pytest.raises(
        InputError, match=r"view 1 \(left.jpg\) has a camera that is not finite or without focal length"
    ):
        write_scene(result, batch, tmp_path / "out", formats=["colmap"])
    assert list((tmp_path / "out").iterdir()) == []


def test_the_model_agrees_with_the_projects_own_projection(result: Arrays, batch: ImageBatch, model: Model) -> None:
    *_, points = model.images[2]
    xyz = np.array([model.points[number][0] for _, _, number in points])
    uv, _ = project(
        xyz, result["extrinsics"][1].astype(float), batch.views[1].intrinsics_to_original(result["intrinsics"][1])
    )
    np.testing.assert_allclose(uv + 0.5, [(x, y) for x, y, _ in points], atol=1e-4)  # float32 points, as above
