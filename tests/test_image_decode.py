"""Bytes of image files to 8-bit RGB: colour modes, depths, orientations and frames."""

import io
import struct
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from moe3d_deploy.errors import InputError, Moe3dWarning
from moe3d_deploy.image_decode import count_frames, decode_frames, decode_image

LABEL = 'image "photo.png"'
Pixels = NDArray[np.uint8]


pytestmark = pytest.mark.filterwarnings("error")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, **options) -> Pixels:
    image = decode_image(data, LABEL, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def one(mode: str, value, kind: str = "PNG", **options) -> list[int]:
    """The RGB of the corner of a picture of one value."""
    return decoded(encoded(Image.new(mode, (6, 4), value), kind, **options))[0, 0].tolist()


# ---- colour modes


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 90, [90, 90, 90]),
        ("1", 1, [255, 255, 255]),
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("LA", (90, 255), [90, 90, 90]),
        ("LA", (90, 0), [255, 255, 255]),
        ("LA", (100, 51), [224, 224, 224]),  # 255 + (100 - 255) * 51/255
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (5, 105, 205, 51), [205, 225, 245]),
    ],
)
def test_transparency_lies_over_white(mode: str, value: int, expected: list[int]) -> None:
    assert one(mode, value) == expected


def palette(**options) -> bytes:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([200, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    return encoded(image, **options)


def test_a_palette_gives_its_colours() -> None:
    pixels = decoded(palette())
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette_is_white(kind: str) -> None:
    pixels = decoded(palette(kind=kind, transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [10, 20, 30]


def test_half_transparent_entries_of_a_palette_are_mixed() -> None:
    assert decoded(palette(transparency=bytes([51, 255])))[0, 0].tolist() == [244, 204, 204]  # 255 + (c - 255) / 5


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 8, 9)), ("1", 0)])
def test_a_colour_declared_transparent_is_white(mode: str, key: int) -> None:
    image = Image.new(mode, (6, 4), 1 if mode == "1" else 0)
    image.putpixel((0, 0), key)
    pixels = decoded(encoded(image, transparency=key))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == ([255] * 3 if mode == "1" else [0, 0, 0])


def test_colours_multiplied_by_alpha_are_divided_again() -> None:
    """TIFF's associated alpha: (40, 80, 120) of alpha 128 are (80, 159, 239), over white (167, 207, 247)."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:] = (40, 80, 120, 128)
    data = tiff(pixels.tobytes(), 6, 4, bits=(8, 8, 8, 8), photometric=2, extra=1)
    np.testing.assert_allclose(decoded(data)[0, 0], [167, 207, 247], atol=1)


# ---- CMYK: (ink / 255) takes its share of red, green, blue


def without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    assert data[at + 4 : at + 9] == b"Adobe"
    (length,) = struct.unpack(">H", data[at + 2 : at + 4])
    return data[:at] + data[at + 2 + length :]


def test_cmyk_without_inversion_is_ink() -> None:
    assert one("CMYK", (255, 0, 0, 0), "TIFF") == [0, 255, 255]
    assert one("CMYK", (0, 0, 0, 0), "TIFF") == [255, 255, 255]


def test_cmyk_of_adobe_is_stored_inverted() -> None:
    """Pillow writes Adobe's marker and 255 - ink."""
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(decoded(data)[0, 0], [0, 255, 255], atol=2)


def test_cmyk_without_adobes_marker_is_stored_as_ink() -> None:
    """ITU-T T.872: without the marker 0 is no ink, so the same bytes are the other colours: 255 of M, Y and K."""
    data = without_adobe(encoded(Image.new("CMYK", (16, 16), (255, 255, 0, 255)), "JPEG", quality=100))
    np.testing.assert_allclose(decoded(data)[0, 0], [255, 255, 0], atol=2)  # stored 0, 0, 255, 0: yellow


# ---- more than 8 bits


def tiff(data: bytes, width: int, height: int, *, bits: Sequence[int], photometric: int, extra: int | None = None):
    """An uncompressed little-endian TIFF of one strip (TIFF 6.0)."""
    values = struct.pack(f"<{len(bits)}H", *bits)
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, len(bits), bits[0]), (259, 3, 1, 1)]
    tags += [(262, 3, 1, photometric), (273, 4, 1, 0), (277, 3, 1, len(bits)), (278, 3, 1, height)]
    tags += [(279, 4, 1, len(data))]
    tags += [(338, 3, 1, extra)] if extra is not None else []
    at = 8 + 2 + 12 * len(tags) + 4
    place = {258: at if len(bits) > 2 else bits[0], 273: at + len(values)}
    entries = b"".join(struct.pack("<HHII", tag, kind, n, place.get(tag, value)) for tag, kind, n, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + values + data


RAMP = np.arange(0, 65536, 1365, dtype=np.uint16)[:48].reshape(6, 8)  # 48 values over the 16 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(kind: str) -> None:
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(RAMP), kind))[..., 1], RAMP >> 8)


def test_big_endian_sixteen_bit_grey_keeps_its_high_byte() -> None:
    data = tiff(RAMP.astype(">u2").tobytes(), 8, 6, bits=(16,), photometric=1)
    swapped = b"MM\0*" + struct.pack(">IH", 8, 9)  # the same directory, big-endian
    for i in range(9):
        tag, kind, n, value = struct.unpack("<HHII", data[10 + 12 * i : 22 + 12 * i])
        swapped += struct.pack(">HHI", tag, kind, n) + (
            struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        )
    np.testing.assert_array_equal(decoded(swapped + data[118:])[..., 0], RAMP >> 8)


def test_sixteen_bit_grey_whose_zero_is_white_is_inverted() -> None:
    data = tiff(RAMP.tobytes(), 8, 6, bits=(16,), photometric=0)
    np.testing.assert_array_equal(decoded(data)[..., 0], (65535 - RAMP) >> 8)


def test_twelve_bit_grey_uses_all_of_its_bits() -> None:
    """Two pixels in three bytes, the first in the higher bits."""
    values = RAMP >> 4
    packed = [byte for a, b in values.reshape(-1, 2).tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255)]
    data = tiff(bytes(packed), 8, 6, bits=(12,), photometric=1)
    np.testing.assert_array_equal(decoded(data)[..., 0], values >> 4)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colour_keeps_its_high_byte(suffix: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65536, (6, 8, channels), dtype=np.uint16)
    if channels == 4:
        pixels[..., 3] = 65535
    data = cv2.imencode(suffix, pixels)[1].tobytes()
    np.testing.assert_array_equal(decoded(data), (pixels[..., 2::-1] >> 8).astype(np.uint8))


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    image = Image.fromarray(RAMP)
    pixels = decoded(encoded(image, transparency=int(RAMP[0, 3])))
    expected = (RAMP >> 8).astype(np.uint8)
    expected[0, 3] = 255
    np.testing.assert_array_equal(pixels[..., 0], expected)


def test_twelve_bits_in_sixteen_are_said_to_look_black() -> None:
    data = encoded(Image.fromarray(RAMP >> 4))
    with pytest.warns(Moe3dWarning) as caught:
        np.testing.assert_array_equal(decoded(data)[..., 0], RAMP >> 12)
    assert str(caught[0].message) == (
        'image "photo.png" uses only the lowest 12 of its 16 bits and looks black; '
        "if its sensor has 12 bits, multiply its values by 16"
    )


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (6, 4), 0.5), "holds floating-point pixels; save it with 8 bits per channel"),
        (Image.new("I", (6, 4), 70000), "holds more than 16 bits; save it with 8 bits per channel"),
        (Image.new("I", (6, 4), -1), "holds more than 16 bits; save it with 8 bits per channel"),
    ],
)
def test_pixels_without_a_known_range_are_refused(image: Image.Image, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        decode_image(encoded(image, "TIFF"), LABEL)
    assert str(caught.value) == f"{LABEL} {reason}"


# ---- orientation


def upright(stored: Pixels, orientation: int) -> Pixels:
    """EXIF 2.32, 4.6.5.1: where the 0th row and the 0th column of the stored picture are when it is looked at."""
    row_at, column_at = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    height, width = stored.shape[:2]
    shape = (height, width) if orientation < 5 else (width, height)
    seen = np.zeros((*shape, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            place = {row_at: row, column_at: column}
            y = place["top"] if "top" in place else shape[0] - 1 - place["bottom"]
            x = place["left"] if "left" in place else shape[1] - 1 - place["right"]
            seen[y, x] = stored[row, column]
    return seen


STORED = np.random.default_rng(3).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def oriented(kind: str, orientation: object, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(STORED), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_orientations_are_applied_or_ignored(kind: str, options: dict[str, object], orientation: int) -> None:
    data = oriented(kind, orientation, **options)
    np.testing.assert_array_equal(decoded(data), upright(STORED, orientation))
    np.testing.assert_array_equal(decoded(data, exif="ignore"), STORED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_a_jpeg_are_applied_or_ignored(orientation: int) -> None:
    data = oriented("JPEG", orientation, quality=100)
    stored = np.asarray(Image.open(io.BytesIO(data)))  # as lossy as it is
    np.testing.assert_array_equal(decoded(data), upright(stored, orientation))
    np.testing.assert_array_equal(decoded(data, exif="ignore"), stored)


@pytest.mark.parametrize("orientation", [0, 9, 300])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_orientation_that_is_none_leaves_the_picture(kind: str, orientation: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        np.testing.assert_array_equal(decoded(oriented(kind, orientation)), STORED)


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40])
def test_an_exif_block_of_nonsense_leaves_the_picture(block: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        np.testing.assert_array_equal(decoded(encoded(Image.fromarray(STORED), exif=block)), STORED)


def test_a_turned_sixteen_bit_tiff_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(RAMP), "TIFF", exif=exif)
    np.testing.assert_array_equal(decoded(data)[..., 0], np.rot90(RAMP >> 8, -1))


# ---- several frames

ANIMATED = [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]


def animated(kind: str, options: dict[str, object]) -> bytes:
    """Three frames, red 10, 70 and 130."""
    first, *others = [Image.new("RGB", (16, 12), (60 * i + 10, 0, 0)) for i in range(3)]
    return encoded(first, kind, save_all=True, append_images=others, **options)


@pytest.mark.parametrize(("kind", "options"), ANIMATED)
def test_the_first_of_several_frames_is_used_and_that_is_said(kind: str, options: dict[str, object]) -> None:
    with pytest.warns(Moe3dWarning) as caught:
        assert decoded(animated(kind, options))[0, 0].tolist() == [10, 0, 0]
    assert [str(warning.message) for warning in caught] == [
        'image "photo.png" has several frames or pages; only the first is used (--all-frames takes them all)'
    ]


@pytest.mark.parametrize(("kind", "options"), ANIMATED)
def test_every_frame_can_be_read(kind: str, options: dict[str, object]) -> None:
    data = animated(kind, options)
    assert count_frames(data, LABEL) == 3
    pictures = list(decode_frames(data, LABEL, [0, 1, 2]))  # each is a picture of its own
    assert [np.asarray(picture)[0, 0].tolist() for picture in pictures] == [[10, 0, 0], [70, 0, 0], [130, 0, 0]]
    assert [np.asarray(frame)[0, 0, 0] for frame in decode_frames(data, LABEL, [2])] == [130]


def test_pages_of_a_tiff_keep_their_sizes() -> None:
    data = encoded(Image.new("RGB", (16, 12)), "TIFF", save_all=True, append_images=[Image.new("L", (20, 10))])
    assert [frame.size for frame in decode_frames(data, LABEL, [0, 1])] == [(16, 12), (20, 10)]


def test_the_previews_in_a_photograph_are_not_its_frames() -> None:
    data = animated("MPO", {})
    assert count_frames(data, LABEL) == 1
    np.testing.assert_allclose(decoded(data)[0, 0], [10, 0, 0], atol=2)


def test_a_damaged_later_frame_does_not_cost_the_first() -> None:
    data = animated("GIF", {})
    with pytest.warns(Moe3dWarning, match="several frames"):
        assert decoded(data[: len(data) - 30])[0, 0].tolist() == [10, 0, 0]


def test_a_damaged_frame_that_is_asked_for_is_an_error_with_the_name() -> None:
    data = animated("TIFF", {"compression": "tiff_deflate"})
    with pytest.raises(InputError, match=r'^image "photo\.png" cannot be decoded \(.*\); save it as PNG or JPEG$'):
        list(decode_frames(data.replace(b"x\x9c", b"xx"), LABEL, [1]))
