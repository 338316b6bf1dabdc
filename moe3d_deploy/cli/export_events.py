"""What `moe3d export` tells while it works: bars and lines on stderr, or a line of JSON per event on stdout."""

import json
import sys
from typing import Any

import click

from moe3d_deploy.cli.progress import Progress


class Reporter:
    """One form for people and one for machines; on stderr the second has warnings, and the error of a failed run.

    A line of JSON is an object with `event`: progress (`stage`, and what is known of its steps), line (`label` and
    `text`, what people read), result (the object of --json) or error (`message`).
    """

    def __init__(self, as_events: bool) -> None:
        self._as_events = as_events
        self._progress = Progress()

    @property
    def shows_bars(self) -> bool:
        """Whether `report` is seen at all: elsewhere only lines are."""
        return self._as_events or sys.stderr.isatty()

    def report(self, stage: str, step: int, total: int, detail: str = "", **facts: Any) -> None:
        """As `Progress.report`; `facts` are what a machine gets in place of the bar."""
        if self._as_events:
            self._print("progress", {"stage": stage, **(facts or {"step": step, "total": total, "detail": detail})})
        else:
            self._progress.report(stage, step, total, detail)

    def line(self, label: str, text: str) -> None:
        """A line that stays."""
        if self._as_events:
            self._print("line", {"label": label, "text": " ".join(text.split())})
        else:
            self._progress.line(label, text)

    def result(self, report: dict[str, Any]) -> None:
        """The object of --json, as the last event."""
        self._print("result", report)

    def failed(self, error: BaseException) -> None:
        """What ended the run; the caller raises it."""
        if self._as_events:
            stopped = not isinstance(error, Exception)  # Ctrl-C, or a signal
            self._print("error", {"message": "interrupted" if stopped else str(error) or type(error).__name__})

    def _print(self, event: str, values: dict[str, Any]) -> None:
        click.echo(json.dumps({"event": event, **values}))
        sys.stdout.flush()
