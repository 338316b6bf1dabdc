"""Which shapes a sweep over views and one over resolutions have, so that both end in minutes."""

from collections.abc import Callable, Sequence

from moe3d_deploy import costs
from moe3d_deploy.benchmarks.bench.cases import Source
from moe3d_deploy.benchmarks.bench.report import Shape
from moe3d_deploy.benchmarks.bench.scaling import FEWEST_POINTS
from moe3d_deploy.errors import InputError

BUDGET_SECONDS = 600.0  # of the two sweeps of a source, by estimate
VIEWS_SHARE = 2 / 3  # of the budget, for the sweep over views
PASSES = 6  # of a case: the first run, one of warm-up, three runs, one for the allocator's figure

# FLOP/s for the estimate alone: about what eager PyTorch reaches in float32 on a core of a server, and on a large GPU.
_RATES = {"cpu": 90e9, "cuda": 20e12}
_VIEWS = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 32)}
_SIDES_OF_VIEWS = (1.0, 0.75, 0.5, 0.4, 0.27)  # of the model's own size; the largest that the budget allows
_SIDES = (0.27, 0.5, 0.75, 1.0)


def sweep_shapes(source: Source, device: str, cores: int) -> list[Shape]:
    """One scene of rising numbers of views at one square size, and one view of rising square sizes.

    device   "cpu", with so many `cores`, or "cuda"

    Raises InputError for a source that takes too few of these shapes for a fit.
    """
    rate = _RATES[device] * (cores if device == "cpu" else 1)

    def affordable(shapes: Sequence[Shape], share: float) -> bool:
        work = sum(costs.total_flops(source.config, s, h, w, batch=b) for b, s, h, w in shapes)
        return PASSES * work / rate <= share * BUDGET_SECONDS

    rows = [[(1, count, side, side) for count in _VIEWS[device]] for side in _sides(source, _SIDES_OF_VIEWS)]
    over_views = _first(_taken(source, rows), lambda row: affordable(row, VIEWS_SHARE))
    squares = [(1, 1, side, side) for side in _sides(source, _SIDES)]
    # All sizes, or those from the smallest on that the budget allows.
    rows = [squares[-count:] for count in range(len(squares), 0, -1)]
    over_pixels = _first(_taken(source, rows), lambda row: affordable(row, 1 - VIEWS_SHARE))
    if not over_views and not over_pixels:
        raise InputError(
            f"--scaling: {source.kind} {source.source} takes fewer than {FEWEST_POINTS} of the views or sizes of a "
            "sweep; leave --scaling out, or name a checkpoint or a bundle of several sizes"
        )
    return list(dict.fromkeys([*over_views, *reversed(over_pixels)]))


def _sides(source: Source, shares: Sequence[float]) -> list[int]:
    """Shares of the model's size in whole patches, falling."""
    patch, patches = source.config.patch_size, source.config.pos_embed_grid
    return sorted({max(1, round(share * patches)) * patch for share in shares}, reverse=True)


def _taken(source: Source, rows: Sequence[Sequence[Shape]]) -> list[list[Shape]]:
    """Of every row what the source takes, where that is enough for a fit."""
    taken = [[shape for shape in row if source.ranges.takes(shape)] for row in rows]
    return [row for row in taken if len(row) >= FEWEST_POINTS]


def _first(rows: list[list[Shape]], good: Callable[[list[Shape]], bool]) -> list[Shape]:
    """The first good row, else the last; empty where there is none."""
    return next((row for row in rows if good(row)), rows[-1] if rows else [])
