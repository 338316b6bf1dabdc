"""`moe3d plan`: what a model will cost before anything is exported or bought. Needs neither a GPU nor torch."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click

from moe3d_deploy import costs, planning
from moe3d_deploy.bundle import Bundle, is_bundle
from moe3d_deploy.checkpoint_config import read_config
from moe3d_deploy.cli.plan_report import Report
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.costs import Shape4
from moe3d_deploy.devices import CPU, DEVICES, Device, find_device
from moe3d_deploy.engines.profiles import VIEW_CHUNK as HEADS_VIEW_CHUNK
from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.export.precision import PRECISIONS, PrecisionPolicy
from moe3d_deploy.manifest import SPLITS, ShapeRanges
from moe3d_deploy.planning import Setup
from moe3d_deploy.runtime.split_backend import VIEW_CHUNK

_CONFIG_FILE = "config.json"
_OUTPUTS_OF_POINT_HEAD = ("point_map", "point_map_conf")


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is planned: the config as it is run, and what a bundle has settled."""

    name: str
    kind: str
    config: ModelConfig
    precision: str | None = None
    merged: bool = True
    ranges: ShapeRanges | None = None
    split: str | None = None


@click.command("plan")
@click.argument("source")
@click.option(
    "--shapes", metavar="BxSxHxW,...", help="What is run.  [default: 1, 2, 4, 8 and 16 views at the model's usual size]"
)
@click.option(
    "--device", "device_name", metavar="NAME|FLOPS,BW,MEM",
    help=f"One of {', '.join((*DEVICES, CPU))} (measured now), or FLOP/s, bytes/s and bytes: 165e12,1e12,24e9.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help="What is 16-bit.  [default: fp16, eager fp32; a bundle's own]"
)
@click.option(
    "--form", type=click.Choice(["eager", "fused", "explicit"]),
    help="Attention: PyTorch's (eager), fused or explicit in an engine.  [default: fused in 16 bits, else explicit]",
)  # fmt: skip
@click.option(
    "--split",
    type=click.Choice(list(SPLITS)),
    help="In two files, as of moe3d-export --split.  [default: a bundle's own]",
)
@click.option(
    "--view-chunk", type=click.IntRange(min=1),
    help="eager: views the dense heads take at a time; --split: views of the part that is per view.",
)  # fmt: skip
@click.option("--point-head", is_flag=True, help="With VGGT's point head, which exports leave out unless asked for it.")
@click.option("--views-that-fit", is_flag=True, help="Search the most views that fit on --device, per precision.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; bytes, FLOPs and seconds.")
def plan_command(
    source: str,
    shapes: str | None,
    device_name: str | None,
    precision: str | None,
    form: str | None,
    split: str | None,
    view_chunk: int | None,
    point_head: bool,
    views_that_fit: bool,
    as_json: bool,
) -> None:
    """Say what SOURCE, a preset, checkpoint folder or bundle, will cost.

    Work, memory, the least time on a device, and where a run does not fit, what does. No weight is read, and neither
    a GPU nor torch is needed.

    \b
    moe3d plan moe3d-1b --device orin
    moe3d plan moe3d-1b --device rtx4090 --shapes 1x8x392x518,1x64x518x518 --precision fp16
    moe3d plan moe3d-1b --device 165e12,1.0e12,24e9 --views-that-fit
    """
    if views_that_fit and device_name is None:
        raise InputError("--views-that-fit is a question about a device: add --device")
    given = _with_split(_open(source, point_head), split)
    chosen = _precision(given, precision, form)
    if given.kind == "bundle" and form == "eager":
        raise InputError(f"bundle {source} does not run in PyTorch; leave --form eager out, or plan its checkpoint")
    wanted = [] if shapes is None else parse_shapes(shapes)
    for shape in wanted:
        costs.check_shape(given.config, shape)
    device = find_device(device_name) if device_name is not None else None
    setup = _setup(given, chosen, device, form, view_chunk)
    wanted = wanted or _usual_shapes(setup)
    others = [] if device is None else list(_others(given, chosen, device, form, view_chunk))
    report = Report(given.name, given.kind, setup, [planning.plan(setup, shape) for shape in wanted])
    for item in report.plans:
        if item.fits is False:
            report.changes[item.shape] = planning.changes_that_fit(setup, item.shape, others)
        if not setup.takes(item.shape):
            report.refused.append(item.shape)
    if views_that_fit:
        setups, least = (setup, *others), setup.allowed.views.min
        for shape in dict.fromkeys((batch, least, height, width) for batch, _, height, width in wanted):
            if setup.takes(shape):
                report.most_views[shape] = {s.precision: planning.largest_views(s, shape) for s in setups}
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for line in report.lines():
            click.echo(line)


def parse_shapes(text: str) -> list[Shape4]:
    """Read `1x8x392x518,...`, B x S x H x W, or trtexec's `images:1x8x3x392x518`; anything else raises InputError."""
    return [_parse_shape(part.strip()) for part in text.split(",")]


def _parse_shape(text: str) -> Shape4:
    sizes = text.removeprefix("images:").split("x")
    numbers = [int(size) for size in sizes if re.fullmatch("[0-9]{1,6}", size)]
    if len(numbers) == len(sizes) == 5 and numbers[2] == 3:
        del numbers[2]
    elif len(numbers) == len(sizes) == 5 and numbers[4] == 3:  # the layout of uint8 images
        del numbers[4]
    if len(numbers) != 4 or len(sizes) not in (4, 5):
        raise InputError(f"--shapes {text!r}: expected BxSxHxW, as 1x8x392x518, or images:1x8x3x392x518")
    batch, views, height, width = numbers
    return batch, views, height, width


def _open(source: str, point_head: bool) -> _Source:
    """The config of what `source` names, with the point head where it is asked for. Raises a Moe3dError."""
    name = source.removeprefix("preset:")
    path = Path(source)
    is_folder_too = name == source and (path / _CONFIG_FILE).is_file()
    if name in PRESETS and not is_folder_too:
        return _Source(source, "preset", _with_point_head(PRESETS[name], source, point_head))
    if name in PRESETS:
        raise CheckpointError(f"{source!r} is a preset and a folder here; write preset:{source} or ./{source}")
    if is_bundle(path):
        return _of_bundle(source, point_head)
    if (path / _CONFIG_FILE).is_file():
        config, _ = read_config(path / _CONFIG_FILE)
        return _Source(source, "checkpoint", _with_point_head(config, source, point_head))
    if not path.exists():
        raise CheckpointError(f"{source}: no such bundle or checkpoint folder, nor a preset ({', '.join(PRESETS)})")
    raise CheckpointError(
        f"{source}: holds neither a manifest.json nor a {_CONFIG_FILE}; name a bundle, a checkpoint folder or a preset"
    )


def _with_point_head(config: ModelConfig, source: str, point_head: bool) -> ModelConfig:
    if point_head and not config.point_head:
        raise InputError(f"{source} has no point head; leave --point-head out")
    return dataclasses.replace(config, point_head=point_head)


def _of_bundle(source: str, point_head: bool) -> _Source:
    manifest = Bundle.open(source, verify="sizes", engines=False).manifest
    held = any(tensor.name in _OUTPUTS_OF_POINT_HEAD for tensor in manifest.outputs)
    if point_head and not held:
        raise InputError(f"bundle {source} has no point head; leave --point-head out, or export with it")
    config = dataclasses.replace(manifest.config, point_head=held)
    ranges, split = manifest.shape_ranges, manifest.split
    return _Source(source, "bundle", config, manifest.precision, manifest.merged_experts, ranges, split)


def _with_split(source: _Source, asked: str | None) -> _Source:
    if asked is None or asked == source.split:
        return source
    if source.kind == "bundle":
        has = f"split at its {source.split}" if source.split else "one file"
        raise InputError(f"bundle {source.name} is {has}; leave --split out, or plan its checkpoint")
    return dataclasses.replace(source, split=asked)


def _precision(source: _Source, asked: str | None, form: str | None) -> str:
    if source.precision is None:
        return asked or ("fp32" if form == "eager" else "fp16")
    if asked not in (None, source.precision):
        raise InputError(f"bundle {source.name} is {source.precision}; leave --precision out, or plan its checkpoint")
    return source.precision


def _usual_shapes(setup: Setup) -> list[Shape4]:
    """The usual shapes, and of a bundle those that it takes, or the smallest that it takes."""
    allowed = setup.allowed
    smallest = (allowed.batch.min, allowed.views.min, allowed.height.min, allowed.width.min)
    return [shape for shape in planning.usual_shapes(setup.config) if setup.takes(shape)] or [smallest]


def _setup(source: _Source, precision: str, device: Device | None, form: str | None, view_chunk: int | None) -> Setup:
    type_of = PrecisionPolicy(precision).type_of
    chosen = form or planning.usual_form(type_of, device)
    setup = Setup(
        source.config, precision, type_of, chosen, device, source.merged, view_chunk, source.ranges, source.split
    )
    return setup if source.split is None or view_chunk else dataclasses.replace(setup, view_chunk=_usual_chunk(setup))


def _usual_chunk(setup: Setup) -> int | None:
    """Views at a time where nobody says otherwise: what ONNX Runtime is given, and what engines are built for."""
    if setup.on_cpu:
        return VIEW_CHUNK
    return HEADS_VIEW_CHUNK if setup.split == "heads" else None


def _others(
    source: _Source, precision: str, device: Device, form: str | None, view_chunk: int | None
) -> Iterator[Setup]:
    """The same in every other precision that the device computes in and whose memory can be predicted; none of a
    bundle, which has one."""
    patch = source.config.patch_size
    for other in PRECISIONS if source.precision is None else ():
        with contextlib.suppress(InputError):
            setup = _setup(source, other, device, form, view_chunk)
            planning.plan(setup, (1, 1, patch, patch))
            if other != precision:
                yield setup
