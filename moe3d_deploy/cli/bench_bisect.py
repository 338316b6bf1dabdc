"""`moe3d bench --bisect`: where the 16-bit model leaves float32, and what has to stay float32."""

import json
import math
from typing import TYPE_CHECKING, Any

import click

from moe3d_deploy.bundle import is_bundle
from moe3d_deploy.cli.plan import parse_shapes
from moe3d_deploy.errors import InputError

if TYPE_CHECKING:
    from moe3d_deploy.benchmarks.bench.rounding_faults import RoundingFaults

TOLERANCE = 0.01  # of a block's output: half's is 0.001 after all blocks of a sound model, a fault's is above this
_SHOWN = 3  # blocks before the first that is off
_PATCHES = (1, 2, 6, 8)


def bisect(
    sources: tuple[str, ...],
    precision: str,
    shapes: tuple[str, ...],
    *,
    tolerance: float | None,
    seed: int | None,
    allow_pickle: bool,
    as_json: bool,
) -> bool:
    """Search SOURCE's model in `precision` and print what is found; whether all outputs keep the limits."""
    from moe3d_deploy.benchmarks.bench.rounding_faults import search
    from moe3d_deploy.export.source import SourceSpec

    if len(sources) != 1:
        raise InputError("--bisect searches one checkpoint or preset; name it alone")
    if is_bundle(sources[0]):
        raise InputError(f"{sources[0]} is a bundle, which has no PyTorch weights; name the checkpoint it was made of")
    spec = SourceSpec(sources[0], seed, allow_pickle)
    patch = spec.open().config.patch_size
    tolerance = TOLERANCE if tolerance is None else tolerance
    shape = _in_patches(shapes, patch)
    found = search(spec, precision, shape, tolerance=tolerance)
    size = "x".join(str(value) for value in (*shape[:2], shape[2] * patch, shape[3] * patch))
    if as_json:
        facts = {"source": sources[0], "precision": precision, "shape": size, "tolerance": tolerance}
        click.echo(json.dumps({**facts, **_values(found)}, indent=2, allow_nan=False))
    else:
        click.echo("\n".join(_lines(f"{sources[0]} in {precision} at {size}", found, tolerance)))
    return not found.broken


def _in_patches(shapes: tuple[str, ...], patch: int) -> tuple[int, int, int, int]:
    if not shapes:
        return _PATCHES
    asked = [shape for text in shapes for shape in parse_shapes(text)]
    if len(asked) != 1:
        raise InputError("--bisect searches at one shape; give one --shapes BxSxHxW")
    batch, views, height, width = asked[0]
    if height % patch or width % patch:
        raise InputError(f"--shapes {shapes[0]}: height and width have to be multiples of the patch size, {patch}")
    return batch, views, height // patch, width // patch


def _values(found: "RoundingFaults") -> dict[str, Any]:
    """JSON knows no infinity: the error of a block whose output is not finite is null."""
    errors = [{"block": block.block, "error": _finite(block.error)} for block in found.blocks]
    first = None if found.first is None else found.first.block
    return {"blocks": errors, "first": first, "broken": found.broken, "islands": found.islands}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lines(what: str, found: "RoundingFaults", tolerance: float) -> list[str]:
    lines = [f"{what}: {len(found.blocks)} blocks in 16 bits, compared with float32"]
    if found.first is None:
        worst = max(found.blocks, key=lambda block: block.error)
        lines.append(f"blocks       all within {tolerance:g}; furthest {worst.block}, {worst.error:.2g}")
    else:
        index = found.blocks.index(found.first)
        before = found.blocks[max(0, index - _SHOWN) : index]
        lines += [f"before       {block.block} {block.error:.2g}" for block in before]
        lines.append(f"first        {found.first.block} {found.first.error:.2g}, beyond {tolerance:g}")
    lines += [f"broken       {text}" for text in found.broken]
    if not found.broken:
        lines.append("outputs      within the limits of the precision")
    elif found.islands:
        lines.append(
            f"islands      float32 in {', '.join(found.islands)} mends it, and with any of them left out does not"
        )
    return lines
