"""Many small mixes by the expert-mix library in device memory of exactly the tensors' sizes, for compute-sanitizer.

    compute-sanitizer python -m moe3d_deploy.benchmarks.kernel_launches libmoe3d_expert_mix.so

Without torch, whose allocator would hide an access behind the end of a tensor: memory comes from the CUDA driver.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.cli.main import finish
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.native.loading import CHANNELS_LAST, NCHW, TYPES, ExpertMixLibrary, Sizes, Tensors, load

Bytes = NDArray[np.uint8]


class Memory(Protocol):
    """Memory that the library reads and writes, by address."""

    def put(self, data: Bytes) -> int:
        """A new block that holds `data`."""

    def get(self, address: int, size: int) -> Bytes:
        """The bytes of a block, after everything that was queued."""

    def release(self) -> None:
        """Give back every block."""


class CudaMemory:
    """Blocks of the first GPU, in the context that the CUDA runtime shares. Raises Moe3dError."""

    def __init__(self) -> None:
        try:
            self._driver: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Moe3dError("there is no CUDA driver; run this where a GPU is") from error
        self._blocks: list[ctypes.c_uint64] = []
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def put(self, data: Bytes) -> int:
        block = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(data.nbytes))
        self._blocks.append(block)
        self._call("cuMemcpyHtoD_v2", block, ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))
        return block.value

    def get(self, address: int, size: int) -> Bytes:
        data = np.empty(size, np.uint8)
        self._call("cuCtxSynchronize")
        self._call(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(data.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(size)
        )
        return data

    def release(self) -> None:
        for block in self._blocks:
            self._call("cuMemFree_v2", block)
        self._blocks.clear()

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._driver, name)(*arguments):
            raise Moe3dError(f"the CUDA driver's {name} failed with status {status}")


class Launch(NamedTuple):
    sizes: Sizes
    with_weights: bool

    def __str__(self) -> str:
        return ", ".join(f"{field[0]} {getattr(self.sizes, field[0])}" for field in Sizes._fields_)


def launches() -> Iterator[Launch]:
    """Every kernel, on maps that end within its vectors, groups and blocks."""
    for experts in (1, 4, 5, 16):
        maps = [
            *[(1, 1, 1, 8, 8, 0), (2, 3, 5, 8, 16, 8), (3, 2, 6, 16, 8, 0), (1, 16, 33, 8, 8, 16)],
            (2, 1, 130, 24, 8, 8),
        ]
        if experts == 5:
            maps.append((2, 3, 3, 1200, 800, 0))  # weights that do not fit into shared memory
        for views, height, width, expert_width, gate_width, padding in maps:
            for kind in TYPES.values():
                for layout in (NCHW, CHANNELS_LAST):
                    stride = experts * expert_width + gate_width + padding if layout == CHANNELS_LAST else 0
                    for with_weights in (False, True):
                        shape = (views, height, width, experts, expert_width, gate_width)
                        yield Launch(Sizes(kind, layout, *shape, stride, 1.0), with_weights)


def launch_all(library: ExpertMixLibrary, memory: Memory) -> int:
    """Run every launch and return their number. Raises Moe3dError where an output is not what it has to be."""
    count = 0
    for launch in launches():
        _run(library, memory, launch)
        memory.release()
        count += 1
    return count


def _run(library: ExpertMixLibrary, memory: Memory, launch: Launch) -> None:
    """With weights and biases of zero every depth is 1, every confidence 2 and every weight 1 / K, whatever the map."""
    sizes, with_weights = launch
    experts, pixels = sizes.experts, sizes.views * sizes.height * sizes.width
    channels = experts * sizes.expert_width + sizes.gate_width
    elements = pixels * (sizes.pixel_stride or channels)
    # 0x3c3c is a number near 1 in every one of the three types, also as half of a float32.
    hidden = np.full(elements * (4 if sizes.type == TYPES["float32"] else 2), 0x3C, np.uint8)
    operand_sizes = (2 * experts * sizes.expert_width, 2 * experts, experts * sizes.gate_width, experts)
    inputs = [memory.put(hidden), *(memory.put(np.zeros(4 * size, np.uint8)) for size in operand_sizes)]
    expected = {"depth": (pixels, 1.0), "confidence": (pixels, 2.0), "weights": (experts * pixels, 1 / experts)}
    if not with_weights:
        del expected["weights"]
    outputs = {name: memory.put(np.full(4 * size, 0xFF, np.uint8)) for name, (size, _) in expected.items()}
    library.mix(sizes, Tensors(*inputs, *outputs.values()), None)
    for name, (size, value) in expected.items():
        got = memory.get(outputs[name], 4 * size).view(np.float32)
        if not np.allclose(got, value, rtol=1e-6, atol=0):
            raise Moe3dError(f"{name} is not {value:g} everywhere: {launch}")


@click.command()
@click.argument("library", type=click.Path(path_type=Path))
def main(library: Path) -> None:
    """Run the mixes with LIBRARY on the first GPU."""
    click.echo(f"{launch_all(load(library), CudaMemory())} mixes as they have to be")


if __name__ == "__main__":
    sys.exit(finish("kernel_launches", lambda: main))
