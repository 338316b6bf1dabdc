"""Where a 16-bit model leaves float32: the first block that is off, and which blocks have to stay in float32.

Both models run in PyTorch, the 16-bit one with real rounding and overflow (`export.half`), so no GPU is needed. A block
is a transformer block or a convolution of a dense head: what a precision policy makes 16-bit, in the order it runs.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.export.compare import Limits, beyond, errors
from moe3d_deploy.export.half import SixteenBitRun
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.verify import Shape, images_for

_BLOCK = re.compile(
    r"aggregator\.patch_embed\.patch_embed|.*?\b(?:frame_|global_)?blocks\.\d+"
    r"|(?:depth|point)_head\.(?:(?:projects|resize_layers|experts)\.\d+|scratch\.output_conv2|scratch\.\w+|gate)"
)
OUTPUTS = ("depth", "depth_conf", "pose_enc")  # extrinsics and intrinsics are made of the last, in float32


@dataclass(frozen=True)
class BlockError:
    """How far a block's output is from the float32 model's: max |a - b| / max |b|; inf where one is not finite."""

    block: str
    error: float


@dataclass(frozen=True)
class RoundingFaults:
    """What `search` found.

    blocks      every 16-bit block in the order it runs
    first       the first of them whose output is off by more than the tolerance; None where all are within it
    broken      outputs of the whole model beyond the limits of the precision, with what is wrong
    islands     blocks which in float32 bring every output within the limits, and none of which can be left out; empty
                where nothing is broken
    """

    blocks: tuple[BlockError, ...]
    first: BlockError | None
    broken: tuple[str, ...]
    islands: tuple[str, ...]


def search(spec: SourceSpec, precision: str, shape: Shape, *, tolerance: float) -> RoundingFaults:
    """Compare the model in `precision` with float32 on the verification's images of a shape in patches.

    tolerance   of a block's output, as a share of its largest value

    Raises InputError for what rounds nothing to 16 bits; Moe3dError where float32 in every block mends nothing.
    """
    policy = PrecisionPolicy(precision)
    if not policy.sixteen_bit:
        raise InputError(f"{precision} rounds nothing to 16 bits; choose a 16-bit precision to search for faults")
    reference, reduced = spec.load(PrecisionPolicy("fp32"), ()), spec.load(policy, ())
    images = torch.from_numpy(images_for(shape, reference.config.patch_size))
    blocks = blocks_of(reduced)
    found, expected, whole = _compare(reference, reduced, images, blocks)
    broken = _broken(whole, expected, precision)
    islands: list[str] = []
    if broken:
        exact, rounded = dict(reference.named_parameters()), {k: p.data for k, p in reduced.named_parameters()}

        def holds(kept: Collection[str]) -> bool:
            for name, parameter in reduced.named_parameters():
                parameter.data = exact[name].data if block_of(name) in kept else rounded[name]
            return not _broken(_run(reduced, images), expected, precision)

        islands = smallest(blocks, holds)
    first = next((block for block in found if not block.error <= tolerance), None)
    return RoundingFaults(tuple(found), first, tuple(broken), tuple(islands))


def block_of(parameter: str) -> str | None:
    """The block that a parameter belongs to; None for what is in none."""
    match = _BLOCK.match(parameter)
    return match.group(0) if match else None


def blocks_of(model: nn.Module) -> list[str]:
    """The blocks of a model that have 16-bit parameters, in the order of its parameters."""
    blocks: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            block = block_of(name)
            if block is None:
                raise Moe3dError(
                    f"parameter {name} is {parameter.dtype} and in no block of the search; please report it"
                )
            blocks[block] = None
    return list(blocks)


def smallest(blocks: Sequence[str], holds: Callable[[Collection[str]], bool]) -> list[str]:
    """A part of `blocks` for which `holds` is true, and is not when any one of them is left out.

    Delta debugging (Zeller and Hildebrandt 2002), leaving out ever smaller pieces. Raises Moe3dError where `holds` is
    false for all blocks together.
    """
    kept, pieces = list(blocks), 2
    if not holds(kept):
        raise Moe3dError(
            "the outputs leave the limits with every block in float32 too: the fault is not one of rounding"
        )
    while kept:
        size = -(-len(kept) // pieces)
        for start in range(0, len(kept), size):
            rest = kept[:start] + kept[start + size :]
            if holds(rest):
                kept, pieces = rest, max(pieces - 1, 2)
                break
        else:
            if size == 1:
                break
            pieces = min(2 * pieces, len(kept))
    return kept


def _compare(
    reference: nn.Module, reduced: nn.Module, images: Tensor, blocks: Sequence[str]
) -> tuple[list[BlockError], dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Errors of the blocks in the order they run, then what the float32 and the 16-bit model put out."""
    outputs: dict[str, NDArray[Any]] = {}
    found: list[BlockError] = []
    hooks = [
        reference.get_submodule(name).register_forward_hook(
            lambda _m, _i, result, name=name: outputs.__setitem__(name, _array(result))
        )
        for name in blocks
    ]
    hooks += [
        reduced.get_submodule(name).register_forward_hook(
            lambda _m, _i, result, name=name: found.append(_error(name, _array(result), outputs.pop(name)))
        )
        for name in blocks
    ]
    try:
        with torch.no_grad():
            expected = _arrays(reference(images))
        whole = _run(reduced, images)
    finally:
        for hook in hooks:
            hook.remove()
    return found, expected, whole


def _run(model: nn.Module, images: Tensor) -> dict[str, NDArray[Any]]:
    """The model's outputs with 16-bit rounding and overflow as on a GPU."""
    with SixteenBitRun(model), torch.no_grad():
        return _arrays(model(images))


def _arrays(result: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: _array(result[name]) for name in OUTPUTS}


def _array(tensor: Tensor) -> NDArray[np.float32]:
    """A copy: the model goes on to write into its tensors."""
    return tensor.detach().to(torch.float32, copy=True).numpy()


def _error(block: str, found: NDArray[Any], expected: NDArray[Any]) -> BlockError:
    return BlockError(block, errors({block: found}, {block: expected})[block]["max"])


def _broken(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], precision: str) -> list[str]:
    return list(beyond(errors(found, expected), Limits.of(precision)))
