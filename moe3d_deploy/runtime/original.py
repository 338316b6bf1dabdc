"""Depth and confidence in the photograph's resolution, from those of the network input."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError
from moe3d_deploy.images import ViewMapping

EDGE_RATIO = 1.05  # of neighbouring depths; above it they belong to two surfaces
_BAND_PIXELS = 1 << 21  # of the photograph, worked on at a time
_MAX_PIXELS = 2**28  # of a photograph; 1 GiB as float32


@dataclass(frozen=True, eq=False)
class OriginalMaps:
    """depth, confidence (h, w) float32 of one photograph; NaN where the network saw nothing or gave no valid depth."""

    depth: NDArray[np.float32]
    confidence: NDArray[np.float32]


def to_original(view: ViewMapping, depth: np.ndarray, confidence: np.ndarray, valid: NDArray[np.bool_]) -> OriginalMaps:
    """Resample one view's maps to its photograph, whose intrinsics are `view.intrinsics_to_original`.

    depth, confidence   (H, W)   of the network input
    valid               (H, W)   bool: where both count; false on padding

    A pixel of the photograph lies between four pixels of the network. Where these are valid and their depths differ by
    at most EDGE_RATIO, the inverse depths are averaged bilinearly: 1 / depth of a plane is linear in the pixel, so
    planes stay planes, exactly. Elsewhere the nearest one counts, so that no depth arises that lies between an object
    and what is behind it (flying points), and none where the nearest is invalid. The confidence comes from the same
    pixels. Half a network pixel beyond the outermost centres their values go on; what was cropped away is NaN.
    Raises InputError for a photograph of more than 2^28 pixels.
    """
    height, width = view.original_height, view.original_width
    if height * width > _MAX_PIXELS:
        raise InputError(f"{view.name} is {width}x{height}, too large for depth in its own resolution; downscale it")
    near = np.where(valid, depth, np.nan).astype(np.float32)
    sure = np.where(valid, confidence, np.nan).astype(np.float32)
    with np.errstate(over="ignore"):
        inverse = np.reciprocal(near)
    inverse[~((inverse >= np.finfo(np.float32).tiny) & np.isfinite(inverse))] = np.nan  # has too few digits to average
    columns = _Axis.of(np.arange(width), view.scale_x, view.offset_x, depth.shape[1])
    maps = OriginalMaps(np.empty((height, width), np.float32), np.empty((height, width), np.float32))
    for rows in _bands(height, width):
        axis = _Axis.of(np.arange(rows.start, rows.stop), view.scale_y, view.offset_y, depth.shape[0])
        _resample(near, inverse, sure, axis, columns, maps.depth[rows], maps.confidence[rows])
    return maps


@dataclass(frozen=True, eq=False)
class _Axis:
    """Per pixel of the photograph along one axis: its neighbours in the network input, and where between them it is."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    nearest: NDArray[np.int64]
    share: NDArray[np.float32]  # of `high`
    seen: NDArray[np.bool_]  # the network input covers the pixel's centre

    @staticmethod
    def of(original: NDArray[np.int64], scale: float, offset: float, count: int) -> "_Axis":
        position = (original + 0.5) / scale - 0.5 + offset  # the inverse of ViewMapping's formula
        inside = np.clip(position, 0, count - 1)
        low = np.minimum(inside.astype(np.int64), max(count - 2, 0))
        high = np.minimum(low + 1, count - 1)
        share = inside - low
        return _Axis(
            low,
            high,
            nearest=np.where(share < 0.5, low, high),
            share=share.astype(np.float32),
            seen=(position >= -0.5) & (position <= count - 0.5),
        )


def _resample(
    depth: NDArray[np.float32],
    inverse: NDArray[np.float32],
    confidence: NDArray[np.float32],
    rows: _Axis,
    columns: _Axis,
    depth_out: NDArray[np.float32],
    confidence_out: NDArray[np.float32],
) -> None:
    corners = [inverse[r][:, c] for r in (rows.low, rows.high) for c in (columns.low, columns.high)]
    largest = np.maximum(np.maximum(corners[0], corners[1]), np.maximum(corners[2], corners[3]))
    smallest = np.minimum(np.minimum(corners[0], corners[1]), np.minimum(corners[2], corners[3]))
    smooth = largest <= EDGE_RATIO * smallest  # false where one of them is NaN
    seen = rows.seen[:, None] & columns.seen
    nearest = np.ix_(rows.nearest, columns.nearest)
    mixed = np.where(smooth, 1 / _bilinear(corners, rows, columns), depth[nearest])
    depth_out[:] = np.where(seen, mixed, np.nan)
    corners = [confidence[r][:, c] for r in (rows.low, rows.high) for c in (columns.low, columns.high)]
    mixed = np.where(smooth, _bilinear(corners, rows, columns), confidence[nearest])
    confidence_out[:] = np.where(seen, mixed, np.nan)


def _bilinear(corners: list[NDArray[np.float32]], rows: _Axis, columns: _Axis) -> NDArray[np.float32]:
    upper = corners[0] + columns.share * (corners[1] - corners[0])
    lower = corners[2] + columns.share * (corners[3] - corners[2])
    mixed: NDArray[np.float32] = upper + rows.share[:, None] * (lower - upper)
    return mixed


def _bands(height: int, width: int) -> Iterator[slice]:
    step = max(1, _BAND_PIXELS // width)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))
