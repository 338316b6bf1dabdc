"""Cameras, depth maps and world points in NumPy, for runtimes without torch.

Conventions everywhere: extrinsics are camera from world (X_cam = R X_world + t) with OpenCV axes (x right,
y down, z forward); pixel centres lie at integer coordinates; lengths have the scale of the depth, not metres.
Float32 input gives float32 results, float64 gives float64, computed in float64.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from moe3d_deploy.errors import InputError

Array = NDArray[Any]


def unproject(depth: ArrayLike, extrinsics: ArrayLike, intrinsics: ArrayLike) -> NDArray[np.float32]:
    """Lift depth maps to world points.

    depth        (..., H, W)    along the optical axis, any scale; NaN gives NaN points
    extrinsics   (..., 3, 4)    camera from world
    intrinsics   (..., 3, 3)    pixels; an infinite focal length gives parallel rays
    returns      (..., H, W, 3) float32, in the units of `depth`

    X = R^T (d K^-1 [u v 1]^T - t).  Source: VGGT (Wang et al. 2025), unprojection of the depth branch.
    """
    depth = np.asarray(depth)
    if depth.ndim < 2:
        raise InputError(f"depth has shape {depth.shape}; pass (..., H, W)")
    rotation, translation, k = _cameras(extrinsics, intrinsics)
    if depth.shape[:-2] != k.shape[:-2]:
        raise InputError(f"depth {depth.shape} and intrinsics {k.shape} do not match; pass (..., H, W) and (..., 3, 3)")
    world_from_camera = np.swapaxes(rotation, -1, -2)
    rays = world_from_camera @ _invert_intrinsics(k)  # (..., 3, 3): a pixel's ray in world axes is rays [u v 1]^T
    origin = -world_from_camera @ translation[..., None]
    height, width = depth.shape[-2:]
    v, u = np.arange(height, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)
    points = np.empty((*depth.shape, 3), np.float32)
    for axis in range(3):
        a, b, c = (rays[..., axis, column, None, None] for column in range(3))
        points[..., axis] = depth * (a * u + b * v + c) + origin[..., axis, :, None]
    return points


def project(points: ArrayLike, extrinsics: ArrayLike, intrinsics: ArrayLike) -> tuple[Array, Array]:
    """Project world points into cameras.

    points       (..., *, 3)    any number of axes after those of the cameras, none included
    extrinsics   (..., 3, 4)    camera from world
    intrinsics   (..., 3, 3)    pixels
    returns      uv (..., *, 2) in pixels and depth (..., *) along the optical axis

    Where the depth is not positive the point is not in front of the camera, and its uv means nothing.
    """
    points = np.asarray(points)
    dtype = _result_type(points, extrinsics, intrinsics)
    rotation, translation, k = _cameras(extrinsics, intrinsics)
    lead = k.shape[:-2]
    if points.shape[-1:] != (3,) or points.shape[:-1][: len(lead)] != lead:
        raise InputError(
            f"points {points.shape} and intrinsics {k.shape} do not match; pass (..., *, 3) and (..., 3, 3)"
        )
    flat = points.astype(np.float64).reshape(*lead, math.prod(points.shape[len(lead) : -1]), 3)
    camera = flat @ np.swapaxes(rotation, -1, -2) + translation[..., None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = (camera / camera[..., 2:]) @ np.swapaxes(k, -1, -2)[..., :2]
    shape = points.shape[:-1]
    return uv.reshape(*shape, 2).astype(dtype), camera[..., 2].reshape(shape).astype(dtype)


def invert_extrinsics(extrinsics: ArrayLike) -> Array:
    """Camera from world (..., 3, 4) -> world from camera (..., 3, 4): [R^T | -R^T t]; its own inverse."""
    rotation, translation = _split(extrinsics)
    inverse = np.swapaxes(rotation, -1, -2)
    result = np.concatenate([inverse, -inverse @ translation[..., None]], axis=-1)
    return result.astype(_result_type(extrinsics))


def pose_encoding_to_cameras(pose_enc: ArrayLike, height: int, width: int) -> tuple[Array, Array]:
    """Decode the camera head's output.

    pose_enc       (..., 9)  translation, quaternion (x, y, z, w; any length but 0), vertical and horizontal
                             field of view in radians
    height, width            pixels of the network input
    returns        extrinsics (..., 3, 4) and intrinsics (..., 3, 3), principal point in the middle

    A field of view of 0 gives an infinite focal length, a quaternion of length 0 a NaN rotation, as in the
    model. Source: VGGT (Wang et al. 2025), pose encoding "absT_quaR_FoV".
    """
    encoding = np.asarray(pose_enc, np.float64)
    if encoding.shape[-1:] != (9,):
        raise InputError(f"pose encoding has shape {encoding.shape}; pass (..., 9)")
    dtype = _result_type(pose_enc)
    extrinsics = np.concatenate([_rotation(encoding[..., 3:7]), encoding[..., :3, None]], axis=-1)
    intrinsics = np.zeros((*encoding.shape[:-1], 3, 3))
    with np.errstate(divide="ignore"):
        intrinsics[..., 0, 0] = width / 2 / np.tan(encoding[..., 8] / 2)
        intrinsics[..., 1, 1] = height / 2 / np.tan(encoding[..., 7] / 2)
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1
    return extrinsics.astype(dtype), intrinsics.astype(dtype)


def cameras_to_pose_encoding(extrinsics: ArrayLike, intrinsics: ArrayLike, height: int, width: int) -> Array:
    """Inverse of `pose_encoding_to_cameras`: extrinsics (..., 3, 4), intrinsics (..., 3, 3) -> (..., 9).

    The quaternion has length 1 and a non-negative scalar part. The encoding has no room for a principal point
    outside the middle or for skew: both are dropped.
    """
    rotation, translation, k = _cameras(extrinsics, intrinsics)
    fov_h = 2 * np.arctan2(height / 2, k[..., 1, 1])
    fov_w = 2 * np.arctan2(width / 2, k[..., 0, 0])
    fov = np.stack([fov_h, fov_w], axis=-1)
    encoding = np.concatenate([translation, _quaternion(rotation), fov], axis=-1)
    return encoding.astype(_result_type(extrinsics, intrinsics))


def _rotation(quaternion: Array) -> Array:
    """Quaternions (..., 4), scalar last, of any length but 0 -> rotations (..., 3, 3)."""
    x, y, z, w = np.moveaxis(quaternion, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        s = 2 / (x * x + y * y + z * z + w * w)
        rows = [
            [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
            [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
            [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
        ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _quaternion(rotation: Array) -> Array:
    """Rotations (..., 3, 3) -> unit quaternions (..., 4), scalar last and not negative.

    Row i of the symmetric matrix 4 q q^T is 4 q_i q: every row with q_i != 0 is a candidate, and the one with
    the largest diagonal loses the fewest digits.
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = np.moveaxis(rotation, (-2, -1), (0, 1))
    rows = [
        [1 + m00 - m11 - m22, m01 + m10, m02 + m20, m21 - m12],
        [m01 + m10, 1 - m00 + m11 - m22, m12 + m21, m02 - m20],
        [m02 + m20, m12 + m21, 1 - m00 - m11 + m22, m10 - m01],
        [m21 - m12, m02 - m20, m10 - m01, 1 + m00 + m11 + m22],
    ]
    candidates = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    best = np.diagonal(candidates, axis1=-2, axis2=-1).argmax(axis=-1)
    q = np.take_along_axis(candidates, best[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[..., 3:] < 0, -q, q)


def _invert_intrinsics(k: Array) -> Array:
    """Inverse of upper triangular intrinsics (..., 3, 3), written out so that an infinite focal length gives 0."""
    fx, skew, cx, fy, cy = k[..., 0, 0], k[..., 0, 1], k[..., 0, 2], k[..., 1, 1], k[..., 1, 2]
    if np.any(fx == 0) or np.any(fy == 0):
        raise InputError("intrinsics have a focal length of 0; pass focal lengths in pixels")
    inverse = np.zeros_like(k)
    inverse[..., 0, 0] = 1 / fx
    inverse[..., 0, 1] = -skew / fx / fy
    inverse[..., 0, 2] = (skew * cy / fy - cx) / fx
    inverse[..., 1, 1] = 1 / fy
    inverse[..., 1, 2] = -cy / fy
    inverse[..., 2, 2] = 1
    return inverse


def _cameras(extrinsics: ArrayLike, intrinsics: ArrayLike) -> tuple[Array, Array, Array]:
    """Rotation (..., 3, 3), translation (..., 3) and intrinsics (..., 3, 3) of matching cameras, float64."""
    rotation, translation = _split(extrinsics)
    k = np.asarray(intrinsics, np.float64)
    if k.shape[-2:] != (3, 3) or k.shape != rotation.shape:
        raise InputError(
            f"intrinsics {k.shape} do not fit extrinsics {np.shape(extrinsics)}; "
            "pass (..., 3, 3) and (..., 3, 4) with the same leading axes"
        )
    return rotation, translation, k


def _split(extrinsics: ArrayLike) -> tuple[Array, Array]:
    matrix = np.asarray(extrinsics, np.float64)
    if matrix.shape[-2:] != (3, 4):
        raise InputError(f"extrinsics have shape {matrix.shape}; pass (..., 3, 4), camera from world")
    return matrix[..., :3], matrix[..., 3]


def _result_type(*arrays: ArrayLike) -> DTypeLike:
    return np.result_type(np.float32, *(np.asarray(array).dtype for array in arrays))
