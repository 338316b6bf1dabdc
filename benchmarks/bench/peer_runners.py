"""Runners of what people would compare with: torch.compile, the widespread export, ONNX Runtime on CUDA, engines."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.ceilings import onnxruntime_ceilings, torch_ceilings
from moe3d_deploy.benchmarks.bench.nodes import count_nodes
from moe3d_deploy.benchmarks.bench.report import Ceilings, DeviceMemory
from moe3d_deploy.benchmarks.bench.runners import Clock, HostClock, Outputs, Runner, TorchRunner
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import run_in_child
from moe3d_deploy.errors import EngineError, Moe3dError, first_line
from moe3d_deploy.machine import usable_cores
from moe3d_deploy.manifest import EngineRecord
from moe3d_deploy.runtime.onnx_operators import FOLDER_OF_WEIGHTS, for_onnxruntime
from moe3d_deploy.runtime.packages import load_package

_REASON_CHARACTERS = 300
_EXPORT = "moe3d_deploy.benchmarks.bench.widespread:export_in_child"
_CUDA = "CUDAExecutionProvider"


def open_peer(
    backend: str,
    source: str,
    *,
    threads: int | None,
    options: Mapping[str, Any],
    types: Sequence[str],
    size: tuple[int, int],
    workdir: str | None,
) -> Runner:
    """The runner of a peer's case; see `open_runner`."""
    if backend == "pytorch-compiled":
        return CompiledRunner(source, threads=threads, types=types, **options)
    if backend == "onnxruntime-widespread":
        if workdir is None:
            raise Moe3dError("the widespread export needs a folder to be written into; give a workdir")
        return WidespreadRunner(widespread_file(source, options, size, Path(workdir)), threads=threads)
    if backend == "onnxruntime-cuda":
        return OnnxCudaRunner(source, threads=threads, types=types)
    return EngineRunner(source, backend, types=types, plugin=options.get("plugin"))


class CompiledRunner(TorchRunner):
    """PyTorch with torch.compile, for the shape at hand alone. It compiles in the first run, and keeps nothing."""

    def __init__(self, source: str, **options: Any) -> None:
        super().__init__(source, **options)
        self._compiled: Any = None
        self._ran = False

    def load(self) -> None:
        super().load()
        # Of a cache on the disk the second process would take seconds where the first one took minutes.
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        self._scratch = tempfile.TemporaryDirectory(prefix="moe3d-compiled-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._scratch.name
        self._compiled = self._torch.compile(self._loaded(), dynamic=False)

    def compute(self, images: Any) -> Any:
        try:
            with self._torch.inference_mode():
                result = self._compiled(images, outputs=self._extra, view_chunk=self._view_chunk)
        except Exception as error:
            if self._ran:
                raise
            inner = getattr(error, "inner_exception", error)
            raise Moe3dError(f"torch.compile failed: {first_line(inner)[:_REASON_CHARACTERS]}") from error
        self._ran = True
        return result


class _FileRunner:
    """An ONNX file in ONNX Runtime with its default options: images and outputs in host memory."""

    stages: tuple[str, ...] = ("model",)
    cuda_graph = False
    device = "cpu"
    input_type = "float32"

    def __init__(self, path: Path, threads: int | None) -> None:
        self._path = path
        self._session: Any = None
        self.threads = threads or usable_cores()
        self.clock: Clock = HostClock()

    def load(self) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        ort = load_package("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads  # as many as every other case has
        try:
            self._session = ort.InferenceSession(self._model(options), options, providers=self._providers())
        except Exception as error:
            raise Moe3dError(f"ONNX Runtime cannot load it: {first_line(error)[:_REASON_CHARACTERS]}") from error

    def _model(self, options: Any) -> str | bytes:
        return str(self._path)

    def _providers(self) -> list[Any]:
        return ["CPUExecutionProvider"]

    def upload(self, images: NDArray[Any]) -> Any:
        return images

    def compute(self, images: Any) -> Any:
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(None, {"images": images}), strict=True))
        except Exception as error:
            raise Moe3dError(f"ONNX Runtime failed: {first_line(error)[:_REASON_CHARACTERS]}") from error

    def download(self, outputs: Any) -> Outputs:
        return dict(outputs)

    def weights_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._path.parent.glob(f"{self._path.name}*"))

    def allocated_bytes(self, images: NDArray[Any]) -> None:
        return None

    def device_memory(self) -> DeviceMemory | None:
        return None

    def ceilings(self) -> Ceilings:
        return onnxruntime_ceilings(self.threads)

    def nodes(self) -> int:
        return count_nodes(self._path)


class WidespreadRunner(_FileRunner):
    """The widespread form of export on the CPU."""

    def __init__(self, path: Path, *, threads: int | None) -> None:
        super().__init__(path, threads)


class OnnxCudaRunner(_FileRunner):
    """A bundle's file in ONNX Runtime on the first GPU. Not run so far: written without a GPU at hand."""

    device = "cuda"

    def __init__(self, source: str, *, threads: int | None, types: Sequence[str]) -> None:
        bundle = Bundle.open(Path(source), verify="sizes", engines=False)
        super().__init__(bundle.model_path, threads)
        self.input_type = bundle.manifest.inputs[0].dtype
        self._gpu = _Gpu(types)

    def load(self) -> None:
        ort = load_package("onnxruntime")
        if hasattr(ort, "preload_dlls"):  # finds CUDA's and cuDNN's libraries in their wheels
            ort.preload_dlls()
        super().load()
        if _CUDA not in self._session.get_providers():
            raise Moe3dError(f"ONNX Runtime {ort.__version__} did not start {_CUDA}; moe3d doctor says what is missing")

    def _model(self, options: Any) -> bytes:
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(self._path.parent))
        return for_onnxruntime(self._path.read_bytes())

    def _providers(self) -> list[Any]:
        return [(_CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"]

    def device_memory(self) -> DeviceMemory:
        return self._gpu.taken()

    def ceilings(self) -> Ceilings:
        return self._gpu.ceilings()


class EngineRunner:
    """An engine of a bundle on the first GPU, arrays in and out. Not run so far: written without a GPU at hand."""

    stages: tuple[str, ...] = ("model",)
    cuda_graph = False
    device = "cuda"

    def __init__(self, source: str, builder: str, *, types: Sequence[str], plugin: str | None) -> None:
        self._bundle = Bundle.open(Path(source), verify="sizes", engines=False)
        self._builder = builder
        self._plugin = Path(plugin) if plugin and plugin != "none" else None
        self._engine: Any = None
        self._gpu = _Gpu(types)
        self.input_type = self._bundle.manifest.inputs[0].dtype
        self.threads = usable_cores()
        self.clock: Clock = HostClock()

    def load(self) -> None:
        from moe3d_deploy import trt

        self._engine = trt.EngineRunner.of_bundle(self._bundle, self._record(), plugin=self._plugin)

    def _record(self) -> EngineRecord:
        """The one that the cases are planned for: the builder's first of the whole model."""
        for record in self._bundle.manifest.engines:
            if record.builder == self._builder and record.part is None:
                return record
        raise EngineError(f"the bundle has no engine of {self._builder}; make one: moe3d-export with --builder")

    def upload(self, images: NDArray[Any]) -> Any:
        return images

    def compute(self, images: Any) -> Any:
        return self._engine.run({"images": images})

    def download(self, outputs: Any) -> Outputs:
        return dict(outputs)

    def weights_bytes(self) -> int:
        return (self._bundle.path / self._record().file).stat().st_size

    def allocated_bytes(self, images: NDArray[Any]) -> None:
        return None

    def device_memory(self) -> DeviceMemory:
        return self._gpu.taken()

    def ceilings(self) -> Ceilings:
        return self._gpu.ceilings()

    def nodes(self) -> None:
        return None


class _Gpu:
    """The driver's figure of memory and the ceilings, by PyTorch: neither library tells them itself."""

    def __init__(self, types: Sequence[str]) -> None:
        self._torch = load_package("torch")
        if not self._torch.cuda.is_available():
            raise Moe3dError("PyTorch sees no GPU, and its ceilings and memory are read there; moe3d doctor says why")
        self._types = tuple(types)
        self._free_before = self._torch.cuda.mem_get_info()[0]

    def taken(self) -> DeviceMemory:
        taken = int(self._free_before - self._torch.cuda.mem_get_info()[0])
        return DeviceMemory(taken, taken)

    def ceilings(self) -> Ceilings:
        return torch_ceilings("cuda", types=self._types)


def widespread_file(source: str, options: Mapping[str, Any], size: tuple[int, int], workdir: Path) -> Path:
    """The widespread export of the source for images of `size` (H, W) below `workdir`, exported by a process of its own
    unless it is there: what exporting takes is no part of what running takes."""
    from moe3d_deploy.export.contract import MODEL_FILE

    height, width = size
    name = "".join(character if character.isalnum() else "-" for character in Path(source).name)
    final = workdir / f"{name}-{height}x{width}"
    if not (final / MODEL_FILE).is_file():
        scratch = Path(tempfile.mkdtemp(prefix="exporting-", dir=workdir))
        request = {
            "source": source,
            "seed": options.get("seed"),
            "allow_pickle": bool(options.get("allow_pickle")),
            "folder": str(scratch),
            "height": height,
            "width": width,
        }
        try:
            run_in_child(_EXPORT, request, title="the widespread export")
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final / MODEL_FILE
