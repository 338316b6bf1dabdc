"""Damaged image files: a batch or one error with the name, never another exception, a long wait or much memory."""

import io
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe3d_deploy.child import peak_bytes
from moe3d_deploy.errors import InputError
from moe3d_deploy.views import load_views

SECONDS = 20  # for one file; the slowest takes 0.1 s on an idle machine
MEMORY = 512 << 20  # beyond what the process had: twice what the most pixels that are allowed here take


def encoded(kind: str, mode: str, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(noise[..., 0].astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(noise)
    (image if mode == "I;16" else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def oriented() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


MORE = [Image.new("RGB", (20, 16), (90 * i, 5, 5)) for i in range(2)]
FILES = [
    encoded("PNG", "RGB", exif=oriented()),
    encoded("PNG", "P", transparency=3),
    encoded("PNG", "I;16"),
    encoded("PNG", "RGB", save_all=True, append_images=[MORE[0].copy(), MORE[1].copy()]),
    encoded("JPEG", "RGB", exif=oriented()),
    encoded("JPEG", "RGB", progressive=True),
    encoded("JPEG", "CMYK"),
    encoded("TIFF", "RGB", exif=oriented()),
    encoded("TIFF", "I;16"),
    encoded("TIFF", "RGB", compression="tiff_lzw"),
    encoded("TIFF", "RGB", save_all=True, append_images=[MORE[0].copy(), MORE[1].copy()]),
    encoded("GIF", "P", save_all=True, append_images=[MORE[0].convert("P"), MORE[1].convert("P")]),
    encoded("WEBP", "RGBA", lossless=True),
    encoded("WEBP", "RGB", save_all=True, append_images=[MORE[0].copy(), MORE[1].copy()]),
    encoded("BMP", "RGB"),
    encoded("PPM", "RGB"),
    encoded("JPEG2000", "RGB"),
]

place = st.floats(0, 1, exclude_max=True)
change = st.one_of(
    st.tuples(st.just("truncate"), place, st.just(b"")),
    st.tuples(st.just("flip"), place, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("remove"), place, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("splice"), place, st.sampled_from(FILES)),
)


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, content in changes:
        at = int(where**2 * len(data))  # headers, where most can go wrong, are at the start
        if kind == "truncate":
            data = data[: at + 1]
        elif kind == "flip":
            data = data[:at] + content + data[at + len(content) :]
        elif kind == "insert":
            data = data[:at] + content + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + len(content) :]
        else:
            data = data[:at] + content[int(where * len(content)) :]
    return data


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few pixels are allowed, so that what is measured is the reader; a wait ends in an error."""

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)
    before = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("limits")
def test_mutated_images_give_a_batch_or_an_error_with_the_name(tmp_path: Path) -> None:
    path = tmp_path / "photo"
    counts = {"batch": 0, "error": 0}
    started_with = peak_bytes()

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(FILES), st.lists(change, min_size=1, max_size=3), st.booleans())
    def attempt(data: bytes, changes: list[tuple[str, float, bytes]], all_frames: bool) -> None:
        path.write_bytes(mutated(data, changes))
        message = ""
        signal.alarm(SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                views = load_views(path, mode="square", size=28, all_frames=all_frames)
            except InputError as error:
                message = str(error)
        signal.alarm(0)
        if message:
            assert f'"{path}"' in message
            assert "\n" not in message
            assert message.isprintable(), message
        else:
            images = views.batches[0].images
            assert images.shape[1:] == (3, 28, 28)
            assert 0 <= images.min() <= images.max() <= 1
        counts["error" if message else "batch"] += 1

    attempt()
    assert min(counts.values()) > 100, f"both outcomes are seen: {counts}"
    assert peak_bytes() - started_with < MEMORY
