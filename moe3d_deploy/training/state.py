"""The resumable state of a run: `state/step-00000100/` holds tensors.safetensors and state.json, never a pickle.

A state is a folder written beside its name, synced and renamed: whoever kills the process, it is there as a whole or
not at all. The newest two are kept.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from moe3d_deploy import strict_json
from moe3d_deploy.disk_errors import name_place
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.files import sha256_file, sync

FORMAT = 1
KEPT = 2
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"\.step-\d{8,}\.partial-[0-9a-f]{8}")
_TENSORS, _VALUES = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """After `step` steps: tensors by name, and everything else as JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_state(folder: Path, state: State) -> Path:
    """Write a state below `folder` and remove all but the newest two. Only for one who holds the run's lock.

    Raises OSError; then what was there stays, and nothing half-written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".{final.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        # As bytes, as the writer of files reports a full disk without an errno.
        (partial / _TENSORS).write_bytes(safetensors.torch.save(tensors))
        values = {
            "format": FORMAT,
            "step": state.step,
            "sha256": sha256_file(partial / _TENSORS),
            "values": state.values,
        }
        (partial / _VALUES).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        for path in (partial / _TENSORS, partial / _VALUES, partial):
            sync(path)
        if final.exists():  # of the same step, as a run that had ended was started again
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(folder)
    except OSError as error:
        name_place(error, final)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in states(folder)[:-KEPT]:
        _remove(old)
    return final


def states(folder: Path) -> list[Path]:
    """The states below a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(state: Path) -> int:
    """The step after which one of `states` was saved."""
    return int(state.name.removeprefix("step-"))


def remove_partial_states(folder: Path) -> None:
    """Clear what a killed writer left. Only for one who holds the run's lock."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def load_state(folder: Path) -> State | None:
    """The newest state below `folder`; None where there is none.

    Raises CheckpointError for one that is damaged or not this version's: it says which older one is left.
    """
    found = states(folder)
    if not found:
        return None
    try:
        return _read(found[-1])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        older = f"to go on from {found[-2].name}" if len(found) > 1 else "to start the run again"
        raise CheckpointError(f"{found[-1]}: damaged or foreign state ({what}); remove it {older}") from error


def _read(path: Path) -> State:
    header = strict_json.parse((path / _VALUES).read_bytes())
    if not isinstance(header, dict) or set(header) != {"format", "step", "sha256", "values"}:
        raise ValueError(f"{_VALUES} is none of a training run")
    if header["format"] != FORMAT:
        raise ValueError(f"format {strict_json.show(header['format'])}, this version reads {FORMAT}")
    match = _NAME.fullmatch(path.name)
    if match is None or header["step"] != int(match[1]) or not isinstance(header["values"], dict):
        raise ValueError(f"{_VALUES} is of another state")
    if header["sha256"] != sha256_file(path / _TENSORS):
        raise ValueError(f"{_TENSORS} is not as it was written")
    tensors = safetensors.torch.load((path / _TENSORS).read_bytes())
    return State(header["step"], tensors, header["values"])


def _remove(path: Path) -> None:
    """By a rename first, so that no part of it can be taken for a state."""
    hidden = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
