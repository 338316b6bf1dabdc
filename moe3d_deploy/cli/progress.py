"""Progress on stderr: a bar that rewrites its line on a terminal; elsewhere only the lines that stay."""

import shutil
import sys
import time

import click

_BAR = 24
_LABEL = 12


class Progress:
    """A bar per stage while it works, and lines that stay in the style of `moe3d-export`'s report.

    A bar goes when the command ends, so that an error does not stand behind it.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._stage = ""
        self._started = 0.0
        if context := click.get_current_context(silent=True):
            context.call_on_close(lambda: self._rewrite(""))

    def report(self, stage: str, step: int, total: int, detail: str = "") -> None:
        """`step` of `total` parts of `stage` are done; a total of 0 is unknown and has no bar."""
        if stage != self._stage:
            self._stage, self._started = stage, time.monotonic()
        if not self._terminal:
            return
        bar = ""
        if total:
            share = step / total
            bar = "█" * int(_BAR * share) + "░" * (_BAR - int(_BAR * share)) + f" {100 * share:3.0f} %  "
        seconds = time.monotonic() - self._started
        self._rewrite(f"{stage:<{_LABEL}} {bar}{seconds:4.0f} s  {detail}")

    def line(self, label: str, text: str) -> None:
        """A line that stays; a bar in its place goes."""
        self._rewrite("")
        click.echo(f"{label:<{_LABEL}} {text}", err=True)

    def _rewrite(self, text: str) -> None:
        if self._terminal:
            columns = shutil.get_terminal_size((100, 24)).columns
            sys.stderr.write("\r\x1b[2K" + text[: columns - 1])
            sys.stderr.flush()
