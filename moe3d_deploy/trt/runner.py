"""Run one engine, NumPy in and out."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.manifest import EngineRecord
from moe3d_deploy.trt import installed
from moe3d_deploy.trt.features import version_of
from moe3d_deploy.trt.installed import Capability
from moe3d_deploy.trt.load_checks import checked_plan, is_version_compatible, rebuild_command
from moe3d_deploy.trt.plugin_library import PluginLibrary
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
        plugin: Path | None = None,
    ) -> None:
        """Load an engine that is in no bundle, such as one that was just built; `of_bundle` loads any other.

        built_by   its builder's version, where it is known: another one is refused before it is loaded
        plugin     the plugin library that it needs, loaded before it; no record says here whether it is the right one

        Raises InputError, MissingExtraError or EngineError.
        """
        path = Path(plan_path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; give an engine (.plan)")
        _first_gpu(path.name, builder)
        version, name = installed.available()[builder], installed.title(builder)
        if built_by is not None and version_of(built_by) != version_of(version):
            raise EngineError(f"{path.name}: built by {name} {built_by}, here is {version}; build it again here")
        library = _plugin_of(plugin, builder, version)
        self._load(path.name, path.read_bytes(), builder, plugin=library, again="build it again here")

    @classmethod
    def of_bundle(cls, bundle: Bundle, record: EngineRecord, *, plugin: Path | None = None) -> "EngineRunner":
        """Load an engine of a bundle, once its file, version, GPU and plugin are found to be right (`load_checks`).

        plugin   the library of an engine that needs one: the very file that it was built with, never from a bundle. It
                 is loaded first, and stays in this process, which can have no other

        Raises MissingExtraError, InputError for a file that is no such library, or EngineError in one line; where
        another engine helps, with the command for it.
        """
        gpu = _first_gpu(record.file, record.builder)
        version = installed.available()[record.builder]
        library = _plugin_of(plugin, record.builder, version)
        plan = checked_plan(bundle, record, version=version, gpus=[gpu], plugin=library)
        runner = cls.__new__(cls)
        again = f"build it again: {rebuild_command(bundle.path, record, [gpu], plugin=plugin)}"
        host_code = is_version_compatible(record)
        runner._load(record.file, plan, record.builder, plugin=library, again=again, host_code=host_code)
        return runner

    def _load(
        self,
        name: str,
        plan: bytes,
        builder: str,
        *,
        again: str,
        plugin: PluginLibrary | None = None,
        host_code: bool = False,
    ) -> None:
        """Deserialise; `again` ends the error of an engine that fails, `host_code` allows it to bring its own."""
        trt = installed.load(builder)
        if plugin:
            plugin.register(trt)
        from polygraphy.backend.trt import TrtRunner, get_trt_logger
        from polygraphy.exception import PolygraphyException

        self._name, self._failures, messages = name, PolygraphyException, Messages()
        with messages.captured():
            self._runtime = trt.Runtime(get_trt_logger())  # has to outlive the engine
            if host_code:
                self._runtime.engine_host_code_allowed = True
            self._runner = TrtRunner(self._runtime.deserialize_cuda_engine(plan))
            try:
                self._runner.activate()  # fails, too, where there is no engine because it could not be read
            except PolygraphyException as error:
                why = reason(messages.errors) or one_line(str(error))
                raise EngineError(
                    f"{name}: {installed.title(builder)} {trt.__version__} cannot load it: {why}; {again}"
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


def _plugin_of(path: Path | None, builder: str, version: str) -> PluginLibrary | None:
    """The library at `path`, looked at from outside. Raises InputError."""
    if path is None:
        return None
    if builder != "tensorrt":
        raise InputError(f"plugin library {path}: {installed.title(builder)} takes no plugins; leave it out")
    library = PluginLibrary.of(path)
    library.check_version(version)
    return library


def _first_gpu(name: str, builder: str) -> Capability:
    """The GPU that an engine runs on. Raises MissingExtraError, or EngineError where there is none."""
    installed.require(builder)
    gpus = installed.visible_gpus()
    if not gpus:
        raise EngineError(f"{name}: running an engine needs an NVIDIA GPU and its driver; none is visible")
    return gpus[0]
