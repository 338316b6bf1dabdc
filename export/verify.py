"""Does the written file compute what PyTorch computes? Run both at shapes the tracer never saw, and compare.

The stages `reference`, `rounded` and `executed` each run in a process of their own (see moe3d_deploy.child), so that
the float32 model, the 16-bit model and the ONNX session are never in memory together.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.child import Emit
from moe3d_deploy.errors import ExportError
from moe3d_deploy.export.compare import Errors, Limits, errors, require_headroom, require_within
from moe3d_deploy.export.precision import PrecisionPolicy

Shape = tuple[int, int, int, int]

# (B, S, rows, columns) in patches. One patch; one view; several scenes; odd S; more views than the chunk of 8 that
# VGGT runs its heads in; for a patch of 14, 518x154 pixels, which MoE3D was trained at.
SHAPES_IN_PATCHES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (1, 1, 6, 5),
    (2, 2, 3, 6),
    (1, 5, 5, 3),
    (1, 9, 2, 3),
    (1, 2, 11, 37),
)

_MORE_EXACT = {"fp16": "fp16-fp32heads", "fp16-fp32heads": "fp32"}


def images_for(shape: Shape, patch_size: int) -> NDArray[np.float32]:
    """The verification's input of a shape: seeded noise in [0, 1] over a slope, (B, S, 3, H, W)."""
    batch, views, rows, columns = shape
    height, width = rows * patch_size, columns * patch_size
    noise = np.random.default_rng([batch, views, rows, columns]).random((batch, views, 3, height, width), np.float32)
    slope = np.linspace(0, 1, width, dtype=np.float32) * np.linspace(0, 1, height, dtype=np.float32)[:, None]
    return ((noise + slope) / 2).astype(np.float32)


def reference(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the float32 model as trained (plain experts, torch's own attention) on every shape."""
    model = _load(request, PrecisionPolicy("fp32"))
    _run(request, emit, model, "reference")
    return {}


def rounded(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the 16-bit model with real rounding and overflow; returns the share of the range per tensor."""
    import torch

    from moe3d_deploy.export.half import SixteenBitRun
    from moe3d_deploy.model.transformer import explicit_attention, set_attention

    model = _load(request, PrecisionPolicy(**request["policy"]))
    set_attention(model, explicit_attention)
    if request["merge"] and model.config.moe is not None:
        model.depth_head.merge_experts()
    with SixteenBitRun(model) as run:
        _run(request, emit, model, "rounded")
    top = torch.finfo(torch.float16).max
    return {"shares": {name: value / top for name, value in run.largest.items()}}


def executed(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the written file in ONNX Runtime on the CPU, on every shape."""
    from moe3d_deploy.runtime.onnx_backend import OnnxBackend

    backend = OnnxBackend(Path(request["model"]))
    for index, shape in enumerate(request["shapes"]):
        emit({"step": index})
        found = backend.run(images_for(tuple(shape), request["patch_size"]))
        _save(request, "executed", index, found)
    return {}


def check(
    folder: Path, shapes: Sequence[Shape], names: Sequence[str], kinds: Sequence[str], precision: str
) -> list[dict]:
    """Compare what the stages saved; one case per shape for the manifest. Raises ExportError outside the limits."""
    limits = Limits.of(precision)
    remedy = "A wrong graph or a numeric fault: please report it with the model"
    if precision != "fp32":
        remedy = (
            f"If --precision {_MORE_EXACT[precision]} passes, the model needs it; else the graph is wrong: report it"
        )
    cases = []
    for index, shape in enumerate(shapes):
        expected = _read(folder, "reference", index, names)
        found: dict[str, Errors] = {kind: errors(_read(folder, kind, index, names), expected) for kind in kinds}
        for kind, error in found.items():
            label = "ONNX Runtime" if kind == "executed" else "16-bit PyTorch"
            batch, views, rows, columns = shape
            require_within(f"{label} at B={batch} S={views}, {rows}x{columns} patches", error, limits, remedy)
        cases.append({"shape_in_patches": list(shape), "errors": found})
    return cases


def headroom_report(shares: dict[str, float], precision: str) -> dict[str, Any]:
    """For the manifest: every tensor's share of the 16-bit range. Raises ExportError when one is too near the end."""
    bound = Limits.of(precision).headroom
    if bound is None:
        raise ExportError(f"precision {precision} has no headroom limit; add it to limits.json")
    require_headroom(shares, bound)
    return {"limit": bound, "tensors": len(shares), "largest": {name: float(f"{x:.4g}") for name, x in shares.items()}}


def _load(request: dict[str, Any], policy: PrecisionPolicy) -> Any:
    from moe3d_deploy.export.source import SourceSpec

    return SourceSpec(**request["source"]).load(policy, request["outputs"])


def _run(request: dict[str, Any], emit: Emit, model: Callable[..., Any], kind: str) -> None:
    import torch

    for index, shape in enumerate(request["shapes"]):
        emit({"step": index})
        images = torch.from_numpy(images_for(tuple(shape), request["patch_size"]))
        with torch.no_grad():
            result = model(images, outputs=request["outputs"])
        _save(request, kind, index, {name: result[name].numpy() for name in request["names"]})


def _save(request: dict[str, Any], kind: str, index: int, arrays: dict[str, NDArray[Any]]) -> None:
    np.savez(Path(request["folder"]) / f"{kind}_{index}.npz", **arrays)  # type: ignore[arg-type]


def _read(folder: Path, kind: str, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    with np.load(folder / f"{kind}_{index}.npz") as arrays:
        return {name: arrays[name] for name in names}
