"""Contact sheets of the procedural scenes: `python -m moe3d_deploy.training.scenes --seeds 0:12 -o sheet.png`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image

from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import InputError
from moe3d_deploy.files import atomic_path
from moe3d_deploy.training.scenes import SPLITS, SceneOptions, render_scene
from moe3d_deploy.training.scenes.sheet import contact_sheet

_MOST_SCENES = 200  # on one sheet


@click.command()
@click.option("--seeds", default="0:12", show_default=True, help="From and to, the end not included; or one seed.")
@click.option("--split", default="train", show_default=True, type=click.Choice(SPLITS))
@click.option("--views", default=4, show_default=True, help="Cameras of a scene, 1..8.")
@click.option("--size", default="126x168", show_default=True, help="Height x width in pixels.")
@click.option("--columns", default=2, show_default=True, type=click.IntRange(1), help="Scenes beside each other.")
@click.option("--photographs", is_flag=True, help="Photographs on some surfaces; needs scikit-image.")
@click.option("--camera-effects/--no-camera-effects", default=True, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where the rays are cast, as torch names it.")
@click.option("-o", "--out", required=True, type=OutputFile(), help="The picture to write.")
def command(
    seeds: str,
    split: str,
    views: int,
    size: str,
    columns: int,
    photographs: bool,
    camera_effects: bool,
    device: str,
    out: Path,
) -> None:
    """Write a contact sheet of scenes: their views above inverse depth, normals and occlusion edges.

    \b
    python -m moe3d_deploy.training.scenes --seeds 0:12 --split train -o sheet.png
    """
    height, width = _numbers("--size", size, r"(\d+)x(\d+)", "126x168")
    options = SceneOptions(height, width, views, split, photographs, camera_effects)
    chosen = _seeds(seeds)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"--out {out}: a sheet is a .png or .jpg file")
    pixels = contact_sheet((render_scene(seed, options, device) for seed in chosen), columns)
    with atomic_path(out) as temp:
        Image.fromarray(pixels).save(temp)
    click.echo(f"{len(chosen)} scenes of {split}, written to {out}")


def _seeds(text: str) -> range:
    if text.isdecimal():
        return range(int(text), int(text) + 1)
    first, end = _numbers("--seeds", text, r"(\d+):(\d+)", "0:12")
    if not 0 < end - first <= _MOST_SCENES:
        raise InputError(f"--seeds {text} names {max(0, end - first)} scenes; a sheet takes 1..{_MOST_SCENES}")
    return range(first, end)


def _numbers(option: str, text: str, pattern: str, example: str) -> tuple[int, int]:
    match = re.fullmatch(pattern, text, re.ASCII)
    if match is None:
        raise InputError(f"{option} {text!r} is not of the form {example}")
    return int(match[1]), int(match[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code."""
    return finish("scenes", lambda: command, arguments)


if __name__ == "__main__":
    sys.exit(main())
