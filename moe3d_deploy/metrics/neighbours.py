"""Nearest points and neighbourhoods of pixels. The one module that uses SciPy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.metrics.inputs import Array, Mask
from moe3d_deploy.runtime.packages import load_package

# Points in a leaf of the tree. As fast as SciPy's 16 for clouds that lie on each other; twice as fast where they are
# far apart, which is what a model gives before it has learnt anything.
_LEAF = 64


class NearestPoints:
    """Which of the points (M, 3) is nearest: a k-d tree. Raises MissingExtraError without SciPy."""

    def __init__(self, points: Array) -> None:
        self._tree: Any = load_package("scipy").spatial.cKDTree(points, leafsize=_LEAF)

    def __call__(self, points: Array, within: float = np.inf) -> tuple[Array, NDArray[np.intp]]:
        """Distance (N,) from each of `points` (N, 3) to the nearest one, and which (N,) that is.

        inf and M for points with none nearer than `within`; a small bound saves most of the time.
        """
        distance, index = self._tree.query(points, distance_upper_bound=within)
        return distance, index


def depth_range(depth: Array, valid: Mask, radius: int) -> tuple[Array, Array]:
    """Least and greatest valid depth within `radius` pixels (a square) of each pixel; (S, H, W) each.

    inf and -inf where no pixel of the square is valid.
    """
    filters = load_package("scipy").ndimage
    size = (1, 2 * radius + 1, 2 * radius + 1)
    least = filters.minimum_filter(np.where(valid, depth, np.inf), size, mode="nearest")
    return least, filters.maximum_filter(np.where(valid, depth, -np.inf), size, mode="nearest")


def grown(mask: Mask, radius: int) -> Mask:
    """Pixels (S, H, W) with one of `mask` within `radius` pixels (a square) in the same view."""
    size = (1, 2 * radius + 1, 2 * radius + 1)
    result: Mask = load_package("scipy").ndimage.maximum_filter(mask, size, mode="nearest")
    return result
