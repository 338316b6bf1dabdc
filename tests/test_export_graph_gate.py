"""Tracing refuses a model that depends on a concrete shape, and lets pass one that does not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d_deploy.errors import ExportError
from moe3d_deploy.export import graph


def module_of(forward: Callable[[Tensor], Tensor]) -> nn.Module:
    class Module(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return forward(images)

    return Module()


def doubled(x: Tensor, height: int) -> Tensor:
    return F.interpolate(x.flatten(0, 1), size=(height, x.shape[-1]))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * (1.0 if x.shape[1] <= 8 else 1.5),
        lambda x: x * (1.0 if x.shape[1] % 2 else 1.5),
        lambda x: x * (1.0 if (x.shape[0] * x.shape[1]) % 2 else 1.5),
        lambda x: x * (1.0 if x.shape[-2] <= 100 else 1.5),
        lambda x: x * (1.0 if x.shape[-2] <= x.shape[-1] else 1.5),
        lambda x: x * (1.0 if x.shape[-2] == x.shape[-1] else 1.5),
        lambda x: x * (1.0 if x.shape[-2] * x.shape[-1] <= 518 * 518 else 1.5),
        lambda x: x * (1.0 if x.shape[1] / x.shape[-2] < 0.2 else 1.5),
        lambda x: x * int(2.5 * x.shape[-2]),
        lambda x: x * float(x.shape[-1]),
        lambda x: x[..., : int(x.shape[-2] / 3), :],
        lambda x: doubled(x, int(2.5 * x.shape[-2])),
        lambda x: F.interpolate(x.flatten(0, 1), scale_factor=x.shape[-1] / x.shape[-2]),
        lambda x: x + torch.linspace(0, 1, x.shape[-1]),
    ],
    ids=[
        "S <= 8", "S % 2", "B S % 2", "H <= 100", "H <= W", "H == W", "H W <= 518^2", "S / H", "int(2.5 H)", "float(W)",
        "int(H / 3)", "resize to int(2.5 H)", "resize by W / H", "linspace(W)",
    ],
)  # fmt: skip
def test_the_gate_refuses_what_holds_for_some_sizes_only(forward: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ExportError) as caught:
        graph.trace(module_of(forward), 14)

    assert str(caught.value).startswith("the model depends on a concrete shape, so one file cannot serve all: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.flatten(0, 1).mean(0),
        lambda x: doubled(x, 2 * x.shape[-2]),
        lambda x: doubled(x, x.shape[-2] // 14 * 4),
        lambda x: x.reshape(-1, x.shape[-1]) + torch.arange(x.shape[-1]),
        lambda x: x if x.shape[-2] % 14 == 0 else x * 0,
    ],
    ids=["mean", "resize to 2 H", "resize to 4 rows", "arange(W)", "H % 14 == 0"],
)
def test_the_gate_lets_pass_what_holds_for_every_size(forward: Callable[[Tensor], Tensor]) -> None:
    assert graph.trace(module_of(forward), 14) is not None


def test_the_refusal_says_what_was_assumed_and_where_it_fails() -> None:
    with pytest.raises(ExportError) as caught:
        graph.trace(module_of(lambda x: x * (1.0 if x.shape[-2] <= x.shape[-1] else 1.5)), 14)
    assert str(caught.value).endswith("it takes for granted that H <= W, which fails at B=3 S=5 H=70 W=56")
