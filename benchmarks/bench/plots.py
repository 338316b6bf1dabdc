"""Plots of a report as SVG: latency and memory against views, a roofline. Every figure is made by `svg`.

The same report gives the same bytes. Text stays text, in the reader's font; ink is `currentColor`, so that a page can
set it for a light and a dark background.
"""

import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moe3d_deploy.benchmarks.bench import figures
from moe3d_deploy.benchmarks.bench.report import Case

INK = "#010203"  # stands for currentColor until the file is written; no other element has it
GRID = 0.25  # opacity
COLOURS = ("#2b7bba", "#d9772b", "#3a9d5d", "#b0508e", "#8a6d3b", "#6b6ecf")  # readable on white and on black
MARKERS = "osD^vP*"  # one more than colours: no two of the first 42 lines look alike
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe3d-bench",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_WIDTH, _HEIGHT, _LINE = 6.4, 3.6, 0.2  # inches: a plot without its legend, and an entry of that

_Draw = Callable[[Any, Sequence[Case]], None]


def plots(cases: Sequence[Case]) -> dict[str, str]:
    """SVG by file name; empty where no case has a figure to show."""
    measured = [case for case in cases if case.status == "measured"]
    if not measured:
        return {}
    drawn: dict[str, _Draw] = {"latency.svg": _latency, "memory.svg": _memory, "roofline.svg": _roofline}
    return {name: svg(draw, measured) for name, draw in drawn.items()}


def svg(draw: Callable[[Any, Any], None], what: Any, *, height: float = _HEIGHT) -> str:
    """What `draw` makes of (axes, what), with room below the axes for the entries of its legend; ink is INK.

    height   inches, without those entries
    """
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        draw(axes, what)
        entries = axes.get_legend_handles_labels()[1]
        figure.set_size_inches(_WIDTH, height + _LINE * len(entries))
        file = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue().replace(INK, "currentColor")
    return text[text.index("<svg") :]


def _latency(axes: Any, cases: Sequence[Case]) -> None:
    for (label, group), style in zip(_lines(cases), _styles(), strict=False):
        found = [figures.latency(case) for case in group]
        views = [case.shape[1] for case in group]
        medians = [item.p50 for item in found]
        above = [item.p90 - item.p50 for item in found]
        axes.errorbar(views, medians, yerr=[[0.0] * len(above), above], label=label, capsize=3, **style)
    axes.set_title("Latency of a run: median, and up to p90")
    axes.set_ylabel("ms")
    _against_views(axes, cases)


def _memory(axes: Any, cases: Sequence[Case]) -> None:
    for (label, group), style in zip(_lines(cases), _styles(), strict=False):
        used = [figures.memory_use(case) for case in group]
        views = [case.shape[1] for case in group]
        axes.plot(views, [(item.driver_bytes or item.peak_bytes) / 1e6 for item in used], label=label, **style)
        predicted = [item.predicted_bytes / 1e6 for item in used]
        axes.plot(views, predicted, color=style["color"], marker=style["marker"], linestyle=":", fillstyle="none")
    axes.plot([], [], color=INK, linestyle=":", label="predicted by moe3d plan")
    axes.set_title("Peak memory beside what was there before loading")
    axes.set_ylabel("MB")
    _against_views(axes, cases)


def _roofline(axes: Any, cases: Sequence[Case]) -> None:
    points = [(figures.intensity(case), figures.reached_flops(case) / 1e9) for case in cases]
    roofs: dict[str, list[float]] = {}
    for case in cases:
        copy = figures.ceilings(case.rounds).copy_bytes_per_second / 1e9
        peak = figures.flops_ceiling(case) / 1e9
        # Each mix of types has a roof of its own.
        name = " ".join([case.backend, *(kind for kind in case.work if kind != "float32")])
        roof = roofs.setdefault(name, [copy, peak])
        roofs[name] = [max(roof[0], copy), max(roof[1], peak)]
    low = min([x for x, _ in points] + [peak / copy for copy, peak in roofs.values()]) / 4
    high = max(x for x, _ in points) * 4
    for (name, (copy, peak)), style in zip(roofs.items(), itertools.cycle(("-", "--", "-.", ":")), strict=False):
        ridge = peak / copy
        label = f"{name}: {copy:.3g} GB/s, {peak:.4g} GFLOP/s"
        axes.plot([low, ridge, high], [low * copy, peak, peak], color=INK, linestyle=style, linewidth=1, label=label)
    for (label, group), style in zip(_lines(cases), _styles(), strict=False):
        places = [(figures.intensity(case), figures.reached_flops(case) / 1e9) for case in group]
        axes.plot(*zip(*places, strict=True), label=label, **{**style, "linestyle": "none"})
    log_scales(axes)
    axes.set_title("Roofline: what was reached, below measured ceilings")
    axes.set_xlabel("FLOP for every byte that has to move")
    axes.set_ylabel("GFLOP/s")
    finish(axes)


def _lines(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    """Cases that differ only in the number of views, in their order, with what they have in common."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        batch, _, height, width = case.shape
        scenes = f", {batch} scenes" if batch > 1 else ""
        label = f"{case.model} {case.backend} {case.precision} {height}x{width}{scenes}"
        found.setdefault(label, []).append(case)
    return [(label, sorted(group, key=lambda case: case.shape[1])) for label, group in found.items()]


def _styles() -> Any:
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return ({"color": colour, "marker": marker, "linestyle": "-", "linewidth": 1.5} for colour, marker in pairs)


def _against_views(axes: Any, cases: Sequence[Case]) -> None:
    counts = sorted({case.shape[1] for case in cases})
    axes.set_xlabel("views of a scene")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    finish(axes)


def log_scales(axes: Any) -> None:
    """Logarithms both ways, with plain numbers at 1, 2, 5."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def finish(axes: Any) -> None:
    """Grid and legend, the same in every plot."""
    axes.grid(alpha=GRID, color=INK, linewidth=0.5)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)
