"""`python -m moe3d_deploy.native`: build the expert-mix library, or say which one is used."""

import sys
from pathlib import Path

import click

from moe3d_deploy.cli.arguments import comma_list
from moe3d_deploy.cli.main import finish
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.native.build import build
from moe3d_deploy.native.loading import BUILD_COMMAND, PACKAGE_FOLDER, VARIABLE, find, load


@click.group()
def command() -> None:
    """The expert-mix kernel: a shared library for PyTorch on an NVIDIA GPU (docs/plugin.md)."""


@command.command("build")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder; default: within this package, found there."
)
@click.option(
    "--arch", default="", help="Compute capabilities, such as 89,90; default: this machine's GPUs, or all without one."
)
def build_command(out: Path | None, arch: str) -> None:
    """Build the library with nvcc.

    \b
    python -m moe3d_deploy.native build --arch 89,90
    """
    path = build(out or PACKAGE_FOLDER, [_architecture(word) for word in comma_list(arch)])
    click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if out is not None:
        click.echo(f"to use it: {VARIABLE}={path}")


@command.command("which")
def which_command() -> None:
    """Print the path and the digest of the library that is used; it is loaded and its ABI checked."""
    found = find()
    if found is None:
        raise Moe3dError(f"there is no library of the expert-mix kernel; build it with: {BUILD_COMMAND}")
    click.echo(f"{found.path}: sha256 {load(found.path).digest()}")


def _architecture(word: str) -> int:
    if not word.isdecimal():
        raise InputError(f"--arch {word}: expected compute capabilities times 10, separated by commas, such as 89,90")
    return int(word)


if __name__ == "__main__":
    sys.exit(finish("python -m moe3d_deploy.native", lambda: command))
