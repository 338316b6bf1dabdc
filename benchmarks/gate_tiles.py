"""How many experts a tile of the picture needs: what an expert mix that leaves some out per tile could save.

    python -m moe3d_deploy.benchmarks.gate_tiles moe3d-tiny --out benchmarks/results/gate_tiles_tiny.json

An expert is needed in a tile where its gate weight passes a bound at any of the tile's pixels. Leaving all others out,
and dividing by what is left, moves a pixel's depth by no more than (K - 1) times the bound, as a share of the distance
between the nearest and the farthest expert there (bounds below 1 / K). The part of the experts' 3x3 convolutions that
is saved is the share of tiles and experts that are not needed; the gate's own channels are always computed.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import InputError
from moe3d_deploy.evaluation import native_size, rendered_scenes
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.files import atomic_write
from moe3d_deploy.runtime.session import Session

FORMAT_VERSION = 1
SIDES = (8, 16, 32)  # pixels of a tile
BOUNDS = (0.001, 0.01, 0.05, 0.1)
_OUTPUT = "expert_weights"


@click.command()
@click.argument("source")
@click.option("--out", required=True, type=OutputFile(), help="JSON file to write.")
@click.option("--count", type=click.IntRange(min=1), default=32, show_default=True, help="Scenes.")
@click.option("--views", type=click.IntRange(1, 8), default=4, show_default=True)
def main(source: str, out: Path, count: int, views: int) -> None:
    """Count the experts that tiles need in SOURCE, a checkpoint or preset with experts, on held-out scenes."""
    opened = SourceSpec(source).open()
    if opened.config.moe is None:
        raise InputError(f"{source} has no experts, so no gate; name a MoE3D checkpoint or preset")
    height, width = native_size(opened.config.img_size, opened.config.patch_size)
    session = Session.open(source, backend="pytorch", outputs=(_OUTPUT,))
    scenes = rendered_scenes(range(count), split=HELD_OUT[0], views=views, height=height, width=width)
    report = {
        "format_version": FORMAT_VERSION,
        "environment": environment(),
        "model": {"name": opened.name, "origin": opened.origin, "num_experts": opened.config.moe.num_experts},
        "scenes": {"split": HELD_OUT[0], "count": count, "views": views, "height": height, "width": width},
        "tiles": tiles_needed(session.run(scene.images)[_OUTPUT] for scene in scenes),
    }
    atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())


def tiles_needed(gates: Iterable[NDArray[np.floating[Any]]]) -> list[dict[str, Any]]:
    """Over gate weights (S, K, H, W) of scenes: a row for every side and bound.

    needed      share of tiles times experts with a weight above the bound at some pixel
    at_most_two share of the tiles that need no more than two experts
    """
    counts = [np.zeros((0, len(BOUNDS)), np.int64) for _ in SIDES]
    experts = 0
    for weights in gates:
        experts = weights.shape[1]
        for i, side in enumerate(SIDES):
            largest = largest_in_tiles(weights, side)
            found = np.stack([(largest > bound).sum(axis=1).reshape(-1) for bound in BOUNDS], axis=1)
            counts[i] = np.concatenate([counts[i], found])
    if not experts:
        raise InputError("there is no scene to count tiles in; give one or more")
    return list(_rows(counts, experts))


def largest_in_tiles(weights: NDArray[np.floating[Any]], side: int) -> NDArray[np.floating[Any]]:
    """The largest weight of each tile: (S, K, H, W) -> (S, K, ceil(H / side), ceil(W / side)); smaller at the edges."""
    for axis in (2, 3):
        starts = np.arange(0, weights.shape[axis], side)
        weights = np.maximum.reduceat(weights, starts, axis=axis)
    return weights


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| tile | weight above | experts needed | tiles that need two or fewer |", "|---|---:|---:|---:|"]
    for row in report["tiles"]:
        lines.append(
            f"| {row['side']}x{row['side']} | {row['bound']:g} | {100 * row['needed']:.1f} % "
            f"| {100 * row['at_most_two']:.1f} % |"
        )
    return "\n".join(lines)


def _rows(counts: list[NDArray[np.int64]], experts: int) -> Iterator[dict[str, Any]]:
    for side, found in zip(SIDES, counts, strict=True):
        for bound, column in zip(BOUNDS, found.T, strict=True):
            needed = float(column.mean()) / experts
            yield {"side": side, "bound": bound, "needed": needed, "at_most_two": float((column <= 2).mean())}


if __name__ == "__main__":
    main()
