"""Videos: which frames, which way up, and files that are cut off, damaged, no video or the end of their decoder."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from videos import CODECS, HEIGHT, WIDTH, number_of, turned, write_video

from moe3d_deploy import video
from moe3d_deploy.child import run_in_child
from moe3d_deploy.errors import InputError, Moe3dWarning
from moe3d_deploy.frame_choice import FrameChoice, spaced
from moe3d_deploy.images import Fitting
from moe3d_deploy.video import is_video, read_video, video_views

pytestmark = pytest.mark.filterwarnings("error::moe3d_deploy.errors.Moe3dWarning")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {suffix: write_video(folder / f"clip.{suffix}") for suffix in CODECS}


# ---- which frames


@pytest.mark.parametrize(
    ("choice", "count", "numbers"),
    [
        (FrameChoice(), 5, [0, 1, 2, 3, 4]),
        (FrameChoice(), 32, list(range(32))),
        (FrameChoice(), 64, list(range(1, 64, 2))),  # the middles of 32 parts of two: the upper of each
        (FrameChoice(max_views=4), 40, [5, 15, 25, 35]),
        (FrameChoice(max_views=1), 9, [4]),
        (FrameChoice(start=30, max_views=2), 40, [32, 37]),  # parts 30..34 and 35..39
        (FrameChoice(stride=10), 40, [0, 10, 20, 30]),
        (FrameChoice(stride=10, start=3), 40, [3, 13, 23, 33]),
        (FrameChoice(stride=10, start=3, max_views=2), 40, [3, 13]),
        (FrameChoice(stride=1), 100, list(range(100))),
        (FrameChoice(start=40), 40, []),
    ],
)
def test_the_frames_that_are_chosen(choice: FrameChoice, count: int, numbers: list[int]) -> None:
    assert list(choice.numbers(count)) == numbers


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_evenly_spaced_frames_are_as_even_as_can_be(count: int, most: int) -> None:
    numbers = spaced(range(count), most)
    assert len(numbers) == min(count, most)
    gaps = np.diff([-1, *numbers, count])
    assert (gaps > 0).all()
    assert np.ptp(gaps[1:-1]) <= 1 if len(gaps) > 3 else True
    assert abs(int(gaps[0]) - int(gaps[-1])) <= 2, "as far from the start as from the end"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, "stride is 0; expected 1 or more"),
        ({"start": -1}, "start is -1; expected 0 or more"),
        ({"max_views": 0}, "max_views is 0; expected 1 or more"),
    ],
)
def test_a_choice_out_of_range_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_video("clip.mp4", **arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_are_those_of_their_numbers_in_every_container(clips: dict[str, Path], suffix: str) -> None:
    frames = read_video(clips[suffix], stride=9, start=2, max_views=4)
    assert [frame.number for frame in frames] == [2, 11, 20, 29]
    assert [number_of(frame.pixels) for frame in frames] == [2, 11, 20, 29]
    assert is_video(clips[suffix])


def test_frames_are_rgb_of_full_size(clips: dict[str, Path]) -> None:
    (frame,) = read_video(clips["mkv"], max_views=1)
    assert (frame.pixels.dtype, frame.pixels.shape) == (np.uint8, (HEIGHT, WIDTH, 3))
    np.testing.assert_allclose(frame.pixels[2, 2], [255, 0, 0], atol=4)  # through YUV


def test_views_are_fitted_and_named_and_their_choice_is_told(clips: dict[str, Path]) -> None:
    views, note = video_views(clips["mkv"], FrameChoice(), Fitting(size=56))
    assert note == (
        "clip.mkv: 32 of 40 frames, evenly spaced from 0 to 39; --max-views and --frame-stride choose others"
    )
    assert [view.name for _, view in views[:3]] == ["clip.mkv#000000", "clip.mkv#000001", "clip.mkv#000003"]
    assert {pixels.shape for pixels, _ in views} == {(42, 56, 3)}
    assert [number_of(pixels) for pixels, _ in views] == list(spaced(range(40), 32))
    assert (views[0][1].original_width, views[0][1].scale_x) == (WIDTH, WIDTH / 56)


@pytest.mark.parametrize(
    ("choice", "note"),
    [
        (FrameChoice(max_views=40), "a.mp4: all 40 frames"),
        (FrameChoice(max_views=2), "a.mp4: 2 of 40 frames, evenly spaced from 10 to 30"),
        (FrameChoice(start=10, max_views=30), "a.mp4: 30 of 40 frames, all from 10"),
        (FrameChoice(stride=9, start=2), "a.mp4: 5 of 40 frames, every 9 from 2 to 38"),
    ],
)
def test_the_line_on_the_choice(choice: FrameChoice, note: str) -> None:
    assert choice.note("a.mp4", list(choice.numbers(40)), 40) == note


def test_a_turned_video_is_upright_unless_that_is_ignored(clips: dict[str, Path], tmp_path: Path) -> None:
    """Turned clockwise, the red upper left quarter is at the upper right."""
    path = tmp_path / "phone.mp4"
    path.write_bytes(turned(clips["mp4"].read_bytes()))
    (upright,) = read_video(path, max_views=1)
    assert upright.pixels.shape == (WIDTH, HEIGHT, 3)
    assert upright.pixels[2, -3, 0] > 200
    assert upright.pixels[2, 2, 0] < 150
    (stored,) = read_video(path, max_views=1, exif="ignore")
    assert stored.pixels.shape == (HEIGHT, WIDTH, 3)
    assert stored.pixels[2, 2, 0] > 200


def test_a_name_of_any_bytes_is_read(clips: dict[str, Path], tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/http:caf\xe9 %02d\n.mp4"
    with open(path, "wb") as file:
        file.write(clips["mp4"].read_bytes())
    views, note = video_views(path, FrameChoice(max_views=1), Fitting(size=56))
    assert views[0][1].name == r"http:caf\xe9 %02d\n.mp4#000020"
    assert note.startswith(r"http:caf\xe9 %02d\n.mp4: 1 of 40 frames")


# ---- files that are not whole


def test_a_video_that_is_cut_off_is_spread_over_what_is_there(clips: dict[str, Path], tmp_path: Path) -> None:
    data = clips["mkv"].read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.warns(Moe3dWarning) as caught:
        frames = read_video(path, max_views=4)
    (message,) = [str(warning.message) for warning in caught if warning.category is Moe3dWarning]
    beginning, _, end = message.partition(" frames, but ends after ")
    assert beginning == f'video "{path}" announces 40'
    count = int(end.partition(" ")[0])
    assert 15 < count < 30
    assert end == f"{count} (matroska: File ended prematurely); copy or record it again"
    assert [frame.number for frame in frames] == list(spaced(range(count), 4))
    assert [number_of(frame.pixels) for frame in frames] == [frame.number for frame in frames]


def test_frames_that_are_not_announced_are_counted(clips: dict[str, Path], tmp_path: Path) -> None:
    """Live recordings have no length. Matroska's element Duration, 0x4489, here a double of 8 bytes."""
    data = clips["mkv"].read_bytes()
    at = data.index(b"\x44\x89\x88") + 3
    path = tmp_path / "live.mkv"
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    assert [frame.number for frame in read_video(path, max_views=4)] == [5, 15, 25, 35]
    assert (
        video_views(path, FrameChoice(stride=30), Fitting(size=56))[1]
        == "live.mkv: 2 of 40 frames, every 30 from 0 to 30"
    )


def test_damage_that_the_decoder_reports_is_told(clips: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(clips["mkv"].read_bytes())
    data[len(data) // 2] ^= 255  # FFV1 has a checksum per slice
    path = tmp_path / "bad.mkv"
    path.write_bytes(data)
    with pytest.warns(Moe3dWarning, match=r'bad\.mkv" is damaged \(ffv1: .*\); frames may be missing or wrong'):
        assert len(read_video(path)) == 32


def test_a_start_after_the_end_is_refused(clips: dict[str, Path]) -> None:
    with pytest.raises(InputError) as caught:
        read_video(clips["mp4"], start=40)
    assert str(caught.value) == f'video "{clips["mp4"]}" has 40 frames; start at 0 to 39, not 40'


CONCAT = b"ffconcat version 1.0\nfile clip.mp4\n"
UNUSABLE = {
    "empty": (b"", r"is empty \(0 bytes\); copy or record it again"),
    "zeros": (bytes(1000), r"cannot be decoded \(.+\); convert it: ffmpeg -i VIDEO -c:v libx264 OUT.mp4"),
    "text": (b"not a video", r"cannot be decoded \(unknown format or codec\); convert it"),
    "playlist": (CONCAT, r"cannot be decoded \(format concat is not read\); convert it"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_that_is_no_video_is_named(clips: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """A list of other files is none: whoever sends it would choose what is read."""
    data, message = UNUSABLE[kind]
    (tmp_path / "clip.mp4").write_bytes(clips["mp4"].read_bytes())
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(InputError, match=f'^video ".*a\\.mp4" {message}'):
        read_video(tmp_path / "a.mp4")
    assert kind == "empty" or not is_video(tmp_path / "a.mp4")


def test_a_video_of_unknown_codec_or_without_frames_is_named(clips: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.avi").write_bytes(clips["avi"].read_bytes().replace(b"XVID", b"nope"))
    with pytest.raises(InputError, match=r'^video ".*a\.avi" cannot be decoded \(.+\); convert it: ffmpeg'):
        read_video(tmp_path / "a.avi")
    data = clips["mp4"].read_bytes()
    at = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    (tmp_path / "b.mp4").write_bytes(data[:at] + bytes(end - at) + data[end:])
    with pytest.raises(InputError, match=r'^video ".*b\.mp4" cannot be decoded \(.+\); convert it: ffmpeg'):
        read_video(tmp_path / "b.mp4")


def test_a_missing_video_or_pipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'^video ".*a\.mp4" is neither a file nor a folder; check the path$'):
        read_video(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r'^video ".*a\.mp4" is a pipe, not a file'):
        read_video(tmp_path / "a.mp4")


# ---- decoders that crash or hang; these run in the child, in the decoder's place


def crash(request: dict[str, object], emit: object) -> dict[str, object]:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("still alive")


class Camera:
    """In OpenCV's place: five frames, each after 0.4 s."""

    waits: ClassVar[dict[int, float]] = {}  # further seconds before frames of a number

    def __init__(self, source: str, backend: int) -> None:
        self.position = 0

    def isOpened(self) -> bool:
        return True

    def set(self, key: int, value: float) -> bool:
        return True

    def get(self, key: int) -> float:
        return 5.0

    def grab(self) -> bool:
        time.sleep(0.4 + self.waits.get(self.position, 0.0))
        self.position += 1
        return self.position <= 5

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.zeros((5, 5, 3), np.uint8)


class StallsOnAFrame(Camera):
    waits = {3: 60.0}


class StallsOnOpen(Camera):
    def __init__(self, source: str, backend: int) -> None:
        time.sleep(60)


def from_camera(request: dict[str, object], camera: type[Camera]) -> dict[str, object]:
    video.cv2.VideoCapture = camera
    return video._decode({**request, "stall_seconds": 1}, lambda event: None)


def slow(request: dict[str, object], emit: object) -> dict[str, object]:
    return from_camera(request, Camera)


def stalls_on_a_frame(request: dict[str, object], emit: object) -> dict[str, object]:
    return from_camera(request, StallsOnAFrame)


def stalls_on_open(request: dict[str, object], emit: object) -> dict[str, object]:
    return from_camera(request, StallsOnOpen)


def test_a_decoder_that_crashes_is_an_error_with_the_name(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_CHILD", "test_video:crash")
    with pytest.raises(InputError) as caught:
        read_video(clips["mp4"])
    assert str(caught.value) == (
        f'decoding video "{clips["mp4"]}" ended with code -11: no message; '
        "convert it: ffmpeg -i VIDEO -c:v libx264 OUT.mp4"
    )


@pytest.mark.parametrize("child", [stalls_on_a_frame, stalls_on_open])
def test_a_decoder_that_hangs_is_an_error_with_the_name(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch, child: Callable[..., object]
) -> None:
    monkeypatch.setattr(video, "_CHILD", f"test_video:{child.__name__}")
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        read_video(clips["mp4"])
    assert time.monotonic() - started < 40
    assert str(caught.value) == (
        f'decoding video "{clips["mp4"]}" gave no frame in 60 s; convert it: ffmpeg -i VIDEO -c:v libx264 OUT.mp4'
    )


def test_a_decoder_that_is_slow_but_steady_is_waited_for(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_CHILD", "test_video:slow")
    assert len(read_video(clips["mp4"])) == 5


@settings(max_examples=14, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    suffix=st.sampled_from(sorted(CODECS)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=12),
    kept=st.floats(0.3, 1),
)
def test_mutated_videos_give_frames_or_an_error_with_the_name(
    clips: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    changes: list[tuple[float, int]],
    kept: float,
) -> None:
    data = bytearray(clips[suffix].read_bytes())
    for place, value in changes:
        data[min(int(place**2 * len(data)), len(data) - 1)] = value  # headers are at the start
    path = tmp_path_factory.getbasetemp() / f"mutated.{suffix}"
    path.write_bytes(data[: int(kept * len(data))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = ""
        try:
            frames = len(read_video(path, max_views=8))
        except InputError as error:
            message = str(error)
    if message:
        assert f'video "{path}"' in message
        assert "\n" not in message
    else:
        assert 1 <= frames <= 8


def test_the_memory_of_the_child_is_that_of_frames_at_network_size(clips: dict[str, Path], tmp_path: Path) -> None:
    request = {
        "path": str(clips["mkv"]),
        "label": "a",
        "name": "a",
        "choice": {"stride": 1, "start": 0, "max_views": None},
        "exif": "apply",
        "fitting": {"mode": "crop", "size": 518, "patch_size": 14, "exif": "apply"},
        "folder": str(tmp_path),
        "stall_seconds": 60,
    }
    found = run_in_child(video._CHILD, request)
    assert len(found.value["frames"]) == 40
    assert found.peak_bytes < 300 << 20  # Python, NumPy, Pillow and OpenCV, and one frame
