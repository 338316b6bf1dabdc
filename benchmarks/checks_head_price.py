"""GPU check of what the experts add to the model: each form of the last stage against VGGT's, in time and in FLOP."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe3d_deploy.benchmarks import torch_device
from moe3d_deploy.benchmarks.bench import price_forms
from moe3d_deploy.benchmarks.bench.price_agreement import LIMITS, disagreements
from moe3d_deploy.benchmarks.bench.price_figures import GOALS
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.benchmarks.checks_kernels import kernel_library
from moe3d_deploy.benchmarks.timing import Effort, Ratio, interleave, measure
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.dpt import DptHead, Grid
from moe3d_deploy.model.experts import MergedExperts, expert_mix
from moe3d_deploy.native.torch_op import KernelExperts

PRESET = "moe3d-1b"
PRECISION = "fp16"
VIEWS = (1, 8)
WIDTH, HEIGHT = 518, 392
PRICE_GOAL = GOALS["cuda"]  # share of time over share of FLOP
TAIL_GOAL = 0.005  # of the model's time, by all that comes after the 3x3 convolutions


def expert_head_price(run: CheckRun) -> None:
    """moe3d-1b at 1 and 8 views of 518x392: plain branches, merged, merged with the kernel, against VGGT's head."""
    device = torch_device.start(run)
    path = kernel_library(run)
    config = replace(PRESETS[PRESET], point_head=False)
    measure_price(run, config, PRESET, path, device, views=VIEWS, size=(HEIGHT, WIDTH), precision=PRECISION)


@torch.inference_mode()
def measure_price(
    run: CheckRun,
    config: ModelConfig,
    name: str,
    path: Path,
    device: torch.device,
    *,
    views: tuple[int, ...],
    size: tuple[int, int],
    precision: str,
    effort: Effort | None = None,
) -> None:
    """Record `cases`: per number of views and form what the head takes beyond VGGT's, as shares of VGGT's whole model.

    time_share   added milliseconds over the whole model's with VGGT's head
    flop_share   added FLOP over that model's, as torch counts them
    price        time_share / flop_share; goal PRICE_GOAL for the kernel
    tail_share   time of ReLU and mix, what comes after the 3x3 convolutions, over the model's; goal TAIL_GOAL

    The model's own time is taken with the kernel; the one with VGGT's head follows from it. Missing a goal is a note.
    """
    run.step("counting FLOP")
    flop = {count: _flop(config, count, size) for count in views}
    run.step(f"generating {precision} weights")
    model = _load(config, name, precision).to(device)
    head = model.depth_head
    stages, tails = price_forms.last_stages(head, head.experts[0], path), _tails(head, path)
    grid = Grid(*(pixels // config.patch_size for pixels in size))
    whole: dict[int, dict[str, Any]] = {count: {} for count in views}
    for count in views:
        levels = price_forms.random_levels(config, count, grid, device, seed=count)
        features = head.features(levels, grid)
        _compare_forms(run, count, {form: stage(features) for form, stage in stages.items() if form != "single"})
        for form, stage in stages.items():
            if form == "single":
                continue
            run.step(f"{count} views, head, {form}")
            timers = (
                torch_device.timer(partial(price_forms.whole_head, head, levels, grid, each), device)
                for each in (stages["single"], stage)
            )
            whole[count][form] = interleave(*timers, effort=effort)
        for form, (convolution, tail) in tails.items():
            run.step(f"{count} views, after the convolution, {form}")
            timing = measure(torch_device.timer(partial(tail, convolution(features)), device), effort=effort)
            whole[count][f"{form} tail"] = timing
    head.merge_experts()
    head.merged = KernelExperts(head.merged, path)  # type: ignore[arg-type, assignment]
    cases: list[dict[str, Any]] = []
    run.record(goals={"price": PRICE_GOAL, "tail_share": TAIL_GOAL}, precision=precision, cases=cases)
    for count in views:
        run.step(f"{count} views, the whole model")
        images = torch.rand((1, count, 3, *size), generator=torch.Generator().manual_seed(count)).to(device)
        timing = measure(torch_device.timer(partial(model, images), device), effort=effort)
        cases += _cases(count, timing.median_ms, whole[count], flop[count])
        run.record(cases=cases)
    _judge(run, cases)


def _tails(
    head: DptHead, path: Path
) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], price_forms.Maps]]]:
    """{form: (features -> convolution's output, that -> maps)} of an unmerged head."""
    if head.moe is None:
        raise ValueError("a head without experts has nothing to compare")
    temperature = head.moe.temperature
    merged = MergedExperts(head.experts, head.gate, head.moe)
    kernel = KernelExperts(merged, path)
    operands = (merged.expert_weight, merged.expert_bias, merged.gate_weight, merged.gate_bias)
    return {
        "merged": (merged.conv, lambda hidden: expert_mix(hidden.relu(), *operands, temperature)[:2]),
        "kernel": (kernel.conv, lambda hidden: kernel.mix(hidden.relu_())[:2]),
    }


def _compare_forms(run: CheckRun, views: int, maps: dict[str, price_forms.Maps]) -> None:
    """Fail where a form's maps are not finite or not those of the plain one."""
    arrays = {form: [tensor.cpu().numpy() for tensor in found] for form, found in maps.items()}
    for form, fault in disagreements(arrays, LIMITS["fp16"]):
        run.fail(f"{views} views, {form}: {fault}")


def _cases(views: int, model_ms: float, measured: dict[str, Any], flop: tuple[int, int]) -> list[dict[str, Any]]:
    """One entry per form. `model_ms` is the whole model's with the kernel; flop: with VGGT's head, with experts."""
    single_flop, experts_flop = flop
    of_kernel: Ratio = measured["kernel"]
    single_ms = model_ms - (of_kernel.second.median_ms - of_kernel.first.median_ms)
    flop_share = (experts_flop - single_flop) / single_flop
    entries = []
    for form in ("plain", "merged", "kernel"):
        ratio: Ratio = measured[form]
        added = ratio.second.median_ms - ratio.first.median_ms
        entry = {
            "views": views,
            "form": form,
            "head_ms": ratio.second.median_ms,
            "single_head_ms": ratio.first.median_ms,
            "head_ratio": {"median": ratio.median, "p10": ratio.p10, "p90": ratio.p90},
            "added_ms": added,
            "single_model_ms": single_ms,
            "time_share": added / single_ms,
            "flop_share": flop_share,
            "price": added / single_ms / flop_share,
            "stable": ratio.first.stable and ratio.second.stable,
        }
        if tail := measured.get(f"{form} tail"):
            entry |= {"tail_ms": tail.median_ms, "tail_share": tail.median_ms / (single_ms + added)}
        entries.append(entry)
    return entries


def _judge(run: CheckRun, cases: list[dict[str, Any]]) -> None:
    """Record `goals_reached` for the kernel, and say in a note what was missed."""
    of_kernel = [case for case in cases if case["form"] == "kernel"]
    for case in cases:
        if not case["stable"]:
            run.note(f"{case['views']} views, {case['form']}: the times had not settled when the warm-up ended")
    reached = {}
    for name, goal, text in (("price", PRICE_GOAL, "{:.2f}"), ("tail_share", TAIL_GOAL, "{:.2%}")):
        worst = max(of_kernel, key=lambda case: case[name])
        reached[name] = worst[name] <= goal
        if not reached[name]:
            found, wanted = text.format(worst[name]), text.format(goal)
            run.note(f"{name} with the kernel is {found} at {worst['views']} views, goal {wanted}")
    run.record(goals_reached=reached)


def _flop(config: ModelConfig, views: int, size: tuple[int, int]) -> tuple[int, int]:
    """FLOP of the model with VGGT's head and with experts."""
    found = []
    for moe in (None, config.moe):
        with torch.device("meta"):
            model = MoE3D(replace(config, moe=moe)).eval().requires_grad_(False)
        found.append(torch_device.count_flop(model, 1, views, 3, *size))
    return found[0], found[1]


def _load(config: ModelConfig, name: str, precision: str) -> MoE3D:
    from moe3d_deploy.checkpoint import load_model, seeded_source

    return load_model(seeded_source(name, config), dtype_of=PrecisionPolicy(precision).dtype_of())
