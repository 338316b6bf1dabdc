"""The folder of a comparison of depth heads: what is done, so that a killed run goes on with what is missing."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from moe3d_deploy import strict_json
from moe3d_deploy.benchmarks.heads.scores import Scores
from moe3d_deploy.benchmarks.heads.training import CURVES, LastStage, TrainedHead
from moe3d_deploy.benchmarks.heads.variants import Plan, Trial
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dError
from moe3d_deploy.files import atomic_write, exclusive_lock, remove_partials
from moe3d_deploy.training.scenes import GENERATOR_VERSION
from moe3d_deploy.training.state import part

FORMAT_VERSION = 2  # of the folder, and of how heads are trained: raise it when older heads must not be mixed in
VALIDATION = "validation"  # beside the held-out splits, a set of scenes that heads have figures on


class WorkFolder:
    """Heads (`<trial>.safetensors`) and their figures on a set of scenes (`<trial>.<set>.json`); every file appears
    whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, trial: Trial) -> bool:
        return self._weights(trial).exists()

    def save(self, trial: Trial, head: TrainedHead) -> None:
        weights = {f"head.{name}": tensor.contiguous() for name, tensor in head.stage.state_dict().items()}
        curves = {f"curve.{name}": tensor for name, tensor in head.curves.items()}
        atomic_write(self._weights(trial), safetensors.torch.save(weights | curves))

    def load(self, trial: Trial, channels: int) -> TrainedHead:
        """Raises CheckpointError for a file that is damaged or another head's."""
        path = self._weights(trial)
        stage = LastStage(channels, trial.variant)
        try:
            tensors = safetensors.torch.load(path.read_bytes())
            stage.load_state_dict(part(tensors, "head."))
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not a head of {trial.variant.name}; remove it to train that again"
            ) from error
        curves = part(tensors, "curve.")
        if not set(curves) <= set(CURVES) or "depth" not in curves:
            raise CheckpointError(f"{path}: holds no losses; remove it to train this head again")
        return TrainedHead(stage.requires_grad_(False), curves)

    def judged(self, trial: Trial, scenes: str) -> bool:
        return self._figures(trial, scenes).exists()

    def scores(self, trial: Trial, scenes: str) -> Scores:
        """The figures of a head that was judged on that set of scenes. Raises CheckpointError."""
        path = self._figures(trial, scenes)
        try:
            scores: Scores = strict_json.parse(path.read_bytes())
        except strict_json.JsonError as error:
            raise CheckpointError(f"{path}: {error}; remove it to judge this head again") from error
        return scores

    def save_scores(self, trial: Trial, scenes: str, scores: Scores) -> None:
        atomic_write(self._figures(trial, scenes), _json(scores))

    def _weights(self, trial: Trial) -> Path:
        return self.path / f"{trial}.safetensors"

    def _figures(self, trial: Trial, scenes: str) -> Path:
        return self.path / f"{trial}.{scenes}.json"


@contextmanager
def open_work(path: Path, plan: Plan, checkpoint_sha256: str) -> Iterator[WorkFolder]:
    """The folder at `path`, made where it is missing, held for the length of the block.

    Raises InputError for one of another plan or checkpoint and for one that holds something else, Moe3dError while
    another process works in it, OSError.
    """
    wanted = {
        "format": FORMAT_VERSION,
        "generator": GENERATOR_VERSION,
        "checkpoint": checkpoint_sha256,
        **dataclasses.asdict(plan),
    }
    file = path / "plan.json"
    if path.is_dir() and not file.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise InputError(f"{path} holds something else than a comparison of heads; choose another --workdir")
    path.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(path / ".lock", Moe3dError(f"{path}: another process works on this comparison; wait for it")):
        remove_partials(path)
        if file.exists():
            _require_equal(file, wanted)
        else:
            atomic_write(path / ".gitignore", b"*\n")
            atomic_write(file, _json(wanted))
        yield WorkFolder(path)


def _require_equal(file: Path, wanted: dict[str, Any]) -> None:
    try:
        found = strict_json.parse(file.read_bytes())
    except strict_json.JsonError as error:
        raise InputError(f"{file}: {error}; remove its folder or choose another --workdir") from error
    for name, value in wanted.items():
        stored = found.get(name) if isinstance(found, dict) else None
        if stored != value:
            shown = "" if name == "checkpoint" else f" ({strict_json.show(stored)}, not {strict_json.show(value)})"
            raise InputError(
                f"{file.parent} is of a comparison with another {name}{shown}; choose another --workdir, or remove it "
                "to start anew"
            )


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode("utf-8")
