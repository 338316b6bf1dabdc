"""`moe3d convert`: VGGT weights, or a preset, to a MoE3D checkpoint folder."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from moe3d_deploy.errors import require

if TYPE_CHECKING:
    from moe3d_deploy.checkpoint import WeightSource

_BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}


@click.command("convert")
@click.argument("source")
@click.option(
    "-o", "--output", required=True, metavar="FOLDER", type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--experts", type=click.IntRange(min=1), default=4, show_default=True, help="Number of experts.")
@click.option(
    "--noise",
    type=click.FloatRange(min=0),
    default=0.01,
    show_default=True,
    help="What is added to each expert's copy of VGGT's weights, relative to their standard deviation.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Seed of the experts' noise and of the gate; takes a preset's seeded random weights, not trained ones.  "
    "[default: 0, and a preset's trained weights where it has them]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Temperature of the gate's softmax.",
)
@click.option("--keep-vggt", is_flag=True, help="Add no experts; leave the depth head as it is.")
@click.option(
    "--dtype",
    type=click.Choice(list(_BYTES_PER_VALUE)),
    default="float32",
    show_default=True,
    help="How the weights are stored.",
)
@click.option("--allow-pickle", is_flag=True, help="Read a .pt file, which safetensors files replace.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that FOLDER holds already.")
@click.pass_context
def convert_command(
    context: click.Context,
    source: str,
    output: Path,
    experts: int,
    noise: float,
    seed: int | None,
    temperature: float,
    keep_vggt: bool,
    dtype: str,
    allow_pickle: bool,
    overwrite: bool,
) -> None:
    """Convert a checkpoint to a folder of config.json and model.safetensors.

    SOURCE is VGGT's model.safetensors or model.pt, a checkpoint folder (with one file of weights or an index of
    shards), or a preset (vggt-1b, moe3d-1b, moe3d-tiny); one without trained weights has seeded random ones. VGGT's
    depth head becomes a mixture of experts: near copies of it, to be trained.

    \b
    moe3d convert moe3d-tiny -o tiny
    moe3d convert vggt-1b -o moe3d-from-vggt --experts 4 --dtype float16
    """
    if keep_vggt:
        for name in ("experts", "noise", "temperature"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--keep-vggt adds no experts, so --{name} has no meaning; leave one out")
    for package in ("torch", "safetensors"):
        require(package)
    import torch

    from moe3d_deploy import checkpoint

    opened = checkpoint.open_checkpoint(source, seed=seed, allow_pickle=allow_pickle)
    weights = opened
    if not keep_vggt:
        weights = checkpoint.convert_to_moe(
            opened, num_experts=experts, noise=noise, seed=seed or 0, temperature=temperature
        )
        if weights is opened and context.get_parameter_source("noise") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{opened.name} has experts, which are kept as they are, so --noise has no meaning")
    values = sum(math.prod(shape) for shape in weights.shapes().values())
    click.echo(f"checkpoint   {opened.name} ({opened.origin})")
    click.echo(f"licence      {opened.licence}")
    click.echo(f"experts      {_experts(opened, weights)}")
    with click.progressbar(length=values, label="writing", file=sys.stderr) as bar:
        checkpoint.save_checkpoint(
            weights, output, dtype=getattr(torch, dtype), overwrite=overwrite, progress=bar.update
        )
    megabytes = values * _BYTES_PER_VALUE[dtype] / 1e6
    click.echo(
        f"written      {output}: {len(weights.shapes()):,} tensors, {values / 1e6:,.1f} M parameters, "
        f"{megabytes:,.0f} MB {dtype}"
    )
    click.echo(f"next         moe3d-export {output} -o bundle")


def _experts(opened: "WeightSource", weights: "WeightSource") -> str:
    moe = weights.config.moe
    if moe is None:
        return "none"
    kept = "kept as they are" if weights is opened else "made from VGGT's depth head, not trained yet"
    return f"{moe.num_experts}, {kept}"
