"""Which weights are 16-bit. Every layer computes in the dtype of its weights, so this decides the whole graph.

int8 is another matter: the model is float32, and its file holds matrix products in 8 bits (`eight_bit`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe3d_deploy.errors import InputError

if TYPE_CHECKING:
    import torch

# Types of the matrix products of encoder and aggregator, of the patch convolution, and of the dense heads'
# convolutions. The patch convolution of a bf16 trunk is float32: ONNX's Conv takes bfloat16 only from opset 22 on, and
# its share of the work is small. The heads are never bf16: TensorRT-RTX builds no transposed convolution in it.
_TYPES = {
    "fp32": ("float32", "float32", "float32"),
    "fp16": ("float16", "float16", "float16"),
    "fp16-fp32heads": ("float16", "float16", "float32"),
    "bf16": ("bfloat16", "float32", "float32"),
    "bf16-fp16heads": ("bfloat16", "float32", "float16"),
    "int8": ("int8", "float32", "float32"),
}
PRECISIONS = tuple(_TYPES)

_PATCH = re.compile(r"aggregator\.patch_embed\.patch_embed\.proj\.(weight|bias)")
# Matrix products of the encoder and the aggregator: what autocast makes 16-bit in the reference.
_TRUNK = re.compile(r"aggregator\..*(\.qkv|\.proj|\.fc1|\.fc2)\.(weight|bias)")
# Convolutions of the dense heads but the last one, whose output is exponentiated.
_DENSE = re.compile(
    r"(depth_head|point_head)\."
    r"(projects|resize_layers|scratch\.(layer|refinenet|output_conv1|output_conv2\.0)|experts\.\d+\.0\.|gate\.0\.)"
)


@dataclass(frozen=True)
class PrecisionPolicy:
    """One of PRECISIONS.

    fp16            matrix products, convolutions and attention in half; residual stream, norms, rotary embedding,
                    softmax, camera head, exponentials and the expert mix in float32
    fp16-fp32heads  the dense heads in float32 as well, as the reference runs them
    bf16            matrix products and attention of encoder and aggregator in bfloat16, all else in float32: the range
                    of float32 for an eighth of half's exactness
    bf16-fp16heads  as bf16, but the dense heads in half
    int8            weights of the matrix products of encoder and aggregator in 8 bits, and so what they are multiplied
                    with; all else in float32. For ONNX Runtime on a CPU
    """

    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is unknown; choose from {', '.join(PRECISIONS)}")

    @property
    def sixteen_bit(self) -> bool:
        return any(kind in ("float16", "bfloat16") for kind in _TYPES[self.precision])

    @property
    def bfloat16(self) -> bool:
        """Whether the graph holds bfloat16, for which ONNX Runtime has no kernels on a CPU."""
        return _TYPES[self.precision][0] == "bfloat16"

    @property
    def eight_bit(self) -> bool:
        """Whether the graph holds products in 8 bits, which only ONNX Runtime on a CPU is to run."""
        return _TYPES[self.precision][0] == "int8"

    @property
    def has_twin(self) -> bool:
        """Whether a float32 twin of the file shows that the graph is right, where the file itself cannot."""
        return self.bfloat16 or self.eight_bit

    def type_of(self, name: str) -> str:
        """The type of a parameter in the file, by its name: float32, float16, bfloat16 or int8. Needs no torch."""
        trunk, patch, dense = _TYPES[self.precision]
        if _PATCH.fullmatch(name):
            return patch
        if match := _TRUNK.fullmatch(name):
            return "float32" if self.eight_bit and match[2] == "bias" else trunk
        return dense if _DENSE.match(name) else "float32"

    def dtype_of(self) -> "Callable[[str], torch.dtype]":
        """From a parameter's name to its dtype in PyTorch; weights in 8 bits are float32 until they are written."""
        import torch

        def choose(name: str) -> torch.dtype:
            kind = self.type_of(name)
            dtype: torch.dtype = torch.float32 if kind == "int8" else getattr(torch, kind)
            return dtype

        return choose
