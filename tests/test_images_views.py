"""Inputs of every kind as the views of scenes: order, names, choice, groups, standard input."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from videos import number_of, write_video

from moe3d_deploy.errors import InputError, Moe3dWarning
from moe3d_deploy.images import load_images
from moe3d_deploy.views import find_inputs, load_views, scene_size

pytestmark = pytest.mark.filterwarnings("error::moe3d_deploy.errors.Moe3dWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wide.png, tall.png, other.png (as wide), clip.mkv of 40 frames, moving.gif of 5, each frame of its own grey."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.new("RGB", (84, 56), (10, 0, 0)).save(folder / "wide.png")
    Image.new("RGB", (56, 84), (20, 0, 0)).save(folder / "tall.png")
    Image.new("RGB", (84, 56), (30, 0, 0)).save(folder / "other.png")
    frames = [Image.new("L", (84, 56), 40 * i) for i in range(5)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    write_video(folder / "clip.mkv")
    return folder


def names(views) -> list[list[str]]:
    return [[view.name for view in batch.views] for batch in views.batches]


def test_images_alone_are_what_load_images_gives(folder: Path) -> None:
    paths = [folder / "tall.png", folder / "wide.png", folder / "tall.png"]
    views = load_views(paths, mode="crop", size=42)
    expected = load_images(paths, mode="crop", size=42)
    (batch,) = views.batches
    np.testing.assert_array_equal(batch.images, expected.images)
    assert batch.views == expected.views
    assert views.notes == ()


def test_images_videos_and_animations_keep_their_order(folder: Path) -> None:
    inputs = [folder / "wide.png", folder / "clip.mkv", folder / "moving.gif", folder / "tall.png"]
    views = load_views(inputs, size=28, max_views=7, all_frames=True)
    assert names(views) == [
        [
            "wide.png",
            *("clip.mkv#000006", "clip.mkv#000020", "clip.mkv#000033"),  # 7 - 2 images = 3 + 2; 40 frames in 3 parts
            *("moving.gif#000001", "moving.gif#000003"),  # 5 frames in 2 parts
            "tall.png",
        ]
    ]
    images = views.batches[0].images
    assert [number_of(image.transpose(1, 2, 0) * 255) for image in images[1:4]] == [6, 20, 33]
    np.testing.assert_allclose(images[4:6, 0, 20, 14] * 255, [40, 120], atol=1)
    assert views.notes == (
        "clip.mkv: 3 of 40 frames, evenly spaced from 6 to 33",
        "moving.gif: 2 of 5 frames, evenly spaced from 1 to 3",
    )


def test_a_stride_holds_for_videos_and_animations(folder: Path) -> None:
    views = load_views([folder / "moving.gif", folder / "clip.mkv"], size=28, stride=2, start=1, all_frames=True)
    assert names(views) == [[f"moving.gif#{i:06d}" for i in (1, 3)] + [f"clip.mkv#{i:06d}" for i in range(1, 40, 2)]]


def test_an_animation_gives_its_first_frame_unless_all_are_asked_for(folder: Path) -> None:
    with pytest.warns(Moe3dWarning, match=r'moving\.gif" has several frames or pages; only the first is used'):
        views = load_views(folder / "moving.gif", size=28)
    assert names(views) == [["moving.gif"]]
    assert views.batches[0].images.max() == 0


def test_too_many_images_are_thinned_evenly(folder: Path, tmp_path: Path) -> None:
    for i in range(9):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{i}.png")
    views = load_views(tmp_path, size=28, max_views=3)
    assert names(views) == [["1.png", "4.png", "7.png"]]
    assert views.notes == ("3 of 9 images, evenly spaced",)
    assert load_views(tmp_path, size=28, max_views=9).notes == ()


def test_groups_are_scenes_of_one_size_without_padding(folder: Path) -> None:
    paths = [folder / "wide.png", folder / "tall.png", folder / "other.png", folder / "clip.mkv"]
    views = load_views(paths, size=42, group_by_size=True, max_views=4)
    assert [scene_size(batch) for batch in views.batches] == ["42x28", "42x42"]
    # 64x48 becomes 42x28: 31.5 rows are 2.25 patches
    assert names(views) == [["wide.png", "other.png", "clip.mkv#000020"], ["tall.png"]]


def test_one_size_is_one_group_and_needs_no_word(folder: Path) -> None:
    views = load_views([folder / "wide.png", folder / "other.png"], size=42, group_by_size=True)
    assert names(views) == [["wide.png", "other.png"]]
    assert views.notes == ()


def test_the_groups_are_told_with_what_separates_them(folder: Path) -> None:
    views = load_views([folder / "wide.png", folder / "tall.png", folder / "other.png"], size=42, group_by_size=True)
    assert views.notes == (
        "2 scenes, one per size: 42x28 (2 views), 42x42 (1 view); each has a world frame and a scale of its own",
    )
    alone = load_images([folder / "tall.png"], size=42)
    np.testing.assert_array_equal(views.batches[1].images, alone.images)
    assert views.batches[1].views == alone.views


# ---- folders, patterns, names


def test_a_folder_gives_its_videos_only_where_it_has_no_image(folder: Path, tmp_path: Path) -> None:
    assert [Path(path).name for path in find_inputs(folder)] == ["moving.gif", "other.png", "tall.png", "wide.png"]
    assert [Path(path).name for path in find_inputs(f"{folder}/*.mkv")] == ["clip.mkv"]
    (tmp_path / "CLIP.MKV").write_bytes((folder / "clip.mkv").read_bytes())
    assert names(load_views(tmp_path, size=28, max_views=1)) == [["CLIP.MKV#000020"]]


def test_a_video_is_known_by_its_content_where_the_suffix_says_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recording").write_bytes((folder / "clip.mkv").read_bytes())
    (tmp_path / "picture").write_bytes((folder / "wide.png").read_bytes())
    views = load_views([tmp_path / "recording", tmp_path / "picture"], size=28, max_views=2)
    assert names(views) == [["recording#000020", "picture"]]


def test_a_video_under_an_images_name_is_no_image(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((folder / "clip.mkv").read_bytes())
    with pytest.raises(InputError, match=r'image ".*a\.png" cannot be decoded \(unknown format\)'):
        load_views(tmp_path / "a.png")


# ---- standard input


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise IsADirectoryError(21, "Is a directory")


def test_an_image_comes_from_standard_input(folder: Path) -> None:
    stream = io.BytesIO((folder / "wide.png").read_bytes())
    views = load_views([folder / "tall.png", "-"], size=42, stdin=stream)
    assert names(views) == [["tall.png", "stdin"]]
    np.testing.assert_allclose(views.batches[0].images[1, 0, 20, 20] * 255, 10, atol=1e-3)


def test_a_file_of_that_name_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes((folder / "wide.png").read_bytes())
    assert find_inputs("./-") == [Path("-")]
    assert names(load_views(find_inputs("./-"), size=42)) == [["-"]]


@pytest.mark.parametrize(
    ("inputs", "stream", "message"),
    [
        (["-", "-"], io.BytesIO(b"x"), '"-" is given 2 times; standard input holds one image: name it once'),
        (["-"], None, '"-" reads an image from standard input, but nothing is piped in; name a file'),
        (["-"], Terminal(), '"-" reads an image from standard input, but nothing is piped in; name a file'),
        (["-"], io.BytesIO(), "image from standard input is empty (0 bytes); copy or record it again"),
        (["-"], Broken(), "image from standard input cannot be read: Is a directory"),
        (
            ["-"],
            io.BytesIO(b"no image"),
            "image from standard input cannot be decoded (unknown format); save it as PNG or JPEG",
        ),
    ],
)
def test_standard_input_that_cannot_be_used_is_said(inputs: list[str], stream: io.BytesIO | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_views(inputs, stdin=stream)
    assert str(caught.value) == message


def test_standard_input_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe3d_deploy.image_files.MAX_FILE_BYTES", 1000)
    with open("/dev/zero", "rb") as stream, pytest.raises(InputError) as caught:
        load_views("-", stdin=stream)
    assert str(caught.value).startswith("image from standard input has more than 1000 bytes")


# ---- what does not fit together


@pytest.mark.parametrize("options", [{"stride": 2}, {"start": 1}])
def test_a_choice_of_frames_without_frames_is_refused(folder: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError) as caught:
        load_views([folder / "wide.png", folder / "tall.png"], **options)
    assert str(caught.value) == (
        "a stride or a start is for videos (and animated images with --all-frames); none is given"
    )


def test_a_limit_that_leaves_nothing_for_a_video_is_refused(folder: Path) -> None:
    inputs = [folder / "wide.png", folder / "tall.png", folder / "clip.mkv"]
    with pytest.raises(InputError) as caught:
        load_views(inputs, max_views=2)
    assert str(caught.value) == "2 images and 1 video do not fit in 2 views; raise --max-views or name fewer"


def test_a_start_after_the_last_frame_of_an_animation_is_refused(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_views(folder / "moving.gif", size=28, start=5, all_frames=True)
    assert str(caught.value) == f'image "{folder}/moving.gif" has 5 frames; start at 0 to 4, not 5'


def test_no_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="no images given; name at least one image, video, folder or pattern"):
        load_views([])


def test_the_python_of_the_page_on_inputs_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "inputs.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "left.png").write_bytes((folder / "wide.png").read_bytes())
    write_video(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(block, "docs/inputs.md", "exec"), scope)
    assert len(scope["views"].batches[0].views) == 8
    assert scope["batch"].views[1].name == "clip.mp4#000002"  # the middle of the first 40/7 frames
    assert [frame.number for frame in scope["frames"]] == [0, 10, 20, 30]
