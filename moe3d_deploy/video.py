"""Frames of a video file, decoded by OpenCV (FFmpeg) in a process of its own.

A codec is C code that is fed a file from anywhere: what crashes or hangs it is an error and not the caller's end.
Frames are decoded one after the other up to the last one wanted, since jumps are not exact in every format.
"""

import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.errors import InputError, Moe3dError, Moe3dWarning
from moe3d_deploy.frame_choice import FrameChoice
from moe3d_deploy.image_files import PathLike, open_file, shown
from moe3d_deploy.images import Exif, Fitting, Prepared, fit
from moe3d_deploy.view_mapping import ViewMapping

# FFmpeg's names of the container formats that are read. Others open further files or addresses (playlists, concat).
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
_MAGIC = re.compile(  # how a file of these formats begins
    rb"....(ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01\xba|FLV\x01|0&\xb2u\x8ef\xcf\x11|OggS"
    rb"|G.{187}G|....G.{191}G",
    re.DOTALL,
)
_MAGIC_BYTES = 200
_MAX_FRAME_PIXELS = 1 << 26  # twice an 8K frame
_STALL_SECONDS = 60  # in which a decoder has to give its next frame
_CHILD = "moe3d_deploy.video:_decode"
_REMEDY = "convert it: ffmpeg -i VIDEO -c:v libx264 OUT.mp4"


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One frame: its number from 0 and its pixels (H, W, 3), uint8 RGB."""

    number: int
    pixels: NDArray[np.uint8]


def read_video(
    path: PathLike,
    *,
    stride: int | None = None,
    start: int = 0,
    max_views: int | None = None,
    exif: Exif = "apply",
) -> list[VideoFrame]:
    """Frames of a video at full size: which ones says `FrameChoice`; without a choice at most 32, evenly spaced.

    exif   "apply" turns them as the file says (phones), "ignore" leaves them as stored

    They are in memory all at once, 3 bytes per pixel; `views.load_views` keeps them at network size only.
    A video that ends before the number of frames it announces, and one whose decoder reports damage, is a Moe3dWarning.
    Raises InputError, with the file's name, for a file that is no video, holds no frame, crashes or stalls its decoder.
    """
    choice = FrameChoice(stride, start, max_views)
    if exif not in ("apply", "ignore"):
        raise InputError(f'exif is "{exif}"; choose apply or ignore')
    with tempfile.TemporaryDirectory() as folder:
        found = _decode_in_child(path, choice, exif, None, folder)
        return [VideoFrame(number, _pixels(folder, number)) for number, _ in found["frames"]]


def video_views(path: PathLike, choice: FrameChoice, fitting: Fitting) -> tuple[list[Prepared], str]:
    """The chosen frames fitted to network size, and a line that says which they are. Raises as `read_video`."""
    with tempfile.TemporaryDirectory() as folder:
        found = _decode_in_child(path, choice, fitting.exif, fitting, folder)
        views = [(_pixels(folder, number), ViewMapping(**mapping)) for number, mapping in found["frames"]]
    return views, choice.note(_name(path), [number for number, _ in found["frames"]], found["count"])


def is_video(path: PathLike) -> bool:
    """Whether a file begins as one of the video formats that are read. Raises InputError for what is no file."""
    with open_file(path, f'"{shown(path)}"') as file:
        return _MAGIC.match(file.read(_MAGIC_BYTES)) is not None


def _name(path: PathLike) -> str:
    return shown(os.path.basename(os.fsdecode(path)))


def _pixels(folder: str, number: int) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.load(_frame_file(folder, number), allow_pickle=False)
    return pixels


def _frame_file(folder: str, number: int) -> Path:
    return Path(folder) / f"{number}.npy"


class _DecoderEndedError(Moe3dError):
    """The child ended without an answer."""


def _decode_in_child(
    path: PathLike, choice: FrameChoice, exif: str, fitting: Fitting | None, folder: str
) -> dict[str, Any]:
    """What `_decode` returns; the frames lie in `folder`. It costs the start of a Python."""
    label = f'video "{shown(path)}"'
    request = {
        "path": os.path.abspath(os.fsdecode(path)),
        "label": label,
        "name": _name(path),
        "choice": asdict(choice),
        "exif": exif,
        "fitting": asdict(fitting) if fitting else None,
        "folder": folder,
        "stall_seconds": _STALL_SECONDS,
    }
    open_file(path, label).close()  # what is no file is said without a child
    try:
        found = run_in_child(_CHILD, request, title=f"decoding {label}", failure=_DecoderEndedError).value
    except _DecoderEndedError as error:
        stalled = f"code -{signal.SIGALRM.value}:" in str(error)
        reason = f"decoding {label} gave no frame in {_STALL_SECONDS} s" if stalled else str(error)
        raise InputError(f"{reason}; {_REMEDY}") from error
    announced, count, complaint = found["announced"], found["count"], found["complaint"]
    if announced is not None and announced > count:
        reason = f" ({complaint})" if complaint else ""
        _warn(f"{label} announces {announced} frames, but ends after {count}{reason}; copy or record it again")
    elif complaint:
        _warn(f"{label} is damaged ({complaint}); frames may be missing or wrong: look at the pictures")
    return found


def _warn(message: str) -> None:
    warnings.warn(message, Moe3dWarning, stacklevel=4)


# ---- in the child


def _decode(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Write the chosen frames to the folder as <number>.npy, at network size if a fitting is given.

    Returns `frames`, pairs of number and mapping (None without a fitting); `count`, how many frames the video has as
    far as is known; `announced`, how many it says to have, None if it does not; `complaint`, FFmpeg's first, or None.
    """
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"format_whitelist;{_FORMATS}"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, in C code as well
    label, choice = request["label"], FrameChoice(**request["choice"])
    fitting = Fitting(**request["fitting"]) if request["fitting"] else None
    mappings: dict[int, dict[str, Any] | None] = {}

    def save(number: int, pixels: NDArray[np.uint8]) -> None:
        mappings[number] = None
        if fitting:
            name = f"{request['name']}#{number:06d}"
            pixels, view = fit(Image.fromarray(pixels), name, f"{label} frame {number}", fitting)
            mappings[number] = view.to_dict()
        np.save(_frame_file(request["folder"], number), pixels)

    with open_file(request["path"], label) as file, _codec_messages() as messages:
        # by descriptor: no other file under that name, no name that FFmpeg takes for an address
        reader = _Reader(
            f"/proc/self/fd/{file.fileno()}", label, request["exif"] == "apply", request["stall_seconds"], messages
        )
        announced = reader.announced()
        count = reader.read(None, save) if announced is None else announced
        numbers = choice.numbers(count)
        if numbers and (end := reader.read(numbers, save)) <= numbers[-1]:
            count = end
            if choice.stride is None and end:  # evenly spaced over what is there
                mappings.clear()
                numbers = choice.numbers(count)
                if numbers:
                    reader.read(numbers, save)
        if count and choice.start >= count:
            raise InputError(f"{label} has {count} frames; start at 0 to {count - 1}, not {choice.start}")
        if not mappings:
            reason = _first(messages()) or "no frame can be read"
            raise InputError(f"{label} cannot be decoded ({reason}); {_REMEDY}")
        return {
            "frames": sorted(mappings.items()),
            "count": count,
            "announced": announced,
            "complaint": _first(messages()),
        }


class _Reader:
    """Reads one video from its start, as often as asked."""

    def __init__(
        self, source: str, label: str, upright: bool, stall_seconds: int, messages: Callable[[], list[str]]
    ) -> None:
        self.source, self.label, self.upright = source, label, upright
        self.stall_seconds, self.messages = stall_seconds, messages

    def announced(self) -> int | None:
        """The number of frames in the header, or computed from length and rate; None where there is neither."""
        count = self._open().get(cv2.CAP_PROP_FRAME_COUNT)
        return int(count) if 1 <= count < 2**53 else None

    def read(self, numbers: Sequence[int] | None, save: Callable[[int, NDArray[np.uint8]], None]) -> int:
        """Hand the frames of those ascending numbers to `save`, and return how many were read through: one more than
        the last number, or fewer where the video ends before it. Without numbers, count all."""
        capture = self._open()
        wanted = iter(numbers if numbers is not None else ())
        number = next(wanted, None)
        position = 0
        while numbers is None or number is not None:
            signal.alarm(self.stall_seconds)
            if not capture.grab():
                break
            if position == number:
                done, pixels = capture.retrieve()
                if not done:
                    break
                save(number, np.ascontiguousarray(pixels[..., ::-1], np.uint8))  # from BGR
                number = next(wanted, None)
            position += 1
        signal.alarm(0)
        return position

    def _open(self) -> cv2.VideoCapture:
        signal.alarm(self.stall_seconds)
        capture = cv2.VideoCapture(self.source, cv2.CAP_FFMPEG)
        if not capture.isOpened():
            reason = _first(self.messages()) or "unknown format or codec"
            raise InputError(f"{self.label} cannot be decoded ({reason}); {_REMEDY}")
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, float(self.upright))
        if bool(capture.get(cv2.CAP_PROP_ORIENTATION_AUTO)) != self.upright:
            raise InputError(f"{self.label} cannot be turned or left as stored: OpenCV lacks the option; update it")
        width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > _MAX_FRAME_PIXELS:
            raise InputError(f"{self.label} has frames of {width}x{height}, too many pixels to decode; downscale it")
        return capture


@contextmanager
def _codec_messages() -> Iterator[Callable[[], list[str]]]:
    """Within the block, a function for the lines that FFmpeg has written to stderr so far."""
    original = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)

        def lines() -> list[str]:
            text = os.pread(log.fileno(), 1 << 16, 0).decode(errors="replace")
            found = re.findall(r"^\[([\w,]+) @ 0x[0-9a-f]+\] (.+)$", text, re.MULTILINE)
            return [_plain(codec.partition(",")[0], shown(message.strip())) for codec, message in found]

        try:
            yield lines
        finally:
            os.dup2(original, 2)
            os.close(original)


def _plain(source: str, message: str) -> str:
    return f"format {source} is not read" if "not on whitelist" in message else f"{source}: {message}"


def _first(lines: list[str]) -> str | None:
    return lines[0] if lines else None
