"""Build one engine in a process of its own: its memory goes with it, a crash is an error, Ctrl-C takes effect at once.

TensorRT-RTX spends most of a build in one call that nothing interrupts; the process around it can be ended.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe3d_deploy import trt
from moe3d_deploy.child import Emit, peak_bytes, run_in_child
from moe3d_deploy.engines.audit import ATTENTION_OPSET
from moe3d_deploy.engines.inspector import inspected, not_told
from moe3d_deploy.engines.plugin_rules import EXPERT_MIX, check_plugin, must_remove_function
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError, Moe3dError
from moe3d_deploy.machine import cpu_name

REPEAT_SECONDS = 1.0  # the last progress is told again this often, so that a long step shows life
INSPECTING = "Inspecting the engine"  # the phase after the builder's own
_THROTTLE_SECONDS = 0.05
_DEFAULTS = trt.BuildFlags()
_PACKAGES = re.compile(r"/[^'\"\s]*/(?:site|dist)-packages/")
_DTYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16"}


class _BuilderDied(EngineError):
    """The process ended without a result: killed, or crashed."""


def build(
    onnx_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    profiles: ShapeProfile | Sequence[ShapeProfile],
    *,
    precision: str,
    builder: str = "auto",
    compute_capabilities: Sequence[trt.Capability] | None = None,
    flags: trt.BuildFlags = _DEFAULTS,
    plugin: trt.PluginLibrary | None = None,
    log_path: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Build an engine into `out_path`, a temporary name the caller renames, and return its record for the manifest.

    profiles    one or several, all of one patch size
    precision   what the graph was exported with; recorded, never turned into a builder flag
    plugin      registered in the builder's process, for TensorRT only; where its parser would take the model's function
                all the same, that leaves the bytes that are parsed
    log_path    file for the builder's messages, line by line as they come; it stays whatever happens
    progress    progress(phase, step, total) in this thread, at least every REPEAT_SECONDS; raise in it to cancel

    The record has builder, builder_version, compute_capabilities (89 is 8.9), precision, profiles, plugin, audit and
    build. Its audit holds what is there, which engines.audit compares with what was asked for.
    On any failure, an interrupt included, the process is stopped and `out_path` is removed.
    Raises InputError, MissingExtraError or EngineError.
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    builder = resolve_builder(builder)
    version = trt.available()[builder]
    check_plugin(builder, version, flags, plugin)
    if not onnx_path.is_file():
        raise InputError(f"{onnx_path}: no such file; give an ONNX file")
    wanted = (profiles,) if isinstance(profiles, ShapeProfile) else tuple(profiles)
    request = {
        "onnx_path": str(onnx_path.absolute()),
        "out_path": str(out_path.absolute()),
        "profiles": [profile.as_dict() for profile in wanted],
        "patch_size": wanted[0].patch_size,
        "builder": builder,
        "compute_capabilities": compute_capabilities and list(compute_capabilities),
        "flags": dataclasses.asdict(flags),
        "plugin": plugin and {**dataclasses.asdict(plugin), "path": str(plugin.path)},
        "without_function": list(EXPERT_MIX) if plugin and must_remove_function(builder, version) else None,
        "log_path": None if log_path is None else str(Path(log_path).absolute()),
    }
    last: dict[str, Any] = {"phase": "start", "peak_bytes": 0}

    def on_event(event: dict[str, Any]) -> None:
        last.update(event)
        if progress:
            progress(event["phase"], event["step"], event["total"])

    try:
        child = run_in_child(
            f"{__name__}:build_in_child", request, title="the builder", on_event=on_event, failure=_BuilderDied
        )
    except BaseException as error:
        out_path.unlink(missing_ok=True)
        if isinstance(error, _BuilderDied):
            raise EngineError(
                f"{onnx_path.name}: {error}. {trt.title(builder)} was at {last['phase']!r} with "
                f"{last['peak_bytes'] / 1e9:.1f} GB; if memory ran short, lower the largest shape "
                f"({'x'.join(map(str, max((profile.max for profile in wanted), key=math.prod)))})"
            ) from None
        raise
    record = child.value
    try:
        record["audit"]["inspector"] = _inspect(record, request, record.pop("attentions"), on_event)
    except BaseException:
        out_path.unlink(missing_ok=True)
        raise
    record["precision"] = precision
    record["build"] |= {"seconds": round(child.seconds, 3), "peak_bytes": child.peak_bytes, "from_cache": False}
    return record


def resolve_builder(builder: str = "auto", *, opset: int = 20, precision: str = "fp16") -> str:
    """The builder to use: `auto` is tensorrt where it is installed and sees a GPU, else tensorrt-rtx.

    opset, precision   of the ONNX file: a TensorRT that does not know the opset is not taken

    Raises InputError for a builder that does not exist, MissingExtraError or EngineError where none can be used or
    where none builds such a file.
    """
    if opset >= ATTENTION_OPSET and precision == "fp32":
        raise InputError(
            f"opset {opset} has attention as one operator, and in float32 TensorRT has no kernel for that: export with "
            "--opset 20 or a 16-bit --precision"
        )
    if precision == "int8":
        raise InputError(
            "int8 is for ONNX Runtime on a CPU, and no TensorRT has a kernel for its products: export with --precision "
            "fp16 for an engine"
        )
    if builder == "auto":
        installed = trt.available()
        usable = "tensorrt" in installed and bool(trt.visible_gpus())
        if usable and _can_build("tensorrt", installed["tensorrt"], opset):
            builder = "tensorrt"
        elif "tensorrt-rtx" in installed:
            builder = "tensorrt-rtx"
        elif usable:
            builder = "tensorrt"  # which is refused below, with the reason
        else:
            reason = "TensorRT is installed but sees no GPU" if installed else "TensorRT is not installed"
            raise EngineError(f"{reason}; build without a GPU with TensorRT-RTX: pip install 'moe3d-deploy[rtx]'")
    trt.require(builder)
    version = trt.available()[builder]
    trt.check_version(builder, version)
    if not trt.knows_opset(builder, version, opset):
        raise EngineError(
            f"TensorRT {version} does not know opset {opset}, whose attention operator came with 10.14: update it, "
            "or export with --opset 20"
        )
    return builder


def check_request(
    builder: str,
    flags: trt.BuildFlags,
    compute_capabilities: Sequence[trt.Capability] | None,
    *,
    opset: int = 20,
    precision: str = "fp16",
    plugin: trt.PluginLibrary | None = None,
) -> str:
    """`resolve_builder`, and whether that version has all that is asked of it; neither loads a library.

    Raises InputError, MissingExtraError or EngineError; the message says which version has what is missing.
    """
    builder = resolve_builder(builder, opset=opset, precision=precision)
    version = trt.available()[builder]
    trt.check_flags(builder, version, flags, gpu=bool(trt.visible_gpus()))
    check_plugin(builder, version, flags, plugin)
    if builder == "tensorrt-rtx":
        trt.check_targets(version, compute_capabilities or ())
    return builder


def _can_build(builder: str, version: str, opset: int) -> bool:
    with contextlib.suppress(EngineError):
        trt.check_version(builder, version)
        return trt.knows_opset(builder, version, opset)
    return False


def _inspect(
    record: dict[str, Any], request: dict[str, Any], attentions: list[Any], on_event: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    """What the engine's inspector tells, in a process of its own: an engine may crash what loads it.

    None without a GPU that the engine was built for; where it fails, the reason. Only an interrupt is raised.
    """
    gpus = trt.visible_gpus()[:1]
    if not any(10 * major + minor in record["compute_capabilities"] for major, minor in gpus):
        return None
    asked = {**request, "attentions": attentions}
    try:
        return run_in_child(f"{__name__}:inspect_in_child", asked, title="the inspector", on_event=on_event).value
    except Moe3dError as error:
        return not_told(str(error))


def inspect_in_child(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The other side of `_inspect`: load the engine that was built, and return engines.inspector's facts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with _Reporter(emit) as reporter:
        reporter.progress(INSPECTING, 0, 1)
        text = trt.layer_information(
            request["out_path"],
            builder=request["builder"],
            plugin=_plugin(request),
            host_code=request["flags"]["version_compatible"],
        )
    attentions = [trt.Attention(core, tuple(products), dtype) for core, products, dtype in request["attentions"]]
    return inspected(text, attentions, profiles=len(request["profiles"]))


def _plugin(request: dict[str, Any]) -> trt.PluginLibrary | None:
    asked = request["plugin"]
    return asked and trt.PluginLibrary(**{**asked, "path": Path(asked["path"])})


def build_in_child(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The other side of `build`: write the plan, return the record without precision and wall time."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing here is worth a slow goodbye
    profiles = [ShapeProfile.from_dict(profile, request["patch_size"]) for profile in request["profiles"]]
    capabilities, flags = request["compute_capabilities"], trt.BuildFlags(**request["flags"])
    plugin = _plugin(request)
    with _log_file(request) as log, _Reporter(emit) as reporter:
        engine = trt.build_engine(
            Path(request["onnx_path"]),
            Path(request["out_path"]),
            profiles,
            builder=request["builder"],
            compute_capabilities=capabilities and [tuple(pair) for pair in capabilities],
            flags=flags,
            plugin=plugin,
            without_function=request["without_function"] and tuple(request["without_function"]),
            progress=reporter.progress,
            log=log,
        )
    return {
        "builder": engine.builder,
        "builder_version": engine.builder_version,
        "compute_capabilities": [10 * major + minor for major, minor in engine.compute_capabilities],
        "profiles": [profile.as_dict() for profile in profiles],
        "plugin": _plugin_record(engine.facts.plugins, plugin),
        "attentions": engine.attentions,
        "audit": {
            "tf32": flags.tf32,
            "network": dataclasses.asdict(engine.facts),
            "compiled": compiled_layers(engine.listing, len(profiles)),
            "activation_memory_bytes": list(engine.activation_memory_bytes),
            "executed": False,
        },
        "build": {
            "parse_seconds": round(engine.parse_seconds, 3),
            "build_seconds": round(engine.build_seconds, 3),
            "plan_bytes": engine.plan_bytes,
            "host_cpu": cpu_name(),
            "flags": flags.asked(),
        },
    }


def _plugin_record(layers: Sequence[str], plugin: trt.PluginLibrary | None) -> dict[str, Any] | None:
    """What an engine with plugin layers needs; None for one without, whatever was registered."""
    if not layers:
        return None
    library, digest = (plugin.path.name, plugin.sha256) if plugin else (None, None)
    return {"layers": list(layers), "library": library, "sha256": digest}


@contextlib.contextmanager
def _log_file(request: dict[str, Any]) -> Iterator[Callable[[str], None] | None]:
    """Write messages to the request's log file, without the folders of this machine: a bundle travels."""
    if request["log_path"] is None:
        yield None
        return
    folder = f"{Path(request['onnx_path']).parent}/"
    with open(request["log_path"], "wb", buffering=0) as file:  # with a buffer, closing fails where writing did

        def write(line: str) -> None:
            with contextlib.suppress(OSError):  # on a full disk it is the engine that says so
                file.write(_PACKAGES.sub("", line.replace(folder, "")).encode("utf-8", "replace") + b"\n")

        yield write


def compiled_layers(listing: str, profiles: int = 1) -> dict[str, Any] | None:
    """Count the layers TensorRT-RTX lists after compiling, which it does without a GPU; None without a listing.

    A listing in which no layer is found counts as one with none: it must not pass for an engine nobody can see into.

    layers            kind (gemm, correlation = convolution, kgen = generated kernel, ...) -> type of the first
                      input -> count
    fused_attention   kernels that hold a whole attention, both matmuls and the softmax; with several profiles, which
                      are compiled one by one, those of the profile that has the fewest
    """
    found = re.findall(r"^\s*Name: (.+?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: ", listing, re.MULTILINE)
    if not listing:
        return None
    layers: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for _, kind, inputs in found:
        dtype = re.search(r"Datatype: (\w+)", inputs)
        if dtype:
            layers[kind][_DTYPES.get(dtype[1], dtype[1].lower())] += 1
    fused = Counter({graph: 0 for name, _, _ in found if (graph := _graph(name, profiles))})
    fused.update(_graph(name, profiles) for name, kind, _ in found if kind == "kgen" and name.startswith("_gemm_mha"))
    fewest = min(fused.values(), default=0) if len(fused) == profiles else 0  # a part that cannot be told apart is none
    return {"layers": {kind: dict(counts) for kind, counts in layers.items()}, "fused_attention": fewest}


def _graph(name: str, profiles: int) -> str:
    """The compiled graph that a layer is of, one for each profile: `MatMul_16_myl1_8` is of `myl1`."""
    match = re.search(r"_(myl\d+)_\d+$", name)
    return "all" if profiles == 1 else match[1] if match else ""


class _Reporter:
    """Sends progress events: not more than the reader needs, and the last one again while a long step runs."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._seen: set[str] = set()
        self._last: tuple[str, int, int] | None = None
        self._sent = 0.0

    def __enter__(self) -> "_Reporter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def progress(self, phase: str, step: int, total: int) -> None:
        with self._lock:
            self._last = (phase, step, total)
            if phase not in self._seen or step == total or time.monotonic() - self._sent > _THROTTLE_SECONDS:
                self._seen.add(phase)
                self._send()

    def _repeat(self) -> None:
        while not self._done.wait(REPEAT_SECONDS):
            with self._lock:
                if time.monotonic() - self._sent > REPEAT_SECONDS / 2:
                    self._send()

    def _send(self) -> None:
        if self._last:
            phase, step, total = self._last
            self._emit({"phase": phase, "step": step, "total": total, "peak_bytes": peak_bytes()})
            self._sent = time.monotonic()
