"""Which weights an fp16 export makes half, and how close its values come to half's largest number, 65,504."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe3d_deploy.errors import ExportError, InputError
from moe3d_deploy.export import verify
from moe3d_deploy.export.half import SixteenBitRun
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.model.transformer import Linear

# Every parameter of MoE3D is on one of these lists, with "*" for what repeats.
PATCH = ("aggregator.patch_embed.patch_embed.proj.weight", "aggregator.patch_embed.patch_embed.proj.bias")
TRUNK = (
    *(
        f"aggregator.{blocks}.*.{layer}.{kind}"
        for blocks in ("patch_embed.blocks", "frame_blocks", "global_blocks")
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
)
DENSE_BODY = (
    *(f"projects.*.{kind}" for kind in ("weight", "bias")),
    *(f"resize_layers.*.{kind}" for kind in ("weight", "bias")),
    *(f"scratch.layer{level}_rn.weight" for level in (1, 2, 3, 4)),
    *(f"scratch.refinenet{level}.out_conv.{kind}" for level in (1, 2, 3, 4) for kind in ("weight", "bias")),
    *(
        f"scratch.refinenet{level}.resConfUnit{unit}.conv{conv}.{kind}"
        for level, unit in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (4, 2))
        for conv in (1, 2)
        for kind in ("weight", "bias")
    ),
    *(f"scratch.output_conv1.{kind}" for kind in ("weight", "bias")),
)
DENSE = (
    *(f"{head}.{name}" for head in ("depth_head", "point_head") for name in DENSE_BODY),
    *(f"depth_head.{branch}.0.{kind}" for branch in ("experts.*", "gate") for kind in ("weight", "bias")),
    *(f"{head}.scratch.output_conv2.0.{kind}" for head in ("depth_head", "point_head") for kind in ("weight", "bias")),
)
FLOAT32 = (
    *(f"aggregator.patch_embed.{name}" for name in ("cls_token", "pos_embed", "register_tokens", "mask_token")),
    *(f"aggregator.patch_embed.norm.{kind}" for kind in ("weight", "bias")),
    *(f"aggregator.{name}" for name in ("camera_token", "register_token")),
    *(
        f"aggregator.{blocks}.*.{norm}.{kind}"
        for blocks in ("patch_embed.blocks", "frame_blocks", "global_blocks")
        for norm in ("norm1", "norm2")
        for kind in ("weight", "bias")
    ),
    *(
        f"aggregator.{blocks}.*.attn.{norm}.{kind}"
        for blocks in ("frame_blocks", "global_blocks")
        for norm in ("q_norm", "k_norm")
        for kind in ("weight", "bias")
    ),
    *(
        f"aggregator.{blocks}.*.{scale}.gamma"
        for blocks in ("patch_embed.blocks", "frame_blocks", "global_blocks")
        for scale in ("ls1", "ls2")
    ),
    "camera_head.**",
    *(f"{head}.norm.{kind}" for head in ("depth_head", "point_head") for kind in ("weight", "bias")),
    *(f"depth_head.{branch}.2.{kind}" for branch in ("experts.*", "gate") for kind in ("weight", "bias")),
    *(f"{head}.scratch.output_conv2.2.{kind}" for head in ("depth_head", "point_head") for kind in ("weight", "bias")),
)


def is_on(name: str, patterns: tuple[str, ...]) -> bool:
    """`*` stands for one number, `**` for any rest."""
    parts = name.split(".")

    def fits(pattern: str) -> bool:
        wanted = pattern.split(".")
        if wanted[-1] == "**":
            return parts[: len(wanted) - 1] == wanted[:-1]
        return len(parts) == len(wanted) and all(
            part.isdigit() if want == "*" else part == want for part, want in zip(parts, wanted, strict=True)
        )

    return any(fits(pattern) for pattern in patterns)


def parameter_names() -> list[str]:
    """Of the plain head and of the expert head."""
    from moe3d_deploy.checkpoint import model_shapes
    from moe3d_deploy.config import PRESETS

    return sorted({*model_shapes(exports.MOE), *model_shapes(PRESETS["vggt-1b"])})


@pytest.mark.parametrize(
    ("policy", "half", "brain"),
    [
        (PrecisionPolicy("fp32"), (), ()),
        (PrecisionPolicy("fp16"), PATCH + TRUNK + DENSE, ()),
        (PrecisionPolicy("fp16-fp32heads"), PATCH + TRUNK, ()),
        (PrecisionPolicy("bf16"), (), TRUNK),
        (PrecisionPolicy("bf16-fp16heads"), DENSE, TRUNK),
    ],
    ids=lambda value: value.precision if isinstance(value, PrecisionPolicy) else "",
)
def test_which_parameters_are_16_bit(policy: PrecisionPolicy, half: tuple[str, ...], brain: tuple[str, ...]) -> None:
    dtype_of = policy.dtype_of()
    for name in parameter_names():
        lists = [is_on(name, patterns) for patterns in (PATCH, TRUNK, DENSE, FLOAT32)]
        assert sum(lists) == 1, f"{name} is on no list, or on two"
        expected = torch.float16 if is_on(name, half) else torch.bfloat16 if is_on(name, brain) else torch.float32
        assert dtype_of(name) == expected, name
    assert policy.bfloat16 == bool(brain)
    assert policy.sixteen_bit == bool(half or brain)


def test_every_pattern_is_of_a_parameter() -> None:
    names = parameter_names()
    for pattern in (*PATCH, *TRUNK, *DENSE, *FLOAT32):
        assert any(is_on(name, (pattern,)) for name in names), pattern


@pytest.mark.parametrize("precision", ["bf16-fp32heads", "int4", "FP16", ""])
def test_another_precision_is_refused(precision: str) -> None:
    with pytest.raises(
        InputError, match=rf"^precision '{precision}' is unknown; choose from fp32, fp16, fp16-fp32heads, bf16, bf16-"
    ):
        PrecisionPolicy(precision)


def test_a_loaded_model_has_the_policys_dtypes() -> None:
    model = exports.load("fp16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float16 if is_on(name, PATCH + TRUNK + DENSE) else torch.float32)


# ---- running it


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).half()


class Products(nn.Module):
    """A call of torch as a module, for SixteenBitRun wants one."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor, **arguments: Any) -> Tensor:
        return self.function(*tensors, **arguments)


@pytest.mark.parametrize(
    ("function", "operands", "arguments"),
    [
        (torch.mm, [random(5, 64), random(64, 7)], {}),
        (torch.bmm, [random(3, 5, 64), random(3, 64, 7)], {}),
        (torch.matmul, [random(2, 3, 5, 16), random(2, 3, 16, 5)], {}),
        (torch.addmm, [random(7), random(5, 64), random(64, 7)], {"beta": 0.5, "alpha": 2.0}),
        (torch.baddbmm, [random(3, 5, 7), random(3, 5, 64), random(3, 64, 7)], {}),
        (F.linear, [random(2, 5, 64), random(7, 64), random(7)], {}),
        (F.conv2d, [random(2, 8, 9, 7), random(4, 8, 3, 3), random(4)], {"padding": 1, "stride": 2}),
        (F.conv2d, [random(2, 8, 9, 7), random(4, 8, 3, 3)], {}),
        (F.conv_transpose2d, [random(1, 8, 4, 3), random(8, 5, 2, 2), random(5)], {"stride": 2}),
    ],
    ids=["mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "conv2d", "conv2d no bias", "conv_transpose2d"],
)
def test_a_product_is_what_native_half_gives(
    function: Callable[..., Tensor], operands: list[Tensor], arguments: dict[str, Any]
) -> None:
    module = Products(function)
    with SixteenBitRun(module) as run:
        found = module(*operands, **arguments)

    expected = function(*operands, **arguments)
    exact = function(*(operand.double() for operand in operands), **arguments)
    assert found.dtype == torch.float16
    # One rounding to half, 2^-11 of the value; native half may add float32 sums in another order, or round twice.
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=2**-11, atol=2**-20 * scale)
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2**-11 * scale)
    assert list(run.largest.values())[-1] == float(found.abs().max())


def test_other_operations_and_other_types_are_left_alone() -> None:
    module = Products(lambda x, y: F.gelu(x).float() @ y.float())
    x, y = random(4, 8), random(8, 4)
    with SixteenBitRun(module) as run:
        found = module(x, y)

    assert torch.equal(found, F.gelu(x).float() @ y.float())
    assert list(run.largest) == ["after the start: gelu"]  # float32 has a range of its own and is not recorded


def test_bfloat16_products_are_rounded_to_bfloat16() -> None:
    x, y = random(5, 64).bfloat16(), random(64, 7).bfloat16()
    module = Products(torch.mm)
    with SixteenBitRun(module):
        found = module(x, y)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), x.double() @ y.double(), rtol=2**-8, atol=1e-6)


class Chain(nn.Module):
    """Half in, half in between, float32 out: what a matrix product between two float32 islands looks like."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.up = Linear(4, 4, bias=False)
        self.down = Linear(4, 4, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(4) * weight)
            self.down.weight.copy_(torch.eye(4) / weight)
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)).float()


def test_the_largest_value_of_each_tensor_is_kept_over_all_runs() -> None:
    model = Chain(2.0)
    with SixteenBitRun(model) as run:
        for value in (3.0, -50.0, 7.0):
            model(torch.full((1, 4), value))

    assert {key: value for key, value in run.largest.items() if key.endswith(": mm")} == {
        "up: mm": 100.0,
        "down: mm": 50.0,
    }


@pytest.mark.parametrize("value", [40000.0, -40000.0, math.inf, math.nan])
def test_overflow_and_nan_are_recorded_as_infinite(value: float) -> None:
    model = Chain(2.0)
    with SixteenBitRun(model) as run:
        result = model(torch.full((1, 4), value))

    assert not torch.isfinite(result).all()
    assert run.largest["up: mm"] == math.inf


def test_the_hooks_go_with_the_run_even_if_it_fails() -> None:
    model = Chain(1.0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), SixteenBitRun(model):
        model(torch.zeros(1, 3))

    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with SixteenBitRun(model) as again:
        model(torch.ones(1, 4))
    assert again.largest["down: mm"] == 1.0
    before = dict(again.largest)
    model(torch.full((1, 4), 9.0))
    assert again.largest == before


# ---- an overflow that ONNX Runtime on a CPU does not see

LAYER = "aggregator.frame_blocks.0.mlp.fc1"
FACTOR = 2.0**17  # a power of two, so the weights keep their digits: 0.3 * 2^17 is below 65,504, a sum of them is not
SHAPE = (1, 2, 2, 3)


def scaled(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same with LAYER's output FACTOR times as large, and the LayerScale behind it as much smaller."""
    factors = {f"{LAYER}.weight": FACTOR, "aggregator.frame_blocks.0.ls2.gamma": 1 / FACTOR}
    return {name: tensor * factors.get(name, 1.0) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def overflowing_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overflowing") / "checkpoint"
    folder.mkdir()
    source = exports.checkpoint()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(scaled(load_file(source / "model.safetensors")), folder / "model.safetensors")
    return folder


def shares_of(checkpoint: Path, folder: Path, precision: str = "fp16") -> dict[str, float]:
    """The stage that runs in a child, in this process."""
    request = {
        "source": {"source": str(checkpoint), "seed": 0, "allow_pickle": False},
        "policy": {"precision": precision},
        "input": "float32",
        "merge": True,
        "outputs": [],
        "names": ["depth"],
        "shapes": [list(SHAPE)],
        "patch_size": 14,
        "folder": str(folder),
    }
    shares: dict[str, float] = verify.rounded(request, lambda event: None)["shares"]
    return shares


def test_a_model_within_range_passes_and_reports_every_tensor(tmp_path: Path) -> None:
    shares = shares_of(exports.checkpoint(), tmp_path)

    report = verify.headroom_report(shares, "fp16")

    assert report["limit"] == 0.5
    assert report["tensors"] == len(shares) > 50
    assert report["largest"] == pytest.approx(shares, rel=1e-3)
    parts = {key.removeprefix("after ").split(".")[0] for key in shares}
    assert parts == {"aggregator", "depth_head"}  # every tensor says where it is; the camera head has none in half
    assert "after depth_head.scratch.output_conv1: upsample_bilinear2d" in shares


def test_an_overflow_fails_the_export_and_names_the_tensor(overflowing_checkpoint: Path, tmp_path: Path) -> None:
    shares = shares_of(overflowing_checkpoint, tmp_path)

    assert shares[f"{LAYER}: addmm"] == math.inf
    with pytest.raises(ExportError, match=rf"^verification failed: tensor '{LAYER}.*' reaches inf of its 16-bit range"):
        verify.headroom_report(shares, "fp16")


def test_bfloat16_has_the_range_that_half_lacks(overflowing_checkpoint: Path, tmp_path: Path) -> None:
    """The same weights; each tensor's share is of its own type, whose largest number is 3.4e38."""
    shares = shares_of(overflowing_checkpoint, tmp_path, "bf16")

    assert 65504 < shares[f"{LAYER}: addmm"] * float(torch.finfo(torch.bfloat16).max) < 1e9
    assert verify.headroom_report(shares, "bf16")["limit"] == 0.5


def test_onnxruntime_on_a_cpu_computes_the_same_graph_without_overflow(tmp_path: Path) -> None:
    """It computes half in float32, so what it gives says nothing of a GPU: the reason for the run in PyTorch."""
    exported = exports.bundle().exported
    proto = copy.deepcopy(exported.proto)
    weights = dict(exports.load("fp16").state_dict())
    changed = {name: scaled(weights)[name] for name in weights if not torch.equal(scaled(weights)[name], weights[name])}
    assert len(changed) == 2
    for name, values in changed.items():
        original = weights[name].numpy()
        for tensor in proto.graph.initializer:  # a Linear's weight lies there transposed
            for turn in (np.asarray, np.transpose):
                if np.array_equal(numpy_helper.to_array(tensor), turn(original)):
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turn(values.numpy())), tensor.name))
    onnx.save(proto, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    images = verify.images_for(SHAPE, 14)

    depth = session.run(["depth"], {"images": images})[0]

    assert np.isfinite(depth).all()
    assert not np.array_equal(depth, exported.run(images)["depth"])  # the change arrived
