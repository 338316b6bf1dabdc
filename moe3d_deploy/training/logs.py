"""The record of a run: train.jsonl, one JSON object a line, and TensorBoard's files where that is installed.

A run that goes on drops the lines of the steps that it takes again.
"""

import contextlib
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe3d_deploy.files import atomic_write

Values = Mapping[str, Any]


class RunLog:
    """Lines with a `kind` ("step", "validation", "note", "start", "end") and a `step`, flushed one by one."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open, for steps after `first_step`. Raises OSError."""
        path = folder / "train.jsonl"
        _keep_until(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard", first_step)

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def write(self, kind: str, step: int, values: Values) -> None:
        """One line; numbers and dicts of numbers also go to TensorBoard. What is not finite becomes null.

        Raises OSError, with the file's name, for a full disk.
        """
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **_finite(values)}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = error.filename or self._file.name
            raise
        if self._board is not None and kind in ("step", "validation"):
            for name, value in _scalars(values):
                self._board.add_scalar(f"{'train' if kind == 'step' else kind}/{name}", value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every line was flushed when it was written; one that failed was told then
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a train.jsonl; a last one that a kill has cut off does not count."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if kind is None or line.get("kind") == kind:
            lines.append(line)
    return lines


def _keep_until(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_log(path) if line.get("step", 0) <= step]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _board(folder: Path, first_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: Values, prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)):
            found += _scalars({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found
