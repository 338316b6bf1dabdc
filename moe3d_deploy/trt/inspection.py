"""What TensorRT's engine inspector says of the layers of a built engine. Needs the GPU that the engine was built for.

Never executed so far; what was run is everything around it, on stand-ins.
"""

import os
from pathlib import Path

from moe3d_deploy.errors import EngineError
from moe3d_deploy.trt import installed
from moe3d_deploy.trt.plugin_library import PluginLibrary
from moe3d_deploy.trt.watch import Messages, one_line, reason


def layer_information(
    plan_path: str | os.PathLike[str],
    *,
    builder: str,
    plugin: PluginLibrary | None = None,
    host_code: bool = False,
) -> str:
    """Deserialise an engine that was just built here, and return the inspector's JSON on all its layers.

    plugin     the library that it was built with
    host_code  it is version-compatible, and brings code for the host

    The text is engines.inspector's to read: how much is in it depends on the verbosity that the engine was built with.
    Raises InputError, MissingExtraError or EngineError. An engine is code: never give one of a bundle's.
    """
    path = Path(plan_path)
    installed.require(builder)
    trt = installed.load(builder)
    if plugin:
        plugin.register(trt)
    from polygraphy.backend.trt import get_trt_logger

    name, messages = f"{installed.title(builder)} {trt.__version__}", Messages()
    with messages.captured():
        runtime = trt.Runtime(get_trt_logger())  # has to outlive the engine
        if host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            why = reason(messages.errors) or "it gives no reason"
            raise EngineError(f"{name} does not load its own engine to inspect it: {one_line(why)}")
        inspector = engine.create_engine_inspector()
        if inspector is None:
            raise EngineError(f"{name} gives no inspector for its engine")
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return str(text)
