"""The DINOv2 encoder and the alternating-attention aggregator over it."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from moe3d_deploy.config import IMAGE_MEAN, IMAGE_STD, ModelConfig
from moe3d_deploy.model.embeddings import resample_grid, rotary_table
from moe3d_deploy.model.transformer import Block, LayerNorm


class PatchProjection(nn.Module):
    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Patch tokens (N, P, C), row by row."""
        return self.proj(images_N3HW.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2 with registers, one view at a time. Its cls and register outputs are not used."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vit, dim = config.vit, config.vit.embed_dim
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.pos_embed_grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, vit.num_register_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # in every checkpoint, used by none of this
        self.patch_embed = PatchProjection(dim, config.patch_size)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                vit.num_heads,
                mlp_ratio=vit.mlp_ratio,
                eps=1e-6,
                init_values=vit.init_values,
                qk_norm=False,
            )
            for _ in range(vit.depth)
        )
        self.norm = LayerNorm(dim, eps=1e-6)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> patch tokens (N, P, C)."""
        count, _, height, width = images_N3HW.shape
        patch, stored = self.config.patch_size, self.config.pos_embed_grid
        patches = self.patch_embed(images_N3HW).to(self.pos_embed.dtype)
        grid = self.pos_embed[0, 1:].unflatten(0, (stored, stored))
        patches = patches + resample_grid(grid, height // patch, width // patch).flatten(0, 1)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(count, -1, -1)
        tokens = torch.cat([cls, self.register_tokens.expand(count, -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 1 + self.config.vit.num_register_tokens :])


class Aggregator(nn.Module):
    """Pairs of a block inside each view and a block over all views of a scene."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        aggregator, dim = config.aggregator, config.aggregator.embed_dim
        self.config = config
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, aggregator.num_register_tokens, dim))
        self.patch_embed = VisionTransformer(config)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                Block(
                    dim,
                    aggregator.num_heads,
                    mlp_ratio=aggregator.mlp_ratio,
                    eps=1e-5,
                    init_values=aggregator.init_values,
                    qk_norm=True,
                )
                for _ in range(aggregator.depth)
            )

        self.frame_blocks = blocks()
        self.global_blocks = blocks()

    @property
    def patch_start(self) -> int:
        """Tokens of a view before its patches: one camera token and the registers."""
        return 1 + self.config.aggregator.num_register_tokens

    def encode(self, images_BS3HW: Tensor) -> Tensor:
        """Images in [0, 1] -> DINOv2 patch tokens (B, S, P, C)."""
        mean = torch.tensor(IMAGE_MEAN, dtype=images_BS3HW.dtype, device=images_BS3HW.device)
        std = torch.tensor(IMAGE_STD, dtype=images_BS3HW.dtype, device=images_BS3HW.device)
        normalised = (images_BS3HW - mean[:, None, None]) / std[:, None, None]
        return self.patch_embed(normalised.flatten(0, 1)).unflatten(0, images_BS3HW.shape[:2])

    def forward(self, patches_BSPC: Tensor, grid_h: int, grid_w: int, keep: Collection[int]) -> dict[int, Tensor]:
        """Patch tokens -> {i: (B, S, T, 2C)} for the block pairs i in `keep`: frame features, then global ones."""
        config, specials = self.config.aggregator, self.patch_start
        batch, views, _, dim = patches_BSPC.shape
        # The first view has tokens of its own, the others share theirs; an index, as 0 further views is allowed.
        slot = torch.arange(views, device=patches_BSPC.device).clamp(max=1)
        camera, register = (
            token[0].index_select(0, slot).expand(batch, views, -1, dim)
            for token in (self.camera_token, self.register_token)
        )
        tokens = torch.cat([camera, register, patches_BSPC], dim=2)
        length = specials + grid_h * grid_w
        head_dim = dim // config.num_heads
        in_view = rotary_table(grid_h, grid_w, specials, head_dim, config.rope_freq, self.camera_token)
        in_view, in_scene = in_view.per_head(), in_view.repeat(views).per_head()

        kept: dict[int, Tensor] = {}
        for i, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            frame = frame_block(tokens.reshape(batch * views, length, dim), in_view)
            tokens = global_block(frame.reshape(batch, views * length, dim), in_scene)
            if i in keep:
                shape = (batch, views, length, dim)
                kept[i] = torch.cat([frame.reshape(shape), tokens.reshape(shape)], dim=-1)
        return kept
