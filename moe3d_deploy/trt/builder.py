"""Build an engine from an ONNX file in this process, streamed to the disk as the builder hands it out."""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.trt import installed
from moe3d_deploy.trt.attentions import Attention, attentions_of
from moe3d_deploy.trt.features import BuildFlags, apply_flags, check_flags
from moe3d_deploy.trt.installed import Capability
from moe3d_deploy.trt.network import ImageProfile, NetworkFacts, network_facts, parse, profile_shapes
from moe3d_deploy.trt.plugin_library import PluginLibrary
from moe3d_deploy.trt.timing import save_timing_cache, set_timing_cache
from moe3d_deploy.trt.watch import Messages, Progress, Watch, one_line, reason

_PARSING = "Parsing the model"
_WRITING = "Writing the engine"
_DEFAULTS = BuildFlags()


@dataclass(frozen=True)
class BuiltEngine:
    """What is known of an engine that was built.

    plan_bytes               size of the file
    activation_memory_bytes  one number for each profile; linear in the tokens when attention is fused
    listing                  the compiled layers with types, where the builder prints them (TensorRT-RTX, no GPU needed)
    log                      the builder's messages, INFO and above
    build_seconds            includes writing the file
    attentions               those of the parsed network, to be found again in the compiled layers
    """

    plan_bytes: int
    builder: str
    builder_version: str
    compute_capabilities: tuple[Capability, ...]
    facts: NetworkFacts
    activation_memory_bytes: tuple[int, ...]
    listing: str
    log: tuple[str, ...]
    parse_seconds: float
    build_seconds: float
    attentions: tuple[Attention, ...] = ()


def build_engine(
    onnx_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    profiles: ImageProfile | Sequence[ImageProfile],
    *,
    builder: str,
    compute_capabilities: Sequence[Capability] | None = None,
    flags: BuildFlags = _DEFAULTS,
    plugin: PluginLibrary | None = None,
    without_function: tuple[str, str] | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    log: Callable[[str], None] | None = None,
) -> BuiltEngine:
    """Build an engine in this process and write it to `out_path`; external weights are read from beside the ONNX file.

    out_path               a temporary name: the caller renames it, or removes what an error has left there
    profiles               one or several, in the engine's order
    compute_capabilities   TensorRT-RTX: (major, minor) of each GPU to build for, default RTX_CAPABILITIES;
                           TensorRT builds for this machine's GPU and takes none
    plugin                 registered before the model is parsed, for TensorRT only: engines.plugin_rules
    without_function       name and domain of a function that the parser is not to see, so that it takes the plugin
    cancelled              asked after every step; True ends the build with EngineError
    log                    receives each message as it comes

    Ctrl-C ends the build with KeyboardInterrupt. Both take effect at the end of the builder's current step, and
    TensorRT-RTX compiles in one step that is most of its time: engines.build runs this where it can be killed.
    A process keeps the builder it used first. Raises InputError, MissingExtraError or EngineError, one line each.
    """
    path = Path(onnx_path)
    installed.require(builder)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an ONNX file")
    trt = installed.load(builder)
    check_flags(builder, str(trt.__version__), flags, gpu=bool(installed.visible_gpus()))
    capabilities = installed.resolve_capabilities(trt, builder, compute_capabilities)
    wanted = profiles if isinstance(profiles, Sequence) else (profiles,)
    watch = Watch(progress, cancelled)
    messages = Messages(lambda line: watch.guard(log, line))
    from polygraphy.exception import PolygraphyException

    with messages.captured(), watch.interruptible():
        try:
            started = time.perf_counter()
            watch.start(_PARSING, 1)
            if plugin:
                plugin.register(trt)
            network = parse(trt, path, without_function=without_function)
            watch.step(_PARSING, 0)
            parsed = time.perf_counter()
            facts, attentions = network_facts(trt, network[1]), attentions_of(network[1])
            shapes = [profile_shapes(trt, network[1], profile, path.name) for profile in wanted]
            config = _config(trt, builder, capabilities, shapes, watch, flags)
            with _PlanFile(Path(out_path)) as plan:
                _serialize(trt, network, config, plan, watch, flags.timing_cache)
                watch.raise_if_stopped(path.name)
                plan.sync()
            watch.step(_WRITING, 0)
        except PolygraphyException as error:
            watch.raise_if_stopped(path.name)
            why = reason(messages.errors) or one_line(str(error))
            if any(map(installed.says_memory_ran_out, [*messages.errors, str(error)])):
                why = f"{installed.OUT_OF_MEMORY}, or a smaller largest shape"
            raise EngineError(
                f"{path.name}: {installed.title(builder)} {trt.__version__} cannot build it: {why}"
            ) from None
    watch.raise_if_stopped(path.name)
    activation = re.findall(r"Total Activation Memory: (\d+) bytes", "\n".join(messages.lines))
    return BuiltEngine(
        plan_bytes=plan.nbytes,
        builder=builder,
        builder_version=str(trt.__version__),
        compute_capabilities=capabilities,
        facts=facts,
        activation_memory_bytes=tuple(int(n) for n in activation),
        listing=messages.listing,
        log=tuple(messages.lines),
        parse_seconds=parsed - started,
        build_seconds=time.perf_counter() - parsed,
        attentions=attentions,
    )


def _config(
    trt: Any,
    builder: str,
    capabilities: tuple[Capability, ...],
    shapes: Sequence[dict[str, tuple[tuple[int, ...], ...]]],
    watch: Watch,
    flags: BuildFlags,
) -> Callable[[Any, Any], Any]:
    """Polygraphy's loader: config(builder, network) gives the builder's configuration."""
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            pass

    def set_flags(_: Any, network: Any, config: Any) -> None:
        apply_flags(trt, builder, config, flags)
        if flags.timing_cache is not None:
            set_timing_cache(config, Path(flags.timing_cache), installed.title(builder))

    profiles = [Profile() for _ in shapes]
    for profile, of_inputs in zip(profiles, shapes, strict=True):
        for name, sizes in of_inputs.items():
            profile.add(name, *sizes)
    options: dict[str, Any] = {
        "profiles": profiles,
        "progress_monitor": Monitor(),
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # else the engine keeps the layers' names alone
    }
    if builder == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create = CreateConfigRTX(compute_capabilities=list(capabilities), **options)
    else:
        create = CreateConfig(**options)
    return PostprocessConfig(create, func=set_flags)


def _serialize(
    trt: Any, network: Any, create: Callable[[Any, Any], Any], plan: "_PlanFile", watch: Watch, timings: str | None
) -> None:
    """Build into `plan`: in pieces, or, with TensorRT before 10.13, through the whole engine in memory.

    What was timed goes into the file `timings`. Raises EngineError, InputError or PolygraphyException, except for what
    stopped a stream: that is in `watch`.
    """
    from polygraphy.backend.trt import engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    def write(data: bytes | memoryview) -> int:
        if watch.stopping:
            return -1
        if not plan.nbytes:
            watch.start(_WRITING, 1)
        plan.write(data)
        return len(data)

    builder, definition, _ = network
    config = create(builder, definition)
    if hasattr(builder, "build_serialized_network_to_stream"):
        writer = _writer(trt, write, watch)
        if not builder.build_serialized_network_to_stream(definition, config, writer):
            raise PolygraphyException("the builder gave no engine and no reason")
    else:
        write(memoryview(engine_bytes_from_network(network, config=config)).cast("B"))
    if timings is not None and not watch.stopping:
        save_timing_cache(config, Path(timings))


def _writer(trt: Any, write: Callable[[bytes], int], watch: Watch) -> Any:
    """`write` for the builder, which must see no exception and calls a build good whose writing failed."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            count = watch.guard(write, data)
            return -1 if count is None else count  # anything but len(data) ends the writing

    return Writer()


class _PlanFile:
    """The file a plan goes into, piece by piece. What fails is one EngineError with the path and the reason."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.nbytes = 0

    def __enter__(self) -> "_PlanFile":
        try:
            self._file = self._path.open("wb", buffering=0)
        except OSError as error:
            raise self._failed(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        try:
            while rest:
                count = self._file.write(rest)  # the system writes at most 2 GiB at a time
                self.nbytes += count
                rest = rest[count:]
        except OSError as error:
            raise self._failed(error) from None

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> EngineError:
        return EngineError(
            f"{self._path}: {error.strerror} after {self.nbytes / 1e6:.0f} MB of the engine; "
            "make room or choose another place"
        )
