"""Image files to network input, equal to VGGT's preprocessing to the byte, and the way back to original pixels.

Knows nothing of the model; video and arrays are not its subject.
"""

import dataclasses
import functools
import glob
import os
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from moe3d_deploy.errors import InputError

Mode = Literal["crop", "pad", "square"]
Exif = Literal["apply", "ignore"]

# Named, so that a file never reaches Pillow's other readers (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")
_MAX_WORKING_PIXELS = 2**28  # 1 GiB at Pillow's 4 bytes per RGB pixel

# What Pillow's readers raise for damaged files; it documents no common base class.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
_DECODE_ERRORS = (*_DAMAGE, RuntimeError, EOFError, MemoryError, struct.error, zlib.error)


@dataclass(frozen=True)
class ViewMapping:
    """Where the pixels of one view lie in its photograph.

    Per axis, with pixel centres at integer coordinates in both images:
    u_original = (u - offset + 0.5) * scale - 0.5

    name                   file name
    original_width/height  pixels of the photograph, after its EXIF orientation where that was applied
    scale_x/y              original pixels per network pixel
    offset_x/y             padding before the photograph, or minus the start of the crop, in network pixels
                           (fractional in mode "square", which pads before it resizes)
    """

    name: str
    original_width: int
    original_height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    def to_original(self, uv: ArrayLike) -> NDArray[np.float64]:
        """Network pixel coordinates (..., 2) as (u, v) -> original pixel coordinates (..., 2)."""
        uv = np.asarray(uv, np.float64)
        if uv.shape[-1:] != (2,):
            raise InputError(f"pixel coordinates have shape {uv.shape}; pass (..., 2)")
        return uv @ self._matrix[:2, :2] + self._matrix[:2, 2]

    def intrinsics_to_original(self, intrinsics: ArrayLike) -> NDArray[np.float64]:
        """Intrinsics (3, 3) in network pixels -> (3, 3) in original pixels."""
        intrinsics = np.asarray(intrinsics, np.float64)
        if intrinsics.shape != (3, 3):
            raise InputError(f"intrinsics have shape {intrinsics.shape}; pass one view's (3, 3)")
        return self._matrix @ intrinsics

    def valid_mask(self, height: int, width: int) -> NDArray[np.bool_]:
        """(height, width), true where the centre of a network pixel lies on the photograph, not on padding."""
        rows = _inside(height, self.offset_y, self.scale_y, self.original_height)
        columns = _inside(width, self.offset_x, self.scale_x, self.original_width)
        return rows[:, None] & columns[None, :]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return dataclasses.asdict(self)

    @property
    def _matrix(self) -> NDArray[np.float64]:
        """Homogeneous (3, 3) form of the mapping."""
        x = (0.5 - self.offset_x) * self.scale_x - 0.5
        y = (0.5 - self.offset_y) * self.scale_y - 0.5
        return np.array([[self.scale_x, 0.0, x], [0.0, self.scale_y, y], [0.0, 0.0, 1.0]])


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """The views of one scene: `images` (S, 3, H, W) float32 RGB in [0, 1], and one mapping per view."""

    images: NDArray[np.float32]
    views: tuple[ViewMapping, ...]


_Prepared = tuple[NDArray[np.uint8], ViewMapping]  # pixels (H, W, 3)


def find_images(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """List the image files that `inputs` name: files, folders and glob patterns, in the order given.

    A folder or a pattern gives its files with an image suffix in natural order (frame_2 before frame_10);
    folders are not searched recursively, hidden files are left out. A file named itself is taken as it is.
    Raises InputError for an input that is missing or holds no image, and when there are no inputs.
    """
    found = [path for item in _as_list(inputs) for path in _expand(os.fspath(item))]
    if not found:
        raise InputError("no images given; name at least one image file, folder or pattern")
    return found


def load_images(
    paths: Sequence[str | os.PathLike[str]],
    *,
    mode: Mode = "crop",
    size: int = 518,
    patch_size: int = 14,
    exif: Exif = "apply",
) -> ImageBatch:
    """Read image files as one network input.

    mode "crop"    width = size, height in proportion rounded to patches; rows beyond `size` cut off centrally
    mode "pad"     longer side = size, the other in proportion rounded to patches; padded to a white square
    mode "square"  padded to a black square, then resized to `size`, which may be any number of pixels
    exif "apply"   turns each image by its EXIF orientation; "ignore" does not, as VGGT

    Views of different size are padded with white, centred, to the largest height and width. Transparency of
    RGBA, LA and palette images is put over white (VGGT: only RGBA). 16-bit images keep their high byte.
    Raises InputError, with the file's name, for a file that cannot be read or has no usable size.

    Source: VGGT (Wang et al. 2025), its image loaders; 8-bit RGB, RGBA and grey images give the same bytes.
    """
    files = [Path(path) for path in _as_list(paths)]
    if not files:
        raise InputError("no images given; pass at least one image file")
    _check_options(mode, size, patch_size, exif)
    prepared = [_fit(_decode(path, exif), path, mode, size, patch_size) for path in files]
    height = max(pixels.shape[0] for pixels, _ in prepared)
    width = max(pixels.shape[1] for pixels, _ in prepared)
    images = np.empty((len(prepared), 3, height, width), np.float32)
    views = []
    for i, (pixels, view) in enumerate(prepared):
        pixels, view = _pad_white(pixels, view, height, width)
        images[i] = pixels.transpose(2, 0, 1).astype(np.float32) / 255
        views.append(view)
    return ImageBatch(images, tuple(views))


def _as_list(paths: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """A single path is a sequence of one, not of its characters."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _expand(item: str) -> list[Path]:
    if os.path.isfile(item):
        return [Path(item)]
    if os.path.isdir(item):
        try:
            names = [name for name in os.listdir(item) if not name.startswith(".")]
        except OSError as error:
            raise InputError(f'folder "{item}" cannot be read: {error.strerror}') from error
        found = _image_files(os.path.join(item, name) for name in names)
        if not found:
            raise InputError(f'folder "{item}" holds no image; its sub-folders are not searched')
        return found
    if not re.search(r"[*?[]", item):
        raise InputError(f'"{item}" is neither a file nor a folder; check the path')
    found = _image_files(glob.iglob(item, recursive=True))
    if not found:
        raise InputError(f'pattern "{item}" matches no image file; check the path')
    return found


def _image_files(candidates: Iterable[str]) -> list[Path]:
    """Those of `candidates` that are files with an image suffix, in natural order."""
    paths = [Path(path) for path in candidates if os.path.isfile(path)]
    return sorted((path for path in paths if path.suffix.lower() in _suffixes()), key=_natural_key)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    """Digits compare as numbers, letters without case; the path itself decides between equals."""
    parts = re.split(r"([0-9]+)", str(path).lower())  # digits at the odd places
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


@functools.cache
def _suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow has a reader for."""
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _check_options(mode: str, size: int, patch_size: int, exif: str) -> None:
    if mode not in ("crop", "pad", "square"):
        raise InputError(f'image mode is "{mode}"; choose crop, pad or square')
    if exif not in ("apply", "ignore"):
        raise InputError(f'exif is "{exif}"; choose apply or ignore')
    if patch_size < 1 or size < 1:
        raise InputError(f"image size {size} and patch size {patch_size} must be positive")
    if mode != "square" and size % patch_size:
        nearest = max(round(size / patch_size), 1) * patch_size
        raise InputError(f"image size {size} is not a multiple of the patch size {patch_size}; use {nearest}")


def _decode(path: Path, exif: str) -> Image.Image:
    """One file as an 8-bit RGB image."""
    if not os.path.isfile(path):
        raise InputError(f'image "{path}" is not a file; check the path')
    if os.path.getsize(path) == 0:
        raise InputError(f'image "{path}" is empty (0 bytes); copy or record it again')
    try:
        with Image.open(path, formats=_formats()) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image) if exif == "apply" else image, path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f'image "{path}" has too many pixels to decode safely; downscale it first') from error
    except _DECODE_ERRORS as error:
        unknown = "unknown format" if isinstance(error, UnidentifiedImageError) else ""
        reason = unknown or " ".join(str(error).split()) or type(error).__name__
        raise InputError(f'image "{path}" cannot be decoded ({reason}); save it as PNG or JPEG') from error


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise InputError(f'image "{path}" holds floating-point pixels; save it with 8 bits per channel')
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f'image "{path}" holds more than 16 bits; save it with 8 bits per channel')
        image = Image.fromarray((values >> 8).astype(np.uint8))  # as Pillow reads 16-bit colour
    if image.mode in ("LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _fit(image: Image.Image, path: Path, mode: str, size: int, patch_size: int) -> _Prepared:
    """Resize and crop or pad one image."""
    width, height = image.size
    if mode == "square":
        side = max(width, height)
        _check_working_size(path, image, side, side)
        left, top = (side - width) // 2, (side - height) // 2
        canvas = Image.new("RGB", (side, side))
        canvas.paste(image, (left, top))
        scale = side / size
        view = ViewMapping(path.name, width, height, scale, scale, left / scale, top / scale)
        return np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC)), view

    new_width = new_height = size
    if mode == "crop" or width >= height:  # VGGT's order of operations; Python rounds a half to even
        new_height = round(height * (size / width) / patch_size) * patch_size
    else:
        new_width = round(width * (size / height) / patch_size) * patch_size
    if not (new_width and new_height):
        raise InputError(
            f'image "{path}" is {width}x{height}, which leaves a side of 0 pixels at size {size}; '
            f"crop it to an aspect ratio below {2 * size // patch_size}:1"
        )
    _check_working_size(path, image, new_width, new_height)
    pixels = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    view = ViewMapping(path.name, width, height, width / new_width, height / new_height, 0.0, 0.0)
    if mode == "pad":
        return _pad_white(pixels, view, size, size)
    start = max(new_height - size, 0) // 2
    return pixels[start : start + size].copy(), dataclasses.replace(view, offset_y=float(-start))


def _check_working_size(path: Path, image: Image.Image, width: int, height: int) -> None:
    if width * height > _MAX_WORKING_PIXELS:
        raise InputError(
            f'image "{path}" is {image.width}x{image.height} and needs {width}x{height} pixels on the way; '
            "crop it to a less extreme aspect ratio or downscale it"
        )


def _pad_white(pixels: NDArray[np.uint8], view: ViewMapping, height: int, width: int) -> _Prepared:
    """Centre `pixels` (h, w, 3) on white (height, width, 3), the smaller half before it."""
    h, w = pixels.shape[:2]
    if (h, w) == (height, width):
        return pixels, view
    top, left = (height - h) // 2, (width - w) // 2
    padded = np.full((height, width, 3), 255, np.uint8)
    padded[top : top + h, left : left + w] = pixels
    return padded, dataclasses.replace(view, offset_x=view.offset_x + left, offset_y=view.offset_y + top)


def _inside(count: int, offset: float, scale: float, original: int) -> NDArray[np.bool_]:
    """(count,), true where pixel i of one axis has its centre within the photograph."""
    position = (np.arange(count) - offset + 0.5) * scale
    return (position >= 0) & (position < original)
