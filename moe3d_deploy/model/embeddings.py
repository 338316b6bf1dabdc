"""Position embeddings, all computed from the grid at hand: stored-grid resampling, 2D rotary, UV.

Grid sizes may be symbolic (torch.export): no branch here looks at one, and nothing is cached by one.
"""

import torch
from torch import Tensor

from moe3d_deploy.model.transformer import RotaryTable


def resample_grid(grid_MMC: Tensor, height: int, width: int) -> Tensor:
    """Resample a stored (M, M, C) embedding to (height, width, C).

    Equals antialiased bicubic `interpolate(size=...)`, written as two matrix products because TensorRT has no
    antialiased Resize. At height = width = M the matrices are the identity.
    """
    stored = grid_MMC.shape[0]
    rows = bicubic_matrix(stored, height, grid_MMC)
    columns = bicubic_matrix(stored, width, grid_MMC)
    by_rows = (rows @ grid_MMC.flatten(1)).unflatten(1, grid_MMC.shape[1:])
    return columns @ by_rows


def bicubic_matrix(size_in: int, size_out: int, like: Tensor) -> Tensor:
    """(size_out, size_in) weights of antialiased bicubic resampling, align_corners off, in dtype of `like`.

    Keys' kernel with a = -0.5, stretched by size_in / size_out when that shrinks, taps outside dropped and the
    rest renormalised: what torch does with antialias=True.
    """
    scale = size_in / torch.full((), size_out, dtype=like.dtype, device=like.device)
    centre = (torch.arange(size_out, dtype=like.dtype, device=like.device) + 0.5) * scale
    tap = torch.arange(size_in, dtype=like.dtype, device=like.device) + 0.5
    x = (tap[None, :] - centre[:, None]).abs() / scale.clamp(min=1.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)


def rotary_table(grid_h: int, grid_w: int, specials: int, head_dim: int, base: float, like: Tensor) -> RotaryTable:
    """Rotary tables of one view: `specials` unrotated tokens, then the patches row by row.

    Patch (row r, column c) sits at (r + 1, c + 1). The first half of the channels turns with y, the second with x,
    by angles pos * base^(-2j / (head_dim / 2)).
    """
    quarter = head_dim // 4
    exponent = torch.arange(quarter, dtype=like.dtype, device=like.device) / quarter
    frequency = base**-exponent
    y = (torch.arange(grid_h, dtype=like.dtype, device=like.device) + 1.0)[:, None] * frequency
    x = (torch.arange(grid_w, dtype=like.dtype, device=like.device) + 1.0)[:, None] * frequency
    y = y[:, None, :].expand(grid_h, grid_w, quarter)
    x = x[None, :, :].expand(grid_h, grid_w, quarter)
    still = torch.zeros(specials, head_dim, dtype=like.dtype, device=like.device)
    cos = torch.cat([y.cos(), y.cos(), x.cos(), x.cos()], dim=-1).flatten(0, 1)
    sin = torch.cat([-y.sin(), y.sin(), -x.sin(), x.sin()], dim=-1).flatten(0, 1)
    return RotaryTable(torch.cat([still + 1.0, cos]), torch.cat([still, sin]))


def uv_embedding(height: int, width: int, channels: int, aspect: Tensor, scale: float = 1.0) -> Tensor:
    """The DPT heads' embedding of image position, (channels, height, width), in the dtype of `aspect`, times `scale`.

    `aspect` is the image's width / height, a scalar. u and v span the unit-diagonal frame, pixel centres inside it;
    channels are [sin u | cos u | sin v | cos v] over frequencies 100^(-k / (channels / 4)). All angles are below
    1 rad, so float32 is exact to rounding and no float64 is needed.

    The first half depends on the column alone, the second on the row: it is the sum of two small tables, each 0 in the
    other's half, which writes the whole once and is exact.
    """
    diagonal = (aspect * aspect + 1.0).sqrt()
    quarter = channels // 4
    exponent = torch.arange(quarter, dtype=aspect.dtype, device=aspect.device) / quarter
    frequency = 100.0**-exponent
    u = frequency[:, None] * (_centred(width, aspect) * (aspect / diagonal))
    v = frequency[:, None] * (_centred(height, aspect) * (1.0 / diagonal))
    u, v = torch.cat([u.sin(), u.cos()]) * scale, torch.cat([v.sin(), v.cos()]) * scale
    columns = torch.cat([u, torch.zeros_like(u)])[:, None, :]
    rows = torch.cat([torch.zeros_like(v), v])[:, :, None]
    return columns + rows


def _centred(size: int, like: Tensor) -> Tensor:
    """(2 i + 1 - size) / size for i = 0..size-1: linspace between the outermost pixel centres of [-1, 1]."""
    length = torch.full((), size, dtype=like.dtype, device=like.device)
    return (2.0 * torch.arange(size, dtype=like.dtype, device=like.device) + 1.0 - length) / length
