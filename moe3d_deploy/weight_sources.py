"""Where weights come from: a seed, or a file of any kind.

Every source hands out one tensor at a time; none checks its tensors against a model (`checkpoint` does).
"""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.model import MoE3D
from moe3d_deploy.seeded import GENERATOR_VERSION, seed_salt, seeded_tensor

VGGT_LICENCE = (
    "VGGT weights: Meta's VGGT licence (facebook/VGGT-1B is non-commercial, VGGT-1B-Commercial has its own terms)"
)
SEEDED_LICENCE = "seeded random weights, no licence"

TRACK_HEAD = "track_head."  # VGGT's point tracker: 394 tensors that no model here has


@dataclass(frozen=True, eq=False)
class WeightSource(ABC):
    """Named tensors and what is known about them.

    name      short, fit for a file name: "moe3d-1b"
    origin    where the weights come from, never an absolute path: "preset:moe3d-1b seed 0", "VGGT-1B",
              "preset:moe3d-tiny trained weights"
    licence   one line
    """

    config: ModelConfig
    name: str
    origin: str
    licence: str

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by state-dict key, in storage order, without VGGT's track head."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype; the caller may keep and change it."""

    @abstractmethod
    def sha256(self) -> str:
        """64 hex digits: of the file, of its shards, or of a text that determines every bit of generated weights."""


# Seeded cameras stay near the identity with a field of view near 1 rad. The generator alone, on which the golden files
# rest, may give a small model a negative field of view, so an infinite focal length.
_POSE_UPDATE = "camera_head.pose_branch.fc2.weight"
_POSE_UPDATE_SCALE = 0.1


@functools.lru_cache(maxsize=16)
def _model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MoE3D(config).state_dict().items()}


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, by state-dict key, in its order."""
    return dict(_model_shapes(config))


@dataclass(frozen=True, eq=False)
class SeededSource(WeightSource):
    """Generated weights for any config; `seeded_source` fills in the rest."""

    seed: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return model_shapes(self.config)

    def tensor(self, name: str) -> Tensor:
        tensor = torch.from_numpy(seeded_tensor(name, self.shapes()[name], self.seed))
        return tensor * _POSE_UPDATE_SCALE if name == _POSE_UPDATE else tensor

    def sha256(self) -> str:
        config = "" if _is_preset(self.name, self.config) else f" {self.config}"
        return sha256_text(f"preset {self.name}{config} seed {self.seed} generator v{GENERATOR_VERSION}")


def seeded_source(name: str, config: ModelConfig, seed: int = 0) -> SeededSource:
    """Seeded weights for `config`, called `name`. Raises InputError for a negative seed."""
    seed_salt(seed)
    kind = "preset" if _is_preset(name, config) else "seeded"
    return SeededSource(config, name, f"{kind}:{name} seed {seed}", SEEDED_LICENCE, seed)


def _is_preset(name: str, config: ModelConfig) -> bool:
    return PRESETS.get(name) == config


class TensorFile(Protocol):
    """Tensors by the names that a file gives them; `read` hands out one on the CPU, in memory of its own."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...

    def sha256(self) -> str: ...


@dataclass(frozen=True, eq=False)
class StoredSource(WeightSource):
    """Weights in a file. `prefix` is what the file's names have in front of the state-dict keys."""

    file: TensorFile
    prefix: str = ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return model_part(self.file.shapes(), self.prefix)

    def tensor(self, name: str) -> Tensor:
        return self.file.read(self.prefix + name)

    def sha256(self) -> str:
        return self.file.sha256()


def model_part(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """The entries of a file that are the model's, by state-dict key: without the prefix and VGGT's track head."""
    keys = ((name.removeprefix(prefix), shape) for name, shape in shapes.items())
    return {key: shape for key, shape in keys if not key.startswith(TRACK_HEAD)}


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
