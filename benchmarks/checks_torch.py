"""GPU checks of the PyTorch model: golden files in float32, and full size in every form that people run."""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import moe3d_deploy
from moe3d_deploy.benchmarks import torch_device
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.benchmarks.timing import Effort, measure
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.export.compare import Limits, errors
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.verify import images_for
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.aggregator import PatchProjection
from moe3d_deploy.model.transformer import Attend, Block, explicit_attention, fused_attention, set_attention
from moe3d_deploy.seeded import seeded_tensor

# max|a - b| / max|b|. float32 in another order of operations gives up to 5e-6 here, the smallest known mistake 1e-4.
GOLDEN_LIMIT = 2e-5

PRESET = "moe3d-1b"
SHAPES = tuple((views, height, 518) for height in (392, 518) for views in (1, 2, 4, 8, 16, 32))  # views, height, width
COMPILED = tuple(shape for shape in SHAPES if shape[0] in (1, 8, 32))  # about a minute of compiling for each
MANY_VIEWS = tuple((views, 518, 518) for views in (47, 48, 49))  # 48 have 65,952 tokens: more than fp16's largest value
GOALS_MS = {(1, 518, 518): 8.0, (8, 518, 518): 60.0}  # of an H200 in 16 bits; its floors are 4.2 and 47
FEW_RUNS = Effort(min_runs=5)
ONE_RUN = Effort(min_runs=1, max_runs=1, warmup_budget_ms=0)

_REFERENCE, _AUTOCAST, _EAGER_FP16, _COMPILED_FP16 = "eager fp32", "autocast bf16", "eager fp16", "compiled fp16"
FORMS = (_REFERENCE, _AUTOCAST, _EAGER_FP16, _COMPILED_FP16)
_COMPARED = ("depth", "depth_conf", "extrinsics", "intrinsics")
_GOLDEN_OUTPUTS = {
    "depth": "depth",
    "depth_conf": "depth_conf",
    "extrinsics": "extrinsic",
    "intrinsics": "intrinsic",
    "world_points": "unprojected_points",
    "point_map": "world_points",
    "point_map_conf": "world_points_conf",
}

Forward = Callable[[Tensor], dict[str, Tensor]]
Sizes = tuple[int, int, int]  # views, height, width


def torch_golden(run: CheckRun) -> None:
    """The golden files' small model in float32 on the GPU, with torch's attention and with the export's."""
    folder = Path(moe3d_deploy.__file__).resolve().parent.parent / "tests" / "data"
    files = sorted(folder.glob("golden_tiny_*.npz"))
    if not files:
        run.skip("there are no golden files beside the package; run from a checkout")
    golden_errors(run, files, torch_device.start(run))


def golden_errors(run: CheckRun, files: list[Path], device: torch.device) -> None:
    """Record the error of every output of every file under both forms of attention; fail above GOLDEN_LIMIT."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    forms: dict[str, Attend] = {"fused": fused_attention, "explicit": explicit_attention}
    for path in files:
        with np.load(path) as arrays:
            golden = {name: arrays[name] for name in arrays}
        model = _golden_model(ModelConfig.from_dict(json.loads(str(golden["config"])))).to(device)
        for form, attend in forms.items():
            run.step(f"{path.stem} with {form} attention")
            set_attention(model, attend)
            worst = _golden_error(model, golden, device)
            found.setdefault(path.stem, {})[form] = worst
            run.record(limit=GOLDEN_LIMIT, errors=found)
            for name, error in worst.items():
                if not error <= GOLDEN_LIMIT:
                    run.fail(f"{path.stem}, {form} attention: {name} is off by {error:.2g}, limit {GOLDEN_LIMIT:g}")


def torch_full_size(run: CheckRun) -> None:
    """The full-size model with seeded weights at 1 to 32 views of 518x392 and 518x518, in every form."""
    judge_goals(run, _full_size(run, SHAPES, FORMS, FEW_RUNS), GOALS_MS)


def judge_goals(run: CheckRun, cases: list[dict[str, Any]], goals_ms: dict[Sizes, float]) -> None:
    """Record `goals`: per shape the fastest 16-bit form beside what was aimed at; missing one is a note."""
    found: list[dict[str, Any]] = []
    half = [case for case in cases if case["form"] != _REFERENCE and not case.get("out_of_memory")]
    for shape, goal in goals_ms.items():
        at = [case for case in half if (case["views"], case["height"], case["width"]) == shape]
        if not at:
            continue
        best = min(at, key=lambda case: case["median_ms"])
        took, reached = best["median_ms"], best["median_ms"] <= goal
        found.append({"shape": shape, "goal_ms": goal, "median_ms": took, "form": best["form"], "reached": reached})
        if not reached:
            run.note(f"{_label(best)}: {took:.1f} ms, the goal is {goal:g} ms")
    run.record(goals=found)


def torch_many_views(run: CheckRun) -> None:
    """The full-size model in fp16 where global attention sums over more keys than fp16 can count."""
    _full_size(run, MANY_VIEWS, (_REFERENCE, _EAGER_FP16), ONE_RUN)


def _full_size(run: CheckRun, shapes: Sequence[Sizes], forms: Sequence[str], effort: Effort) -> list[dict[str, Any]]:
    device = torch_device.start(run)
    run.step("measuring the matrix-product ceilings")
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    ceilings = {name: torch_device.matmul_ceiling(dtype, device) for name, dtype in dtypes.items()}
    run.record(ceilings=ceilings)
    return run_forms(
        run,
        replace(PRESETS[PRESET], point_head=False),
        PRESET,
        device,
        ceilings,
        shapes=shapes,
        forms=forms,
        compiled=COMPILED,
        compiler=lambda model: torch.compile(model, dynamic=False),
        effort=effort,
    )


def run_forms(
    run: CheckRun,
    config: ModelConfig,
    name: str,
    device: torch.device,
    ceilings: dict[str, dict[str, Any]],
    *,
    shapes: Sequence[Sizes],
    compiler: Callable[[nn.Module], Any],
    forms: Sequence[str] = FORMS,
    compiled: Sequence[Sizes] | None = None,
    effort: Effort | None = None,
) -> list[dict[str, Any]]:
    """Measure eager float32, the reference's bf16 autocast, eager fp16 and compiled fp16; each against the first.

    shapes     views, height and width of the images; what `compiler` makes runs at those of `compiled` alone, None: all
    forms      of FORMS, those to measure, the first among them

    Records and returns `cases`, one for each form and shape. Fails for values that are not finite, for fp16 outside
    the export's limits, and for a rate above the ceiling of its type, which can only be a mistake of the measurement.
    """
    cases: list[dict[str, Any]] = []
    references: dict[Sizes, dict[str, NDArray[Any]]] = {}
    run.step("counting FLOP")
    with torch.device("meta"):
        bare = MoE3D(config).eval().requires_grad_(False)
    flop = {(views, *size): torch_device.count_flop(bare, 1, views, 3, *size) for views, *size in shapes}
    run.record(model=name, cases=cases)
    for form, dtype, forward, weights_seconds in _forms(run, config, name, device, compiler, forms):
        for shape in shapes:
            if form == _COMPILED_FP16 and compiled is not None and shape not in compiled:
                continue
            views, height, width = shape
            case: dict[str, Any] = {
                "form": form,
                "views": views,
                "height": height,
                "width": width,
                "weights_seconds": weights_seconds,
                "gflop": flop[shape] / 1e9,
            }
            run.step(_label(case))
            try:
                outputs, measured = _measure(forward, _images(config, shape).to(device), device, effort)
            except torch.OutOfMemoryError:
                run.note(f"{_label(case)}: out of device memory")
                cases.append({**case, "out_of_memory": True})
                run.record(cases=cases)
                continue
            rate = torch_device.tflops(flop[shape], measured["median_ms"])
            case |= {**measured, "tflops": rate, "ceiling": dtype, "share_of_ceiling": rate / ceilings[dtype]["tflops"]}
            if form == _REFERENCE:
                references[shape] = outputs
            elif shape in references:
                case["errors"] = errors(outputs, references[shape])
            cases.append(case)
            run.record(cases=cases)
            _judge(run, case)
        del forward  # else it stays on the device beside the next one
    return cases


def autocast_trunk(model: MoE3D, dtype: torch.dtype, device_type: str) -> None:
    """Run the encoder and the aggregator as the public VGGT code does: under autocast, the heads outside it.

    In place. Only blocks and patch projection have autocast: the position embedding's resampling is a matrix product
    here and would become 16-bit, while the reference resamples in float32.
    """
    for module in model.aggregator.modules():
        if isinstance(module, (Block, PatchProjection)):
            module.forward = torch.autocast(device_type, dtype=dtype)(module.forward)  # type: ignore[method-assign]


def _forms(
    run: CheckRun,
    config: ModelConfig,
    name: str,
    device: torch.device,
    compiler: Callable[[nn.Module], Any],
    wanted: Sequence[str],
) -> Iterator[tuple[str, str, Forward, float]]:
    """(form, type whose ceiling counts, forward, seconds to get the weights), one model on the device at a time."""
    model, seconds = _load(run, config, name, device, PrecisionPolicy("fp32"))
    yield _REFERENCE, "fp32", model, seconds
    if _AUTOCAST in wanted:
        autocast_trunk(model, torch.bfloat16, device.type)
        yield _AUTOCAST, "bf16", model, seconds
    del model
    gc.collect()  # autocast's wrappers and the model hold each other
    model, seconds = _load(run, config, name, device, PrecisionPolicy("fp16"))
    yield _EAGER_FP16, "fp16", model, seconds
    if _COMPILED_FP16 in wanted:
        yield _COMPILED_FP16, "fp16", compiler(model), seconds


def _load(
    run: CheckRun, config: ModelConfig, name: str, device: torch.device, policy: PrecisionPolicy
) -> tuple[MoE3D, float]:
    from moe3d_deploy.checkpoint import load_model, seeded_source

    run.step(f"generating {policy.precision} weights")
    started = time.perf_counter()
    model = load_model(seeded_source(name, config), dtype_of=policy.dtype_of()).to(device)
    if config.moe is not None:
        model.depth_head.merge_experts()
    return model, round(time.perf_counter() - started, 2)


def _measure(
    forward: Forward, images: Tensor, device: torch.device, effort: Effort | None
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The compared outputs; times, memory and finiteness."""
    with torch.inference_mode(), torch_device.PeakMemory(device) as memory:
        started = time.perf_counter()
        outputs = forward(images)
        found = {name: outputs.pop(name).cpu() for name in _COMPARED}
        outputs.clear()
        first = round(time.perf_counter() - started, 2)  # with compiling, where that is done
        timing = measure(torch_device.timer(lambda: forward(images), device), effort=effort)
    finite = torch_device.all_finite(found.values())
    measured = {"first_call_seconds": first, **timing._asdict(), **memory.as_dict(), "finite": finite}
    return {name: tensor.numpy() for name, tensor in found.items()}, measured


def _judge(run: CheckRun, case: dict[str, Any]) -> None:
    label = _label(case)
    if not case["finite"]:
        run.fail(f"{label}: an output is not finite")
    if not case["stable"]:
        run.note(f"{label}: the times had not settled when the warm-up ended")
    if case["share_of_ceiling"] > 1:
        run.fail(f"{label}: {case['tflops']:.1f} TFLOP/s is above the measured ceiling, so one of the two is wrong")
    if case["form"].endswith("fp16"):
        limits = Limits.of("fp16").errors
        for name, found in case.get("errors", {}).items():
            for kind, bound in limits.get(name, limits["*"]).items():
                if not found[kind] <= bound:
                    run.fail(f"{label}: {name} is off by {found[kind]:.2g} ({kind} relative), limit {bound:g}")


def _label(case: dict[str, Any]) -> str:
    views = case["views"]
    return f"{case['form']}, {views} view{'s' * (views > 1)} of {case['width']}x{case['height']}"


def _images(config: ModelConfig, shape: Sizes) -> Tensor:
    views, rows, columns = shape[0], shape[1] // config.patch_size, shape[2] // config.patch_size
    return torch.from_numpy(images_for((1, views, rows, columns), config.patch_size))


def _golden_model(config: ModelConfig) -> MoE3D:
    """The model with the golden files' weights: the generator's, without what a seeded checkpoint changes."""
    with torch.device("meta"):
        model = MoE3D(config)
    tensors = {name: torch.from_numpy(seeded_tensor(name, t.shape)) for name, t in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _golden_error(model: MoE3D, golden: dict[str, NDArray[Any]], device: torch.device) -> dict[str, float]:
    """Largest relative error of each output."""
    images = torch.from_numpy(golden["images"]).to(device)
    with torch.inference_mode():
        outputs = model(images, outputs=("world_points", "point_map", "point_map_conf"))
    found = {name: outputs[name].cpu().numpy() for name in (*_GOLDEN_OUTPUTS, "pose_enc")}
    expected = {name: golden[key] for name, key in _GOLDEN_OUTPUTS.items()}
    expected["depth"] = expected["depth"][..., 0]
    expected["pose_enc"] = golden["pose_enc_iters"][-1]
    return {name: error["max"] for name, error in errors(found, expected).items()}
