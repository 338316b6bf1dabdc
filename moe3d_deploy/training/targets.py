"""Ground truth in the model's terms: depth and cameras in the first camera's frame, divided by the scene's scale."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe3d_deploy.errors import InputError
from moe3d_deploy.model.camera import unproject


class Targets(NamedTuple):
    """What the losses compare with. Lengths are in units of `scale`, so that the scenes of a batch are of one size."""

    depth: Tensor  # (B, S, H, W), 0 where there is no truth
    valid: Tensor  # (B, S, H, W) bool
    pose_enc: Tensor  # (B, S, 9), camera from the first camera; see `pose_encoding`
    scale: Tensor  # (B,), of the depth that came in


def normalised_targets(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Targets:
    """Scenes in any world frame and any unit -> what a model can know of them from images alone.

    depth        (B, S, H, W)   along the optical axis; 0, negative, infinite or NaN where it is not known
    extrinsics   (B, S, 3, 4)   camera from world, OpenCV axes
    intrinsics   (B, S, 3, 3)   pixels

    The first camera's frame becomes the world. The scale is the mean distance of the valid world points of all views
    to its origin; depth and translations are divided by it. Source: VGGT (Wang et al. 2025), section 3.4.

    Raises InputError for a scene without a valid pixel, or with a camera that is not finite, and names its index.
    """
    targets = unchecked_targets(depth, extrinsics, intrinsics)
    _require_scale(targets.scale, targets.valid.sum((1, 2, 3)))
    return targets


def unchecked_targets(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Targets:
    """`normalised_targets` without a look at the result, for which the program would have to wait for a GPU.

    A scene that it would refuse comes out with NaN.
    """
    with torch.no_grad():
        valid = depth.isfinite() & (depth > 0)
        depth = torch.where(valid, depth, 0)
        relative = _from_first_camera(extrinsics)
        points = unproject(depth, relative.to(depth.dtype), intrinsics.to(depth.dtype))
        distance = torch.where(valid, points.norm(dim=-1), 0)
        scale = distance.sum((1, 2, 3)) / valid.sum((1, 2, 3))
        relative[..., 3] /= scale[:, None, None]
        height, width = depth.shape[-2:]
        pose_enc = pose_encoding(relative, intrinsics, height, width).to(depth.dtype)
        return Targets(depth / scale[:, None, None, None], valid, pose_enc, scale)


def pose_encoding(extrinsics: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Cameras -> what the camera head predicts; `geometry.cameras_to_pose_encoding` in torch.

    extrinsics   (..., 3, 4)   camera from world
    intrinsics   (..., 3, 3)   pixels; only the focal lengths are encoded
    returns      (..., 9)      translation, unit quaternion (x, y, z, w) with w >= 0, vertical and horizontal field of
                               view in radians, in the dtype of `extrinsics`
    """
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    k = intrinsics.to(extrinsics.dtype)
    half = torch.stack([k.new_full((), pixels / 2) for pixels in (height, width)])  # made where k is
    fov = 2 * torch.atan2(half, torch.stack([k[..., 1, 1], k[..., 0, 0]], dim=-1))
    return torch.cat([translation, _quaternion(rotation), fov], dim=-1)


def _from_first_camera(extrinsics: Tensor) -> Tensor:
    """Camera from the first camera (B, S, 3, 4) in float64: a world origin far away must not cost digits.

    X_i = R_i R_0^T (X_0 - t_0) + t_i.
    """
    rotation, translation = extrinsics[..., :3].double(), extrinsics[..., 3:].double()
    turned = rotation @ rotation[:, :1].transpose(-1, -2)
    return torch.cat([turned, translation - turned @ translation[:, :1]], dim=-1)


def _quaternion(rotation: Tensor) -> Tensor:
    """Rotations (..., 3, 3) -> unit quaternions (..., 4), scalar last and not negative.

    Row i of 4 q q^T is 4 q_i q: the row with the largest diagonal loses the fewest digits.
    """
    m = [[rotation[..., row, column] for column in range(3)] for row in range(3)]
    rows = (
        (1 + m[0][0] - m[1][1] - m[2][2], m[0][1] + m[1][0], m[0][2] + m[2][0], m[2][1] - m[1][2]),
        (m[0][1] + m[1][0], 1 - m[0][0] + m[1][1] - m[2][2], m[1][2] + m[2][1], m[0][2] - m[2][0]),
        (m[0][2] + m[2][0], m[1][2] + m[2][1], 1 - m[0][0] - m[1][1] + m[2][2], m[1][0] - m[0][1]),
        (m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1], 1 + m[0][0] + m[1][1] + m[2][2]),
    )
    candidates = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    index = best[..., None, None].expand(*best.shape, 1, 4)
    q = candidates.gather(-2, index).squeeze(-2)
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[..., 3:] < 0, -q, q)


def _require_scale(scale: Tensor, count: Tensor) -> None:
    bad = ~(scale.isfinite() & (scale > 0))
    if not bad.any():
        return
    index = int(bad.nonzero()[0, 0])
    if count[index] == 0:
        raise InputError(
            f"scene {index} of the batch has no pixel with a valid depth (finite and positive); leave this scene out"
        )
    raise InputError(
        f"scene {index} of the batch has a scale of {float(scale[index])}: its cameras or depths are not finite; "
        "leave this scene out"
    )
