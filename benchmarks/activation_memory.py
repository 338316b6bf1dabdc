"""The predicted activation memory (`moe3d_deploy.memory`) against PyTorch's allocator and TensorRT-RTX's report.

    python -m moe3d_deploy.benchmarks.activation_memory --out benchmarks/results/memory_cpu.json

PyTorch runs; an engine is only built, which needs no GPU and reserves nothing. Values of weights do not matter here.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.files import atomic_write
from moe3d_deploy.memory import activation_bytes

_1B = PRESETS["moe3d-1b"]
_FEW = dataclasses.replace(
    _1B,
    vit=dataclasses.replace(_1B.vit, depth=2),
    aggregator=dataclasses.replace(_1B.aggregator, depth=4),
    camera_head=dataclasses.replace(_1B.camera_head, trunk_depth=1),
    dpt_head=dataclasses.replace(_1B.dpt_head, intermediate_layer_idx=(0, 1, 2, 3)),
    point_head=False,
)
MODELS: dict[str, ModelConfig] = {
    "moe3d-tiny": PRESETS["moe3d-tiny"],
    "moe3d-1b": _1B,
    "moe3d-1b with 4 layers": _FEW,
    "vggt-1b with 4 layers": dataclasses.replace(_FEW, moe=None),
}

# Model, form, precision and shapes (B, S, H, W). No shape here was looked at while the prediction was written, but for
# one, 1x8x392x518, which every table of this project has.
CASES: tuple[tuple[str, str, str, tuple[tuple[int, int, int, int], ...]], ...] = (
    ("moe3d-tiny", "eager", "fp32", ((1, 12, 252, 252), (2, 5, 350, 252), (1, 3, 518, 518))),
    ("moe3d-1b with 4 layers", "eager", "fp32", ((1, 2, 392, 518), (1, 3, 280, 518))),
    ("moe3d-1b", "eager", "fp32", ((1, 2, 294, 518),)),
    ("moe3d-tiny", "fused", "fp16", ((1, 10, 350, 252), (2, 9, 252, 378))),
    ("moe3d-tiny", "explicit", "fp32", ((1, 6, 175, 126), (2, 7, 126, 126))),
    ("moe3d-1b with 4 layers", "fused", "fp16", ((1, 2, 518, 518), (1, 12, 294, 518), (1, 32, 392, 518))),
    ("vggt-1b with 4 layers", "fused", "fp16", ((1, 3, 518, 392), (1, 24, 280, 518))),
    ("moe3d-1b with 4 layers", "explicit", "fp32", ((1, 3, 392, 518), (1, 5, 280, 392))),
    ("moe3d-1b", "fused", "fp16", ((1, 8, 392, 518), (1, 3, 518, 518))),
)


@click.command()
@click.option("--out", required=True, type=OutputFile(), help="JSON file to write.")
@click.option("--workdir", type=click.Path(path_type=Path), help="Where models go for a while (3 GB).")
def main(out: Path, workdir: Path | None) -> None:
    """Measure every case, each in a process of its own, and write what was predicted beside it."""
    rows: list[dict[str, Any]] = []
    for model, form, precision, shapes in CASES:
        with tempfile.TemporaryDirectory(prefix="moe3d-memory-", dir=workdir) as folder:
            for shape in shapes:
                click.echo(f"{model} {form} {precision} {'x'.join(map(str, shape))} ...", err=True)
                request = {"model": model, "precision": precision, "shape": shape, "folder": folder}
                stage = "run_pytorch" if form == "eager" else "build"
                measured = run_in_child(f"{__spec__.name}:{stage}", request).value["bytes"]
                predicted = activation_bytes(MODELS[model], shape, form=form, precision=precision)
                row = {"model": model, "form": form, "precision": precision, "shape": list(shape)}
                rows.append({**row, "measured_bytes": measured, "predicted_bytes": predicted})
    report = {"format_version": 1, "environment": environment(), "rows": rows}
    atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode("utf-8"))


def run_pytorch(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: the peak of what PyTorch's allocator has given out during one run, weights and images not counted."""
    import torch

    from moe3d_deploy.model import MoE3D

    batch, views, height, width = request["shape"]
    with torch.device("meta"):
        model = MoE3D(MODELS[request["model"]])
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    images = torch.rand(batch, views, 3, height, width)
    with torch.no_grad():
        return {"bytes": allocated(lambda: model(images))}


def allocated(run: Callable[[], object]) -> int:
    """Peak bytes that PyTorch's CPU allocator gives out during `run`, beside what it holds before."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def build(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: the `Total Activation Memory` of an engine for everything up to the shape; the model is exported once."""
    from moe3d_deploy.checkpoint import load_model, seeded_source
    from moe3d_deploy.engines.shapes import ShapeProfile
    from moe3d_deploy.export.graph import export_onnx
    from moe3d_deploy.export.precision import PrecisionPolicy
    from moe3d_deploy.trt import build_engine

    folder = Path(request["folder"])
    path = folder / "model.onnx"
    if not path.exists():
        source = seeded_source("measured", MODELS[request["model"]], 0)
        policy = PrecisionPolicy(request["precision"])
        export_onnx(load_model(source, dtype_of=policy.dtype_of(), point_head=False), folder)
    patch = MODELS[request["model"]].patch_size
    shape = tuple(request["shape"])
    profile = ShapeProfile((1, 1, patch, patch), shape, shape, patch)
    built = build_engine(path, folder / "measured.plan", profile, builder="tensorrt-rtx", compute_capabilities=[(8, 9)])
    return {"bytes": built.activation_memory_bytes[0]}


def table(report: dict[str, Any]) -> str:
    """Markdown: what was measured and predicted for every case."""
    lines = [
        "| model | run by | precision | shape (B x S x H x W) | measured | predicted | difference |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for row in report["rows"]:
        by = "PyTorch" if row["form"] == "eager" else f"TensorRT-RTX, attention {row['form']}"
        measured, predicted = row["measured_bytes"], row["predicted_bytes"]
        lines.append(
            f"| {row['model']} | {by} | {row['precision']} | {' x '.join(map(str, row['shape']))} "
            f"| {measured / 1e6:.0f} MB | {predicted / 1e6:.0f} MB | {100 * (predicted / measured - 1):+.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(finish("activation_memory", lambda: main))
