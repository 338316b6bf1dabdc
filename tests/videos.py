"""Small videos whose frames tell their number: frame i is grey of value 6 i, with a red upper left quarter."""

import struct
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT, STEP = 64, 48, 6
CODECS = {"mp4": "mp4v", "mov": "mp4v", "avi": "XVID", "mkv": "FFV1", "webm": "VP90", "flv": "FLV1", "ts": "mp4v"}


def write_video(path: Path, frames: int = 40) -> Path:
    """A video in the container that the suffix says, at most 42 frames; FFV1 in .mkv is without loss."""
    fourcc = cv2.VideoWriter_fourcc(*CODECS[path.suffix[1:]])
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, fourcc, 10, (WIDTH, HEIGHT))
    assert writer.isOpened()
    for i in range(frames):
        picture = np.full((HEIGHT, WIDTH, 3), STEP * i, np.uint8)
        picture[: HEIGHT // 2, : WIDTH // 2] = (0, 0, 255)
        writer.write(picture)
    writer.release()
    return path


def number_of(pixels: np.ndarray) -> int:
    """The number of the frame that shows these pixels (H, W, 3), by its lower right quarter."""
    height, width = pixels.shape[:2]
    return round(float(pixels[height * 3 // 4, width * 3 // 4].mean()) / STEP)


def turned(data: bytes) -> bytes:
    """An mp4 with a track matrix of a quarter turn, clockwise when shown (ISO/IEC 14496-12, tkhd)."""
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # after type, version and flags, times and ids, reserved, layer
    matrix = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, HEIGHT << 16, 0, 0x40000000)
    assert struct.unpack(">9i", data[at : at + 36])[0] == 0x10000, "the matrix was the identity"
    return data[:at] + matrix + data[at + 36 :]
