"""Does the written file compute what PyTorch computes? Run both at shapes the tracer never saw, and compare.

The stages `reference`, `rounded` and `executed` each run in a process of their own (see moe3d_deploy.child), so that
the float32 model, the 16-bit model and the ONNX session are never in memory together.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import Emit
from moe3d_deploy.errors import ExportError
from moe3d_deploy.export.compare import Errors, Limits, errors, require_headroom, require_within
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.runtime.pixels import to_floats

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

MORE_EXACT = {
    "int8": "fp32",
    "fp16": "fp16-fp32heads or fp32",
    "fp16-fp32heads": "fp32",
    "bf16-fp16heads": "bf16 or fp16",
    "bf16": "fp16 or fp32",
}
_MORE_RANGE = {
    "fp16": "fp16-fp32heads if it belongs to a head, else --precision bf16",
    "fp16-fp32heads": "bf16",
    "bf16-fp16heads": "bf16",
    "bf16": "fp32",
}

LABELS = {
    "executed": "ONNX Runtime",
    "twin": "ONNX Runtime on the float32 twin of the file",
    "rounded": "16-bit PyTorch",
}
_OF_TWIN = "reference_of_twin"  # what the twin is compared with


def images_for(shape: Shape, patch_size: int) -> NDArray[np.float32]:
    """The verification's input of a shape: seeded noise in [0, 1] over a slope, (B, S, 3, H, W)."""
    batch, views, rows, columns = shape
    height, width = rows * patch_size, columns * patch_size
    noise = np.random.default_rng([batch, views, rows, columns]).random((batch, views, 3, height, width), np.float32)
    slope = np.linspace(0, 1, width, dtype=np.float32) * np.linspace(0, 1, height, dtype=np.float32)[:, None]
    return ((noise + slope) / 2).astype(np.float32)


def pixels_for(shape: Shape, patch_size: int) -> NDArray[np.uint8]:
    """`images_for` in 8 bits, (B, S, H, W, 3)."""
    levels = np.rint(images_for(shape, patch_size) * np.float32(255))
    return np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8), 2, -1))


def reference(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the float32 model as trained (plain experts, torch's own attention) on every shape.

    For a file that has a twin, once more with the weights rounded to the file's.
    """
    policy = PrecisionPolicy(**request["policy"])
    model = _load(request, PrecisionPolicy("fp32"))
    _run(request, emit, model, "reference")
    if policy.has_twin:
        for name, parameter in model.named_parameters():
            parameter.data = _as_written(parameter.data, policy.type_of(name))
        _run(request, lambda event: None, model, _OF_TWIN)
    return {}


def _as_written(parameter: Any, kind: str) -> Any:
    """A parameter with the rounding of its type in the file, in float32."""
    import torch

    from moe3d_deploy.export.eight_bit import Columns

    if kind != "int8":
        return parameter.to(getattr(torch, kind)).to(parameter.dtype)
    return torch.from_numpy(Columns.of(parameter.numpy().T).rounded().T)


def rounded(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the 16-bit model with real rounding and overflow; returns the share of the range per tensor."""
    from moe3d_deploy.export.half import SixteenBitRun

    model = deployed_model(request)
    with SixteenBitRun(model) as run:
        _run(request, emit, model, "rounded")
    return {"shares": run.shares}


def deployed_model(request: dict[str, Any]) -> Any:
    """The model in the types of the file and in its form: explicit attention, experts merged where they are there."""
    from moe3d_deploy.model.transformer import explicit_attention, set_attention

    model = _load(request, PrecisionPolicy(**request["policy"]))
    set_attention(model, explicit_attention)
    if request["merge"] and model.config.moe is not None:
        model.depth_head.merge_experts()
    return model


def executed(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the written file, or the parts together, in ONNX Runtime on the CPU, on every shape."""
    _execute(request, emit, open_model(request), "executed")
    return {}


def twin(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the float32 twin of a file that ONNX Runtime rounds in every run or cannot run, on every shape."""
    _execute(request, emit, open_twin(request), "twin")
    return {}


def model_request(bundle: Bundle) -> dict[str, Any]:
    """What a request says of a written bundle's model: `model` and `names`, as `open_model` takes them."""
    parts = {role: str(path) for role, path in bundle.part_paths.items()}
    return {"model": parts or str(bundle.model_path), "names": [output.name for output in bundle.manifest.outputs]}


def open_model(request: dict[str, Any]) -> Any:
    """The backend of `model` in a request: a file, or the files of a split model's parts by their roles."""
    from moe3d_deploy.runtime.onnx_backend import OnnxBackend
    from moe3d_deploy.runtime.split_backend import SplitBackend

    model = request["model"]
    if isinstance(model, str):
        return OnnxBackend(Path(model))
    return SplitBackend({role: Path(file) for role, file in model.items()}, request["names"])


def open_twin(request: dict[str, Any]) -> Any:
    """As `open_model`, of the float32 twins, which are written into the request's `folder`."""
    from moe3d_deploy.export.twin import float32_twin

    model, folder = request["model"], Path(request["folder"])
    if isinstance(model, str):
        return open_model({**request, "model": str(float32_twin(Path(model), folder))})
    twins = {role: str(float32_twin(Path(file), folder)) for role, file in model.items()}
    return open_model({**request, "model": twins})


def check(
    folder: Path, shapes: Sequence[Shape], names: Sequence[str], kinds: Sequence[str], precision: str
) -> list[dict]:
    """Compare what the stages saved; one case per shape for the manifest. Raises ExportError outside the limits."""
    remedy = "A wrong graph or a numeric fault: please report it with the model"
    more_exact = (
        f"If --precision {MORE_EXACT[precision]} passes, the model needs it; else the graph is wrong: report it"
        if precision != "fp32"
        else remedy
    )
    cases = []
    for index, shape in enumerate(shapes):
        found: dict[str, Errors] = {}
        for kind in kinds:
            expected = _read(folder, _OF_TWIN if kind == "twin" else "reference", index, names)
            found[kind] = errors(_read(folder, kind, index, names), expected)
            batch, views, rows, columns = shape
            label = f"{LABELS[kind]} at B={batch} S={views}, {rows}x{columns} patches"
            if kind == "twin":  # nothing in it is rounded to 16 bits
                require_within(label, found[kind], Limits.of("fp32"), remedy)
            else:
                require_within(label, found[kind], Limits.of(precision), more_exact)
        cases.append({"shape_in_patches": list(shape), "errors": found})
    return cases


def limits_report(precision: str, kinds: Sequence[str]) -> dict[str, Any]:
    """For the manifest: the limits of `check`, those of the twin apart."""
    limits: dict[str, Any] = dict(Limits.of(precision).errors)
    return {**limits, "twin": Limits.of("fp32").errors} if "twin" in kinds else limits


def headroom_report(shares: dict[str, float], precision: str) -> dict[str, Any]:
    """For the manifest: every tensor's share of its 16-bit range. Raises ExportError when one is too near the end."""
    bound = Limits.of(precision).headroom
    if bound is None:
        raise ExportError(f"precision {precision} has no headroom limit; add it to limits.json")
    require_headroom(shares, bound, f"Try --precision {_MORE_RANGE[precision]}")
    return {"limit": bound, "tensors": len(shares), "largest": {name: float(f"{x:.4g}") for name, x in shares.items()}}


def _load(request: dict[str, Any], policy: PrecisionPolicy) -> Any:
    from moe3d_deploy.export.source import SourceSpec

    return SourceSpec(**request["source"]).load(policy, request["outputs"])


def _run(request: dict[str, Any], emit: Emit, model: Callable[..., Any], kind: str) -> None:
    import torch

    for index, shape in enumerate(request["shapes"]):
        emit({"step": index})
        images = _input(request, shape)
        floats = to_floats(images) if images.dtype == np.uint8 else images
        with torch.no_grad():
            result = model(torch.from_numpy(floats), outputs=request["outputs"])
        _save(request, kind, index, {name: result[name].numpy() for name in request["names"]})


def _execute(request: dict[str, Any], emit: Emit, backend: Any, kind: str) -> None:
    for index, shape in enumerate(request["shapes"]):
        emit({"step": index})
        _save(request, kind, index, backend.run(_input(request, shape)))


def _input(request: dict[str, Any], shape: Sequence[int]) -> NDArray[Any]:
    batch, views, rows, columns = shape
    make = pixels_for if request["input"] == "uint8" else images_for
    return make((batch, views, rows, columns), request["patch_size"])


def _save(request: dict[str, Any], kind: str, index: int, arrays: dict[str, NDArray[Any]]) -> None:
    np.savez(Path(request["folder"]) / f"{kind}_{index}.npz", **arrays)  # type: ignore[arg-type]


def _read(folder: Path, kind: str, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    with np.load(folder / f"{kind}_{index}.npz") as arrays:
        return {name: arrays[name] for name in names}
