"""What helps a training from scratch to find one view in another: two losses that no checkpoint has weights for.

A camera loss asks one token per view for the motion between views; before attention has found any correspondence, that
is a hopeless question, and depth stays what a single image tells. These ask every patch:

    points    where its pixels lie in the first camera's frame, by a linear read-out of its tokens
    matches   which patches of other views show the same point, by the attention of the first head of global blocks

Neither changes the model: the read-out stays in the run, and the attention is the model's own.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.camera import cameras_from_pose, unproject
from moe3d_deploy.model.dpt import Grid
from moe3d_deploy.model.embeddings import rotary_table
from moe3d_deploy.model.transformer import Block, LayerNorm, Linear, rotate
from moe3d_deploy.training.targets import Targets

VISIBLE_WITHIN = 1.08  # ratio of depths up to which two views see the same surface, and not one behind the other
_NEAREST = 1e-3  # in units of the scene's scale: what lies nearer than this to a camera's plane is not seen by it
_LEAST_DEPTH = 0.1  # likewise; points nearer than this count as if they were there


class Aids(nn.Module):
    """The losses with a weight above 0, and the layers that they need."""

    def __init__(self, config: ModelConfig, *, point_weight: float, match_weight: float) -> None:
        super().__init__()
        self.point_weight, self.match_weight = point_weight, match_weight
        self.readout = PointReadout(config) if point_weight else None

    def forward(
        self, model: MoE3D, levels: Sequence[Tensor], grid: Grid, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum (B,) and its parts (B,), without gradients and before their weights.

        levels   four of (B S, P, D), what the backbone gives
        """
        total, parts = torch.zeros_like(targets.scale), {}
        points = scene_points(targets)
        if self.readout is not None:
            found = self.readout(levels[-1], grid).unflatten(0, targets.depth.shape[:2])
            parts["point"] = point_loss(found, points, targets)
            total = total + self.point_weight * parts["point"]
        if self.match_weight:
            matches = patch_matches(points, targets, model.config.patch_size)
            logits = [
                attention_logits(model, frame_tokens(levels[place], model.config), block, grid, matches.shape[1])
                for place, block in matching_blocks(model.config)
            ]
            parts["match"], parts["matched"] = match_loss(logits, matches)
            total = total + self.match_weight * parts["match"]
        return total, {name: part.detach() for name, part in parts.items()}


def matching_blocks(config: ModelConfig) -> list[tuple[int, int]]:
    """Which global blocks are to find matches, as (place of its level, number of the block).

    Of those that the dense heads read all but the first, which has little to go by, and the last, after which no token
    hears of what another has found.
    """
    return list(enumerate(config.dpt_head.intermediate_layer_idx))[1:-1]


def frame_tokens(level_NPD: Tensor, config: ModelConfig) -> Tensor:
    """What a global block reads of the patches, (N, P, C): the first half of the level that it ends."""
    return level_NPD[..., : config.aggregator.embed_dim]


class PointReadout(nn.Module):
    """Points of every pixel in the first camera's frame, linear in the tokens of its patch."""

    def __init__(self, config: ModelConfig) -> None:
        """Starts at 0 everywhere."""
        super().__init__()
        self.patch_size = config.patch_size
        self.norm = LayerNorm(config.dpt_head.dim_in, eps=1e-5)
        self.linear = Linear(config.dpt_head.dim_in, 3 * config.patch_size**2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, level_NPD: Tensor, grid: Grid) -> Tensor:
        """Tokens of a backbone's level -> (N, 3, H, W) float32, in units of the scene's scale."""
        pixels = self.linear(self.norm(level_NPD.float()))
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, tuple(grid)), self.patch_size)


def scene_points(targets: Targets) -> Tensor:
    """The true points (B, S, H, W, 3) in the first camera's frame, in units of the scene's scale."""
    return unproject(targets.depth, *cameras_from_pose(targets.pose_enc, *targets.depth.shape[-2:]))


def point_loss(predicted_BS3HW: Tensor, points_BSHW3: Tensor, targets: Targets) -> Tensor:
    """(B,): mean over a scene's valid pixels of |P - P*|_1 / (3 max(D*, 0.1)), D* the depth of the true point P*."""
    off = (predicted_BS3HW.movedim(2, -1) - points_BSHW3).abs().mean(-1)
    error = off / targets.depth.clamp(min=_LEAST_DEPTH)
    return torch.where(targets.valid, error, 0).flatten(1).sum(1) / targets.valid.flatten(1).sum(1)


def match_loss(logits: Sequence[Tensor], matches: Tensor) -> tuple[Tensor, Tensor]:
    """-log of the attention that a true match gets, in nats, and that attention by its geometric mean: both (B,).

    logits    a (B, S, S, P, P) for each supervised block: of the patches q of view j for patch p of view i at [i, j, p]
    matches   (B, S, S, P) from `patch_matches`; a scene without any gives 0

    Attention goes to the patches of all views, the patch's own included: what it gives to itself is missing elsewhere.
    A patch with n matches cannot do better than log n. The first figure is the mean over blocks and matches, the second
    is of the last block.
    """
    known = matches >= 0
    index = matches.clamp(min=0)[..., None]
    count = known.flatten(1).sum(1).clamp(min=1)

    def of_block(x: Tensor) -> Tensor:
        everything = x.logsumexp(-1).logsumexp(2, keepdim=True)
        missed = everything - x.gather(-1, index)[..., 0]
        return torch.where(known, missed, 0).flatten(1).sum(1) / count

    found = torch.stack([of_block(x) for x in logits])
    return found.mean(0), torch.where(known.flatten(1).any(1), (-found[-1]).exp(), 0)


def patch_matches(points_BSHW3: Tensor, targets: Targets, patch_size: int) -> Tensor:
    """(B, S, S, P) int64: in which patch of view j the centre of patch p of view i lies, at [i, j, p]; -1 for none.

    None for i = j, where the depth is not known, and where the point is outside of view j or hidden there: where the
    depth of view j at that pixel differs from the point's by more than VISIBLE_WITHIN.
    """
    batch, views, height, width = targets.depth.shape
    middle = slice(patch_size // 2, None, patch_size)
    points = points_BSHW3[:, :, middle, middle].flatten(2, 3)
    known = targets.valid[:, :, middle, middle].flatten(2, 3)
    extrinsics, intrinsics = cameras_from_pose(targets.pose_enc, height, width)
    in_view = torch.einsum("bjrc,bipc->bijpr", extrinsics[..., :3], points) + extrinsics[:, None, :, None, :, 3]
    z = in_view[..., 2].clamp(min=_NEAREST)
    column, row = (
        (in_view[..., axis] / z * intrinsics[:, None, :, None, axis, axis] + intrinsics[:, None, :, None, axis, 2])
        .round()
        .long()
        for axis in (0, 1)
    )
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    seen = targets.depth[:, None].expand(batch, views, views, height, width).flatten(3).gather(3, row * width + column)
    same = (z < seen * VISIBLE_WITHIN) & (seen < z * VISIBLE_WITHIN)
    other = ~torch.eye(views, dtype=torch.bool, device=z.device)[None, :, :, None]
    index = (row // patch_size) * (width // patch_size) + column // patch_size
    return torch.where(known[:, :, None] & (in_view[..., 2] > _NEAREST) & inside & same & other, index, -1)


def attention_logits(model: MoE3D, frame_NPC: Tensor, block: int, grid: Grid, views: int) -> Tensor:
    """(B, S, S, P, P): logits of the first head of a global block from the patches of view i to those of view j.

    frame_NPC   from `frame_tokens`; N = B S
    """
    config = model.config.aggregator
    width = config.embed_dim // config.num_heads
    reader = cast(Block, model.aggregator.global_blocks[block])
    x = reader.norm1(frame_NPC.float())
    table = rotary_table(*grid, 0, width, config.rope_freq, model.aggregator.camera_token)

    def of_first_head(start: int, norm: nn.Module) -> Tensor:
        rows = slice(start, start + width)
        projected = norm(F.linear(x, reader.attn.qkv.weight[rows], reader.attn.qkv.bias[rows]))
        return rotate(projected, table).unflatten(0, (-1, views))

    q = of_first_head(0, reader.attn.q_norm)
    k = of_first_head(config.embed_dim, reader.attn.k_norm)
    return torch.einsum("bipc,bjqc->bijpq", q, k) / width**0.5
