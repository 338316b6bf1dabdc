"""GPU checks of training, in all that a run does on a device, and of the scenes when they are rendered there."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe3d_deploy.benchmarks import torch_device
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.errors import Moe3dError, require
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scenes import SceneOptions, render_scene

# |a - b| / |b| of losses and gradient norms. float32 in another order of operations gives up to 1e-4 after a backward
# pass through the whole model; bfloat16 keeps 8 bits, of which the sums of a GPU, in any order, may turn the last.
FLOAT32_LIMIT = 1e-3
BFLOAT16_LIMIT = 2e-2

# Of rays in float32: relative error of a depth, and the share of pixels that hit the neighbour of what they graze.
DEPTH_LIMIT = 1e-4
OTHER_SURFACE_LIMIT = 1e-3

_COMPARED = ("loss", "depth", "camera", "gradient_norm")
_SCENES = 8
_NEARLY_NOTHING = 1e-6  # minutes: a run then stops after its first step


def training(run: CheckRun) -> None:
    """moe3d-tiny from scratch: a few steps in every form that touches the device in its own way."""
    require("safetensors")
    device = torch_device.start(run)
    options = TrainOptions(
        "moe3d-tiny", train="all", from_scratch=True, steps=4, batch=8, views=(1, 4), scenes=_SCENES, workers=2,
        depth_loss="log", log_every=1, validate_every=2, validation_scenes=1, compile=True, device=str(device),
    )  # fmt: skip
    train_in_every_form(run, options)


def train_in_every_form(run: CheckRun, options: TrainOptions) -> None:
    """Runs from scratch of `options`, of at least two steps and on its device; the CPU works as well.

    One float32 step against the CPU; Muon with bfloat16 and compiled blocks in one go and in two; a head on features
    that were kept for a part of a batch. Records losses and speed, fails where two of a pair differ.
    """
    from moe3d_deploy.training.compiled import require_tools

    folder = run.work / "training"
    base = dataclasses.replace(options, scene_cache=str(folder / "scenes"))
    plain = dataclasses.replace(base, steps=1, warmup=0, compile=False, validate_every=0)
    full = dataclasses.replace(base, optimizer="muon", amp="bf16-heads")
    if options.compile:
        try:
            require_tools(torch.device(options.device))
        except Moe3dError as error:
            run.note(f"nothing was compiled: {error}")
            full = dataclasses.replace(full, compile=False)

    run.step("one step in float32, on the CPU and on the device")
    reference = _losses(dataclasses.replace(plain, device="cpu"), folder / "cpu")
    _compare(run, "float32, one step", _losses(plain, folder / "device"), reference, FLOAT32_LIMIT)

    run.step("Muon, bfloat16 and compiled blocks, in one go")
    whole = _losses(full, folder / "whole")
    run.record(samples_per_second=whole[-1]["samples_per_second"], data_wait_share=whole[-1]["data_wait_share"])
    run.step("the same, stopped after a step and resumed")
    _losses(dataclasses.replace(full, minutes=_NEARLY_NOTHING), folder / "resumed")
    _compare(run, "resumed", _losses(full, folder / "resumed"), whole, BFLOAT16_LIMIT)

    run.step("the head on kept features")
    head = dataclasses.replace(
        base, source=str(folder / "whole" / "checkpoint"), train="head", from_scratch=False, compile=False,
        feature_cache="memory", optimizer="adamw", amp="bf16",
    )  # fmt: skip
    kept = _losses(head, folder / "memory")
    on_disk = dataclasses.replace(head, feature_cache="disk")
    _losses(dataclasses.replace(on_disk, minutes=_NEARLY_NOTHING), folder / "disk")
    _drop_a_step(folder / "disk")
    _compare(run, "features on disk", _losses(on_disk, folder / "disk"), kept, FLOAT32_LIMIT)


def scenes(run: CheckRun) -> None:
    """Scenes rendered on the device against those of the CPU, which the tests check."""
    device = torch_device.start(run)
    compare_scenes(run, device, SceneOptions(), range(8))


def compare_scenes(run: CheckRun, device: torch.device, options: SceneOptions, seeds: range) -> None:
    """Record the errors of depth and the pixels that differ, and the speed on the device, whose first scene is left out
    of it; fail beyond the limits."""
    worst = {"depth": 0.0, "other_surface": 0.0, "other_colour": 0.0}
    seconds = 0.0
    for seed in seeds:
        run.step(f"seed {seed}")
        expected = render_scene(seed, options, device="cpu")
        started = time.perf_counter()
        found = render_scene(seed, options, device=device)
        images = found.images.cpu()  # waits for the device
        seconds += time.perf_counter() - started if seed != seeds[0] else 0
        surfaces = found.surfaces.cpu() == expected.surfaces
        hit = surfaces & (expected.depth > 0)
        error = ((found.depth.cpu() - expected.depth).abs() / expected.depth)[hit]
        # Colours change by more than rounding only where a shadow or a texture has its own edge.
        colours = ((images.int() - expected.images.int()).abs() > 1).any(1)
        for name, value in (
            ("depth", float(error.max())), ("other_surface", _share(~surfaces)), ("other_colour", _share(colours)),
        ):  # fmt: skip
            worst[name] = max(worst[name], value)
        run.record(worst=worst)
    rate = (len(seeds) - 1) * options.views / seconds if seconds else None
    run.record(views_per_second=rate, limits={"depth": DEPTH_LIMIT, "other_surface": OTHER_SURFACE_LIMIT})
    if not worst["depth"] <= DEPTH_LIMIT:
        run.fail(f"depth is off by {worst['depth']:.2g}, limit {DEPTH_LIMIT:g}")
    if not worst["other_surface"] <= OTHER_SURFACE_LIMIT:
        run.fail(f"{worst['other_surface']:.2g} of a scene's pixels hit other surfaces, limit {OTHER_SURFACE_LIMIT:g}")


def _losses(options: TrainOptions, folder: Path) -> list[dict[str, Any]]:
    """Train into `folder`; the lines of its log, one per step."""
    from moe3d_deploy.training.logs import read_log
    from moe3d_deploy.training.loop import train

    train(options, folder)
    return read_log(folder / "train.jsonl", "step")


def _compare(
    run: CheckRun, what: str, found: list[dict[str, Any]], expected: list[dict[str, Any]], limit: float
) -> None:
    pairs = [
        (line[name], other[name])
        for line, other in zip(found, expected, strict=True)
        for name in _COMPARED
        if name in other
    ]
    off = max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)
    run.record(**{what: {"losses": [line["loss"] for line in found], "off": off, "limit": limit}})
    if not off <= limit:
        run.fail(f"{what}: a loss or a gradient's norm is off by {off:.2g}, limit {limit:g}")


def _drop_a_step(folder: Path) -> None:
    """Remove the features of one sample of the first step, and let a run that goes on need them again."""
    files = sorted((folder / "features").rglob("*.safetensors"))
    files[0].unlink()


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())
