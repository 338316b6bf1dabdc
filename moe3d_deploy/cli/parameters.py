"""Types of command-line parameters that several commands have."""

import os
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.errors import InputError


class OutputFile(click.Path):
    """A file to write at the end of a long measurement: that its folder exists is checked at the start."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises InputError where the folder is missing."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            flag = f"{param.opts[-1]} " if param else ""
            raise InputError(f"{flag}{path}: folder {path.parent} does not exist; create it")
        return path
