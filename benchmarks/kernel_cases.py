"""What the expert-mix kernel is checked on: cases, seeded tensors, and the mix in float64 with its error bound."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe3d_deploy.native.torch_op import Operands

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("nchw", "channels_last")

_ULP = 2.0**-24  # relative rounding error of one float32 operation


class Case(NamedTuple):
    """Sizes of a mix. `padding`: unused channels behind each pixel's, in channels-last maps."""

    type_name: str = "float16"
    layout: str = "nchw"
    views: int = 2
    height: int = 6
    width: int = 14
    experts: int = 4
    expert_width: int = 32
    gate_width: int = 32
    padding: int = 0

    @property
    def channels(self) -> int:
        return self.experts * self.expert_width + self.gate_width

    def __str__(self) -> str:
        padded = f", {self.padding} channels of padding" if self.padding else ""
        return (
            f"{self.type_name} {self.layout} {self.views}x{self.height}x{self.width}, {self.experts} experts of "
            f"{self.expert_width}, gate of {self.gate_width}{padded}"
        )


# H W over the edges of vectors, groups, warps and blocks of the kernels, single pixels, single rows and columns.
_MAPS = [
    *[(1, 1, 1), (3, 1, 5), (3, 37, 1), (5, 2, 2), (2, 7, 7), (1, 16, 16), (3, 11, 23), (2, 16, 32), (1, 18, 29)],
    *[(2, 28, 38), (1, 31, 33), (1, 392, 518), (1, 517, 519), (16, 518, 518)],
]
# (K, Ce, Cg): lanes without channels, unequal widths, and weights that do not fit into shared memory.
_WIDTHS = [(4, 8, 8), (2, 24, 40), (3, 64, 8), (5, 8, 120), (16, 8, 8), (4, 1024, 1024)]


def cases() -> Iterator[Case]:
    """Every number of experts, every size of map and every width, each in three types and both layouts."""
    for layout in LAYOUTS:
        for type_name in TYPES:
            usual = Case(type_name, layout)
            yield from (usual._replace(experts=experts) for experts in range(1, 17))
            for views, height, width in _MAPS:
                yield usual._replace(views=views, height=height, width=width)
            for experts, expert_width, gate_width in _WIDTHS:
                small = usual._replace(height=4, width=5)
                yield small._replace(experts=experts, expert_width=expert_width, gate_width=gate_width)
            if layout == "channels_last":
                yield usual._replace(padding=8)


def operands_for(case: Case, generator: torch.Generator) -> Operands:
    """Weights that give depths near exp(N(0, 1)) and a gate of which every expert has a part."""

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=generator.device)

    experts, width, gate_width = case.experts, case.expert_width, case.gate_width
    return (
        normal(width**-0.5, experts, 2, width),
        normal(0.3, experts, 2),
        normal(gate_width**-0.5, experts, gate_width),
        normal(0.3, experts),
    )


def hidden_for(case: Case, generator: torch.Generator) -> Tensor:
    """A map (N, C, H, W) after a ReLU in the case's type and layout; its padding holds NaN."""
    dtype, device = TYPES[case.type_name], generator.device
    if case.layout == "nchw":
        shape: tuple[int, ...] = (case.views, case.channels, case.height, case.width)
        return torch.randn(shape, generator=generator, device=device).relu_().to(dtype)
    shape = (case.views, case.height, case.width, case.channels + case.padding)
    stored = torch.randn(shape, generator=generator, device=device).relu_().to(dtype)
    stored[..., case.channels :] = float("nan")
    return stored[..., : case.channels].permute(0, 3, 1, 2)


class Expected(NamedTuple):
    """The mix in float64: depth, confidence (N, H, W), weights (N, K, H, W); `bound` (N, H, W) is the relative error
    that float32 may have."""

    depth: Tensor
    confidence: Tensor
    weights: Tensor
    bound: Tensor


def reference(hidden: Tensor, operands: Operands, temperature: float) -> Expected:
    """The formula of moe3d_expert_mix.h in float64.

    The bound: a sum of n products is off by at most (n + 1) roundings of the sum of their magnitudes; exp turns that
    into a relative error; the softmax has it twice, above and below its fraction line. 16 roundings more for the rest.
    """
    expert_weight, expert_bias, gate_weight, gate_bias = (operand.double() for operand in operands)
    experts, _, width = expert_weight.shape
    values = hidden.double()
    of_experts = values[:, : experts * width].unflatten(1, (experts, width))
    of_gate = values[:, experts * width :]
    raw = torch.einsum("koc,nkchw->nkohw", expert_weight, of_experts) + expert_bias[:, :, None, None]
    logits = torch.einsum("kc,nchw->nkhw", gate_weight, of_gate) + gate_bias[:, None, None]
    shifted = ((logits - logits.amax(1, keepdim=True)) / temperature).exp()
    weights = shifted / shifted.sum(1, keepdim=True)
    depth = (weights * raw[:, :, 0].exp()).sum(1)
    confidence = 1 + (weights * raw[:, :, 1].exp()).sum(1)

    sums = torch.einsum("koc,nkchw->nkohw", expert_weight.abs(), of_experts.abs()) + expert_bias.abs()[:, :, None, None]
    gate_sums = torch.einsum("kc,nchw->nkhw", gate_weight.abs(), of_gate.abs()) + gate_bias.abs()[:, None, None]
    of_raw = (width + 2) * sums.amax((1, 2))
    of_logits = (gate_weight.shape[1] + 2) * gate_sums.amax(1) / temperature
    return Expected(depth, confidence, weights, _ULP * (of_raw + 2 * of_logits + 16))


def worst_error(got: tuple[Tensor, Tensor, Tensor], expected: Expected) -> float:
    """Largest error as a share of what float32 may have; above 1, or NaN, it is wrong. Infinite for any NaN."""
    of_maps = [
        (got[0].double() - expected.depth).abs() / (expected.bound * expected.depth),
        (got[1].double() - expected.confidence).abs() / (expected.bound * expected.confidence),
    ]
    if got[2].numel():
        allowed = expected.bound[:, None] * expected.weights + _ULP
        of_maps.append((got[2].double() - expected.weights).abs() / allowed)
    return max(float(share.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) for share in of_maps)
