"""A model in a backend, taken apart into upload, model and download, each of which can be timed.

A runner does what the backend of `moe3d run` does, with the same code; the tests hold the two to the same bits.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.ceilings import onnxruntime_ceilings, torch_ceilings
from moe3d_deploy.benchmarks.bench.nodes import count_nodes
from moe3d_deploy.benchmarks.bench.report import WHOLE, Ceilings, DeviceMemory
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.machine import usable_cores
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.packages import load_package
from moe3d_deploy.runtime.split_backend import VIEW_CHUNK, SplitBackend
from moe3d_deploy.runtime.torch_backend import TorchBackend

Outputs = dict[str, NDArray[Any]]


class Clock(Protocol):
    """Marks points in the order of the work, and tells the time between two of them once both are reached."""

    def mark(self) -> Any: ...

    def milliseconds(self, begin: Any, end: Any) -> float: ...


class HostClock:
    """For work that is done when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, begin: float, end: float) -> float:
        return 1e3 * (end - begin)


class CudaClock:
    """CUDA events, for work that goes on after its call has returned; marking waits for nothing."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))


class Runner(Protocol):
    """`load`, then any number of `upload`, `compute`, `download`.

    stages   the names of those three steps that are the backend's own, "model" among them; others do nothing
    """

    stages: tuple[str, ...]
    clock: Clock
    threads: int
    cuda_graph: bool

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""

    @property
    def input_type(self) -> str: ...

    def load(self) -> None: ...

    def upload(self, images: NDArray[Any]) -> Any: ...

    def compute(self, images: Any) -> Any: ...

    def download(self, outputs: Any) -> Outputs: ...

    def weights_bytes(self) -> int: ...

    def allocated_bytes(self, images: NDArray[Any]) -> int | None:
        """The most bytes of tensors alive at once in a run, beside weights and images; None where nothing tells."""

    def device_memory(self) -> DeviceMemory | None:
        """What is taken on the GPU since the runner was made; None on a CPU."""

    def ceilings(self) -> Ceilings: ...

    def nodes(self) -> int | None:
        """Of the ONNX file; None where there is none."""


def infer(runner: Runner, images: NDArray[Any]) -> tuple[dict[str, float], Outputs]:
    """One run: milliseconds of the runner's stages and of WHOLE, and the outputs in host memory."""
    clock, host = runner.clock, HostClock()
    started = host.mark()
    marks = [clock.mark()]
    uploaded = runner.upload(images)
    marks.append(clock.mark())
    computed = runner.compute(uploaded)
    marks.append(clock.mark())
    outputs = runner.download(computed)
    marks.append(clock.mark())
    whole = host.milliseconds(started, host.mark())  # the outputs are in host memory: nothing goes on any more
    steps = zip(("upload", "model", "download"), marks, marks[1:], strict=False)
    times = {name: clock.milliseconds(a, b) for name, a, b in steps if name in runner.stages}
    return {**times, WHOLE: whole}, outputs


class TorchRunner(TorchBackend):
    """The PyTorch backend, step by step.

    precision   a `PrecisionPolicy`'s, by which the weights are cast; the backend itself is float32
    types       whose ceilings are measured
    """

    stages: tuple[str, ...] = ("upload", "model", "download")
    cuda_graph = False

    def __init__(
        self,
        source: str,
        *,
        threads: int | None,
        precision: str = "fp32",
        types: Sequence[str] = ("float32",),
        **options: Any,
    ) -> None:
        torch = load_package("torch")
        if threads is not None:
            torch.set_num_threads(threads)
        super().__init__(source, **options)
        self._types = tuple(types)
        if precision != "fp32":
            self._load = lambda: self._cast(source, precision, options).to(self._device)
        self.threads = int(torch.get_num_threads())
        self.clock: Clock = CudaClock(torch) if self._on_gpu else HostClock()
        self._free_before = torch.cuda.mem_get_info()[0] if self._on_gpu else 0

    @staticmethod
    def _cast(source: str, precision: str, options: Mapping[str, Any]) -> Any:
        """The model with the weights in the types of `precision`."""
        from moe3d_deploy.checkpoint import load_model, open_checkpoint
        from moe3d_deploy.export.precision import PrecisionPolicy

        given = {name: options[name] for name in ("seed", "allow_pickle") if name in options}
        return load_model(open_checkpoint(source, **given), dtype_of=PrecisionPolicy(precision).dtype_of())

    @property
    def device(self) -> str:
        return self._device

    @property
    def _on_gpu(self) -> bool:
        return self._device == "cuda"

    def upload(self, images: NDArray[Any]) -> Any:
        return self._torch.from_numpy(images).to(self._device)

    def compute(self, images: Any) -> Any:
        with self._torch.inference_mode():
            return self._loaded()(images, outputs=self._extra, view_chunk=self._view_chunk)

    def download(self, outputs: Any) -> Outputs:
        return {name: outputs[name].cpu().numpy() for name in self.output_names}

    def weights_bytes(self) -> int:
        model = self._loaded()
        tensors = [*model.parameters(), *model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def allocated_bytes(self, images: NDArray[Any]) -> int:
        from moe3d_deploy.benchmarks.activation_memory import allocated

        uploaded = self.upload(images)
        if not self._on_gpu:
            return allocated(lambda: self.compute(uploaded))
        cuda = self._torch.cuda
        cuda.synchronize()
        held = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        self.compute(uploaded)
        cuda.synchronize()
        return int(cuda.max_memory_allocated() - held)

    def device_memory(self) -> DeviceMemory | None:
        if not self._on_gpu:
            return None
        cuda = self._torch.cuda  # its allocator keeps what it has had, so that the figure of now is the largest
        return DeviceMemory(int(self._free_before - cuda.mem_get_info()[0]), int(cuda.max_memory_allocated()))

    def ceilings(self) -> Ceilings:
        return torch_ceilings(self._device, types=self._types)

    def nodes(self) -> None:
        return None


class OnnxRunner:
    """A bundle in ONNX Runtime on the CPU, whole or split: images and outputs stay where they are."""

    stages: tuple[str, ...] = ("model",)
    cuda_graph = False
    device = "cpu"

    def __init__(self, source: str, *, threads: int | None, view_chunk: int | None = None) -> None:
        load_package("onnxruntime")
        self._bundle = Bundle.open(Path(source), verify="sizes", engines=False)
        self._backend: OnnxBackend | SplitBackend | None = None
        self._view_chunk = VIEW_CHUNK if view_chunk is None else view_chunk
        self.input_type = self._bundle.manifest.inputs[0].dtype
        self.threads = threads or usable_cores()
        self.clock: Clock = HostClock()

    def load(self) -> None:
        self._loaded()

    def _loaded(self) -> "OnnxBackend | SplitBackend":
        if self._backend is None:
            bundle = self._bundle
            bundle.check(engines=False)
            if parts := bundle.part_paths:
                outputs = [output.name for output in bundle.manifest.outputs]
                self._backend = SplitBackend(parts, outputs, view_chunk=self._view_chunk, threads=self.threads)
            else:
                self._backend = OnnxBackend(bundle.model_path, threads=self.threads)
        return self._backend

    def upload(self, images: NDArray[Any]) -> Any:
        return images

    def compute(self, images: Any) -> Any:
        return self._loaded().run(images)

    def download(self, outputs: Any) -> Outputs:
        return dict(outputs)

    def weights_bytes(self) -> int:
        manifest = self._bundle.manifest
        return sum(entry.size for name, entry in manifest.files.items() if name.startswith(manifest.model_files))

    def allocated_bytes(self, images: NDArray[Any]) -> None:
        return None

    def device_memory(self) -> None:
        return None

    def ceilings(self) -> Ceilings:
        types = ("float32", "int8") if self._bundle.manifest.only_in_onnxruntime else ("float32",)
        return onnxruntime_ceilings(self.threads, types=types)

    def nodes(self) -> int:
        bundle = self._bundle
        return sum(map(count_nodes, (bundle.part_paths or {"": bundle.model_path}).values()))


def open_runner(
    backend: str,
    source: str,
    *,
    threads: int | None,
    options: Mapping[str, Any],
    types: Sequence[str] = ("float32",),
    size: tuple[int, int] = (0, 0),
    workdir: str | None = None,
) -> Runner:
    """The runner of a case.

    options   of `Session.open`, and of the backend's runner
    types     in which the case computes
    size      height and width, for a file of one size; such files go into `workdir`

    Raises what the backends raise.
    """
    if backend == "onnxruntime":
        return OnnxRunner(source, threads=threads, **options)
    if backend == "pytorch":
        return TorchRunner(source, threads=threads, types=types, **options)
    from moe3d_deploy.benchmarks.bench.peer_runners import open_peer

    return open_peer(backend, source, threads=threads, options=options, types=types, size=size, workdir=workdir)
