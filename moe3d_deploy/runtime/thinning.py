"""Fewer points of a large scene: the same ones in every run, on every machine."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np

from moe3d_deploy.errors import InputError

_CELLS = 1 << 20  # from the origin along an axis, either way: 21 bits
_PENDING = 1 << 22  # points that wait for the next merge at least: 84 MB
_EXTENT_PERCENTILES = (1, 99)  # a few points far out do not stretch the scene


@dataclass(frozen=True)
class VoxelSize:
    """Edge of a voxel: `value` in units of the scene, or that share of its extent where `relative` holds."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise InputError(f"voxel size is {self.value:g}; give a number above 0")

    @staticmethod
    def parse(text: str) -> "VoxelSize":
        """The text "0.02" is 0.02 units of the scene, "0.5%" a two-hundredth of its extent; InputError for others."""
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%?)\s*", text)
        try:
            value = float(match[1]) if match else math.nan
        except ValueError:
            value = math.nan
        if match is None or math.isnan(value):
            raise InputError(f"voxel size {text!r} is no size; give a number, or a share of the scene such as 0.5%")
        return VoxelSize(value / 100, relative=True) if match[2] else VoxelSize(value)


def scene_extent(points: np.ndarray) -> float:
    """Diagonal of the box that holds the middle 98 % of the points (N, 3) along each axis; 0 without points."""
    if not len(points):
        return 0.0
    low, high = np.percentile(points.astype(np.float64), _EXTENT_PERCENTILES, axis=0)
    return float(np.linalg.norm(high - low))


def one_per_voxel(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], size: float, extent: float | None = None
) -> np.ndarray:
    """Of the points in each voxel of edge `size` the most confident one, the first among equals.

    parts    any number of (points (n, 3), confidence (n,), ids (n,) int64), ids ascending over all parts
    extent   of the scene, where `size` was given as a share of it: an error then speaks of that share
    returns  the ids that stay, ascending

    The voxels are cells of the grid floor(coordinate / size). A point that stays is one that was measured, with its own
    colour and pixel; a mean would lie between surfaces and belong to no pixel. At most twice the points that stay, and
    some millions, are held at a time.
    Raises InputError, with a size that works, where the grid has 2^20 cells or more from the origin along an axis.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    kept_count = waiting = 0
    rest = iter(parts)
    for points, confidence, ids in rest:
        cells = _cells(points, size)
        if cells is None:
            raise _too_small(size, max(_reach(points), *(_reach(more) for more, _, _ in rest), 0.0), extent)
        kept.append(_best(cells, confidence, ids))
        waiting += len(kept[-1][0])
        if waiting > max(kept_count, _PENDING):
            kept, waiting = [_merged(kept)], 0
            kept_count = len(kept[0][0])
    return np.sort(_merged(kept)[2]) if kept else np.empty(0, np.int64)


def scattered(ids: np.ndarray, count: int) -> np.ndarray:
    """(N,) bool, true for `count` of `ids` (N,), spread as if drawn at random, but by their numbers alone.

    So the choice is the same everywhere, a smaller one is part of a larger one, and no row or view is preferred.
    """
    if count >= len(ids):
        return np.ones(len(ids), bool)
    if count <= 0:
        return np.zeros(len(ids), bool)
    order = _scramble(ids)
    return order <= np.partition(order, count - 1)[count - 1]  # no two are equal: the scrambling is one to one


def _scramble(ids: np.ndarray) -> np.ndarray:
    """A fixed one-to-one mapping of 64-bit numbers without visible order: the finaliser of SplitMix64 (Steele 2014)."""
    x = ids.astype(np.uint64)
    x += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def _cells(points: np.ndarray, size: float) -> np.ndarray | None:
    """(n,) int64: one number per voxel, 21 bits an axis; None where they do not suffice."""
    cells = np.floor(points.astype(np.float64) / size)
    if np.abs(cells).max(initial=0) >= _CELLS:
        return None
    numbers = cells.astype(np.int64) + _CELLS
    return (numbers[:, 0] << 42) | (numbers[:, 1] << 21) | numbers[:, 2]


def _reach(points: np.ndarray) -> float:
    return float(np.abs(points).max(initial=0))


def _too_small(size: float, reach: float, extent: float | None) -> InputError:
    """For points whose largest coordinate is `reach`. The size that it names works, so it is rounded up."""
    enough = reach / (_CELLS - 1) * (1 + 1e-9)  # a negative coordinate is in the cell below; 1e-9 for the division
    unit, sign = (extent / 100, "%") if extent is not None else (1.0, "")
    least = float(Context(prec=2, rounding=ROUND_CEILING).create_decimal_from_float(enough / unit))
    return InputError(
        f"a voxel size of {size / unit:.3g}{sign} is too small for a scene that reaches {reach:.3g} units from its "
        f"origin; give {least:g}{sign} or more, or drop more points"
    )


def _merged(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    cells, confidence, ids = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _best(cells, confidence, ids)


def _best(cells: np.ndarray, confidence: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per cell the entry of highest confidence, of equals the first; in order of the cells.

    The first is the one of lowest id: parts come in order of their ids, and an earlier merge has left one per cell.
    """
    if not len(cells):
        return cells, confidence, ids
    order = np.argsort(cells, kind="stable")
    cells, confidence, ids = cells[order], confidence[order], ids[order]
    starts = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]]))
    highest = np.maximum.reduceat(confidence, starts)
    candidates = np.flatnonzero(confidence == np.repeat(highest, np.diff(starts, append=len(cells))))
    chosen = candidates[np.searchsorted(candidates, starts)]  # the first candidate of each cell
    return cells[chosen], confidence[chosen], ids[chosen]
