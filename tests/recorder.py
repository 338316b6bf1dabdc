"""A CheckRun for tests of the GPU checks: it keeps what a check says."""

import json
from pathlib import Path
from typing import Any

from moe3d_deploy.benchmarks.checks import CheckRun


class Recorder(CheckRun):
    """Figures, failures and notes so far; figures as they come out of JSON."""

    def __init__(self, work: Path, bundle: Path | None = None) -> None:
        super().__init__(bundle, work, self._keep)
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []
        self.notes: list[str] = []

    def _keep(self, event: dict[str, Any]) -> None:
        self.figures.update(json.loads(json.dumps(event.get("figures", {}))))
        self.failures += [event["failure"]] if "failure" in event else []
        self.notes += [event["note"]] if "note" in event else []
