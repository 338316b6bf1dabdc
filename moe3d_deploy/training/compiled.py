"""Transformer blocks compiled by torch for a training (`--compile`): fewer passes over memory between the products.

On a CPU attention is then written out, as torch's fused kernel is slow backwards; long scenes keep the fused one, whose
memory does not grow with the square of their length.
"""

import os
import shutil

import torch
from torch import Tensor, nn

from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.model.transformer import Block, explicit_attention, fused_attention, set_attention

_MOST_VARIANTS = 64  # of a block's code: with and without gradients, rotary embedding and q/k norm, one view or more
_LONGEST_WRITTEN_OUT = 1024  # tokens; the logits of one block then take 4 MiB a head in float32


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Compile every transformer block of `model`, at its first call; a length alone makes no new code.

    Raises Moe3dError where a CPU has no C++ compiler.
    """
    if device.type == "cpu":
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
            raise Moe3dError(
                "--compile needs a C++ compiler on a CPU and finds none: install g++, or leave --compile out"
            )
        set_attention(model, _cpu_attention)
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS  # beyond it a block would run uncompiled, with a warning
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (explicit_attention if q.shape[-2] <= _LONGEST_WRITTEN_OUT else fused_attention)(q, k, v)
