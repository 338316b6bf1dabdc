"""The bytes of one image file as 8-bit RGB pictures: every colour mode, depth, orientation and number of frames.

Where the bytes come from, and how a picture becomes a view, are not its subject.
"""

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from moe3d_deploy.errors import InputError, Moe3dWarning

Exif = Literal["apply", "ignore"]

# Named, so that a file never reaches Pillow's other readers (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")

# What Pillow's readers raise for damaged files; it documents no common base class.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
_DECODE_ERRORS = (*_DAMAGE, RuntimeError, EOFError, MemoryError, BufferError, struct.error, zlib.error)

_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 0x0112, 258, 262, 0  # tags of EXIF and TIFF
_UPRIGHT = {  # EXIF 2.32, tag Orientation: what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_AS_STORED = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # their inverses
_DARK = 1 << 12  # 16-bit grey below this comes from a sensor of at most 12 bits, and looks black


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes of the formats that are read, `.png` among them."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS)


def decode_image(data: bytes, label: str, exif: Exif = "apply") -> Image.Image:
    """The picture in the bytes of an image file, in mode RGB; `label`, such as `image "a.png"`, is what errors call it.

    exif   "apply" turns the picture by its orientation (1 to 8; anything else is none), "ignore" leaves it as stored

    Transparency is put over white. 16-bit images keep their high byte; 12-bit ones the highest 8 bits. Colours are not
    managed: embedded profiles are ignored. Of several frames or pages it is the first, with a Moe3dWarning.
    Raises InputError for bytes that are no image of a known format, damaged, or of too many pixels.
    """
    with _opened(data, label) as image:
        if _is_sequence(image):
            warnings.warn(
                f"{label} has several frames or pages; only the first is used (--all-frames takes them all)",
                Moe3dWarning,
                stacklevel=2,
            )
        return _picture(image, label, exif)


def count_frames(data: bytes, label: str) -> int:
    """How many frames or pages an image file has. Raises InputError as `decode_image` does."""
    with _opened(data, label) as image:
        return int(getattr(image, "n_frames", 1)) if _is_sequence(image) else 1


def decode_frames(data: bytes, label: str, numbers: Sequence[int], exif: Exif = "apply") -> Iterator[Image.Image]:
    """The frames or pages of those numbers, counted from 0 and ascending, each as `decode_image` gives the first."""
    with _opened(data, label) as image:
        for number in numbers:
            image.seek(number)
            yield _picture(image, f"{label} frame {number}", exif)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow has a reader for."""
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


@contextmanager
def _opened(data: bytes, label: str) -> Iterator[Image.Image]:
    """An image in the bytes; what its reader raises in the block becomes an InputError."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{label} has too many pixels to decode safely; downscale it first") from error
    except _DECODE_ERRORS as error:
        unknown = "unknown format" if isinstance(error, UnidentifiedImageError) else ""
        words = " ".join(str(error).split())
        reason = unknown or "".join(filter(str.isprintable, words)) or type(error).__name__
        raise InputError(f"{label} cannot be decoded ({reason}); save it as PNG or JPEG") from error


def _is_sequence(image: Image.Image) -> bool:
    """Whether there are frames or pages after the first. Further pictures in a JPEG are previews and gain maps."""
    if image.format in ("JPEG", "MPO"):
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except _DECODE_ERRORS:
        return True  # there is a second frame, and it is damaged


def _picture(image: Image.Image, label: str, exif: str) -> Image.Image:
    """The current frame as a picture of its own in mode RGB."""
    before = _orientation(image)
    image.load()
    remaining = _orientation(image)  # Pillow's TIFF reader turns the picture itself and removes the tag
    picture = _to_rgb(image, label)
    if exif == "apply":
        turn: Image.Transpose | None = _UPRIGHT.get(remaining)
    else:
        turn = _AS_STORED.get(before) if before != remaining else None
    if turn is not None:
        return picture.transpose(turn)
    return picture.copy() if picture is image else picture


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 2 to 8; 1 where there is none or it makes no sense."""
    try:
        value: Any = image.getexif().get(_ORIENTATION, 1)
        return int(value) if value in _UPRIGHT else 1
    except _DECODE_ERRORS:
        return 1


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{label} holds floating-point pixels; save it with 8 bits per channel")
    if image.mode.startswith("I"):
        return _from_integers(image, label)
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # ITU-T T.872: 0 is white unless Adobe's marker is there; Pillow expects it
    has_key = "transparency" in image.info and not _is_deep_key(image.info["transparency"])
    if image.mode in ("LA", "PA", "La", "RGBa") or has_key:
        # La and RGBa: colours are multiplied by alpha, and Pillow has no way from La to RGBA
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_deep_key(key: object) -> bool:
    """Whether a transparent colour is one of 16 bits per channel, which no pixel of 8 bits can be compared with."""
    return isinstance(key, (tuple, int)) and max(key if isinstance(key, tuple) else (key,)) > 255


def _from_integers(image: Image.Image, label: str) -> Image.Image:
    """Grey of up to 16 bits: the highest 8 of them, as Pillow reads 16-bit colour."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{label} holds more than 16 bits; save it with 8 bits per channel")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = min(*tags.get(_BITS_PER_SAMPLE, ()), 16, 16)
    if bits == 16 and 0 < values.max() < _DARK:
        used = int(values.max()).bit_length()
        warnings.warn(
            f"{label} uses only the lowest {used} of its 16 bits and looks black; "
            f"if its sensor has {used} bits, multiply its values by {1 << (16 - used)}",
            Moe3dWarning,
            stacklevel=2,
        )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values  # Pillow does so with 8 bits only
    grey = (values >> (bits - 8)).astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")
