"""TensorRT and TensorRT-RTX through Polygraphy: what is installed, build an engine from an ONNX file, run an engine.

The only module that imports tensorrt, tensorrt_rtx or polygraphy. Precision is the graph's: networks are strongly
typed on both builders and no flag changes a type. Plugins are not registered here; TensorRT-RTX aborts the process
when one is.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from moe3d_deploy.errors import EngineError, InputError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[str, int, int], None]
"""progress(phase, step, total): phases nest and repeat; within one run of a phase the steps rise from 0 to total."""
Capability = tuple[int, int]

RTX_CAPABILITIES: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (12, 0))
"""What a TensorRT-RTX engine is built for unless told otherwise, whatever GPU the building machine has."""


class _Library(NamedTuple):
    title: str
    module: str
    distributions: tuple[str, ...]
    extra: str


_LIBRARIES = {
    "tensorrt": _Library("TensorRT", "tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "trt"),
    "tensorrt-rtx": _Library("TensorRT-RTX", "tensorrt_rtx", ("tensorrt_rtx",), "rtx"),
}
_DTYPES = {"float": "fp32", "half": "fp16"}  # every other type keeps TensorRT's name in lower case: bf16, int64, ...


class ImageProfile(Protocol):
    """The smallest, typical and largest shape of the input `images`; engines.shapes.ShapeProfile is one."""

    def image_shapes(self, channels_last: bool = False) -> tuple[tuple[int, ...], ...]: ...


@dataclass(frozen=True)
class NetworkFacts:
    """What the parsed network holds before the builder fuses it.

    layers                          layer type -> count
    matmul, convolution, attention  type of the result (fp32, fp16, bf16, ...) -> count of layers
    plugins                         names of the plugin layers
    functions                       op name of each model-local function that was expanded -> count of its nodes
    """

    layers: dict[str, int]
    matmul: dict[str, int]
    convolution: dict[str, int]
    attention: dict[str, int]
    plugins: tuple[str, ...]
    functions: dict[str, int]


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine and what its builder told of it.

    plan                     bytes in the builder's own memory, not a copy
    activation_memory_bytes  one number for each profile; linear in the tokens when attention is fused
    listing                  the compiled layers with types, where the builder prints them (TensorRT-RTX, no GPU needed)
    log                      the builder's messages, INFO and above
    """

    plan: memoryview
    builder: str
    builder_version: str
    compute_capabilities: tuple[Capability, ...]
    facts: NetworkFacts
    activation_memory_bytes: tuple[int, ...]
    listing: str
    log: tuple[str, ...]
    parse_seconds: float
    build_seconds: float


def title(builder: str) -> str:
    """The product's name, such as TensorRT-RTX. InputError for a builder that does not exist."""
    if builder not in _LIBRARIES:
        raise InputError(f"builder {builder!r} is unknown; use one of {', '.join(_LIBRARIES)}")
    return _LIBRARIES[builder].title


def available() -> dict[str, str]:
    """The installed builders and their versions; a library without package metadata is imported to ask it."""
    return {builder: _version(lib) for builder, lib in _LIBRARIES.items() if _is_installed(lib.module)}


def require(builder: str) -> None:
    """Raise MissingExtraError unless `builder` and Polygraphy are installed, InputError if there is no such builder."""
    title(builder)
    for package in (_LIBRARIES[builder].module, "polygraphy"):
        if not _is_installed(package):
            raise MissingExtraError(package, _LIBRARIES[builder].extra)


def visible_gpus() -> list[Capability]:
    """The compute capability of every CUDA device this process sees; empty without a driver or a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        status = driver.cuDeviceGet(ctypes.byref(device), index)
        for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h
            status = status or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        if not status:
            found.append((major.value, minor.value))
    return found


def build_engine(
    onnx_path: str | os.PathLike[str],
    profile: ImageProfile,
    *,
    builder: str,
    compute_capabilities: Sequence[Capability] | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    workspace_bytes: int | None = None,
    tf32: bool = False,
    log: Callable[[str], None] | None = None,
) -> BuiltEngine:
    """Build an engine in this process; external weights are read from beside the ONNX file.

    compute_capabilities   TensorRT-RTX: (major, minor) of each GPU to build for, default RTX_CAPABILITIES;
                           TensorRT builds for this machine's GPU and takes none
    tf32                   let float32 matmuls and convolutions use TF32; without it fp32 means fp32
    cancelled              asked after every step; True ends the build with EngineError
    log                    receives each message as it comes

    Ctrl-C ends the build with KeyboardInterrupt. Both take effect at the end of the builder's current step, and
    TensorRT-RTX compiles in one step that is most of its time: engines.build runs this where it can be killed.
    A process keeps the builder it used first. Raises InputError, MissingExtraError or EngineError, one line each.
    """
    path = Path(onnx_path)
    require(builder)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an ONNX file")
    trt = _load(builder)
    capabilities = _capabilities(trt, builder, compute_capabilities)
    watch = _Watch(progress, cancelled)
    messages = _Messages(lambda line: watch.guard(log, line))
    from polygraphy.exception import PolygraphyException

    with messages.captured(), watch.interruptible():
        try:
            started = time.perf_counter()
            network = _parse(trt, path, watch)
            parsed = time.perf_counter()
            facts = _network_facts(network[1])
            shapes = _input_shapes(trt, network[1], profile, path.name)
            plan = _serialize(trt, builder, network, capabilities, shapes, watch, workspace_bytes, tf32)
        except PolygraphyException as error:
            watch.raise_if_stopped(path.name)
            reason = _reason(messages.errors) or _one_line(str(error))
            raise EngineError(f"{path.name}: {title(builder)} {trt.__version__} cannot build it: {reason}") from None
    watch.raise_if_stopped(path.name)
    activation = re.findall(r"Total Activation Memory: (\d+) bytes", "\n".join(messages.lines))
    return BuiltEngine(
        plan=memoryview(plan).cast("B"),
        builder=builder,
        builder_version=str(trt.__version__),
        compute_capabilities=capabilities,
        facts=facts,
        activation_memory_bytes=tuple(int(n) for n in activation),
        listing=messages.listing,
        log=tuple(messages.lines),
        parse_seconds=parsed - started,
        build_seconds=time.perf_counter() - parsed,
    )


class EngineRunner:
    """One engine on the first visible GPU, NumPy in and out; for checks, not for production. One thread at a time.

    Never executed so far: an engine that loads, and `run`; both need a GPU. What has run is the errors without one.
    An engine is code: load only what you trust.
    """

    def __init__(self, plan_path: str | os.PathLike[str], *, builder: str) -> None:
        path = Path(plan_path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; give an engine (.plan)")
        require(builder)
        if not visible_gpus():
            raise EngineError(f"{path.name}: running an engine needs an NVIDIA GPU and its driver; none is visible")
        trt = _load(builder)
        from polygraphy.backend.trt import TrtRunner, get_trt_logger
        from polygraphy.exception import PolygraphyException

        self._name, self._failures, messages = path.name, PolygraphyException, _Messages()
        with messages.captured():
            self._runtime = trt.Runtime(get_trt_logger())  # has to outlive the engine
            self._runner = TrtRunner(self._runtime.deserialize_cuda_engine(path.read_bytes()))
            try:
                self._runner.activate()  # fails, too, where there is no engine because it could not be read
            except PolygraphyException as error:
                reason = _reason(messages.errors) or _one_line(str(error))
                raise EngineError(
                    f"{path.name}: {title(builder)} {trt.__version__} cannot load it: {reason}; build it again here"
                ) from None

    def run(self, inputs: "Mapping[str, np.ndarray]") -> "dict[str, np.ndarray]":
        """Run one batch: arrays by input name in the engine's types, arrays by output name back (copies)."""
        messages = _Messages()
        with messages.captured():
            try:
                outputs = self._runner.infer(dict(inputs))
            except self._failures as error:
                reason = _reason(messages.errors) or _one_line(str(error))
                raise EngineError(f"{self._name}: the engine did not run: {reason}") from None
        return {name: array.copy() for name, array in outputs.items()}

    def close(self) -> None:
        """Free the engine's memory; `run` fails afterwards."""
        self._runner.deactivate()

    def __enter__(self) -> "EngineRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def _version(library: _Library) -> str:
    for name in library.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module(library.module).__version__)


def _load(builder: str) -> Any:
    """Import the library and Polygraphy over it; Polygraphy reads its choice from the environment, once."""
    use_rtx = builder == "tensorrt-rtx"
    name, before = "POLYGRAPHY_USE_TENSORRT_RTX", os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX")
    os.environ[name] = str(int(use_rtx))
    try:
        trt = importlib.import_module(_LIBRARIES[builder].module)
        from polygraphy import config
    except (ImportError, OSError) as error:
        raise EngineError(f"{title(builder)} does not load: {_one_line(str(error))}; install it again") from None
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    if bool(config.USE_TENSORRT_RTX) is not use_rtx:
        raise EngineError(
            f"this process already uses the other builder, so it cannot use {title(builder)}; start another process"
        )
    return trt


def _capabilities(trt: Any, builder: str, asked: Sequence[Capability] | None) -> tuple[Capability, ...]:
    if builder == "tensorrt":
        gpus = visible_gpus()
        if not gpus:
            raise EngineError("TensorRT builds for the GPU of this machine and none is visible; use tensorrt-rtx")
        if asked is not None and list(asked) != gpus[:1]:
            raise InputError(f"TensorRT builds for this machine's GPU, {gpus[0]}, alone; leave capabilities out")
        return (gpus[0],)
    wanted = RTX_CAPABILITIES if asked is None else tuple(dict.fromkeys((major, minor) for major, minor in asked))
    known = [int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    unknown = [pair for pair in wanted if 10 * pair[0] + pair[1] not in known or not 0 <= pair[1] <= 9]
    if unknown or not wanted:
        raise InputError(
            f"compute capability {'{}.{}'.format(*unknown[0]) if unknown else '(none)'}: TensorRT-RTX "
            f"{trt.__version__} builds for {', '.join(str(n / 10) for n in known)}; "
            "for another GPU build with TensorRT on its machine"
        )
    return wanted


def _parse(trt: Any, path: Path, watch: "_Watch") -> Any:
    """(builder, network, parser) of a strongly typed network: TensorRT 10 by flag, 11 without one."""
    from polygraphy.backend.trt import network_from_onnx_path

    watch.start("Parsing the model", 1)
    has_flag = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    if not has_flag and trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11:
        raise EngineError(f"TensorRT {trt.__version__} has no strongly typed networks; install 10.3 or newer")
    network = network_from_onnx_path(str(path), strongly_typed=has_flag)
    if has_flag and not network[1].get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        raise EngineError(f"{path.name}: the network did not become strongly typed; types would not be the graph's")
    watch.step("Parsing the model", 0)
    return network


def _input_shapes(trt: Any, network: Any, profile: ImageProfile, model: str) -> tuple[tuple[int, ...], ...]:
    """The profile's shapes in the layout of the input, checked against the sizes the model fixes."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if [tensor.name for tensor in inputs] != ["images"] or len(inputs[0].shape) != 5:
        found = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in inputs) or "nothing"
        raise EngineError(f"{model}: takes {found}; expected one input, images (B, S, 3, H, W); export it again")
    channels_last = inputs[0].dtype == trt.DataType.UINT8
    axes = ("batch", "views", *(("height", "width", "channels") if channels_last else ("channels", "height", "width")))
    shapes = profile.image_shapes(channels_last)
    for axis, fixed, *asked in zip(axes, inputs[0].shape, *shapes, strict=True):
        if fixed != -1 and set(asked) != {fixed}:
            raise EngineError(
                f"{model}: its {axis} is fixed at {fixed}, the profile asks for {':'.join(map(str, asked))}; "
                f"build with --{axis} {fixed} or export with a free {axis}"
            )
    return shapes


def _network_facts(network: Any) -> NetworkFacts:
    layers: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {"MATRIX_MULTIPLY": Counter(), "CONVOLUTION": Counter(), "ATTENTION": Counter()}
    plugins, calls = [], set()
    for layer in network:
        kind = layer.type.name
        layers[kind] += 1
        if kind.startswith("PLUGIN"):
            plugins.append(layer.name)
        # A layer from a function body names its call: "[ONNX Layer: mul | expert_mix (ExpertMix)]".
        calls.update(re.findall(r" \| ([^|\]]+) \((\w+)\)", layer.metadata))
        group = {"DECONVOLUTION": "CONVOLUTION", "ATTENTION_OUTPUT": "ATTENTION"}.get(kind, kind)
        if group in dtypes:
            dtype = layer.get_output(0).dtype.name.lower()
            dtypes[group][_DTYPES.get(dtype, dtype)] += 1
    return NetworkFacts(
        layers=dict(layers),
        matmul=dict(dtypes["MATRIX_MULTIPLY"]),
        convolution=dict(dtypes["CONVOLUTION"]),
        attention=dict(dtypes["ATTENTION"]),
        plugins=tuple(plugins),
        functions=dict(Counter(function for _, function in calls)),
    )


def _serialize(
    trt: Any,
    builder: str,
    network: Any,
    capabilities: tuple[Capability, ...],
    shapes: tuple[tuple[int, ...], ...],
    watch: "_Watch",
    workspace_bytes: int | None,
    tf32: bool,
) -> Any:
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile, engine_bytes_from_network

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            pass

    def set_tf32(builder: Any, network: Any, config: Any) -> None:  # on by default in both libraries
        (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)

    options: dict[str, Any] = {
        "profiles": [Profile().add("images", *shapes)],
        "progress_monitor": Monitor(),
    }
    if workspace_bytes is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: workspace_bytes}
    if builder == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        config = CreateConfigRTX(compute_capabilities=list(capabilities), **options)
    else:
        config = CreateConfig(**options)
    return engine_bytes_from_network(network, config=PostprocessConfig(config, func=set_tf32))


class _Watch:
    """Between the builder's progress callbacks and the caller's: counts, cancels, keeps exceptions out of C++."""

    def __init__(self, progress: Progress | None, cancelled: Callable[[], bool] | None) -> None:
        self._progress, self._cancelled = progress, cancelled
        self._totals: dict[str, int] = {}
        self._lock = threading.Lock()  # the builder may report from several threads
        self._interrupted = self._stopped = False
        self._error: BaseException | None = None

    def start(self, phase: str, steps: int) -> None:
        self._totals[phase] = steps
        self._report(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        """Note that step `step` (from 0) is done; False tells the builder to give up."""
        self._report(phase, step + 1)
        return not (self._interrupted or self._stopped or self._error)

    def _report(self, phase: str, done: int) -> None:
        with self._lock:
            self.guard(self._progress, phase, done, self._totals.get(phase, done))
            self._stopped = bool(self.guard(self._cancelled)) or self._stopped

    def guard(self, call: Callable[..., Any] | None, *args: Any) -> Any:
        """Call the caller's function, if there is one; what it raises must wait until the builder has returned."""
        try:
            return call(*args) if call else None
        except BaseException as error:  # noqa: BLE001  raised by raise_if_stopped
            self._error = self._error or error

    def raise_if_stopped(self, model: str) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        if self._error:
            raise self._error
        if self._stopped:
            raise EngineError(f"{model}: the engine build was cancelled; nothing was written")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn Ctrl-C into a flag: an exception must not pass through the builder. Another handler stays in place."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True


class _Messages(logging.Handler):
    """Polygraphy's and the library's messages, kept off stdout: INFO and above, errors, the compiled layers."""

    def __init__(self, log: Callable[[str], object] | None = None) -> None:
        super().__init__()
        self._log = log
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.listing = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = str(record.msg)
        if text.startswith("Layers:"):
            self.listing = text
        if record.levelno < 10:  # TensorRT's VERBOSE
            return
        if record.levelno >= logging.ERROR:
            self.errors.append(text)
        for line in text.splitlines():
            self.lines.append(line)
            if self._log:
                self._log(line)

    @contextmanager
    def captured(self) -> Iterator[None]:
        from polygraphy.logger import G_LOGGER

        target = logging.getLogger("Polygraphy")
        before = (target.level, target.propagate, target.handlers[:])
        names = ("use_python_logging_system", "colors", "letter")
        style = {name: getattr(G_LOGGER, name) for name in names}
        target.level, target.propagate, target.handlers[:] = 1, False, [self]
        for name in names:
            setattr(G_LOGGER, name, name == "use_python_logging_system")
        try:
            with G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
                yield
        finally:
            for name in names:
                setattr(G_LOGGER, name, style[name])
            target.level, target.propagate, target.handlers[:] = before


def _reason(errors: Sequence[str]) -> str:
    """One line from the library's errors: the node the parser stopped at, or the builder's first error."""
    weights = [text.partition(": ")[2] for text in errors if text.startswith("WeightsContext")]
    if weights:
        return _one_line(f"{weights[0]}; put the weight file that belongs to it beside it")
    if any("MODEL_DESERIALIZE_FAILED" in text for text in errors):
        return "the file is damaged or no ONNX file; export it again"
    for text in errors:
        if match := re.match(r"In node -?\d+ with name: (.*?) and operator: (.*?) \(\w+\): (.*)", text, re.DOTALL):
            return _one_line('node "{}" ({}): {}'.format(*match.groups()))
    return _one_line(errors[0]) if errors else ""


def _one_line(text: str) -> str:
    # the library's own source lines, its error codes, links
    text = re.sub(r"\bIn \S+ at /\S+:\d+ ?|^\w+::\w+: Error Code \d+: |\(See https?:[^)]*\)", "", text)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
