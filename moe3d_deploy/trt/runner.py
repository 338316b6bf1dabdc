"""Run one engine, NumPy in and out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.trt import installed
from moe3d_deploy.trt.watch import Messages, one_line, reason

if TYPE_CHECKING:
    import numpy as np


class EngineRunner:
    """One engine on the first visible GPU, NumPy in and out; for checks, not for production. One thread at a time.

    Never executed so far: an engine that loads, and `run`; both need a GPU. What has run is the errors without one.
    An engine is code: load only what you trust.
    """

    def __init__(
        self,
        plan_path: str | os.PathLike[str],
        *,
        builder: str,
        built_by: str | None = None,
        bundle: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load the engine; `built_by`, its record's builder_version, and `bundle` are for the error of one that fails.

        Raises InputError, MissingExtraError or EngineError.
        """
        path = Path(plan_path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; give an engine (.plan)")
        installed.require(builder)
        if not installed.visible_gpus():
            raise EngineError(f"{path.name}: running an engine needs an NVIDIA GPU and its driver; none is visible")
        trt = installed.load(builder)
        from polygraphy.backend.trt import TrtRunner, get_trt_logger
        from polygraphy.exception import PolygraphyException

        self._name, self._failures, messages = path.name, PolygraphyException, Messages()
        with messages.captured():
            self._runtime = trt.Runtime(get_trt_logger())  # has to outlive the engine
            self._runner = TrtRunner(self._runtime.deserialize_cuda_engine(path.read_bytes()))
            try:
                self._runner.activate()  # fails, too, where there is no engine because it could not be read
            except PolygraphyException as error:
                why = reason(messages.errors) or one_line(str(error))
                raise EngineError(
                    f"{path.name}: {installed.title(builder)} {trt.__version__} cannot load it: {why}; "
                    + (f"{installed.title(builder)} {built_by} built it; " if built_by else "")
                    + ("build it again here" + (f" with: moe3d-export {os.fspath(bundle)}" if bundle else ""))
                ) from None

    def run(self, inputs: "Mapping[str, np.ndarray]") -> "dict[str, np.ndarray]":
        """Run one batch: arrays by input name in the engine's types, arrays by output name back (copies)."""
        messages = Messages()
        with messages.captured():
            try:
                outputs = self._runner.infer(dict(inputs))
            except self._failures as error:
                why = reason(messages.errors) or one_line(str(error))
                raise EngineError(f"{self._name}: the engine did not run: {why}") from None
        return {name: array.copy() for name, array in outputs.items()}

    def close(self) -> None:
        """Free the engine's memory; `run` fails afterwards."""
        self._runner.deactivate()

    def __enter__(self) -> "EngineRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
