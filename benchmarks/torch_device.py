"""Timing, memory and arithmetic of PyTorch on one device. On the CPU the same functions work, for tests."""

import functools
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.benchmarks.timing import Effort, Timer, measure

_MATMUL_SIDES = (4096, 8192)  # enough to fill any card; the faster of the two counts


def start(run: CheckRun) -> torch.device:
    """The GPU, with TF32 off so that float32 means float32; skips the check where torch sees no GPU."""
    if not torch.cuda.is_available():
        run.skip(f"torch {torch.__version__} sees no GPU; install a build for this machine's CUDA driver")
    set_exact_float32()
    run.record(
        torch={
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": False,
        }
    )
    return torch.device("cuda")


def set_exact_float32() -> None:
    """Turn TF32 off, which convolutions use by default on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def timer(call: Callable[[], Any], device: torch.device) -> Timer:
    """Milliseconds of one call on the device, between two CUDA events; wall-clock time on the CPU."""

    def on_gpu() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def on_cpu() -> float:
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    return on_gpu if device.type == "cuda" else on_cpu


class PeakMemory:
    """Largest device memory in a block: `allocated_bytes` by tensors, `reserved_bytes` by torch's allocator.

    Both count what was there before, such as weights. None on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.allocated_bytes: int | None = None
        self.reserved_bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._on_gpu:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self.allocated_bytes = torch.cuda.max_memory_allocated()
            self.reserved_bytes = torch.cuda.max_memory_reserved()

    def as_dict(self) -> dict[str, int | None]:
        return {"peak_allocated_bytes": self.allocated_bytes, "peak_reserved_bytes": self.reserved_bytes}


def matmul_ceiling(
    dtype: torch.dtype, device: torch.device, *, sides: tuple[int, ...] = _MATMUL_SIDES, effort: Effort | None = None
) -> dict[str, Any]:
    """The best TFLOP/s of a square matrix product of random values: what arithmetic of this type can reach here."""
    best: dict[str, Any] = {"tflops": 0.0}
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        timing = measure(timer(functools.partial(torch.matmul, a, b), device), effort=effort)
        found = {"tflops": tflops(2.0 * side**3, timing.median_ms), "side": side, **timing._asdict()}
        best = max(best, found, key=lambda entry: entry["tflops"])
    return best


def tflops(flop: float, milliseconds: float) -> float:
    return flop / milliseconds / 1e9


def count_flop(model: nn.Module, *shape: int) -> int:
    """FLOP of one forward pass of a model on the meta device: products, convolutions and attention, 2 for each
    multiply-add, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
