"""An ONNX file in ONNX Runtime on the CPU."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moe3d_deploy.errors import BundleError, Moe3dError, first_line
from moe3d_deploy.machine import NO_VNNI, multiplies_bytes_exactly
from moe3d_deploy.runtime.onnx_operators import FOLDER_OF_WEIGHTS, for_onnxruntime, has_eight_bits
from moe3d_deploy.runtime.packages import load_package

_SEVERITY_FATAL = 4  # of onnxruntime's logger: its errors are raised, and told once
_REASON_CHARACTERS = 300  # ONNX Runtime can name every tensor of a graph


class OnnxBackend:
    """A session over one ONNX file of the contract, or over a part of a split model."""

    def __init__(self, model: Path, *, threads: int | None = None) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported; nothing here is to be sent
        ort = load_package("onnxruntime")
        try:
            file = model.read_bytes()
        except OSError as error:
            raise BundleError(f"{model}: {error.strerror}; copy the bundle or export it again") from error
        in_eight_bits = has_eight_bits(file)
        if in_eight_bits and not multiplies_bytes_exactly():
            raise Moe3dError(f"{model}: {NO_VNNI}; take a bundle in float32 or fp16 here")
        options = ort.SessionOptions()
        options.log_severity_level = _SEVERITY_FATAL
        # A second, rearranged copy of the weights: for moe3d-1b 1.8 GB and 9 s of 21 s to load, 0 to 4 % of latency.
        # A run with products in 8 bits takes a tenth longer without it, and these have a quarter of the bytes.
        options.add_session_config_entry("session.disable_prepacking", str(int(not in_eight_bits)))
        # Planning which buffer may be used again takes 3 of 3.5 s to load, and no less memory is the result.
        options.enable_mem_reuse = False
        options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(model.parent))
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        try:
            self._session = ort.InferenceSession(for_onnxruntime(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = first_line(error)[:_REASON_CHARACTERS]
            raise BundleError(
                f"{model}: ONNX Runtime {ort.__version__} cannot load it: {reason}; copy the bundle or export it again"
            ) from error
        self.input_names = [given.name for given in self._session.get_inputs()]
        self.output_names = [output.name for output in self._session.get_outputs()]
        self._keeping, self._releasing = ort.RunOptions(), ort.RunOptions()
        self._releasing.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """images (B, S, 3, H, W) float32, or (B, S, H, W, 3) uint8, as the file takes -> every output by name."""
        return self.run_on({"images": images})

    def run_on(self, inputs: Mapping[str, NDArray[Any]], *, release: bool = False) -> dict[str, NDArray[Any]]:
        """Every input by name -> every output by name. Raises Moe3dError where ONNX Runtime fails.

        release   give the memory of the run back afterwards; else it is kept for the next one, which is quicker
        """
        options = self._releasing if release else self._keeping
        try:
            arrays = self._session.run(None, dict(inputs), options)
        except Exception as error:
            name, first = next(iter(inputs.items()))
            shape = "x".join(map(str, first.shape))
            raise Moe3dError(f"ONNX Runtime failed on {name} {shape}: {first_line(error)}; try fewer views") from error
        return dict(zip(self.output_names, arrays, strict=True))
