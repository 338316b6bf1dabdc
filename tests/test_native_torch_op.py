"""The PyTorch operator around the C entry, on the CPU's stand-in: layouts, types, refusals, what a compiler is told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import depth_head
from test_native_math import random_operands

from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.model.experts import MergedExperts, expert_mix
from moe3d_deploy.native import torch_op
from moe3d_deploy.native.loading import CHANNELS_LAST, NCHW
from moe3d_deploy.native.torch_op import KernelExperts, run_expert_mix, self_test

pytest_plugins = ["native_fixtures", "native_library"]
pytestmark = pytest.mark.usefixtures("on_cpu")

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS = 3 * 16 + 8


def operands() -> torch_op.Operands:
    weight, bias, gate_weight, gate_bias = random_operands(np.random.default_rng(1), 3, 16, 8)
    return tuple(map(torch.from_numpy, (weight, bias, gate_weight, gate_bias)))  # type: ignore[return-value]


def hidden(dtype: torch.dtype = torch.float32, views: int = 2, height: int = 5, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((views, CHANNELS, height, width), generator=generator).relu().to(dtype)


def channels_last(tensor: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """The same map with its channels last and `padding` unused ones, all NaN, behind each pixel's."""
    views, channels, height, width = tensor.shape
    wide = torch.full((views, height, width, channels + padding), float("nan"), dtype=tensor.dtype)
    wide[..., :channels] = tensor.permute(0, 2, 3, 1)
    return wide[..., :channels].permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("padding", [None, 0, 8], ids=["nchw", "channels last", "padded"])
def test_the_operator_is_the_models_mix_in_every_type_and_layout(
    stand_in: Path, dtype: torch.dtype, padding: int | None
) -> None:
    given = hidden(dtype) if padding is None else channels_last(hidden(dtype), padding)
    got = run_expert_mix(given, *operands(), 0.7, True, str(stand_in))
    expected = expert_mix(hidden(dtype), *operands(), 0.7)
    for mine, its in zip(got, expected, strict=False):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)  # two float32 sums in different order


@pytest.mark.parametrize("size", [(2, 5, 7), (1, 5, 7), (2, 1, 7), (2, 5, 1), (2, 1, 1), (1, 1, 7), (1, 1, 1)], ids=str)
def test_channels_last_maps_of_any_size_are_read_where_they_are(stand_in: Path, size: tuple[int, int, int]) -> None:
    given = channels_last(hidden(torch.float32, *size), padding=8)
    sizes, tensors = torch_op.arguments(given, operands(), torch_op.empty_outputs(given, operands()[2], False), 1.0)
    assert tensors.hidden == given.data_ptr()
    if size != (1, 1, 1):  # a single pixel is contiguous in either sense
        assert (sizes.layout, sizes.pixel_stride) == (CHANNELS_LAST, CHANNELS + 8)
    got = run_expert_mix(given, *operands(), 1.0, True, str(stand_in))
    for mine, its in zip(got, expert_mix(given, *operands(), 1.0), strict=False):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_other_layouts_are_copied_and_give_the_same(stand_in: Path) -> None:
    expected = run_expert_mix(hidden(), *operands(), 1.0, True, str(stand_in))
    turned = hidden().transpose(2, 3).contiguous().transpose(2, 3)
    odd_padding = channels_last(hidden(), padding=3)  # rows of 59 channels: not aligned to 16 bytes
    off = channels_last(hidden().to(torch.float16), padding=8)
    off = torch.cat([torch.zeros(1, dtype=off.dtype), off.permute(0, 2, 3, 1).flatten()])[1:].view(2, 5, 7, CHANNELS)
    assert off.data_ptr() % 16 == 2
    for given in (turned, odd_padding, off.permute(0, 3, 1, 2)):
        assert torch_op._layout(given) is None
        got = run_expert_mix(given, *operands(), 1.0, True, str(stand_in))
        exact = given.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5 if exact else 1e-2, atol=1e-6 if exact else 1e-3)
    assert torch_op._layout(hidden()) == (NCHW, 0)


def test_without_weights_none_are_written(stand_in: Path) -> None:
    depth, confidence, weights = run_expert_mix(hidden(), *operands(), 1.0, False, str(stand_in))
    expected = run_expert_mix(hidden(), *operands(), 1.0, True, str(stand_in))
    assert weights.shape == (0,)
    assert torch.equal(depth, expected[0])
    assert torch.equal(confidence, expected[1])


def test_a_map_of_no_view_gives_empty_outputs(stand_in: Path) -> None:
    depth, confidence, weights = run_expert_mix(hidden()[:0], *operands(), 1.0, True, str(stand_in))
    assert depth.shape == confidence.shape == (0, 5, 7)
    assert weights.shape == (0, 3, 5, 7)


@pytest.mark.parametrize("with_weights", [False, True])
def test_the_operator_keeps_pytorchs_rules_for_custom_operators(stand_in: Path, with_weights: bool) -> None:
    """Schema, no hidden aliases, and the shapes that the compiler is told are those that come."""
    torch.library.opcheck(run_expert_mix, (hidden(), *operands(), 0.7, with_weights, str(stand_in)))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t.double(), "takes a map of float32, float16, bfloat16, got torch.float64"),
        (0, lambda t: t[0], r"expected \(N, C, H, W\), \(K, 2, Ce\), \(K, 2\), \(K, Cg\), \(K\), got \(56, 5, 7\), "),
        (0, lambda t: t[:, :-1], r"hidden is \(2, 55, 5, 7\), expected \(2, 56, 5, 7\)"),
        (1, lambda t: t[:, :1], r"expert_weight is \(3, 1, 16\), expected \(3, 2, 16\)"),
        (2, lambda t: t[:2], r"expert_bias is \(2, 2\), expected \(3, 2\)"),
        (3, lambda t: t[:2], r"gate_weight is \(2, 8\), expected \(3, 8\)"),
        (4, lambda t: t[:1], r"gate_bias is \(1,\), expected \(3,\)"),
        (4, lambda t: t.half(), "gate_bias has to be contiguous float32, got torch.float16"),
        (3, lambda t: t.t().contiguous().t(), "gate_weight has to be contiguous float32"),
        (2, lambda t: t.to("meta"), "expert_bias is on meta and the map on cpu"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_their_addresses_are_used(
    stand_in: Path, index: int, change: object, message: str
) -> None:
    given = [hidden(), *operands()]
    given[index] = change(given[index])  # type: ignore[operator]
    with pytest.raises(InputError, match=f"^moe3d::expert_mix.*{message}"):
        torch_op._check(given[0], tuple(given[1:]))  # type: ignore[arg-type]
    if index != 2 or given[2].device == CPU:  # else torch's own dispatch takes it
        with pytest.raises(InputError, match=message):
            run_expert_mix(*given, 1.0, True, str(stand_in))


def test_a_tensor_of_the_cpu_never_reaches_the_gpus_library(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_op, "DEVICE_TYPE", "cuda")
    with pytest.raises(InputError, match="^moe3d::expert_mix runs on cuda tensors, got the map on cpu$"):
        run_expert_mix(hidden(), *operands(), 1.0, True, str(stand_in))


def test_what_the_library_refuses_is_an_error_with_its_reason(stand_in: Path) -> None:
    with pytest.raises(Moe3dError) as caught:
        run_expert_mix(hidden(), *operands(), 0.0, True, str(stand_in))
    assert str(caught.value) == (
        "the expert mix was not started: the temperature is wrong; expected a finite number of at least 1.2e-38 "
        "(libmoe3d_expert_mix.so, status 8)"
    )


def merged_experts(temperature: float = 0.5) -> MergedExperts:
    moe = MoeConfig(3, 8, 16, temperature)
    head = depth_head(moe)
    return MergedExperts(head.experts, head.gate, moe)


@pytest.mark.parametrize("with_weights", [False, True])
def test_the_last_stage_with_the_kernel_is_the_merged_one(stand_in: Path, with_weights: bool) -> None:
    merged = merged_experts()
    features = torch.randn((2, merged.conv.in_channels, 6, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        got = KernelExperts(merged, stand_in, with_weights=with_weights)(features)
        expected = merged(features)
    torch.testing.assert_close(got.depth, expected.depth, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-5, atol=0)
    assert got.candidates.numel() == 0
    if with_weights:
        torch.testing.assert_close(got.weights, expected.weights, rtol=1e-5, atol=1e-6)
    else:
        assert got.weights.numel() == 0


def test_the_last_stage_traces_into_one_node(stand_in: Path) -> None:
    """What torch.compile sees of it: no graph break, one call of the operator."""
    kernel = KernelExperts(merged_experts(), stand_in)
    features = torch.zeros((1, kernel.conv.in_channels, 4, 5))
    with torch.inference_mode():
        graph = torch.export.export(kernel, (features,)).graph
    calls = [node for node in graph.nodes if node.target is torch.ops.moe3d.expert_mix.default]
    assert len(calls) == 1


def test_the_self_test_passes_for_the_kernel_and_finds_a_wrong_one(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = merged_experts()
    self_test(merged, stand_in, CPU)
    arguments = torch_op.arguments

    def with_another_temperature(*given: object) -> object:
        return arguments(*given[:3], 1.01 * given[3])  # type: ignore[arg-type, operator]

    monkeypatch.setattr(torch_op, "arguments", with_another_temperature)
    with pytest.raises(Moe3dError, match=r"^libmoe3d_expert_mix\.so is off by .* of PyTorch's own result"):
        self_test(merged, stand_in, CPU)


def test_the_self_test_finds_a_nan(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_written(hidden: torch.Tensor, gate: torch.Tensor, with_weights: bool) -> object:
        return tuple(tensor.fill_(float("nan")) for tensor in empty(hidden, gate, with_weights))

    empty = torch_op.empty_outputs
    monkeypatch.setattr(torch_op, "empty_outputs", not_written)
    monkeypatch.setattr("moe3d_deploy.native.loading.ExpertMixLibrary.mix", lambda *_: None)
    with pytest.raises(Moe3dError, match="is off by 1e\\+30"):
        self_test(merged_experts(), stand_in, CPU)
