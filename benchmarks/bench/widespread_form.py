"""The model as it is usually handed to an exporter: one size of image, everything spelled out.

What makes such files large is written here by hand, on the weights of `MoE3D`: positions of tokens as integers that
every block looks its angles up by, q, k and v of one five-axis tensor, loops unrolled, sizes asked of tensors again and
again. Sizes are known when the object is made, so the encoder's position embedding is a constant. The numbers are the
model's own. What it is for: `widespread`.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d_deploy.config import IMAGE_MEAN, IMAGE_STD
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.aggregator import Aggregator, VisionTransformer
from moe3d_deploy.model.camera import CameraHead, cameras_from_pose
from moe3d_deploy.model.dpt import Grid
from moe3d_deploy.model.embeddings import resample_grid
from moe3d_deploy.model.transformer import Attention, Block


class WidespreadForm(nn.Module):
    """Images (1, S, 3, H, W) -> DEFAULT_OUTPUTS, each (1, S, ...), for one height and width.

    The model's weights are shared, and it is not changed. Experts are plain branches, unmerged.
    """

    encoder_positions: Tensor
    places: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, model: MoE3D, height: int, width: int) -> None:
        super().__init__()
        self.model = model
        self.grid = Grid(height // model.config.patch_size, width // model.config.patch_size)
        encoder = model.aggregator.patch_embed
        stored = encoder.config.pos_embed_grid
        with torch.no_grad():
            patches = resample_grid(encoder.pos_embed[0, 1:].unflatten(0, (stored, stored)), *self.grid)
            positions = torch.cat([encoder.pos_embed[:, :1], patches.flatten(0, 1)[None]], dim=1)
        self.register_buffer("encoder_positions", positions, persistent=False)
        places = torch.cartesian_prod(torch.arange(self.grid.h), torch.arange(self.grid.w)) + 1
        specials = torch.zeros(model.aggregator.patch_start, 2, dtype=places.dtype)
        self.register_buffer("places", torch.cat([specials, places]), persistent=False)
        config = model.config.aggregator
        angles = _angles(max(self.grid), config.embed_dim // config.num_heads // 2, config.rope_freq)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch, views, _, height, width = images.shape
        aggregator, config = self.model.aggregator, self.model.config
        mean, std = (torch.tensor(values).view(1, 1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        normalised = ((images - mean) / std).reshape(batch * views, 3, height, width)
        tokens = self._aggregate(aggregator, self._encode(aggregator.patch_embed, normalised), batch, views)
        pose = self._pose(self.model.camera_head, tokens[-1][:, :, 0])
        extrinsics, intrinsics = cameras_from_pose(pose, height, width)
        levels = []
        for index in config.dpt_head.intermediate_layer_idx:
            patches = tokens[index][:, :, aggregator.patch_start :]
            levels.append(patches.reshape(batch * views, -1, patches.shape[-1]))
        maps = self.model.dense(levels, self.grid, ())
        depth, confidence = (maps[name].reshape(batch, views, height, width) for name in ("depth", "depth_conf"))
        found = {"depth": depth, "depth_conf": confidence, "extrinsics": extrinsics, "intrinsics": intrinsics}
        return tuple(found[name] for name in DEFAULT_OUTPUTS)

    def _encode(self, encoder: VisionTransformer, images_N3HW: Tensor) -> Tensor:
        """Patch tokens (N, P, C)."""
        patches = encoder.patch_embed(images_N3HW)
        count = patches.shape[0]
        x = torch.cat([encoder.cls_token.expand(count, -1, -1), patches], dim=1) + self.encoder_positions
        x = torch.cat([x[:, :1], encoder.register_tokens.expand(count, -1, -1), x[:, 1:]], dim=1)
        for block in _blocks(encoder.blocks):
            x = self._block(block, x, None)
        return encoder.norm(x)[:, 1 + encoder.config.vit.num_register_tokens :]

    def _aggregate(self, aggregator: Aggregator, patches: Tensor, batch: int, views: int) -> list[Tensor]:
        """The outputs (B, S, T, 2C) of every pair of blocks."""
        camera, register = (
            _of_first_and_others(token, batch, views) for token in (aggregator.camera_token, aggregator.register_token)
        )
        x = torch.cat([camera, register, patches], dim=1)
        length, dim = x.shape[1], x.shape[2]
        places = self.places[None].expand(batch * views, -1, -1)
        kept = []
        pairs = zip(_blocks(aggregator.frame_blocks), _blocks(aggregator.global_blocks), strict=True)
        for frame_block, global_block in pairs:
            x = self._block(frame_block, x.reshape(batch * views, length, dim), places)
            frame = x.reshape(batch, views, length, dim)
            in_scene = places.reshape(batch, views * length, 2)
            x = self._block(global_block, x.reshape(batch, views * length, dim), in_scene)
            kept.append(torch.cat([frame, x.reshape(batch, views, length, dim)], dim=-1))
        return kept

    def _pose(self, head: CameraHead, tokens_BSD: Tensor) -> Tensor:
        """The last pose encoding (B, S, 9), its fields of view clipped at 0."""
        token = head.token_norm(tokens_BSD)
        plain = F.layer_norm(token, head.token_norm.normalized_shape, eps=1e-6)
        pose = head.empty_pose_tokens.expand(token.shape[0], token.shape[1], -1)
        for iteration in range(head.num_iterations):
            shift, scale, gate = head.poseLN_modulation(head.embed_pose(pose)).chunk(3, dim=-1)
            h = token + gate * (plain * (1 + scale) + shift)
            for block in _blocks(head.trunk):
                h = self._block(block, h, None)
            update = head.pose_branch(head.trunk_norm(h))
            pose = pose + update if iteration else update
        return torch.cat([pose[..., :7], pose[..., 7:].relu()], dim=-1)

    def _block(self, block: Block, x: Tensor, places: Tensor | None) -> Tensor:
        x = x + block.ls1(self._attend(block.attn, block.norm1(x), places))
        return x + block.ls2(block.mlp(block.norm2(x)))

    def _attend(self, attention: Attention, x: Tensor, places: Tensor | None) -> Tensor:
        """Places (N, T, 2) of the tokens: row and column."""
        count, length, dim = x.shape
        qkv = attention.qkv(x).reshape(count, length, 3, attention.num_heads, dim // attention.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if places is not None:
            q, k = self._rotate(q, places), self._rotate(k, places)
        out = F.scaled_dot_product_attention(q, k, v)
        return attention.proj(out.transpose(1, 2).reshape(count, length, dim))

    def _rotate(self, x: Tensor, places: Tensor) -> Tensor:
        """x (N, heads, T, D): the first half of the channels turns by the row, the second by the column."""
        vertical, horizontal = x.chunk(2, dim=-1)
        return torch.cat([self._turn(vertical, places[..., 0]), self._turn(horizontal, places[..., 1])], dim=-1)

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        cos, sin = (F.embedding(places, table)[:, None] for table in (self.cos, self.sin))
        low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat([-high, low], dim=-1) * sin


def _blocks(modules: nn.Module) -> list[Block]:
    """Of a list of blocks, which torch types as modules of any kind."""
    return cast("list[Block]", list(modules.children()))


def _of_first_and_others(token_12NC: Tensor, batch: int, views: int) -> Tensor:
    """(1, 2, N, C), of the first view and of all others -> (B S, N, C)."""
    count, dim = token_12NC.shape[2:]
    first = token_12NC[:, :1].expand(batch, 1, count, dim)
    others = token_12NC[:, 1:].expand(batch, views - 1, count, dim)
    return torch.cat([first, others], dim=1).reshape(batch * views, count, dim)


def _angles(largest: int, channels: int, base: float) -> Tensor:
    """(largest + 1, channels): pos * base^(-2j / channels), twice side by side, for positions from 0."""
    frequency = base ** -(torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angles = torch.arange(largest + 1, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angles, angles], dim=-1)
