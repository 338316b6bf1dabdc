"""The camera head, and cameras from its pose encoding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d_deploy.config import CameraHeadConfig
from moe3d_deploy.model.transformer import Block, LayerNorm, Linear, Mlp

TRUNK_LAYER_SCALE = 0.01  # at initialisation, for training only
POSE_DIM = 9  # translation 3, quaternion xyzw 4, vertical and horizontal field of view


class CameraHead(nn.Module):
    """Refines one pose encoding per view over a few iterations, from the view's camera token alone."""

    def __init__(self, config: CameraHeadConfig) -> None:
        super().__init__()
        dim = config.dim_in
        self.num_iterations = config.num_iterations
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.trunk = nn.ModuleList(
            Block(dim, config.num_heads, mlp_ratio=4.0, eps=1e-5, init_values=TRUNK_LAYER_SCALE, qk_norm=False)
            for _ in range(config.trunk_depth)
        )
        self.token_norm = LayerNorm(dim, eps=1e-5)
        self.trunk_norm = LayerNorm(dim, eps=1e-5)
        self.embed_pose = Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)

    def forward(self, camera_tokens_BSD: Tensor) -> list[Tensor]:
        """Camera tokens (B, S, D) -> one pose encoding (B, S, 9) per iteration, fields of view clipped at 0.

        The encoding fed back is the accumulated one before that clipping.
        """
        token = self.token_norm(camera_tokens_BSD)
        plain = F.layer_norm(token, token.shape[-1:], eps=1e-6)
        pose = self.empty_pose_tokens.expand(*token.shape[:2], -1)
        emitted = []
        for iteration in range(self.num_iterations):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, dim=-1)
            h = token + gate * (plain * (1 + scale) + shift)
            for block in self.trunk:
                h = block(h)
            update = self.pose_branch(self.trunk_norm(h))
            pose = update if iteration == 0 else pose + update
            emitted.append(torch.cat([pose[..., :7], pose[..., 7:].relu()], dim=-1))
        return emitted


def cameras_from_pose(pose_enc: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pose encoding (..., 9) -> extrinsics (..., 3, 4) camera from world, intrinsics (..., 3, 3) in pixels.

    The quaternion (x, y, z, w) need not be of unit length. The principal point is the image centre. A field of view
    of 0 gives an infinite focal length.
    """
    translation, quaternion, fov = pose_enc.split([3, 4, 2], dim=-1)
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    rotation = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    extrinsics = torch.cat([rotation, translation[..., None]], dim=-1)

    half = torch.stack([_scalar(width, pose_enc) / 2, _scalar(height, pose_enc) / 2])
    fx, fy = (half / (fov.flip(-1) / 2).tan()).unbind(-1)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    cx, cy = zero + half[0], zero + half[1]
    entries = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], dim=-1)
    return extrinsics, entries.unflatten(-1, (3, 3))


def unproject(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:
    """Lift a depth map to world points.

    depth        (B, S, H, W)   along the optical axis, any scale
    extrinsics   (B, S, 3, 4)   camera from world, OpenCV axes
    intrinsics   (B, S, 3, 3)   pixels; pixel centres lie at integer coordinates
    returns      (B, S, H, W, 3) in the units of `depth`

    X = R^T (d K^-1 [u v 1]^T - t).  Source: VGGT (Wang et al. 2025), unprojection of the depth branch.
    """
    _, _, height, width = depth.shape
    u = torch.arange(width, dtype=depth.dtype, device=depth.device)
    v = torch.arange(height, dtype=depth.dtype, device=depth.device)[:, None]
    focal_x, focal_y, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    camera = torch.stack([(u - cx) / focal_x * depth, (v - cy) / focal_y * depth, depth], dim=-1)
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    moved = camera - translation[..., None, None, :]
    return (moved.flatten(2, 3) @ rotation).unflatten(2, (height, width))


def _scalar(value: int, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)
