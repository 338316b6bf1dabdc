"""The output side of `moe3d run`: its options, and what it prints for machines."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from moe3d_deploy.runtime.outputs import OutputOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--formats",
        default="png,npz,ply,glb",
        show_default=True,
        help="What to write, separated by commas; also colmap, colmap-txt, rrd.",
    ),
    click.option(
        "--original", is_flag=True, help="Depth and confidence in the photographs' resolution too (png and npz)."
    ),
    click.option(
        "--drop-lowest",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.25,
        show_default=True,
        help="Share of the least confident points left out.",
    ),
    click.option("--voxel", help="One point per voxel: its edge in units of the scene, or 0.5% of the scene's extent."),
    click.option(
        "--max-points", type=click.IntRange(min=1), help="At most so many points; default: all, 100000 for COLMAP."
    ),
)


def output_options(command: _Command) -> _Command:
    """Add the options that say what is written, as keyword arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def parse_outputs(
    formats: str, *, original: bool, drop_lowest: float, voxel: str | None, max_points: int | None
) -> "tuple[list[str], OutputOptions]":
    """The formats and options of `write_scene`; raises what `check_formats` raises, before anything is loaded."""
    from moe3d_deploy.runtime.outputs import OutputOptions, check_formats
    from moe3d_deploy.runtime.thinning import VoxelSize

    kinds = [kind.strip() for kind in formats.split(",")]
    options = OutputOptions(
        drop_lowest=drop_lowest,
        voxel=None if voxel is None else VoxelSize.parse(voxel),
        max_points=max_points,
        original=original,
    )
    check_formats(kinds, options)
    return kinds, options


def depth_line(folder: Path) -> str:
    """What a person is told of the depth of the scene in `folder`."""
    views = _cameras(folder)["views"]
    ends = [(view["depth_near"], view["depth_far"]) for view in views if view["valid_fraction"] > 0]
    if not ends:
        return "no pixel has a valid depth"
    near, far = min(near for near, _ in ends), max(far for _, far in ends)
    return f"depth from {near:.3g} to {far:.3g}, up to the scene's scale (not metres)"


def print_json_lines(folder: Path, files: Sequence[Path], scene: Mapping[str, Any]) -> None:
    """Print a line per view, its entry in cameras.json, and one of the whole scene, `scene` and its files.

    Every line is a JSON object with `type` and `scene`, the folder; numbers that are not finite are null.
    """
    cameras = _cameras(folder)
    for view in cameras["views"]:
        of_view = {kind: str(folder / name) for kind, name in view["files"].items()}
        _print_line({"type": "view", "scene": str(folder), **view, "files": of_view})
    listed = [str(path) for path in files]
    _print_line({"type": "scene", "scene": str(folder), **scene, "points": cameras["points"], "files": listed})


def _cameras(folder: Path) -> dict[str, Any]:
    from moe3d_deploy.runtime.output_folder import CAMERAS_FILE

    document: dict[str, Any] = json.loads((folder / CAMERAS_FILE).read_bytes())
    return document


def _print_line(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, allow_nan=False))
