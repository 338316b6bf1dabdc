"""Survival matrix: photographs and arrays of every kind, sizes beyond the model's, and what the numbers do."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from survival import Printed, Refused

from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import InputError
from moe3d_deploy.images import load_images
from moe3d_deploy.runtime.session import Session

pytest_plugins = ["survival_fixtures"]
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM", "GIF")


@pytest.fixture(scope="module")
def session(finished: Path) -> Session:
    return Session.open(finished)


def encoded(kind: str, size: tuple[int, int] = (84, 56)) -> bytes:
    noise = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A header that promises 60000x60000 pixels, and almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def picture(mode: str, size: tuple[int, int], color: Any = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "TIFF" if mode in ("F", "I", "CMYK") else "PNG")
    return buffer.getvalue()


UNUSABLE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\x89",
    "text": lambda: b"this is a letter, not a photograph",
    "a web page": lambda: b"<!DOCTYPE html><title>404</title>",
    "an archive": lambda: b"PK\x03\x04" + bytes(100),
    "a promise of 3.6 billion pixels": huge_png,
    "one pixel": lambda: picture("RGB", (1, 1), (5, 6, 7)),
    "absurdly long": lambda: picture("L", (60000, 1)),
    "floats with NaN": lambda: picture("F", (40, 30), float("nan")),
    "32-bit integers": lambda: picture("I", (40, 30), 1 << 20),
}


@pytest.mark.survival(
    row="images that cannot be used",
    how="empty, text, other formats, a decompression bomb, absurd shape, no 8-bit pixels",
)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_that_is_no_usable_image_is_refused(kind: str, finished: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "left.png").write_bytes(encoded("PNG"))
    (tmp_path / "right.png").write_bytes(UNUSABLE[kind]())
    refused("run", finished, tmp_path / "left.png", tmp_path / "right.png", "-o", tmp_path / "out", names="right.png")
    assert not (tmp_path / "out").exists(), "images are read before anything is written"


@pytest.mark.survival(row="images that cannot be used", how="each format cut off at 24 places")
@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_cut_off_anywhere_is_refused_or_whole(
    kind: str, finished: Path, tmp_path: Path, refused: Refused
) -> None:
    """Some formats end in bytes that carry no pixels; what is taken has to be the picture."""
    whole = encoded(kind)
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(whole)
    expected = load_images([path], size=42).images
    errors: list[str] = []
    for size in np.linspace(0, len(whole) - 1, 24, dtype=int):
        path.write_bytes(whole[:size])
        try:
            taken = load_images([path], size=42).images
        except InputError as error:
            errors.append(str(error))
        else:
            np.testing.assert_array_equal(taken, expected)
    assert [error for error in errors if path.name not in error or "\n" in error] == []
    path.write_bytes(whole[: len(whole) // 3])
    refused("run", finished, path, "-o", tmp_path / "out", names=path.name)


@pytest.mark.survival(
    row="images that cannot be used", how="missing, an empty folder, a pattern without a match, no images at all"
)
@pytest.mark.parametrize("name", ["none.png", "empty", "*.jpg"])
def test_images_that_are_not_there_are_named(name: str, finished: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused("run", finished, tmp_path / name, "-o", tmp_path / "out", names=name)
    refused("run", finished, "-o", tmp_path / "out", names="IMAGES")


UNUSUAL: dict[str, Callable[[], bytes]] = {
    "grey": lambda: picture("L", (84, 56), 100),
    "grey with transparency": lambda: picture("LA", (84, 56), (100, 50)),
    "transparent": lambda: picture("RGBA", (84, 56), (10, 20, 30, 40)),
    "palette": lambda: picture("P", (84, 56), 3),
    "black and white": lambda: picture("1", (84, 56), 1),
    "16 bits": lambda: picture("I;16", (84, 56), 40000),
    "CMYK": lambda: picture("CMYK", (84, 56), (10, 20, 30, 40)),
    "portrait": lambda: picture("RGB", (56, 84), (5, 6, 7)),
}


@pytest.mark.survival(
    row="unusual images", how="each kind beside an ordinary photograph, of another size, through the model"
)
@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_image_goes_through_the_model(kind: str, session: Session, tmp_path: Path, photo: Path) -> None:
    path = tmp_path / "unusual.tiff"
    path.write_bytes(UNUSUAL[kind]())
    batch = load_images([photo, path], size=42)
    result = session.run(batch.images)
    assert result["depth"].shape == (2, *batch.images.shape[2:])
    assert_finite(result)


@pytest.mark.survival(row="unusual images", how="EXIF orientations 1 to 8, the photograph turned back")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    """One corner is red; where orientation n puts the stored top left corner is from the EXIF specification."""
    pixels = np.full((28, 42, 3), 255, np.uint8)
    pixels[:14, :14] = (255, 0, 0)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    views = load_images([tmp_path / "turned.png"], mode="pad", size=42).images[0]
    height, width = (42, 28) if orientation >= 5 else (28, 42)
    inside = views[:, (42 - height) // 2 : (42 + height) // 2, (42 - width) // 2 : (42 + width) // 2]
    row, column = (2 if corner[0] == "t" else -3), (2 if corner[1] == "l" else -3)
    assert inside[1, row, column] < 0.1, "the red corner"
    assert inside[1].mean() > 0.7


def assert_finite(result: dict[str, NDArray[Any]]) -> None:
    for name, array in result.items():
        assert np.isfinite(array).all(), name
    assert (result["depth_conf"] >= 1).all()


# ---- arrays


def scene(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).random(shape or (2, 3, 28, 42), np.float32)


def with_value(value: float) -> NDArray[np.float32]:
    array = scene()
    array[1, 2, 3, 4] = value
    return array


ARRAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: with_value(float("nan")), "nan"),
    "infinity": (lambda: with_value(float("inf")), "inf"),
    "beyond 1": (lambda: scene() * 255, "expected RGB in [0, 1]"),
    "negative": (lambda: scene() - 0.5, "expected RGB in [0, 1]"),
    "bytes": (lambda: np.zeros((2, 3, 28, 42), np.uint8), "8-bit"),
    "complex": (lambda: scene().astype(complex), "complex"),
    "objects": (lambda: np.full((2, 3, 28, 42), None), "object"),
    "text": (lambda: np.full((2, 3, 28, 42), "x"), "U1"),
    "channels last": (lambda: scene(2, 28, 42, 3), "2, 28, 42, 3)"),
    "one view without its axis": (lambda: scene(3, 28, 42), "(3, 28, 42)"),
    "no views": (lambda: scene(0, 3, 28, 42), "views"),
    "no pixels": (lambda: scene(2, 3, 0, 42), "height"),
    "a number": (lambda: 0.5, "()"),
    "nothing": (lambda: None, "expected (S, 3, H, W)"),
    "ragged lists": (lambda: [[0.5], [0.5, 0.5]], "list"),
}  # fmt: skip


@pytest.mark.survival(
    row="arrays that do not fit", how="NaN, infinity, wrong range, type, number of axes or order of axes to Session.run"
)
@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_does_not_fit_is_refused(kind: str, session: Session, printed: Printed) -> None:
    make, names = ARRAYS[kind]
    with pytest.raises(InputError, match=re.escape(names)) as caught:
        session.run(make())
    assert "\n" not in str(caught.value)
    printed(str(caught.value), InputError.exit_code)


STRIDES: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "transposed": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "every second column of another": lambda a: np.repeat(a, 2, axis=3)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "Fortran order": np.asfortranarray,
    "read-only": lambda a: np.frombuffer(a.tobytes(), np.float32).reshape(a.shape),
    "other byte order": lambda a: a.astype(">f4"),
    "float64": lambda a: a.astype(np.float64),
}


@pytest.mark.survival(
    row="arrays that do not fit",
    how="the same values non-contiguous, read-only, byte-swapped or float64: the same result",
)
@pytest.mark.parametrize("kind", STRIDES)
def test_how_an_array_lies_in_memory_does_not_matter(kind: str, session: Session) -> None:
    images = scene()
    other = STRIDES[kind](images)
    for name, array in session.run(images).items():
        np.testing.assert_array_equal(session.run(other)[name], array)
    np.testing.assert_array_equal(other, images)


# ---- sizes


@pytest.mark.survival(
    row="sizes that do not fit", how="images whose height or width is no multiple of 14, to Session.run"
)
@pytest.mark.parametrize(("shape", "names"), [
    ((1, 3, 29, 42), "height is 29; accepted are 14 and more in steps of 14, the nearest is 28"),
    ((1, 3, 28, 41), "width is 41; accepted are 14 and more in steps of 14, the nearest is 42"),
    ((1, 3, 28, 7), "width is 7; accepted are 14 and more in steps of 14, the nearest is 14"),
])  # fmt: skip
def test_a_size_between_the_steps_is_refused(
    shape: tuple[int, ...], names: str, session: Session, printed: Printed
) -> None:
    with pytest.raises(InputError, match=re.escape(names)) as caught:
        session.run(scene(*shape))
    printed(str(caught.value), InputError.exit_code)


@pytest.mark.survival(row="sizes that do not fit", how="`moe3d run --size` and the shapes of an engine")
@pytest.mark.parametrize(("flags", "names"), [
    (("--height", "100"), "100 is not a multiple of the patch size 14; nearest is 98"),
    (("--height", "140:1000000:14"), "expected a number, min:max or min:opt:max"),
    (("--views", "8:4:2"), "sizes must rise"),
    (("--views", "0"), "every size must be at least 1"),
    (("--width", "wide"), "'wide'"),
])  # fmt: skip
def test_a_profile_that_cannot_be_is_refused(
    flags: tuple[str, ...], names: str, plain: Path, photo: Path, refused: Refused
) -> None:
    refused("export", plain, *flags, names=names)
    refused("run", plain, photo, "-o", plain.parent / "out", "--size", "100", names="100 is not a multiple")


# ---- numbers


def filled(value: float) -> NDArray[np.float32]:
    return np.full((3, 3, 42, 42), value, np.float32)


def halves() -> NDArray[np.float32]:
    images = filled(0.0)
    images[..., 21:] = 1
    return images


PICTURES: dict[str, Callable[[], NDArray[np.float32]]] = {
    "black": lambda: filled(0.0),
    "white": lambda: filled(1.0),
    "the smallest float": lambda: filled(np.float32(1e-45)),
    "saturated noise": lambda: (scene(3, 3, 42, 42) > 0.5).astype(np.float32),
    "one bright pixel": lambda: np.pad(np.ones((3, 3, 1, 1), np.float32), ((0, 0), (0, 0), (20, 21), (20, 21))),
    "half black, half white": halves,
}


@pytest.mark.survival(
    row="black, white and saturated images", how="images of one value, saturated noise, single pixels"
)
@pytest.mark.parametrize("kind", PICTURES)
def test_extreme_images_give_finite_outputs(kind: str, session: Session) -> None:
    assert_finite(session.run(PICTURES[kind]()))


@pytest.mark.survival(row="black, white and saturated images", how="a black and a white photograph through `moe3d run`")
def test_a_black_and_a_white_photograph_give_a_scene(finished: Path, tmp_path: Path, printed: Printed,
                                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for name, value in (("black.png", 0), ("white.png", 255)):
        Image.new("RGB", (84, 56), (value, value, value)).save(tmp_path / name)
    arguments = ["run", str(finished), str(tmp_path / "black.png"), str(tmp_path / "white.png")]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    printed(capsys.readouterr().out.splitlines()[1], 0)
    assert (tmp_path / "out" / "cameras.json").exists()


@pytest.mark.survival(row="many views", how="48, 49 and 96 views of one scene")
@pytest.mark.parametrize("views", [48, 49, 96])
def test_many_views_give_finite_outputs(views: int, session: Session) -> None:
    result = session.run(scene(views, 3, 28, 42))
    assert result["depth"].shape == (views, 28, 42)
    assert_finite(result)


@pytest.mark.survival(row="the same input again", how="100 runs of one session and one of a new session, bit by bit")
def test_the_same_images_give_the_same_bits(session: Session, finished: Path) -> None:
    images = scene()
    first = session.run(images)
    for result in (*(session.run(images) for _ in range(100)), Session.open(finished).run(images)):
        for name, array in result.items():
            assert array.tobytes() == first[name].tobytes(), name
