"""A small moe3d-tiny, and a checkpoint of it such as a training run leaves, to be shipped in a folder of the test's."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkpoints import LEAST, tensors, write_folder
from torch import Tensor

from moe3d_deploy import shipped_weights
from moe3d_deploy.benchmarks.ship_weights import ship
from moe3d_deploy.checkpoint import open_checkpoint, seeded_source
from moe3d_deploy.config import PRESETS


def small_preset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moe3d-tiny becomes a model of a moment, whose trained weights would lie in `folder`: as yet there are none."""
    monkeypatch.setitem(PRESETS, "moe3d-tiny", LEAST)
    monkeypatch.setattr(shipped_weights, "FOLDER", folder)


def trained_checkpoint(
    folder: Path, changed: Mapping[str, Tensor] | None = None, licence: str | None = "Apache-2.0"
) -> Path:
    """A checkpoint folder with other weights than any seed's that a test asks for, some of them replaced."""
    write_folder(folder, tensors(seeded_source("run", LEAST, 77)) | dict(changed or {}), None)
    notes = {"licence": licence} if licence else {}
    (folder / "config.json").write_text(json.dumps(LEAST.to_dict() | notes))
    return folder


def ship_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`small_preset`, with its trained weights in `folder` / "weights"."""
    small_preset(folder / "weights", monkeypatch)
    ship(open_checkpoint(trained_checkpoint(folder / "run" / "checkpoint")), {"note": "of a test"})
