"""What memory and arithmetic reach on this machine in the library that runs the model: the fastest of many runs.

A model spends its time in products, convolutions and copies of that library, so none of its figures can be above them
but for a mistake of the measurement. The fastest run counts, and small sizes are among those tried: something else that
has the processor now and then does not lower a ceiling.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe3d_deploy.benchmarks.bench.report import Ceilings, Rates
from moe3d_deploy.benchmarks.timing import Effort, Timer, collect
from moe3d_deploy.runtime.packages import load_package

_COPY_BYTES = 128 << 20  # beyond the cache of a current processor
_CPU_SIDES = (512, 2048)
_GPU_SIDES = (4096, 8192)
_CPU_MAPS = ((64, 128), (256, 64))  # channels, side of the map: of a 3x3 convolution
_GPU_MAPS = ((256, 256), (512, 256))
_EFFORT = Effort(min_runs=3, max_runs=50, budget_ms=300, warmup_budget_ms=100)


def best(first: Ceilings, second: Ceilings) -> Ceilings:
    """The larger of every figure. Both have the same types."""
    rates = {}
    for kind, a in first.flops_per_second.items():
        b = second.flops_per_second[kind]
        rates[kind] = Rates(max(a.matmul, b.matmul), max(a.convolution, b.convolution))
    return Ceilings(max(first.copy_bytes_per_second, second.copy_bytes_per_second), rates)


def torch_ceilings(device: str, *, types: Sequence[str] = ("float32",), effort: Effort = _EFFORT) -> Ceilings:
    """Of PyTorch in each of these types, by its settings in this process, on "cpu" or "cuda"."""
    torch = load_package("torch")
    from moe3d_deploy.benchmarks import torch_device

    def timer(call: Callable[[], Any]) -> Timer:
        return torch_device.timer(call, torch.device(device))

    def matmul(kind: Any, side: int) -> float:
        a, b = (torch.rand(side, side, device=device).to(kind) for _ in range(2))
        return 2 * side**3 / _fastest(timer(lambda: torch.matmul(a, b)), effort)

    def convolution(kind: Any, size: tuple[int, int]) -> float:
        channels, side = size
        image = torch.rand(1, channels, side, side, device=device).to(kind)
        weight = torch.rand(channels, channels, 3, 3, device=device).to(kind)
        seconds = _fastest(timer(lambda: torch.conv2d(image, weight, padding=1)), effort)
        return _convolution_flops(size) / seconds

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        copied = 2 * _COPY_BYTES / _fastest(timer(lambda: target.copy_(source)), effort)
        sides, maps = (_GPU_SIDES, _GPU_MAPS) if device == "cuda" else (_CPU_SIDES, _CPU_MAPS)
        rates = {
            name: Rates(
                max(matmul(getattr(torch, name), side) for side in sides),
                max(convolution(getattr(torch, name), size) for size in maps),
            )
            for name in types
        }
    return Ceilings(copied, rates)


def onnxruntime_ceilings(threads: int, *, types: Sequence[str] = ("float32",), effort: Effort = _EFFORT) -> Ceilings:
    """Of ONNX Runtime on the CPU with `threads` threads, in "float32", as which it computes 16 bits, and "int8".

    Every model has one node. The copy is a negation: a node that only copies may be left out. Convolutions are float32
    in every model, so those of int8 count as 0.
    """
    random = np.random.default_rng(0)

    def matmul(kind: str, side: int) -> float:
        if kind == "int8":
            tokens, weight = (random.integers(0, 127, (side, side), dtype) for dtype in (np.uint8, np.int8))
            timer = _node("MatMulInteger", (tokens, weight, np.uint8(128)), np.empty((side, side), np.int32), threads)
        else:
            a, b = random.random((2, side, side), np.float32)
            timer = _node("MatMul", (a, b), np.empty_like(a), threads)
        return 2 * side**3 / _fastest(timer, effort)

    def convolution(size: tuple[int, int]) -> float:
        channels, side = size
        image = random.random((1, channels, side, side), np.float32)
        weight = random.random((channels, channels, 3, 3), np.float32)
        seconds = _fastest(_node("Conv", (image, weight), np.empty_like(image), threads, pads=[1] * 4), effort)
        return _convolution_flops(size) / seconds

    values = np.ones(_COPY_BYTES // 4, np.float32)
    copied = 2 * _COPY_BYTES / _fastest(_node("Neg", (values,), np.empty_like(values), threads), effort)
    rates = {
        kind: Rates(
            max(matmul(kind, side) for side in _CPU_SIDES),
            max(map(convolution, _CPU_MAPS)) if kind == "float32" else 0.0,
        )
        for kind in types
    }
    return Ceilings(copied, rates)


def _convolution_flops(size: tuple[int, int]) -> int:
    channels, side = size
    return 2 * 9 * channels**2 * side**2


def _fastest(timer: Timer, effort: Effort) -> float:
    """Seconds of the fastest run."""
    return min(collect(timer, effort=effort).times_ms) / 1e3


def _node(operator: str, inputs: Sequence[Any], output: np.ndarray, threads: int, **attributes: Any) -> Timer:
    """A timer of one node in ONNX Runtime, from and to memory that is already there. All inputs but the first are
    stored in the file, as weights are."""
    onnx, ort = load_package("onnx"), load_package("onnxruntime")
    names = ["x", "w", "z"][: len(inputs)]

    def info(name: str, array: np.ndarray) -> Any:
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return onnx.helper.make_tensor_value_info(name, kind, array.shape)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, names, ["y"], **attributes)],
        operator,
        [info("x", inputs[0])],
        [info("y", output)],
        [
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in zip(names[1:], inputs[1:], strict=True)
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(inputs[0]))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(output))

    def run() -> float:
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        return 1e3 * (time.perf_counter() - started)

    return run
