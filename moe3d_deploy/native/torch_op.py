"""`moe3d::expert_mix`: the expert-mix kernel as a PyTorch operator, and the expert head's last stage around it.

The operator is a thin shell over the library's C function: it checks types and shapes, takes the map in the layout that
it has, and queues one kernel on torch's current stream. It waits for nothing and has no gradient.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.model.experts import MergedExperts, Mixture, expert_mix
from moe3d_deploy.native.loading import ALIGNMENT_BYTES, CHANNELS_LAST, NCHW, TYPES, WIDTH_STEP, Sizes, Tensors, load

DEVICE_TYPE = "cuda"  # whose memory the library reads

Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # expert_weight, expert_bias, gate_weight, gate_bias

_TYPES = {getattr(torch, name): number for name, number in TYPES.items()}
# How far the kernel may be from PyTorch's operators in `self_test`: both are float32 sums of at most some thousand
# terms, in another order, under an exponential.
_SELF_TEST_LIMIT = 1e-3


@torch.library.custom_op("moe3d::expert_mix", mutates_args=())
def run_expert_mix(
    hidden: Tensor,
    expert_weight: Tensor,
    expert_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    temperature: float,
    with_weights: bool,
    library: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """depth, confidence (N, H, W), weights (N, K, H, W) or, without `with_weights`, an empty tensor; all float32.

    hidden    (N, K Ce + Cg, H, W)  after the ReLU; float32, float16 or bfloat16. Contiguous and channels-last maps,
              also those with unused channels behind each pixel's, are read where they are; others are copied first.
    operands  as `model.experts.expert_mix` has them: float32, contiguous, on the map's device
    library   path of libmoe3d_expert_mix.so

    Raises InputError for tensors that do not fit, Moe3dError where the library refuses.
    """
    operands = (expert_weight, expert_bias, gate_weight, gate_bias)
    _check(hidden, operands)
    if hidden.device.type != DEVICE_TYPE:
        raise InputError(f"moe3d::expert_mix runs on {DEVICE_TYPE} tensors, got the map on {hidden.device}")
    if _layout(hidden) is None:
        hidden = hidden.contiguous()
    outputs = empty_outputs(hidden, gate_weight, with_weights)
    sizes, tensors = arguments(hidden, operands, outputs, temperature)
    loaded = load(Path(library))
    if hidden.device.type == "cuda":
        with torch.cuda.device(hidden.device):
            loaded.mix(sizes, tensors, torch.cuda.current_stream().cuda_stream)
    else:
        loaded.mix(sizes, tensors, None)
    return outputs


@run_expert_mix.register_fake
def _(
    hidden: Tensor,
    expert_weight: Tensor,
    expert_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    temperature: float,
    with_weights: bool,
    library: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(hidden, (expert_weight, expert_bias, gate_weight, gate_bias))
    return empty_outputs(hidden, gate_weight, with_weights)


class KernelExperts(nn.Module):
    """Stands in for MergedExperts: its convolution, then the kernel. `candidates` of its Mixture is empty."""

    expert_weight: Tensor
    expert_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor

    def __init__(self, merged: MergedExperts, library: Path, *, with_weights: bool = False) -> None:
        """`merged` keeps its convolution's type; its small operands are copied to float32 where they are not."""
        super().__init__()
        self.conv = merged.conv
        self.temperature = merged.temperature
        self.with_weights = with_weights
        self.library = str(library)
        for name in ("expert_weight", "expert_bias", "gate_weight", "gate_bias"):
            self.register_buffer(name, getattr(merged, name).detach().to(torch.float32).contiguous())

    def forward(self, features_NCHW: Tensor) -> Mixture:
        return self.mix(self.conv(features_NCHW).relu_())

    def mix(self, hidden_NCHW: Tensor) -> Mixture:
        """What comes after the convolution and its ReLU."""
        depth, confidence, weights = run_expert_mix(
            hidden_NCHW,
            self.expert_weight,
            self.expert_bias,
            self.gate_weight,
            self.gate_bias,
            self.temperature,
            self.with_weights,
            self.library,
        )
        return Mixture(depth, confidence, weights, weights.new_empty(0))


def self_test(merged: MergedExperts, library: Path, device: torch.device) -> None:
    """Run the kernel once with a model's operands beside PyTorch's operators. Waits for the device.

    Raises Moe3dError where the kernel does not start, as on a card that the library was not compiled for, or where the
    two differ.
    """
    kernel = KernelExperts(merged, library, with_weights=True).to(device)
    operands = (kernel.expert_weight, kernel.expert_bias, kernel.gate_weight, kernel.gate_bias)
    channels = merged.conv.out_channels
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for height, width in ((5, 7), (8, 16)):  # one pixel a thread, and four
            # Small values: with any weights no exponential may overflow.
            hidden = (0.1 * torch.randn((2, channels, height, width), generator=generator).relu()).to(device)
            expected = expert_mix(hidden, *operands, merged.temperature)
            for got, want in zip(kernel.mix(hidden)[:3], expected[:3], strict=True):
                error = float(((got - want).abs() / want.abs().clamp(min=_SELF_TEST_LIMIT)).nan_to_num(nan=1e30).max())
                if error > _SELF_TEST_LIMIT:
                    raise Moe3dError(
                        f"{library.name} is off by {error:.2g} of PyTorch's own result on this device, limit "
                        f"{_SELF_TEST_LIMIT:g}"
                    )


def arguments(
    hidden: Tensor, operands: Operands, outputs: tuple[Tensor, Tensor, Tensor], temperature: float
) -> tuple[Sizes, Tensors]:
    """The C function's arguments for tensors that fit together; an empty `weights` is left out."""
    expert_weight, _, gate_weight, _ = operands
    layout, pixel_stride = _layout(hidden) or (NCHW, 0)
    views, _, height, width = hidden.shape
    sizes = Sizes(
        *(_TYPES[hidden.dtype], layout, views, height, width),
        *(expert_weight.shape[0], expert_weight.shape[2], gate_weight.shape[1]),
        *(pixel_stride, temperature),
    )
    depth, confidence, weights = (tensor.data_ptr() if tensor.numel() else None for tensor in outputs)
    addresses = (tensor.data_ptr() for tensor in (hidden, *operands))
    return sizes, Tensors(*addresses, depth, confidence, weights)


def _check(hidden: Tensor, operands: Operands) -> None:
    """Raise InputError unless types and shapes fit together: the C function sees addresses alone."""
    expert_weight, expert_bias, gate_weight, gate_bias = operands
    if hidden.dtype not in _TYPES:
        raise InputError(f"moe3d::expert_mix takes a map of {', '.join(TYPES)}, got {hidden.dtype}")
    if hidden.dim() != 4 or expert_weight.dim() != 3 or gate_weight.dim() != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, *operands))
        raise InputError(f"moe3d::expert_mix: expected (N, C, H, W), (K, 2, Ce), (K, 2), (K, Cg), (K), got {shapes}")
    experts, _, width = expert_weight.shape
    gate_width = gate_weight.shape[1]
    expected = {
        "hidden": (hidden, (hidden.shape[0], experts * width + gate_width, *hidden.shape[2:])),
        "expert_weight": (expert_weight, (experts, 2, width)),
        "expert_bias": (expert_bias, (experts, 2)),
        "gate_weight": (gate_weight, (experts, gate_width)),
        "gate_bias": (gate_bias, (experts,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise InputError(f"moe3d::expert_mix: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.device != hidden.device:
            raise InputError(f"moe3d::expert_mix: {name} is on {tensor.device} and the map on {hidden.device}")
        if tensor is not hidden and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise InputError(f"moe3d::expert_mix: {name} has to be contiguous float32, got {tensor.dtype}")


def empty_outputs(hidden: Tensor, gate_weight: Tensor, with_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised depth, confidence and weights, as `run_expert_mix` returns them."""
    views, _, height, width = hidden.shape
    depth, confidence = (hidden.new_empty((views, height, width), dtype=torch.float32) for _ in range(2))
    of_gate = (views, gate_weight.shape[0], height, width) if with_weights else (0,)
    return depth, confidence, hidden.new_empty(of_gate, dtype=torch.float32)


def _layout(hidden: Tensor) -> tuple[int, int] | None:
    """(enum moe3d_layout, pixel stride) of a map that the kernel reads where it is; None for others."""
    if hidden.is_contiguous():
        return NCHW, 0
    _, channels, height, width = hidden.shape
    # Of an axis of size 1 the stride says nothing.
    strides = {axis: stride for axis, stride in enumerate(hidden.stride()) if hidden.shape[axis] > 1}
    steps = ((3, 1), (2, width), (0, height * width))
    stride = next((strides[axis] // pixels for axis, pixels in steps if axis in strides), channels)
    packed = strides == {axis: stride * pixels for axis, pixels in steps if axis in strides} | {1: 1}
    fits = stride >= channels and stride % WIDTH_STEP == 0 and hidden.data_ptr() % ALIGNMENT_BYTES == 0
    return (CHANNELS_LAST, stride) if packed and fits else None
