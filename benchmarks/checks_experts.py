"""GPU check of the expert head's price over VGGT's single head, at the level of the model: a first figure only."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe3d_deploy.benchmarks import torch_device
from moe3d_deploy.benchmarks.bench.price_forms import random_levels
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.benchmarks.timing import Effort, interleave
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.model.dpt import DptHead, Grid, activate_depth

VIEWS = (1, 8)
WIDTH, HEIGHT = 518, 392

_PREFIX = "depth_head."
_Pair = tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]  # single head, with experts


def expert_mix_memory(run: CheckRun) -> None:
    """VGGT's depth head against the one with 4 merged experts, at 1 and 8 views of 518x392."""
    device = torch_device.start(run)
    compare_heads(run, PRESETS["vggt-1b"], MoeConfig(), device, views=VIEWS, size=(HEIGHT, WIDTH))


@torch.inference_mode()
def compare_heads(
    run: CheckRun,
    config: ModelConfig,
    moe: MoeConfig,
    device: torch.device,
    *,
    views: tuple[int, ...],
    size: tuple[int, int],
    effort: Effort | None = None,
) -> None:
    """Record `cases`: per precision, number of views and part of the head, the time ratio and both peaks of memory.

    part   "head": patch tokens to depth and confidence; "last stage": full-resolution features to those, where the
           two heads differ
    ratio  time with experts over time without, run in turn on the same input, pair by pair
    """
    grid = Grid(*(pixels // config.patch_size for pixels in size))
    cases: list[dict[str, Any]] = []
    run.record(num_experts=moe.num_experts, width=size[1], height=size[0], cases=cases)
    for precision in ("fp32", "fp16"):
        run.step(f"generating {precision} weights")
        single, mixed = (_head(replace(config, moe=m), precision).to(device) for m in (None, moe))
        for count in views:
            for part, calls in _calls(single, mixed, random_levels(config, count, grid, device, seed=count), grid):
                run.step(f"{precision}, {count} views, {part}")
                found = _compare(run, f"{precision}, {count} views, {part}", calls, device, effort)
                cases.append({"precision": precision, "views": count, "part": part, **found})
                run.record(cases=cases)


def _calls(single: DptHead, mixed: DptHead, levels: list[Tensor], grid: Grid) -> Iterator[tuple[str, _Pair]]:
    """The two heads' calls by part; the features of the last stage go before the whole head comes."""

    def last_stages(features: Tensor) -> _Pair:
        return lambda: _single(single, features), lambda: _mixed(mixed, features)

    yield "last stage", last_stages(single.features(levels, grid))
    yield (
        "head",
        (lambda: _single(single, single.features(levels, grid)), lambda: _mixed(mixed, mixed.features(levels, grid))),
    )


def _compare(
    run: CheckRun,
    label: str,
    calls: _Pair,
    device: torch.device,
    effort: Effort | None,
) -> dict[str, Any]:
    peaks = []
    for call in calls:
        with torch_device.PeakMemory(device) as memory:
            outputs = call()
        if not torch_device.all_finite(outputs):
            run.fail(f"{label}: an output is not finite")
        peaks.append(memory.as_dict())
        del outputs
    first, second = (torch_device.timer(call, device) for call in calls)
    ratio = interleave(first, second, effort=effort)
    if not (ratio.first.stable and ratio.second.stable):
        run.note(f"{label}: the times had not settled when the warm-up ended")
    return {
        "ratio": {"median": ratio.median, "p10": ratio.p10, "p90": ratio.p90},
        "single": {**ratio.first._asdict(), **peaks[0]},
        "experts": {**ratio.second._asdict(), **peaks[1]},
    }


def _head(config: ModelConfig, precision: str) -> DptHead:
    """The depth head alone with seeded weights; with experts in the merged form."""
    from moe3d_deploy.checkpoint import seeded_source

    source, dtype_of = seeded_source("head", config), PrecisionPolicy(precision).dtype_of()
    with torch.device("meta"):
        head = DptHead(config.dpt_head, config.patch_size, 2, config.moe)
    tensors = {name: source.tensor(_PREFIX + name).to(dtype_of(_PREFIX + name)) for name in head.state_dict()}
    head.load_state_dict(tensors, assign=True)
    head.eval().requires_grad_(False)
    if config.moe is not None:
        head.merge_experts()
    return head


def _single(head: DptHead, features: Tensor) -> tuple[Tensor, ...]:
    return activate_depth(head.raw(features))


def _mixed(head: DptHead, features: Tensor) -> tuple[Tensor, ...]:
    mixture = head.mixture(features)
    return mixture.depth, mixture.confidence
