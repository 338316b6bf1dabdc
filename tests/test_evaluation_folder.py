"""A user's own scenes: the truth at the network's resolution, and every way in which a folder can be wrong."""

import contextlib
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged_scenes import write_scene
from PIL import Image

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError, Moe3dWarning
from moe3d_deploy.evaluation.folder import (
    _require_proportions,
    find_scenes,
    folder_scenes,
    read_truth,
    to_network,
)
from moe3d_deploy.geometry import project
from moe3d_deploy.manifest import Preprocessing
from moe3d_deploy.view_mapping import ViewMapping

CROP = replace(Preprocessing.of(ModelConfig()), size=56)
PAD = replace(CROP, mode="pad")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two scenes, of two and of three photographs of 112x84."""
    write_scene(tmp_path / "data" / "desk")
    write_scene(tmp_path / "data" / "hall", views=3)
    return tmp_path / "data"


# ---- the truth at the network's resolution


def test_each_network_pixel_takes_the_depth_nearest_to_its_centre() -> None:
    """Width 4 from 8: the centre of pixel 1 is 2.5 in the truth, between pixels 2 and 3: the later one."""
    depth = np.arange(24, dtype=np.float32).reshape(3, 8) + 1
    view = ViewMapping("a.png", 8, 3, 2.0, 1.0, 0.0, 0.0)
    k = np.array([[10.0, 0, 4], [0, 10, 1.5], [0, 0, 1]])
    seen, intrinsics = to_network(depth, k, view, 3, 4)
    np.testing.assert_array_equal(seen, depth[:, [1, 3, 5, 7]])
    # u = (u_true + 0.5) / 2 - 0.5: focal length 5, and 4.5 / 2 - 0.5
    np.testing.assert_allclose(intrinsics, [[5, 0, 1.75], [0, 10, 1.5], [0, 0, 1]])


def test_a_truth_of_another_resolution_than_its_photograph_is_brought_to_the_same() -> None:
    """A photograph of 8x4, a truth of 4x2 and a network input of 4x2: the truth is it already."""
    depth = np.arange(8, dtype=np.float32).reshape(2, 4)
    k = np.array([[3.0, 0, 2], [0, 3, 1], [0, 0, 1]])
    seen, intrinsics = to_network(depth, k, ViewMapping("a.png", 8, 4, 2.0, 2.0, 0.0, 0.0), 2, 4)
    np.testing.assert_array_equal(seen, depth)
    np.testing.assert_allclose(intrinsics, k)


@pytest.mark.parametrize("mode", [CROP, PAD])
def test_points_fall_on_the_network_pixels_that_see_them(mode: Preprocessing, data: Path) -> None:
    """A point that a pixel of the photograph sees is seen by the network at (u - offset + 0.5) / scale - 0.5 of it."""
    scene = next(folder_scenes(find_scenes(data), mode))
    true = read_truth(data / "desk" / "truth.npz", 2)
    height, width = scene.images.shape[2:]
    offset = (height - 42) / 2  # rows of padding above
    points = np.array([[0.3, -0.2, 3.0], [-0.5, 0.4, 2.0]])
    there, _ = project(points, true["extrinsics"][1], true["intrinsics"][1])
    here, _ = project(points, scene.truth["extrinsics"][1], scene.truth["intrinsics"][1])
    np.testing.assert_allclose(here, (there + 0.5) / 2 - 0.5 + [0, offset], atol=1e-5)
    assert (height, width) == ((42, 56) if mode is CROP else (56, 56))
    rows = slice(int(offset), int(offset) + 42)
    np.testing.assert_array_equal(scene.truth["depth"][:, rows], true["depth"][:, 1::2, 1::2])


def test_padding_has_no_truth(data: Path) -> None:
    scene = next(folder_scenes(find_scenes(data), PAD))
    assert not scene.truth["depth"][:, :7].any()
    assert not scene.truth["depth"][:, 49:].any()


def test_another_size_may_be_asked_for(data: Path) -> None:
    scene = next(folder_scenes(find_scenes(data), CROP, 28))
    assert scene.images.shape == (2, 3, 28, 28)  # 21 rows are 1.5 patches, of which Python rounds to 2
    assert scene.truth["depth"].shape == (2, 28, 28)


# ---- what is a scene


def test_the_scenes_of_a_folder_in_order_and_their_photographs_in_natural_order(data: Path) -> None:
    for index in (9, 10):
        shutil.copy(data / "hall" / "view_0.png", data / "hall" / f"view_{index}.png")
    (data / "hall" / "view_1.png").unlink()
    (data / "hall" / "view_0.png").unlink()
    (data / ".hidden").mkdir()
    (data / "notes.txt").write_text("two rooms")
    scenes = find_scenes(data)
    assert [scene.path.name for scene in scenes] == ["desk", "hall"]
    assert [path.name for path in scenes[1].images] == ["view_2.png", "view_9.png", "view_10.png"]


def test_a_scene_itself_is_a_folder_of_one(data: Path) -> None:
    (scene,) = find_scenes(data / "desk")
    assert scene.path == data / "desk"


# ---- what is refused


def test_a_damaged_truth_is_bad_input_whatever_is_damaged(tmp_path: Path) -> None:
    """Headers and directory of the archive hit at random: read as it is, or refused in the project's words."""
    write_scene(tmp_path / "scene", height=14, width=14)
    whole, path = (tmp_path / "scene" / "truth.npz").read_bytes(), tmp_path / "damaged.npz"
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for at in rng.choice([*range(200), *range(len(whole) - 400, len(whole))], 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            read_truth(path, 2)


def rewritten(path: Path, **changes: Any) -> None:
    """Write a truth.npz again, with entries replaced, or left out where they are None."""
    with np.load(path) as file:
        entries = {**{name: file[name] for name in file}, **changes}
    np.savez(path, **{name: array for name, array in entries.items() if array is not None})


def refusal(folder: Path) -> str:
    """Before any scene is loaded."""
    with pytest.raises(InputError) as caught:
        find_scenes(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


ONES = np.ones((2, 84, 112), np.float32)
BAD_TRUTH: list[tuple[dict[str, Any], str]] = [
    ({"depth": None}, "has no depth; it needs depth (S, H, W), extrinsics (S, 3, 4), intrinsics (S, 3, 3)"),
    ({"extrinsics": None}, "has no extrinsics; it needs "),
    ({"intrinsics": None}, "has no intrinsics; it needs "),
    ({"depth": ONES[0]}, ": depth is float32 (84, 112); expected numbers (S, H, W)"),
    ({"depth": ONES.astype("U1")}, ": depth is <U1 (2, 84, 112); expected numbers (S, H, W)"),
    ({"depth": ONES[:, :0]}, ": depth is float32 (2, 0, 112); expected numbers (S, H, W)"),
    ({"extrinsics": np.zeros((2, 4, 4))}, ": extrinsics is float64 (2, 4, 4); expected numbers (S, 3, 4)"),
    ({"intrinsics": np.zeros((2, 3, 4))}, ": intrinsics is float64 (2, 3, 4); expected numbers (S, 3, 3)"),
    ({"depth": ONES[:1]}, ": depth has 1 views beside 2 photographs; pass one for each"),
    ({"extrinsics": np.zeros((3, 3, 4))}, ": extrinsics has 3 views beside 2 photographs; pass one for each"),
    ({"depth": ONES * np.nan}, ": depth holds NaN or infinite values; mark a depth that is not known by 0"),
    ({"depth": -ONES}, ": depth is below 0 somewhere; mark a depth that is not known by 0"),
    ({"depth": 0 * ONES}, ": no pixel has a true depth above 0; there is nothing to compare with"),
    ({"extrinsics": np.ones((2, 3, 4))}, ": extrinsics of view 0 hold no rotation; pass [R | t] with R R^T = 1 and "),
    (
        {"intrinsics": np.stack([np.diag([90.0, 90, 1]), np.diag([90.0, 0, 1])])},
        ": intrinsics hold NaN or a focal length that is not above 0; pass focal lengths in pixels",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TRUTH)
def test_a_wrong_truth_is_named_with_its_file(changes: dict[str, Any], message: str, data: Path) -> None:
    shutil.copytree(data / "desk", data / "last")
    truth = data / "last" / "truth.npz"
    rewritten(truth, **changes)
    assert refusal(data).startswith(f'"{truth}"{" " * (message[0] != ":")}{message}')


def test_a_truth_of_other_proportions_is_named_with_its_photograph(data: Path) -> None:
    rewritten(data / "desk" / "truth.npz", depth=ONES[:, :, :84])
    assert refusal(data) == (
        f'image "{data}/desk/view_0.png" is 112x84, and its truth 84x84 has other proportions; crop them alike'
    )


@pytest.mark.parametrize(("photograph", "truth"), [((1080, 2400), (104, 230)), ((2400, 1080), (230, 104))])
def test_sides_are_compared_to_a_pixel_of_either(photograph: tuple[int, int], truth: tuple[int, int]) -> None:
    """230 x 1080 / 2400 = 103.5, which is 104 rounded; a truth that is off by one and a half is another one's."""
    _require_proportions("a.png", *photograph, truth[1], truth[0])
    wrong = (truth[0] + 2, truth[1]) if truth[0] < truth[1] else (truth[0], truth[1] + 2)
    with pytest.raises(InputError, match="has other proportions"):
        _require_proportions("a.png", *photograph, wrong[1], wrong[0])


def test_proportions_are_those_of_the_photograph_turned_upright(data: Path) -> None:
    """EXIF orientation 6: stored 112x84, seen 84x112."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (data / "desk").glob("*.png"):
        Image.open(path).save(path, exif=exif)
    assert f'image "{data}/desk/view_0.png" is 84x112, and its truth 112x84 has other proportions' in refusal(data)
    rewritten(data / "desk" / "truth.npz", depth=np.ones((2, 112, 84)))
    assert len(find_scenes(data)) == 2


def test_a_damaged_photograph_of_the_last_scene_is_told_at_once(data: Path) -> None:
    path = data / "hall" / "view_2.png"
    path.write_bytes(path.read_bytes()[:-500])
    assert refusal(data).startswith(f'image "{path}" cannot be decoded (')


def test_photographs_are_warned_of_once(data: Path) -> None:
    """They are read to be checked, and again to be used."""
    frames = [Image.new("RGB", (112, 84), colour) for colour in ("red", "blue")]
    frames[0].save(data / "desk" / "view_0.png", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scenes = find_scenes(data)
    with pytest.warns(Moe3dWarning, match="has several frames or pages"):
        scenes[0].load(CROP)


def test_a_truth_on_rows_that_are_cropped_away_is_none(tmp_path: Path) -> None:
    """A portrait of 56x168 is cropped to its middle 56 rows; only the first row has a depth."""
    write_scene(tmp_path / "tall", height=168, width=56)
    depth = np.zeros((2, 168, 56), np.float32)
    depth[:, 0] = 1
    rewritten(tmp_path / "tall" / "truth.npz", depth=depth)
    with pytest.raises(InputError) as caught:
        next(folder_scenes(find_scenes(tmp_path / "tall"), CROP))
    assert str(caught.value) == f'"{tmp_path / "tall"}": no pixel of its truth.npz that the model sees has a true depth'


def no_truth(data: Path) -> None:
    (data / "hall" / "truth.npz").unlink()


def empty_truth(data: Path) -> None:
    (data / "hall" / "truth.npz").write_bytes(b"")


def torn_truth(data: Path) -> None:
    truth = data / "hall" / "truth.npz"
    truth.write_bytes(truth.read_bytes()[:1000])


def array_for_truth(data: Path) -> None:
    with open(data / "hall" / "truth.npz", "wb") as file:
        np.save(file, ONES)


def pickled_truth(data: Path) -> None:
    np.savez(data / "hall" / "truth.npz", depth=np.array([{}], object))


def text_for_truth(data: Path) -> None:
    with zipfile.ZipFile(data / "hall" / "truth.npz", "w") as file:
        for name in ("depth", "extrinsics", "intrinsics"):
            file.writestr(name + ".npy", b"hello")


def no_photographs(data: Path) -> None:
    for path in (data / "hall").glob("*.png"):
        path.unlink()


def one_photograph_more(data: Path) -> None:
    Image.new("RGB", (112, 84)).save(data / "hall" / "view_3.png")


def no_scenes(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def a_file(data: Path) -> None:
    shutil.rmtree(data)
    data.write_text("no folder")


LAYOUT = "expected a folder per scene, with its photographs and truth.npz (docs/evaluation.md)"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_truth, f'"{{data}}/hall/truth.npz" is neither a file nor a folder; check the path; {LAYOUT}'),
        (empty_truth, '"{data}/hall/truth.npz" is no .npz of plain arrays; write it again, with numpy.savez'),
        (text_for_truth, '"{data}/hall/truth.npz": depth is |S5 (); expected numbers (S, H, W)'),
        (torn_truth, '"{data}/hall/truth.npz" is no .npz of plain arrays; write it again, with numpy.savez'),
        (array_for_truth, '"{data}/hall/truth.npz" is no .npz of plain arrays; write it again, with numpy.savez'),
        (pickled_truth, '"{data}/hall/truth.npz" is no .npz of plain arrays; write it again, with numpy.savez'),
        (no_photographs, 'folder "{data}/hall" holds no image; its sub-folders are not searched'),
        (one_photograph_more, '"{data}/hall/truth.npz": depth has 3 views beside 4 photographs; pass one for each'),
        (no_scenes, f'"{{data}}" holds no scene; {LAYOUT}'),
        (a_file, f'"{{data}}" is no folder; {LAYOUT}'),
    ],
)
def test_a_wrong_folder_is_one_line_before_any_scene_is_loaded(
    spoil: Callable[[Path], None], message: str, data: Path
) -> None:
    spoil(data)
    with pytest.raises(InputError) as caught:
        find_scenes(data)
    assert str(caught.value) == message.format(data=data)
