"""Normals of organised points: those that a depth map's pixels lift to."""

import numpy as np
from numpy.typing import ArrayLike

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics.inputs import Array, Mask, floats


def normals_from_points(points: ArrayLike, valid: ArrayLike | None = None) -> Array:
    """Unit normals of points that lie on a grid of pixels.

    points    (..., H, W, 3)   neighbouring pixels are neighbouring points
    valid     (..., H, W) bool, None: all
    returns   (..., H, W, 3)   towards the camera (for x right, y down, z forward); 0 where undefined

    The cross product of a difference along the row and one along the column. Along each, of the differences to the two
    neighbours the shorter one is taken, so that a normal beside an occlusion edge is that of its own surface, not of
    the step. Undefined where a pixel has no valid neighbour along one of the two, or where the two are parallel.
    Raises InputError for other shapes and for points at valid pixels that are not finite.
    """
    p = floats(points, "points")
    if p.ndim < 3 or p.shape[-1] != 3:
        raise InputError(f"points have shape {p.shape}; pass (..., H, W, 3), the points of a depth map")
    mask = np.ones(p.shape[:-1], bool) if valid is None else np.asarray(valid)
    if mask.shape != p.shape[:-1] or mask.dtype != np.bool_:
        raise InputError(f"valid is {mask.dtype} {mask.shape}; pass bool {p.shape[:-1]}")
    if not np.isfinite(p[mask]).all():
        raise InputError(
            "points are NaN or infinite at valid pixels; pass finite points, or leave these out by `valid`"
        )
    p = np.where(mask[..., None], p, 0.0)
    normal = np.cross(_shorter_difference(p, mask, -2), _shorter_difference(p, mask, -3))
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    # Row x column points along the viewing direction.
    return np.divide(-normal, length, out=np.zeros_like(normal), where=length > 0)


def _shorter_difference(points: Array, valid: Mask, axis: int) -> Array:
    """The difference to the next or to the previous point along `axis` of `points`; 0 without a valid one."""
    p, mask = np.moveaxis(points, axis, 0), np.moveaxis(valid, axis + 1, 0)
    step = p[1:] - p[:-1]
    both = mask[1:] & mask[:-1]
    length = np.where(both, np.sum(step * step, axis=-1), np.inf)
    none = np.full((1, *length.shape[1:]), np.inf)
    ahead, behind = np.concatenate([length, none]), np.concatenate([none, length])
    zero = np.zeros((1, *step.shape[1:]))
    use_ahead = (ahead <= behind)[..., None]
    result = np.where(use_ahead, np.concatenate([step, zero]), np.concatenate([zero, step]))
    result[~np.isfinite(np.minimum(ahead, behind))] = 0
    return np.moveaxis(result, 0, axis)
