"""Checks that the metrics share: arrays in float64, depth maps in pairs, cameras. Holds no metric of its own."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe3d_deploy.errors import InputError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# How far R R^T may be from the identity: rotations stored in half precision are 1e-3 off.
_ROTATION_TOLERANCE = 5e-3


def floats(array: ArrayLike, name: str) -> Array:
    """`array` in float64; InputError for what has no such form (ragged, text, complex)."""
    try:
        given = np.asarray(array)
        if given.dtype.kind not in "bfiu":
            raise TypeError
        return given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is no array of real numbers; pass numbers of one shape") from error


def depth_pair(
    pred: ArrayLike, true: ArrayLike, valid: ArrayLike | None, *, positive: bool = False, axes: int | None = None
) -> tuple[Array, Array, Mask]:
    """Predicted depth, true depth and the pixels to judge, all of one shape (..., H, W).

    valid      bool of the same shape; None: where the true depth is not 0
    positive   predictions have to be above 0 as well
    axes       how many axes the maps must have; None: two or more

    Raises InputError for shapes that differ, where no pixel is valid, and for values at a valid pixel that cannot be
    judged. Values at other pixels are never looked at.
    """
    depth, truth = floats(pred, "predicted depth"), floats(true, "true depth")
    wanted = "(..., H, W)" if axes is None else "(H, W)" if axes == 2 else "(S, H, W)"
    if depth.shape != truth.shape or depth.ndim < 2 or axes not in (None, depth.ndim):
        raise InputError(
            f"predicted depth {depth.shape} and true depth {truth.shape} do not fit; pass {wanted} for both"
        )
    mask = truth != 0 if valid is None else np.asarray(valid)
    if mask.shape != truth.shape or mask.dtype != np.bool_:
        raise InputError(f"valid is {mask.dtype} {mask.shape}; pass bool {truth.shape}, the shape of the depth")
    count = int(np.count_nonzero(mask))
    if count == 0:
        raise InputError(f"none of {mask.size} pixels is valid; pass a map with true depth at one pixel or more")
    _refuse(truth, ~(np.isfinite(truth) & (truth > 0)), mask, "true depth", "mark pixels without truth by 0")
    _refuse(
        depth,
        ~np.isfinite(depth),
        mask,
        "predicted depth",
        "check the prediction, or leave these pixels out of `valid`",
    )
    if positive:
        _refuse(depth, depth <= 0, mask, "predicted depth", "pass depth along the optical axis, above 0")
    return depth, truth, mask


def _refuse(values: Array, bad: Mask, valid: Mask, name: str, remedy: str) -> None:
    bad = bad & valid
    if bad.any():
        example = float(values[bad][0])
        raise InputError(
            f"{name} is {example:g} at the first of {np.count_nonzero(bad)} unusable pixels "
            f"({np.count_nonzero(valid)} are valid); {remedy}"
        )


def cloud(points: ArrayLike, name: str) -> Array:
    """Points (N, 3), at least one, all finite."""
    checked = floats(points, name)
    if checked.ndim != 2 or checked.shape[1] != 3 or len(checked) == 0:
        raise InputError(f"{name} have shape {checked.shape}; pass (N, 3) with one point or more")
    _finite(checked, name)
    return checked


def extrinsics_of(matrix: ArrayLike, name: str) -> Array:
    """Extrinsics (S, 3, 4), camera from world, each with a rotation."""
    checked = floats(matrix, name)
    if checked.ndim != 3 or checked.shape[1:] != (3, 4) or len(checked) == 0:
        raise InputError(f"{name} have shape {checked.shape}; pass (S, 3, 4), camera from world")
    _finite(checked, name)
    rotation = checked[:, :, :3]
    error = np.abs(rotation @ np.swapaxes(rotation, 1, 2) - np.eye(3)).max(axis=(1, 2))
    bad = (error > _ROTATION_TOLERANCE) | (np.linalg.det(rotation) < 0)
    if bad.any():
        raise InputError(
            f"{name} of view {int(bad.argmax())} hold no rotation; pass [R | t] with R R^T = 1 and det R = 1"
        )
    return checked


def intrinsics_of(matrix: ArrayLike, name: str, views: int) -> Array:
    """Intrinsics (S, 3, 3) with focal lengths above 0; an infinite one (parallel rays) is allowed."""
    checked = floats(matrix, name)
    if checked.shape != (views, 3, 3):
        raise InputError(f"{name} have shape {checked.shape}; pass {(views, 3, 3)}, in pixels")
    focal = checked[:, [0, 1], [0, 1]]
    if np.isnan(checked).any() or not (focal > 0).all():
        raise InputError(f"{name} hold NaN or a focal length that is not above 0; pass focal lengths in pixels")
    return checked


def from_first_camera(extrinsics: Array) -> Array:
    """The same cameras (S, 3, 4) with the first one's frame as the world: T_i T_0^-1.

    Coordinates then are as small as the scene, wherever its world has its origin.
    """
    rotation = extrinsics[:, :, :3] @ extrinsics[0, :, :3].T
    translation = extrinsics[:, :, 3] - rotation @ extrinsics[0, :, 3]
    return np.concatenate([rotation, translation[:, :, None]], axis=2)


def _finite(values: NDArray[Any], name: str) -> None:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise InputError(f"{name} hold {bad} values that are NaN or infinite of {values.size}; pass finite numbers")
