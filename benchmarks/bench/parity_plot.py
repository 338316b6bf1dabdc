"""The heat map of a parity section: variants by shapes, the colour is the largest depth error. Needs matplotlib."""

import math
import textwrap
from typing import Any

from matplotlib.colors import LogNorm

from moe3d_deploy.benchmarks.bench.parity import DEPTH, Parity, compared, error_of, faults
from moe3d_deploy.benchmarks.bench.plots import INK, svg

_ROW, _REST = 0.17, 2.6  # inches: of a shape, and of titles and labels
_COLOURS = "viridis"
_LEAST = 1e-9  # an error of 0 has no logarithm; none of float32 is smaller
_LIGHT = 0.55  # from this place of the scale on ink is dark
_BEYOND = "#d1242f"
_FONT = 6.0
_NAME = 14  # characters of a variant's name in one line


def plots(parity: Parity) -> dict[str, str]:
    """SVG by file name; empty where nothing was compared."""
    if not any(compared(parity, variant) for variant in parity.variants):
        return {}
    return {"parity.svg": svg(_heat_map, parity, height=_REST + _ROW * len(parity.inputs))}


def _heat_map(axes: Any, parity: Parity) -> None:
    ran = [variant for variant in parity.variants if compared(parity, variant)]
    places = {item.shape: row for row, item in enumerate(parity.inputs)}
    figure = error_of(DEPTH, "max")
    values = {
        (places[shape], column): error
        for column, variant in enumerate(ran)
        for shape, found in compared(parity, variant)
        if (error := figure(found)) is not None
    }
    beyond = {(places[shape], column) for column, variant in enumerate(ran) for shape, _ in faults(parity, variant)}
    finite = [max(value, _LEAST) for value in values.values() if math.isfinite(value)] or [_LEAST]
    top = max(finite) * 1.01
    norm = LogNorm(min(finite) / 1.01, top)
    grid = [[_drawn(values.get((row, column)), top) for column in range(len(ran))] for row in range(len(places))]
    mesh = axes.pcolormesh(grid, norm=norm, cmap=_COLOURS)
    for (row, column), value in values.items():
        ink = "#000000" if norm(_drawn(value, top)) > _LIGHT else "#ffffff"
        shown = f"{value:.0e}" if math.isfinite(value) else "inf"
        axes.text(column + 0.5, row + 0.5, shown, ha="center", va="center", color=ink, fontsize=_FONT)
    for row, column in sorted(beyond):
        axes.plot(
            [column, column + 1, column + 1, column, column], [row, row, row + 1, row + 1, row],
            color=_BEYOND, linewidth=1.5, clip_on=False,
        )  # fmt: skip
    if beyond:
        axes.plot([], [], color=_BEYOND, linewidth=1.5, label="leaves the exporter's limits, in any output")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0.5)
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in places.values()], ["x".join(map(str, shape)) for shape in places], fontsize=7)
    axes.set_xticks(
        [column + 0.5 for column in range(len(ran))],
        ["\n".join([variant.backend, variant.precision, *textwrap.wrap(variant.name, _NAME)]) for variant in ran],
        fontsize=7,
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"Largest depth error against {parity.reference} PyTorch, by shape BxSxHxW")
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    bar.outline.set_edgecolor(INK)
    bar.ax.tick_params(labelsize=7)


def _drawn(value: float | None, top: float) -> float:
    """What the colour says: a place without a value has none, an infinite error the last one."""
    return math.nan if value is None else min(max(value, _LEAST), top)
