"""GPU checks of the expert-mix kernel itself: values against float64, bandwidth against a copy, memory accesses."""

import functools
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe3d_deploy.benchmarks import torch_device
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.benchmarks.kernel_cases import (
    LAYOUTS,
    TYPES,
    Case,
    cases,
    hidden_for,
    operands_for,
    reference,
    worst_error,
)
from moe3d_deploy.benchmarks.timing import Effort, interleave
from moe3d_deploy.native.build import build, find_nvcc
from moe3d_deploy.native.loading import FILE_NAME, VARIABLE, find, load
from moe3d_deploy.native.torch_op import Operands, arguments, empty_outputs, run_expert_mix

TEMPERATURE = 0.7
BANDWIDTH_GOAL = 0.85  # of a copy's
SIDE = 518
VIEWS = (1, 2, 4, 8, 16)

_EXTREME = ([0.0, 3e38, -3e38], [-3e38, -1e38, -2e38], [1000.0, 2000.0, 0.0], [-1e4, 0.0, -1e4])
# Buffers of one timing are so large together that none of them is still in a cache when its turn comes again.
_ROTATED_BYTES = 2**30
_CALLS = 8  # of one timing, at least, so that starting the first one does not count
_BRIEF = Effort(budget_ms=1_000.0, warmup_budget_ms=2_000.0)
# A kernel that mostly reads may be faster than a copy that writes half of its bytes, but not by as much as this.
_IMPOSSIBLE_SHARE = 1.5

_SANITIZER = "compute-sanitizer"
_SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_SANITIZER_FOUND = 86  # its exit code where it finds something; any number that nothing else uses


def expert_mix_kernel(run: CheckRun) -> None:
    """Values of every kernel on fresh inputs, NaN and extreme logits."""
    device = torch_device.start(run)
    path = kernel_library(run)
    compare_values(run, path, device, cases(), seed=secrets.randbits(31))
    compare_edges(run, path, device)


def expert_mix_bandwidth(run: CheckRun) -> None:
    """The kernel's traffic as a share of a copy's at 1 to 16 views of 518x518."""
    device = torch_device.start(run)
    path = kernel_library(run)
    measure_bandwidth(run, path, device, views=VIEWS, side=SIDE)


def expert_mix_sanitizer(run: CheckRun) -> None:
    """The kernel under each tool of compute-sanitizer."""
    path = kernel_library(run)
    sanitize(run, path, sanitizer())


def kernel_library(run: CheckRun) -> Path:
    """The library to check: the one that MOE3D_NATIVE names, else one built from this package's sources, else one that
    is installed. Skips the check where there is none and no nvcc."""
    found, built = find(), run.work / FILE_NAME
    if found is not None and found.named_by:
        path, origin = found.path, VARIABLE
    elif built.is_file() or find_nvcc():
        path, origin = built, "built from these sources"
        if not built.is_file():
            run.step("building the kernel's library")
            build(run.work)
    elif found is not None:
        path, origin = found.path, "installed"
    else:
        run.skip(
            f"there is no nvcc to build the kernel's library with; name one that was built elsewhere in {VARIABLE}"
        )
    path = Path(os.path.abspath(path))
    run.record(library={"origin": origin, "sha256": load(path).digest()})
    return path


@torch.inference_mode()
def compare_values(run: CheckRun, path: Path, device: torch.device, chosen: Iterable[Case], *, seed: int) -> None:
    """Record `worst`, per type and layout the largest error as a share of what float32 may have; fail above 1."""
    worst: dict[str, float] = {}
    count = 0
    run.record(seed=seed, temperature=TEMPERATURE)
    for index, case in enumerate(chosen):
        generator = torch.Generator(device).manual_seed(seed + index)
        operands, hidden = operands_for(case, generator), hidden_for(case, generator)
        kind = f"{case.type_name} {case.layout}"
        if index % 20 == 0:
            run.step(f"case {index}: {case}")
        for with_weights in (True, False):
            try:
                got = run_expert_mix(hidden, *operands, TEMPERATURE, with_weights, str(path))
                error = _worst_by_view(got, hidden, operands)
            except torch.OutOfMemoryError:
                run.note(f"{case}: out of device memory")
                continue
            count += 1
            worst[kind] = max(worst.get(kind, 0.0), error)
            if not error <= 1:
                run.fail(f"{case}: off by {error:.3g} times what float32 may be, weights {with_weights}")
    run.record(cases=count, worst=worst)


def _worst_by_view(got: tuple[Tensor, Tensor, Tensor], hidden: Tensor, operands: Operands) -> float:
    """`worst_error`, a view at a time: float64 takes several times the map's memory."""
    errors = []
    for view in range(len(hidden)):
        one = slice(view, view + 1)
        expected = reference(hidden[one], operands, TEMPERATURE)
        errors.append(worst_error((got[0][one], got[1][one], got[2][one]), expected))
    return max(errors)


@torch.inference_mode()
def compare_edges(run: CheckRun, path: Path, device: torch.device) -> None:
    """Record `edges`, how many cases of NaN and of extreme logits were looked at; fail for each that is wrong."""
    run.step("NaN and extreme logits")
    done = 0
    for layout in LAYOUTS:
        for type_name in TYPES:
            case = Case(type_name, layout, 2, 3, 4, 4, 8, 8)
            for channel in (0, 17, 39):  # of expert 0, of expert 2, of the gate
                done += 1
                if fault := _nan_fault(case, channel, path, device):
                    run.fail(f"{case}: NaN in channel {channel}: {fault}")
            for logits in _EXTREME:
                done += 1
                if fault := _extreme_fault(case._replace(experts=3), logits, path, device):
                    run.fail(f"{case._replace(experts=3)}: logits {logits}: {fault}")
    run.record(edges=done)


def _nan_fault(case: Case, channel: int, path: Path, device: torch.device) -> str | None:
    """A NaN has to make its pixel NaN, also where its expert has no weight, and change no other pixel."""
    generator = torch.Generator(device).manual_seed(0)
    operands, hidden = operands_for(case, generator), hidden_for(case, generator)
    operands[3].copy_(torch.tensor([0.0, 0.0, 0.0, 500.0]))
    clean = run_expert_mix(hidden, *operands, 1.0, True, str(path))
    hidden[1, channel, 1, 2] = float("nan")
    got = run_expert_mix(hidden, *operands, 1.0, True, str(path))
    for name, now, before in zip(("depth", "confidence"), got, clean, strict=False):
        broken = now.isnan()
        if not broken[1, 1, 2] or int(broken.sum()) != 1:
            return f"{name} has {int(broken.sum())} NaN pixels, expected its own"
        if not torch.equal(now[~broken], before[~broken]):
            return f"{name} of other pixels changed"
    return None


def _extreme_fault(case: Case, logits: list[float], path: Path, device: torch.device) -> str | None:
    """Expert 1 has the largest logit and depth 2, so depth is 2 exactly, and confidence is 2."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = hidden_for(case, generator)
    expert_weight, expert_bias, gate_weight, gate_bias = (tensor.zero_() for tensor in operands_for(case, generator))
    expert_bias[:, 0] = torch.tensor([0.5, math.log(2.0), 0.0])
    gate_bias.copy_(torch.tensor(logits))
    depth, confidence, weights = run_expert_mix(
        hidden, expert_weight, expert_bias, gate_weight, gate_bias, 1.0, True, str(path)
    )
    exactly = torch.tensor([0.0, 1.0, 0.0], device=device)[:, None, None]
    if not bool((weights == exactly).all()):
        return "the weights are not those of the largest logit alone"
    # exp(log 2) to two roundings
    if not bool(((depth - 2).abs() <= 4 * torch.finfo(torch.float32).eps).all() and (confidence == 2).all()):
        return f"depth {float(depth.flatten()[0])} and confidence {float(confidence.flatten()[0])}, expected 2 and 2"
    return None


@torch.inference_mode()
def measure_bandwidth(
    run: CheckRun,
    path: Path,
    device: torch.device,
    *,
    views: tuple[int, ...],
    side: int,
    rotated_bytes: int = _ROTATED_BYTES,
    effort: Effort | None = None,
) -> None:
    """Record `bandwidth`: per type, layout and views the kernel's bytes per second over a copy's of as many bytes.

    A copy of n bytes reads n and writes n, so the copy beside a mix is of half the bytes that the mix reads and writes.
    Both run in turn, pair by pair, over buffers that no cache holds. `goal_reached` says whether every case of a layout
    reached BANDWIDTH_GOAL; missing it is no failure.
    """
    found: list[dict[str, Any]] = []
    run.record(goal=BANDWIDTH_GOAL, side=side, bandwidth=found)
    for type_name in TYPES:
        for layout in LAYOUTS:
            for count in views:
                case = Case(type_name, layout, count, side, side)
                run.step(f"bandwidth, {case}")
                try:
                    found.append(_bandwidth(run, case, path, device, rotated_bytes, effort or _BRIEF))
                except torch.OutOfMemoryError:
                    run.note(f"{case}: out of device memory")
                run.record(bandwidth=found)
    reached = {
        layout: all(entry["share"]["median"] >= BANDWIDTH_GOAL for entry in found if entry["layout"] == layout)
        for layout in LAYOUTS
    }
    run.record(goal_reached=reached)
    for layout, done in reached.items():
        if not done:
            least = min(entry["share"]["median"] for entry in found if entry["layout"] == layout)
            run.note(f"{layout}: {least:.0%} of a copy's bandwidth at the least, goal {BANDWIDTH_GOAL:.0%}")


def _bandwidth(
    run: CheckRun, case: Case, path: Path, device: torch.device, rotated_bytes: int, effort: Effort
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    operands, first = operands_for(case, generator), hidden_for(case, generator)
    outputs = empty_outputs(first, operands[2], False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (first, *outputs))
    buffers = max(2, math.ceil(rotated_bytes / size))
    library = load(path)
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None
    maps = [first, *(torch.empty_like(first).copy_(first) for _ in range(buffers - 1))]
    prepared = [arguments(hidden, operands, outputs, TEMPERATURE) for hidden in maps]
    mixes = [functools.partial(library.mix, *given, stream) for given in prepared]
    copied = torch.zeros(buffers, 2, size // 2, dtype=torch.uint8, device=device)
    copies = [functools.partial(target.copy_, source) for source, target in copied]
    repeats = math.ceil(_CALLS / buffers)
    ratio = interleave(
        torch_device.timer(_in_turn(mixes, repeats), device),
        torch_device.timer(_in_turn(copies, repeats), device),
        effort=effort,
    )
    if not (ratio.first.stable and ratio.second.stable):
        run.note(f"{case}: the times had not settled when the warm-up ended")
    if ratio.median > _IMPOSSIBLE_SHARE:
        run.fail(f"{case}: {ratio.median:.2f} of a copy's bandwidth cannot be, so one of the two times is wrong")
    calls = repeats * buffers
    moved = calls * size / 1e6  # MB, over ms: GB/s
    return {
        "type": case.type_name,
        "layout": case.layout,
        "views": case.views,
        "bytes": size,
        "mix_ms": ratio.first.median_ms / calls,
        "mix_gb_per_s": moved / ratio.first.median_ms,
        "copy_gb_per_s": moved / ratio.second.median_ms,
        "share": {"median": ratio.median, "p10": ratio.p10, "p90": ratio.p90},
    }


def _in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> Callable[[], None]:
    def run_all() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    return run_all


def sanitizer() -> str | None:
    """compute-sanitizer on the PATH or beside nvcc; None where there is none."""
    nvcc = find_nvcc()
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    return shutil.which(_SANITIZER) or (shutil.which(_SANITIZER, path=beside) if beside else None)


def sanitize(run: CheckRun, path: Path, program: str | None, *, module: str | None = None) -> None:
    """Record `tools`: what each tool of compute-sanitizer says of many small mixes; fail where one finds something.

    module   that runs the mixes, given the library's path
    """
    if program is None:
        run.skip(f"{_SANITIZER} is absent; it comes with the CUDA toolkit")
    module = module or "moe3d_deploy.benchmarks.kernel_launches"
    said: dict[str, Any] = {}
    for tool in _SANITIZER_TOOLS:
        run.step(tool)
        command = [program, "--tool", tool, "--error-exitcode", str(_SANITIZER_FOUND)]
        command += [sys.executable, "-m", module, str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        lines = [line.lstrip("= ").strip() for line in done.stdout.splitlines() if line.strip()]
        summary = next((line for line in reversed(lines) if re.search("SUMMARY", line)), lines[-1] if lines else "")
        said[tool] = {"code": done.returncode, "says": summary}
        run.record(tools=said)
        if done.returncode == _SANITIZER_FOUND:
            run.fail(f"{tool}: {summary}")
        elif done.returncode:
            run.fail(f"{tool} ended with code {done.returncode}: {summary}")
