"""The transformer block shared by the encoder, the aggregator and the camera head.

Every layer computes in the dtype of its own weights and casts its input to it. A 16-bit model is therefore the
same code with some weights cast, and the float32 islands are the weights left alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class RotaryTable(NamedTuple):
    """What rotary embedding multiplies with: both (T, head_dim), or `per_head` (T, 1, head_dim), float32."""

    cos: Tensor
    signed_sin: Tensor

    def repeat(self, views: int) -> "RotaryTable":
        """The table of `views` views laid end to end; views do not differ in position."""
        length, dim = self.cos.shape
        return RotaryTable(*(t.expand(views, length, dim).reshape(views * length, dim) for t in self))

    def per_head(self) -> "RotaryTable":
        """The table for tensors (..., T, heads, head_dim)."""
        return RotaryTable(*(t[:, None] for t in self))


def in_type_of(weight: Tensor, x: Tensor) -> Tensor:
    """x in the dtype of `weight`; as it is under autocast, which would cast it a second time."""
    device = x.device.type
    casts_itself = device != "meta" and torch.is_autocast_enabled(device)  # torch refuses to be asked of meta tensors
    return x if casts_itself else x.to(weight.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(in_type_of(self.weight, x), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.gamma.dtype) * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim_in: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim_in, hidden)
        self.fc2 = Linear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention with optional q/k norm and rotary embedding, in that order."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.attend: Attend = fused_attention
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(head_dim, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)

    def forward(self, x_BTC: Tensor, rotary: RotaryTable | None) -> Tensor:
        """rotary   a table `per_head`"""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self.qkv(x_BTC).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.proj(self.attend(q.to(v.dtype), k.to(v.dtype), v).flatten(-2))


class Block(nn.Module):
    """x + g1 Attn(LN(x)), then x + g2 MLP(LN(x)). The residual stream has the dtype of the LayerScale."""

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float, eps: float, init_values: float, qk_norm: bool
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm=qk_norm)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), dim)
        self.ls2 = LayerScale(dim, init_values)

    def forward(self, x_BTC: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        x_BTC = x_BTC + self.ls1(self.attn(self.norm1(x_BTC), rotary))
        return x_BTC + self.ls2(self.mlp(self.norm2(x_BTC)))


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotary embedding of x (..., T, head_dim), or (..., T, heads, head_dim) and a table `per_head`, in its dtype.

    Each half of the channels (y, then x) rotates in pairs half a half apart: the four quarters swap in twos.
    """
    x = x.to(table.cos.dtype)
    y_low, y_high, x_low, x_high = x.chunk(4, dim=-1)
    swapped = torch.cat([y_high, y_low, x_high, x_low], dim=-1)
    return x * table.cos + swapped * table.signed_sin


def fused_attention(q_BTHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every head, (B, T, heads, d), by whatever kernel torch picks."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BTHd, v_BTHd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def explicit_attention(q_BTHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    """The same as plain operations, softmax in float32 at least.

    Scaling q and k apart keeps 16-bit logits small and the ONNX graph short. They are scaled by powers of two: a graph
    stores a factor in the type of the tensor, and d^(-1/4) rounded to 16 bits would scale every logit wrongly. What is
    left of d^(-1/2), nothing where d is a power of four, scales the float32 logits.
    """
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BTHd, v_BTHd))
    exponent = -0.5 * math.log2(q.shape[-1])
    whole = math.floor(exponent)
    logits = (q * 2.0 ** (whole // 2)) @ (k * 2.0 ** (whole - whole // 2)).transpose(-1, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if exponent != whole:
        logits = logits.mul_(2.0 ** (exponent - whole))
    return (logits.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)


def set_attention(model: nn.Module, attend: Attend) -> None:
    """Use `attend` in every attention of `model`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
