"""Build one engine in a process of its own: its memory goes with it, a crash is an error, Ctrl-C takes effect at once.

TensorRT-RTX spends most of a build in one call that nothing interrupts; the process around it can be ended.
"""

import dataclasses
import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe3d_deploy import trt
from moe3d_deploy.child import Emit, peak_bytes, run_in_child
from moe3d_deploy.engines.audit import ATTENTION_OPSET
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.machine import cpu_name

REPEAT_SECONDS = 1.0  # the last progress is told again this often, so that a long step shows life
_THROTTLE_SECONDS = 0.05
_ATTENTION_TENSORRT = (10, 14)  # the first that knows attention as an operator
_DTYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16"}


class _BuilderDied(EngineError):
    """The process ended without a result: killed, or crashed."""


def build(
    onnx_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    profile: ShapeProfile,
    *,
    precision: str,
    builder: str = "auto",
    compute_capabilities: Sequence[trt.Capability] | None = None,
    workspace_bytes: int | None = None,
    tf32: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Build an engine into `out_path`, a temporary name the caller renames, and return its record for the manifest.

    precision   what the graph was exported with; recorded, never turned into a builder flag
    progress    progress(phase, step, total) in this thread, at least every REPEAT_SECONDS; raise in it to cancel

    The record has builder, builder_version, compute_capabilities (89 is 8.9), precision, profiles, plugin, audit and
    build. Its audit holds what is there, which engines.audit compares with what was asked for.
    On any failure, an interrupt included, the process is stopped and `out_path` is removed.
    Raises InputError, MissingExtraError or EngineError.
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    builder = resolve_builder(builder)
    if not onnx_path.is_file():
        raise InputError(f"{onnx_path}: no such file; give an ONNX file")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise InputError(f"workspace of {workspace_bytes} bytes: give a positive number, or none for the builder's own")
    request = {
        "onnx_path": str(onnx_path.absolute()),
        "out_path": str(out_path.absolute()),
        "profile": profile.as_dict(),
        "patch_size": profile.patch_size,
        "builder": builder,
        "compute_capabilities": compute_capabilities and list(compute_capabilities),
        "workspace_bytes": workspace_bytes,
        "tf32": tf32,
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
                f"({'x'.join(map(str, profile.max))})"
            ) from None
        raise
    record = child.value
    record["precision"] = precision
    record["build"] |= {"seconds": round(child.seconds, 3), "peak_bytes": child.peak_bytes}
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
    if builder == "auto":
        installed = trt.available()
        usable = "tensorrt" in installed and bool(trt.visible_gpus())
        if usable and _knows(installed["tensorrt"], opset):
            builder = "tensorrt"
        elif "tensorrt-rtx" in installed:
            builder = "tensorrt-rtx"
        elif usable:
            builder = "tensorrt"  # which is refused below, with the reason
        else:
            reason = "TensorRT is installed but sees no GPU" if installed else "TensorRT is not installed"
            raise EngineError(f"{reason}; build without a GPU with TensorRT-RTX: pip install 'moe3d-deploy[rtx]'")
    trt.require(builder)
    if builder == "tensorrt" and not _knows(version := trt.available()[builder], opset):
        needed = ".".join(map(str, _ATTENTION_TENSORRT))
        raise EngineError(
            f"TensorRT {version} does not know opset {opset}, whose attention operator came with {needed}: update it, "
            "or export with --opset 20"
        )
    return builder


def _knows(version: str, opset: int) -> bool:
    return opset < ATTENTION_OPSET or tuple(map(int, version.split(".")[:2])) >= _ATTENTION_TENSORRT


def build_in_child(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The other side of `build`: write the plan, return the record without precision and wall time."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing here is worth a slow goodbye
    profile = ShapeProfile.from_dict(request["profile"], request["patch_size"])
    capabilities = request["compute_capabilities"]
    with _Reporter(emit) as reporter:
        engine = trt.build_engine(
            Path(request["onnx_path"]),
            Path(request["out_path"]),
            profile,
            builder=request["builder"],
            compute_capabilities=capabilities and [tuple(pair) for pair in capabilities],
            progress=reporter.progress,
            workspace_bytes=request["workspace_bytes"],
            tf32=request["tf32"],
        )
    return {
        "builder": engine.builder,
        "builder_version": engine.builder_version,
        "compute_capabilities": [10 * major + minor for major, minor in engine.compute_capabilities],
        "profiles": [profile.as_dict()],
        "plugin": {"layers": list(engine.facts.plugins)} if engine.facts.plugins else None,
        "audit": {
            "tf32": request["tf32"],
            "network": dataclasses.asdict(engine.facts),
            "compiled": compiled_layers(engine.listing),
            "activation_memory_bytes": list(engine.activation_memory_bytes),
            "executed": False,
        },
        "build": {
            "parse_seconds": round(engine.parse_seconds, 3),
            "build_seconds": round(engine.build_seconds, 3),
            "plan_bytes": engine.plan_bytes,
            "host_cpu": cpu_name(),
        },
    }


def compiled_layers(listing: str) -> dict[str, Any] | None:
    """Count the layers TensorRT-RTX lists after compiling, which it does without a GPU; None without a listing.

    A listing in which no layer is found counts as one with none: it must not pass for an engine nobody can see into.

    layers            kind (gemm, correlation = convolution, kgen = generated kernel, ...) -> type of the first
                      input -> count
    fused_attention   kernels that hold a whole attention, both matmuls and the softmax
    """
    found = re.findall(r"^\s*Name: (.+?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: ", listing, re.MULTILINE)
    if not listing:
        return None
    layers: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for _, kind, inputs in found:
        dtype = re.search(r"Datatype: (\w+)", inputs)
        if dtype:
            layers[kind][_DTYPES.get(dtype[1], dtype[1].lower())] += 1
    fused = sum(kind == "kgen" and name.startswith("_gemm_mha") for name, kind, _ in found)
    return {"layers": {kind: dict(counts) for kind, counts in layers.items()}, "fused_attention": fused}


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
