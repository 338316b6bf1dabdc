"""Views as 8-bit pixels (..., H, W, 3) and as floats (..., 3, H, W) in [0, 1]: one is exactly the other over 255."""

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError

LEVELS = np.float32(255)


def to_floats(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, contiguous: pixel / 255, as a graph of 8-bit input divides."""
    return np.ascontiguousarray(np.moveaxis(pixels, -1, -3)).astype(np.float32) / LEVELS


def to_pixels(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(..., 3, H, W) floats in [0, 1] -> (..., H, W, 3) uint8, contiguous.

    Raises InputError unless every value is, in float32, one of the 256 that 8-bit pixels give: nothing is rounded.
    """
    floats = images.astype(np.float32)
    levels = np.rint(floats * LEVELS)
    if not np.array_equal(levels / LEVELS, floats):
        raise InputError(
            "images: values lie between the levels of 8-bit pixels, which is all that this model takes; "
            "pass uint8 pixels (S, H, W, 3), or export with --input float32"
        )
    return np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8), -3, -1))
