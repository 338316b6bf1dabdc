"""Colours for maps of numbers and for expert weights. It returns pictures and writes no files."""

import colorsys

import cv2
import numpy as np

from moe3d_deploy.errors import InputError

COLORMAPS = {
    "turbo": cv2.COLORMAP_TURBO,
    "viridis": cv2.COLORMAP_VIRIDIS,
    "magma": cv2.COLORMAP_MAGMA,
    "inferno": cv2.COLORMAP_INFERNO,
    "gray": None,
}

# Okabe and Ito (2008): colours that stay distinct under colour blindness, without their black.
_CATEGORIES = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (160, 160, 160),
)


def robust_range(values: np.ndarray, valid: np.ndarray | None = None) -> tuple[float, float] | None:
    """The 2nd and 98th percentile of the finite values (any shape) where `valid` holds; None if there are none."""
    usable = values[_usable(values, valid)]
    if usable.size == 0:
        return None
    lo, hi = np.percentile(usable.astype(np.float64), (2, 98))
    return float(lo), float(hi)


def colorize(
    values: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    lo: float | None = None,
    hi: float | None = None,
    colormap: str = "turbo",
) -> np.ndarray:
    """Colour a map: `lo` and below take the first colour of the map, `hi` and above the last.

    values    (H, W)      any number; non-finite ones are invalid
    valid     (H, W)      bool, or None for everywhere
    lo, hi    default to `robust_range`; where both are equal (a constant map) every pixel takes the middle colour
    returns   (H, W, 3)   uint8 RGB, invalid pixels black
    Raises InputError for an unknown colormap, another shape of `valid`, or lo > hi.
    """
    if colormap not in COLORMAPS:
        raise InputError(f"colormap {colormap!r} is unknown; choose one of {', '.join(COLORMAPS)}")
    usable = _usable(values, valid)
    if lo is None or hi is None:
        robust_lo, robust_hi = robust_range(values, valid) or (0.0, 1.0)  # without valid values all comes out black
        lo, hi = robust_lo if lo is None else lo, robust_hi if hi is None else hi
    if not lo <= hi:
        raise InputError(f"colour range {lo:g}..{hi:g} is empty; give lo <= hi")
    # Halves, because hi - lo of the largest float64 numbers overflows.
    span = hi / 2 - lo / 2
    numbers = np.where(usable, values.astype(np.float64), lo)
    share = np.clip((numbers / 2 - lo / 2) / span, 0, 1) if span > 0 else np.full(numbers.shape, 0.5)
    return np.where(usable[..., None], _table(colormap)[np.rint(share * 255).astype(np.uint8)], 0)


def inverse_depth(depth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """1 / depth in float64 where `valid`, else NaN: the quantity depth pictures show.

    Near things then take the warm end of the colours and most of their range, far ones the cold end.
    """
    numbers = np.asarray(depth, np.float64)
    return np.divide(1.0, numbers, out=np.full(numbers.shape, np.nan), where=valid)


def expert_map(weights: np.ndarray, *, valid: np.ndarray | None = None) -> np.ndarray:
    """Colour each pixel by its strongest expert, as bright as that expert's weight.

    weights   (K, H, W)   in [0, 1], summing to 1 over K
    valid     (H, W)      bool, or None for everywhere
    returns   (H, W, 3)   uint8 RGB; a weight of 1 gives the palette colour, non-finite weights and invalid pixels black
    """
    usable = _usable(weights, None).all(axis=0)
    if valid is not None:
        usable &= _usable(weights[0], valid)
    shade = np.where(usable, np.clip(weights.max(axis=0), 0, 1), 0)
    colors = palette(len(weights))[weights.argmax(axis=0)]
    return np.rint(colors * shade[..., None]).astype(np.uint8)


def palette(count: int) -> np.ndarray:
    """Distinct colours, (count, 3) uint8 RGB: eight fixed ones, or evenly spaced hues where more are asked for."""
    if count <= len(_CATEGORIES):
        return np.array(_CATEGORIES[:count], np.uint8)
    hues = [colorsys.hsv_to_rgb(index / count, 0.85, 1.0) for index in range(count)]
    return np.rint(np.array(hues) * 255).astype(np.uint8)


def _usable(values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    finite = np.isfinite(values)
    if valid is None:
        return finite
    if valid.shape != values.shape:
        raise InputError(f"the valid mask has shape {valid.shape}, the map {values.shape}; they must be equal")
    return finite & valid


def _table(colormap: str) -> np.ndarray:
    """(256, 3) uint8 RGB."""
    ramp = np.arange(256, dtype=np.uint8)
    code = COLORMAPS[colormap]
    if code is None:
        return np.repeat(ramp[:, None], 3, axis=1)
    return cv2.applyColorMap(ramp[:, None], code)[:, 0, ::-1]
