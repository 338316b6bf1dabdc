"""Which weights are 16-bit. Every layer computes in the dtype of its weights, so this decides the whole graph."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe3d_deploy.errors import InputError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "fp16-fp32heads")

# Matrix products and convolutions of the encoder and the aggregator: what autocast makes 16-bit in the reference.
_TRUNK = re.compile(r"aggregator\..*(\.qkv|\.proj|\.fc1|\.fc2)\.(weight|bias)")
# Convolutions of the dense heads but the last one, whose output is exponentiated.
_DENSE = re.compile(
    r"(depth_head|point_head)\."
    r"(projects|resize_layers|scratch\.(layer|refinenet|output_conv1|output_conv2\.0)|experts\.\d+\.0\.|gate\.0\.)"
)


@dataclass(frozen=True)
class PrecisionPolicy:
    """One of PRECISIONS.

    fp16: matrix products, convolutions and attention in half; residual stream, norms, rotary embedding, softmax, camera
    head, exponentials and the expert mix in float32. fp16-fp32heads: the dense heads in float32 as well, as the
    reference runs them.
    """

    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is unknown; choose from {', '.join(PRECISIONS)}")

    @property
    def sixteen_bit(self) -> bool:
        return self.precision != "fp32"

    def dtype_of(self) -> "Callable[[str], torch.dtype]":
        """From a parameter's name to its dtype."""
        import torch

        half_heads = self.precision == "fp16"

        def choose(name: str) -> torch.dtype:
            half = self.sixteen_bit and (_TRUNK.fullmatch(name) or (half_heads and _DENSE.match(name)))
            return torch.float16 if half else torch.float32

        return choose
