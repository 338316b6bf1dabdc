"""Image files to network input, equal to VGGT's preprocessing to the byte, and the way back to original pixels.

Knows nothing of the model. Which files there are is `image_files`' subject, what is in them `image_decode`'s; videos
and inputs of every kind are `views`'.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe3d_deploy.errors import InputError
from moe3d_deploy.image_decode import Exif, decode_image
from moe3d_deploy.image_files import PathLike, as_list, find_images, read_file, shown
from moe3d_deploy.view_mapping import ViewMapping

__all__ = [
    "Exif",
    "Fitting",
    "ImageBatch",
    "Mode",
    "Prepared",
    "ViewMapping",
    "batch_of",
    "find_images",
    "fit",
    "load_images",
]

Mode = Literal["crop", "pad", "square"]

_MAX_WORKING_PIXELS = 2**28  # 1 GiB at Pillow's 4 bytes per RGB pixel
_MIN_SIDE = 8  # pixels of a picture's longer side; below, there is nothing to see depth in

Prepared = tuple[NDArray[np.uint8], ViewMapping]  # one view's pixels (H, W, 3), not yet padded to its batch


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """The views of one scene: `images` (S, 3, H, W) float32 RGB in [0, 1], and one mapping per view."""

    images: NDArray[np.float32]
    views: tuple[ViewMapping, ...]


@dataclass(frozen=True)
class Fitting:
    """How pictures become views, as `load_images` says. Raises InputError for values that it cannot use."""

    mode: Mode = "crop"
    size: int = 518
    patch_size: int = 14
    exif: Exif = "apply"

    def __post_init__(self) -> None:
        if self.mode not in ("crop", "pad", "square"):
            raise InputError(f'image mode is "{self.mode}"; choose crop, pad or square')
        if self.exif not in ("apply", "ignore"):
            raise InputError(f'exif is "{self.exif}"; choose apply or ignore')
        size, patch_size = self.size, self.patch_size
        if patch_size < 1 or size < 1:
            raise InputError(f"image size {size} and patch size {patch_size} must be positive")
        if self.mode != "square" and size % patch_size:
            nearest = max(round(size / patch_size), 1) * patch_size
            raise InputError(f"image size {size} is not a multiple of the patch size {patch_size}; use {nearest}")


def load_images(
    paths: PathLike | Sequence[PathLike],
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

    Views of different size are padded with white, centred, to the largest height and width. Transparency is put over
    white (VGGT: only that of RGBA). 16-bit images keep their high byte. Of an animated image or several pages it is
    the first, with a Moe3dWarning.
    Raises InputError, with the file's name, for a file that cannot be read or has no usable size.

    Source: VGGT (Wang et al. 2025), its image loaders; 8-bit RGB, RGBA and grey images give the same bytes.
    """
    files = [Path(os.fsdecode(path)) for path in as_list(paths)]
    if not files:
        raise InputError("no images given; pass at least one image file")
    fitting = Fitting(mode, size, patch_size, exif)
    prepared = []
    for path in files:
        label = f'image "{shown(path)}"'
        prepared.append(fit(decode_image(read_file(path, label), label, exif), shown(path.name), label, fitting))
    return batch_of(prepared)


def batch_of(prepared: Sequence[Prepared]) -> ImageBatch:
    """Views as one batch, padded with white, centred, to the largest height and width."""
    height = max(pixels.shape[0] for pixels, _ in prepared)
    width = max(pixels.shape[1] for pixels, _ in prepared)
    images = np.empty((len(prepared), 3, height, width), np.float32)
    views = []
    for i, (pixels, view) in enumerate(prepared):
        pixels, view = _pad_white(pixels, view, height, width)
        images[i] = pixels.transpose(2, 0, 1).astype(np.float32) / 255
        views.append(view)
    return ImageBatch(images, tuple(views))


def fit(image: Image.Image, name: str, label: str, fitting: Fitting) -> Prepared:
    """Resize and crop or pad one RGB picture; `name` is the view's, `label` what errors call it. Raises InputError."""
    mode, size, patch_size = fitting.mode, fitting.size, fitting.patch_size
    width, height = image.size
    if max(width, height) < _MIN_SIDE:
        raise InputError(
            f"{label} is {width}x{height}, too small to show a scene; use one of {_MIN_SIDE} pixels or more"
        )
    if mode == "square":
        side = max(width, height)
        _check_working_size(label, image, side, side)
        left, top = (side - width) // 2, (side - height) // 2
        canvas = Image.new("RGB", (side, side))
        canvas.paste(image, (left, top))
        scale = side / size
        view = ViewMapping(name, width, height, scale, scale, left / scale, top / scale)
        return np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC)), view

    new_width = new_height = size
    if mode == "crop" or width >= height:  # VGGT's order of operations; Python rounds a half to even
        new_height = round(height * (size / width) / patch_size) * patch_size
    else:
        new_width = round(width * (size / height) / patch_size) * patch_size
    if not (new_width and new_height):
        raise InputError(
            f"{label} is {width}x{height}, which leaves a side of 0 pixels at size {size}; "
            f"crop it to an aspect ratio below {2 * size // patch_size}:1"
        )
    _check_working_size(label, image, new_width, new_height)
    pixels = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    view = ViewMapping(name, width, height, width / new_width, height / new_height, 0.0, 0.0)
    if mode == "pad":
        return _pad_white(pixels, view, size, size)
    start = max(new_height - size, 0) // 2
    return pixels[start : start + size].copy(), dataclasses.replace(view, offset_y=float(-start))


def _check_working_size(label: str, image: Image.Image, width: int, height: int) -> None:
    if width * height > _MAX_WORKING_PIXELS:
        raise InputError(
            f"{label} is {image.width}x{image.height} and needs {width}x{height} pixels on the way; "
            "crop it to a less extreme aspect ratio or downscale it"
        )


def _pad_white(pixels: NDArray[np.uint8], view: ViewMapping, height: int, width: int) -> Prepared:
    """Centre `pixels` (h, w, 3) on white (height, width, 3), the smaller half before it."""
    h, w = pixels.shape[:2]
    if (h, w) == (height, width):
        return pixels, view
    top, left = (height - h) // 2, (width - w) // 2
    padded = np.full((height, width, 3), 255, np.uint8)
    padded[top : top + h, left : left + w] = pixels
    return padded, dataclasses.replace(view, offset_x=view.offset_x + left, offset_y=view.offset_y + top)
