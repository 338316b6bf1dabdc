"""Warnings of the library as lines for a person: the message, without the place in the source that Python adds."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import TextIO

import click

from moe3d_deploy.errors import Moe3dWarning


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Within the block, every Moe3dWarning becomes a line on stderr; other warnings stay what they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, Moe3dWarning):
                click.echo(f"warning: {' '.join(str(message).splitlines())}", err=True)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.simplefilter("always", Moe3dWarning)
        warnings.showwarning = show_line
        yield
