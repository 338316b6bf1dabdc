"""The DPT heads: patch tokens of four depths -> full-resolution features -> depth or points, with confidence."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d_deploy.config import DptHeadConfig, MoeConfig
from moe3d_deploy.model.embeddings import uv_embedding
from moe3d_deploy.model.experts import Conv2d, MergedExperts, Mixture, branch, mix
from moe3d_deploy.model.transformer import LayerNorm, in_type_of

OUTPUT_HIDDEN = 32  # channels between the last two convolutions of VGGT's heads
UV_SCALE = 0.1  # of the embedding of image position that is added to a feature map


class Grid(NamedTuple):
    """Patches of a view, (rows, columns)."""

    h: int
    w: int


class ConvTranspose2d(nn.ConvTranspose2d):
    """Kernel equal to stride, in the dtype of its weights."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(in_type_of(self.weight, x), output_size)


class ResidualUnit(nn.Module):
    """relu(x) + conv2(relu(conv1(relu(x)))). The skip carries the rectified input: released weights expect it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(features, features, 3, padding=1)
        self.conv2 = Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rectified = x.relu()
        return rectified + self.conv2(self.conv1(rectified).relu())


class Fusion(nn.Module):
    def __init__(self, features: int, *, with_skip: bool) -> None:
        super().__init__()
        self.out_conv = Conv2d(features, features, 1)
        if with_skip:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(resize(self.resConfUnit2(x), size))


class Scratch(nn.Module):
    """VGGT's name for everything after the four levels have their own resolution."""

    def __init__(self, config: DptHeadConfig, channels_out: int | None) -> None:
        super().__init__()
        features = config.features
        for level, width in enumerate(config.out_channels, start=1):
            setattr(self, f"layer{level}_rn", Conv2d(width, features, 3, padding=1, bias=False))
        for level in (1, 2, 3, 4):
            setattr(self, f"refinenet{level}", Fusion(features, with_skip=level < 4))
        self.output_conv1 = Conv2d(features, features // 2, 3, padding=1)
        if channels_out is not None:
            self.output_conv2 = branch(features // 2, OUTPUT_HIDDEN, channels_out)


class DptHead(nn.Module):
    """Shared body of the depth and point heads; `features` ends at full resolution, `raw` is what activates.

    With `moe` the last stage is K experts and a gate in place of VGGT's `output_conv2`.
    """

    def __init__(self, config: DptHeadConfig, patch_size: int, channels_out: int, moe: MoeConfig | None) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.moe = moe
        c0, c1, c2, c3 = config.out_channels
        self.norm = LayerNorm(config.dim_in, eps=1e-5)
        self.projects = nn.ModuleList(Conv2d(config.dim_in, width, 1) for width in config.out_channels)
        self.resize_layers = nn.ModuleList(
            [
                ConvTranspose2d(c0, c0, kernel_size=4, stride=4),
                ConvTranspose2d(c1, c1, kernel_size=2, stride=2),
                nn.Identity(),
                Conv2d(c3, c3, 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(config, None if moe else channels_out)
        self.merged: MergedExperts | None = None
        if moe:
            half = config.features // 2
            self.experts = nn.ModuleList(
                branch(half, moe.hidden_channels, channels_out) for _ in range(moe.num_experts)
            )
            self.gate = branch(half, moe.gate_hidden_channels, moe.num_experts)

    def features(self, levels_NPD: Sequence[Tensor], grid: Grid) -> Tensor:
        """Patch tokens (N, P, D) of the four levels -> (N, features / 2, H, W)."""
        dtype = self.norm.weight.dtype
        rows, columns = (torch.full((), g, dtype=dtype, device=levels_NPD[0].device) for g in grid)
        aspect = columns / rows

        def with_position(x: Tensor) -> Tensor:
            _, channels, height, width = x.shape
            # In place: at full resolution a sum of its own would be the model's largest tensor a second time.
            return x.add_(uv_embedding(height, width, channels, aspect, UV_SCALE).to(x.dtype))

        levels = []
        for i, tokens in enumerate(levels_NPD):
            x = self.norm(tokens).transpose(1, 2).unflatten(2, grid)
            x = self.resize_layers[i](with_position(self.projects[i](x)))
            levels.append(getattr(self.scratch, f"layer{i + 1}_rn")(x))
        full = (grid.h * self.patch_size, grid.w * self.patch_size)
        return with_position(resize(self.scratch.output_conv1(self._fuse(levels)), full))

    def _fuse(self, levels: list[Tensor]) -> Tensor:
        """Coarse to fine; each step is as large as the next level, the last one twice its own size."""
        x, skip = levels.pop(), None
        for level in (4, 3, 2, 1):
            height, width = levels[-1].shape[-2:] if levels else (2 * x.shape[-2], 2 * x.shape[-1])
            x = getattr(self.scratch, f"refinenet{level}")(x, skip, (height, width))
            skip = levels.pop() if levels else None
        return x

    def raw(self, features_NCHW: Tensor) -> Tensor:
        """VGGT's last stage, without its activation: (N, channels, H, W), the last channel is confidence."""
        return self.scratch.output_conv2(features_NCHW)

    def mixture(self, features_NCHW: Tensor) -> Mixture:
        """The expert mix, in the merged form where `merge_experts` was called."""
        if self.moe is None:
            raise RuntimeError("this head has no experts")
        if self.merged is not None:
            return self.merged(features_NCHW)
        return mix(*self.branches(features_NCHW), self.moe.temperature)

    def branches(self, features_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """What `mix` mixes: the experts' raw outputs (N, K, 2, H, W) and the gate's logits (N, K, H, W)."""
        if self.moe is None or self.merged is not None:
            raise RuntimeError("this head has no separate experts")
        raw = torch.stack([expert(features_NCHW) for expert in self.experts], dim=1)
        return raw, self.gate(features_NCHW)

    def merge_experts(self) -> None:
        """Change to the deployment form, in place: the branches' own weights are dropped."""
        if self.moe is None:
            raise RuntimeError("this head has no experts")
        self.merged = MergedExperts(self.experts, self.gate, self.moe)
        del self.experts, self.gate


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned: the only resampling in these heads."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def activate_depth(raw_N2HW: Tensor) -> tuple[Tensor, Tensor]:
    """depth = exp(v), confidence = 1 + exp(c), both (N, H, W) float32."""
    raw = raw_N2HW.to(torch.promote_types(raw_N2HW.dtype, torch.float32))
    return raw[:, 0].exp(), 1 + raw[:, 1].exp()


def activate_points(raw_N4HW: Tensor) -> tuple[Tensor, Tensor]:
    """points = sign(v) (exp|v| - 1) as (N, H, W, 3), confidence = 1 + exp(c) as (N, H, W), float32."""
    raw = raw_N4HW.to(torch.promote_types(raw_N4HW.dtype, torch.float32))
    value = raw[:, :3].movedim(1, -1)
    return value.sign() * value.abs().expm1(), 1 + raw[:, 3].exp()
