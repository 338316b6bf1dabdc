"""Photographs as textures: those that scikit-image's wheel brings, read from its data folder without downloading."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from moe3d_deploy.errors import InputError, MissingExtraError

# The stereo pair of a motorcycle is kept out: trained models are judged on it.
NAMES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
_SIDE = 256
_LEVELS = 6  # 256, 128, .. 8 pixels
_STARTS = np.cumsum([0] + [(_SIDE >> level) ** 2 for level in range(_LEVELS)])


@functools.lru_cache(maxsize=4)
def atlas(device: torch.device) -> Tensor:
    """All photographs in all sizes, linear light: (3, photographs * pixels of one, level after level).

    Raises MissingExtraError without scikit-image, InputError where its folder lacks one.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("scikit-image", "train")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    parts = [part for name in NAMES for part in _levels(folder / name)]
    return torch.from_numpy(np.concatenate(parts).T.copy()).to(device)


def _levels(path: Path) -> list[np.ndarray]:
    try:
        with Image.open(path) as image:
            side = min(image.size)
            square = image.convert("RGB").crop((0, 0, side, side)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(
            f"photograph {path.name} of scikit-image's data folder cannot be read; install scikit-image again, "
            "or render without photographs"
        ) from error
    pixels = (np.asarray(square, np.float32) / 255) ** 2
    levels = []
    for _ in range(_LEVELS):
        levels.append(pixels.reshape(-1, 3))
        pixels = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4
    return levels


def sample(photo: Tensor, s: Tensor, t: Tensor, width: Tensor) -> Tensor:
    """Colours of points on photographs that repeat, every other one mirrored.

    photo (P,) int64; s, t (P,) in pictures; width (P,) of a pixel, in pictures; returns (3, P) linear light
    """
    texels = atlas(s.device)
    wide = (width * _SIDE).clamp(1, (1 << _LEVELS) - 1)
    level = (wide.view(torch.int32) >> 23) - 127  # the exponent: floor of log2
    side = torch.bitwise_right_shift(torch.full_like(level, _SIDE), level)
    starts = torch.from_numpy(_STARTS.astype(np.int32)).to(s.device)
    start = photo.to(torch.int32) * int(_STARTS[-1]) + starts.index_select(0, level)
    x, y = _mirrored(s) * side - 0.5, _mirrored(-t) * side - 0.5
    floor_x, floor_y = torch.floor(x), torch.floor(y)
    dx, dy = x - floor_x, y - floor_y
    last = side - 1
    left, upper = floor_x.to(torch.int32), floor_y.to(torch.int32)
    zero = torch.zeros_like(last)
    x0, x1 = torch.minimum(left.clamp_min(0), last), torch.minimum(left + 1, last).maximum(zero)
    y0, y1 = torch.minimum(upper.clamp_min(0), last), torch.minimum(upper + 1, last).maximum(zero)
    top = start + y0 * side
    bottom = start + y1 * side
    a, b = texels.index_select(1, top + x0), texels.index_select(1, top + x1)
    c, d = texels.index_select(1, bottom + x0), texels.index_select(1, bottom + x1)
    upper_row, lower_row = a + dx * (b - a), c + dx * (d - c)
    return upper_row + dy * (lower_row - upper_row)


def _mirrored(x: Tensor) -> Tensor:
    """A triangle wave: 0..1, then back, of period 2."""
    half = 0.5 * x
    return 1 - (2 * (half - torch.floor(half)) - 1).abs()
