"""Sweeps as plots: time against views and against pixels, and the line of the arithmetic through the first point."""

import itertools
from collections.abc import Sequence
from typing import Any

from moe3d_deploy.benchmarks.bench import figures
from moe3d_deploy.benchmarks.bench.plots import COLOURS, INK, MARKERS, finish, log_scales, svg
from moe3d_deploy.benchmarks.bench.report import Case
from moe3d_deploy.benchmarks.bench.scaling import PIXELS, VIEWS, Sweep, sweeps

_LABELS = {VIEWS: "views of a scene", PIXELS: "pixels of a view"}


def plots(cases: Sequence[Case]) -> dict[str, str]:
    """SVG by file name; a file for every axis that has a sweep."""
    found = sweeps(cases)
    drawn = {axis: [sweep for sweep in found if sweep.axis == axis] for axis in (VIEWS, PIXELS)}
    return {f"scaling_{axis}.svg": svg(_draw, group) for axis, group in drawn.items() if group}


def _draw(axes: Any, found: Sequence[Sweep]) -> None:
    for sweep, colour, marker in zip(found, itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False):
        case = sweep.cases[0]
        times = [figures.latency(item).p50 for item in sweep.cases]
        work = [sum(item.work.values()) for item in sweep.cases]
        label = f"{case.model} {case.backend} {case.precision} {sweep.fixed}"
        axes.plot(sweep.places, times, color=colour, marker=marker, linestyle="-", linewidth=1.5, label=label)
        line = [times[0] * item / work[0] for item in work]
        axes.plot(sweep.places, line, color=colour, linestyle=":", linewidth=1.5)
    axes.plot([], [], color=INK, linestyle=":", label="FLOP, through the first point")
    log_scales(axes)
    kind = found[0].axis
    axes.set_title(f"Growth with {kind}: median of a run, and the arithmetic")
    axes.set_xlabel(_LABELS[kind])
    axes.set_ylabel("ms")
    finish(axes)
