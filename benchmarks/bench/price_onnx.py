"""The subjects that ONNX Runtime runs on the CPU: dense heads as small files of their own, and a whole bundle."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.inputs import FreshImages
from moe3d_deploy.benchmarks.bench.price import FUNCTION, PLAIN, SINGLE, Shape
from moe3d_deploy.benchmarks.bench.process_memory import HostMemory
from moe3d_deploy.benchmarks.bench.runners import OnnxRunner, infer
from moe3d_deploy.benchmarks.timing import Timer
from moe3d_deploy.child import Emit
from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.export.parts import layers_of, level_name, part_file
from moe3d_deploy.machine import usable_cores
from moe3d_deploy.runtime.onnx_backend import OnnxBackend

_ROLE = "heads"


class _OnCpu(ABC):
    """What the subjects of ONNX Runtime have in common."""

    device = "cpu"
    activations_by = "anonymous memory"

    @abstractmethod
    def run(self, form: str) -> list[NDArray[Any]]:
        """Depth and confidence."""

    def timer(self, form: str) -> Timer:
        def timed() -> float:
            started = time.perf_counter()
            self.run(form)
            return 1e3 * (time.perf_counter() - started)

        return timed

    def activations(self, form: str) -> tuple[list[NDArray[Any]], int | None]:
        """The first run: depth and confidence, and what it added that is of no file; None where the kernel does not
        reset its peak."""
        memory = HostMemory()
        memory.after_load()
        maps = self.run(form)
        memory.after_first_run()
        return maps, memory.figures()["anonymous_bytes"]


class OnnxHeads(_OnCpu):
    """Files of dense heads, one for each form, on the same random tokens."""

    def __init__(self, files: Mapping[str, Path], config: ModelConfig, shape: Shape, *, threads: int | None) -> None:
        self.threads = threads or usable_cores()
        self._backends = {form: OnnxBackend(path, threads=self.threads) for form, path in files.items()}
        self.forms = tuple(files)
        batch, views, height, width = shape
        grid = (height // config.patch_size, width // config.patch_size)
        size = (batch, views, *grid, config.dpt_head.dim_in)
        self._tokens = {level_name(layer): np.empty(size, np.float32) for layer in layers_of(config)}

    def renew(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        for tokens in self._tokens.values():
            random.standard_normal(out=tokens, dtype=np.float32)

    def run(self, form: str) -> list[NDArray[Any]]:
        outputs = self._backends[form].run_on(self._tokens)
        return [outputs["depth"], outputs["depth_conf"]]


class OnnxBundle(_OnCpu):
    """A bundle in the one form that it has."""

    def __init__(self, source: str, form: str, shape: Shape, *, threads: int | None) -> None:
        self._runner = OnnxRunner(source, threads=threads)
        self._runner.load()
        self.threads = self._runner.threads
        self.forms: tuple[str, ...] = (form,)
        self._fresh = FreshImages(shape, self._runner.input_type, seed=0)
        self._images = self._fresh.next()

    def renew(self, seed: int) -> None:
        self._images = self._fresh.next()

    def run(self, form: str) -> list[NDArray[Any]]:
        outputs = infer(self._runner, self._images)[1]
        return [outputs["depth"], outputs["depth_conf"]]


def export_heads(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: write the dense head of every form as a file of its own; {form: path}.

    source   of `SourceSpec`
    moe      the experts' config
    folder   an empty one
    precision
    """
    import torch

    from moe3d_deploy.benchmarks.bench.price_forms import Completed, load_head
    from moe3d_deploy.export.graph import export_parts
    from moe3d_deploy.export.precision import PrecisionPolicy
    from moe3d_deploy.export.source import SourceSpec
    from moe3d_deploy.model import MoE3D

    base, dtype_of = SourceSpec(**request["source"]).open(), PrecisionPolicy(request["precision"]).dtype_of()
    moe = MoeConfig(**request["moe"])
    files = {}
    for form, experts in ((SINGLE, None), (PLAIN, moe), (FUNCTION, moe)):
        emit({"step": f"exporting the head, {form}"})
        source = Completed.of(base, experts)
        with torch.device("meta"):  # nothing but the head has values, and nothing else is asked for any
            model = MoE3D(source.config).eval().requires_grad_(False)
        model.depth_head = load_head(source, dtype_of)
        folder = Path(request["folder"]) / form
        folder.mkdir()
        export_parts(model, folder, _ROLE, merge=form == FUNCTION, roles=[_ROLE])
        files[form] = str(folder / part_file(_ROLE))
    return files
