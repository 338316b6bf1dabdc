"""Transformer blocks compiled by torch for a training (`--compile`): fewer passes over memory between the products.

On a CPU attention is then written out, as torch's fused kernel is slow backwards; long scenes keep the fused one, whose
memory does not grow with the square of their length.
"""

import importlib.util
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

    Raises Moe3dError as `require_tools` does.
    """
    require_tools(device)
    if device.type == "cpu":
        set_attention(model, _cpu_attention)
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else a block would run uncompiled, with a warning
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)


def require_tools(device: torch.device) -> None:
    """Raise Moe3dError without what compiles: on a CPU a C++ compiler, on CUDA Triton and a C compiler."""
    if device.type == "cpu":
        _require_compiler("C++", "CXX", "g++", "clang++")
        return
    if importlib.util.find_spec("triton") is None:
        raise Moe3dError("--compile needs Triton on CUDA: pip install triton, or leave --compile out")
    _require_compiler("C", "CC", "gcc", "clang")


def _require_compiler(language: str, variable: str, *usual: str) -> None:
    if not any(shutil.which(name) for name in (os.environ.get(variable, usual[0]), *usual)):
        raise Moe3dError(
            f"--compile needs a {language} compiler and finds none: install {usual[0]}, or leave --compile out"
        )


def _cpu_attention(q_BTHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    form = explicit_attention if q_BTHd.shape[1] <= _LONGEST_WRITTEN_OUT else fused_attention
    return form(q_BTHd, k_BTHd, v_BTHd)
